//! Executes runs, several at once. A run depends on its identity alone, so the number of jobs
//! changes no result.

use super::Failure;
use super::progress::Progress;
use dfar::data::Dataset;
use dfar_baselines::SystemDevice;
use dfar_baselines::machine::Machine;
use dfar_baselines::results::{Identity, Provenance, RunResult};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// How runs are executed.
pub struct Jobs<'a, D> {
    /// The device of a run.
    pub device: &'a (dyn Fn() -> Result<Arc<D>, Failure> + Sync),
    /// The data set.
    pub data: &'a Dataset,
    /// Directory of the results.
    pub out: &'a Path,
    /// Runs at once.
    pub jobs: usize,
    /// Threads of each.
    pub threads: usize,
    /// Threads that pack batches for each.
    pub workers: usize,
}

impl<D: SystemDevice> Jobs<'_, D> {
    /// Executes all runs and files each result when it is finished. After a failure, no further run
    /// starts.
    pub fn execute(&self, runs: &[Identity], progress: &Progress) -> Result<(), Failure> {
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        let fail = |error: Failure| {
            next.store(runs.len(), Ordering::SeqCst);
            failure.lock().expect("no job panics while it stores its error").get_or_insert(error);
        };
        std::thread::scope(|scope| {
            for job in 0..self.jobs.min(runs.len()) {
                let (next, fail) = (&next, &fail);
                let started = dfar::threads::start(scope, move || {
                    self.work(job, runs, next, progress).unwrap_or_else(fail);
                });
                if let Err(error) = started {
                    fail(dfar::Error::Threads { reason: error.to_string() }.into());
                    break;
                }
            }
        });
        progress.clear();
        failure.into_inner().expect("all jobs have ended").map_or(Ok(()), Err)
    }

    fn work(
        &self,
        job: usize,
        runs: &[Identity],
        next: &AtomicUsize,
        progress: &Progress,
    ) -> Result<(), Failure> {
        let pool = dfar::threads::pool(self.threads).map_err(dfar::Error::from)?;
        while let Some(run) = runs.get(next.fetch_add(1, Ordering::SeqCst)) {
            progress.begin(job, run);
            let result = pool.install(|| self.one(job, run, progress))?;
            progress.end(job, run, &result);
        }
        Ok(())
    }

    /// One run. Its model is written before its result, with which the run is finished.
    fn one(&self, job: usize, run: &Identity, progress: &Progress) -> Result<RunResult, Failure> {
        let start = Instant::now();
        let device = (self.device)()?;
        let name = device.name();
        let mut observe = |epoch: &_| progress.epoch(job, run, epoch);
        let trained = run.run(device, self.data, self.workers, &mut observe)?;
        let provenance = Provenance {
            device: name,
            threads: rayon::current_num_threads(),
            jobs: self.jobs,
            seconds: start.elapsed().as_secs_f64(),
            machine: Machine::here(),
            commit: commit(),
            version: env!("CARGO_PKG_VERSION"),
        };
        let result = RunResult::new(run, &trained.fitted, &provenance);
        run.save_model(self.out, self.data, &trained)?;
        result.save(&run.path(self.out))?;
        Ok(result)
    }
}

/// The commit of the program: `DFAR_COMMIT` in the environment, or when it was built.
fn commit() -> Option<String> {
    std::env::var("DFAR_COMMIT").ok().or_else(|| option_env!("DFAR_COMMIT").map(str::to_owned))
}
