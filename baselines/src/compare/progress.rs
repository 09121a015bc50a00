//! Progress of the runs on stderr: a bar for each job and one for the plan on a terminal, else
//! lines.

use crate::cli::note;
use crate::output::Output;
use dfar_baselines::fit::Epoch;
use dfar_baselines::results::{Identity, Row, RunResult};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use std::sync::Mutex;
use std::time::Instant;

/// Reports the progress of a plan.
pub struct Progress {
    quiet: bool,
    bars: Option<Bars>,
    clock: Mutex<Clock>,
}

struct Bars {
    all: MultiProgress,
    plan: ProgressBar,
    jobs: Vec<ProgressBar>,
}

impl Progress {
    /// For `runs` on this many jobs. `known` are results of the past, for the time left.
    pub fn new(output: Output, jobs: usize, runs: &[Identity], known: &[RunResult]) -> Self {
        let bars = output.has_bars().then(|| Bars::new(jobs, runs.len()));
        let mut clock = Clock {
            left: runs.iter().map(|run| run.system).collect(),
            running: vec![None; jobs],
            seconds: known.iter().map(|result| (result.system, result.seconds)).collect(),
            total: runs.len(),
        };
        clock.seconds.retain(|(_, seconds)| seconds.is_finite());
        Self { quiet: output.quiet, bars, clock: Mutex::new(clock) }
    }

    /// A run begins on a job.
    pub fn begin(&self, job: usize, run: &Identity) {
        self.clock().running[job] = Some((run.system, Instant::now()));
        if let Some(bars) = &self.bars {
            bars.jobs[job].set_length(run.config.epochs as u64);
            bars.jobs[job].set_position(0);
            bars.jobs[job].set_message(name(run));
        }
    }

    /// An epoch of a run.
    pub fn epoch(&self, job: usize, run: &Identity, epoch: &Epoch) {
        let auc = epoch.valid_auc.map_or("-".to_owned(), |auc| format!("{auc:.4}"));
        let best = if epoch.best { " (best)" } else { "" };
        let seconds = epoch.train_seconds + epoch.valid_seconds;
        let text = format!("loss {:.4}, validation AUC {auc}{best}, {seconds:.1} s", epoch.loss);
        match &self.bars {
            None => self.line(&format!("{}, epoch {}: {text}", name(run), epoch.epoch)),
            Some(bars) => {
                bars.jobs[job].set_position(epoch.epoch as u64);
                bars.jobs[job].set_message(format!("{}: {text}", name(run)));
                bars.plan.set_message(self.clock().text());
            }
        }
    }

    /// A run ended.
    pub fn end(&self, job: usize, run: &Identity, result: &RunResult) {
        let text = {
            let mut clock = self.clock();
            clock.end(job, run.system, result.seconds);
            clock.text()
        };
        let auc = result.test.and_then(|test| test.values[0]);
        let auc = auc.map_or("-".to_owned(), |auc| format!("{auc:.4}"));
        self.line(&format!("{}: test AUC {auc}, {:.0} s; {text}", name(run), result.seconds));
        if let Some(bars) = &self.bars {
            bars.plan.inc(1);
            bars.plan.set_message(text);
        }
    }

    /// Prints a line.
    pub fn line(&self, text: &str) {
        let print = || note(text);
        match &self.bars {
            _ if self.quiet => {}
            Some(bars) => bars.all.suspend(print),
            None => print(),
        }
    }

    /// Removes the bars.
    pub fn clear(&self) {
        if let Some(bars) = &self.bars {
            // A terminal that has gone away cannot be cleared.
            let _ = bars.all.clear();
        }
    }

    fn clock(&self) -> std::sync::MutexGuard<'_, Clock> {
        self.clock.lock().expect("no thread panics while it holds the clock")
    }
}

impl Bars {
    fn new(jobs: usize, runs: usize) -> Self {
        let style = |template: &str| {
            ProgressStyle::with_template(template).expect("the template is well-formed").progress_chars("=> ")
        };
        let all = MultiProgress::new();
        let plan = ProgressBar::new(runs as u64).with_style(style("{bar:20} {pos}/{len} runs {msg}"));
        let job = |_| {
            let bar = ProgressBar::new(1).with_style(style("{bar:20} {pos}/{len} epochs {msg}"));
            all.add(bar)
        };
        let jobs = (0..jobs).map(job).collect();
        let plan = all.add(plan);
        plan.tick();
        Self { all, plan, jobs }
    }
}

/// The name of a run in messages.
pub fn name(run: &Identity) -> String {
    format!("{} ({}), seed {}", run.system.title(), run.setting(), run.config.seed)
}

/// What is left of a plan, and how long runs take.
struct Clock {
    /// Systems of the runs that have not ended.
    left: Vec<Row>,
    /// What each job computes, since when.
    running: Vec<Option<(Row, Instant)>>,
    /// Seconds of the finished runs.
    seconds: Vec<(Row, f64)>,
    total: usize,
}

impl Clock {
    fn end(&mut self, job: usize, system: Row, seconds: f64) {
        self.running[job] = None;
        if let Some(at) = self.left.iter().position(|row| *row == system) {
            self.left.swap_remove(at);
        }
        self.seconds.push((system, seconds));
    }

    /// Mean of the finished runs of a system, or of all.
    fn expected(&self, system: Row) -> Option<f64> {
        let mean = |seconds: Vec<f64>| {
            (!seconds.is_empty()).then(|| seconds.iter().sum::<f64>() / seconds.len() as f64)
        };
        let own = self.seconds.iter().filter(|(row, _)| *row == system).map(|(_, seconds)| *seconds);
        mean(own.collect()).or_else(|| mean(self.seconds.iter().map(|(_, seconds)| *seconds).collect()))
    }

    /// Seconds until the plan is done, if anything is known.
    fn seconds_left(&self) -> Option<f64> {
        let work: f64 = self.left.iter().map(|&row| self.expected(row)).sum::<Option<f64>>()?;
        let done = self.running.iter().flatten().map(|(row, since)| {
            let expected = self.expected(*row).unwrap_or(0.0);
            since.elapsed().as_secs_f64().min(expected)
        });
        Some((work - done.sum::<f64>()) / self.running.len() as f64)
    }

    fn text(&self) -> String {
        let done = self.total - self.left.len();
        let left = match (self.left.len(), self.seconds_left()) {
            (0, _) | (_, None) => String::new(),
            (_, Some(seconds)) => format!(", about {} left", duration(seconds)),
        };
        format!("{done} of {} runs done{left}", self.total)
    }
}

/// As `2 h 05 min`, `5 min` or `40 s`.
fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h {:02} min", seconds / 3600, seconds % 3600 / 60),
    }
}
