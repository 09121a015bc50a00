//! The training loop: epochs of drawn batches, validation, early stopping, checkpoints.

use super::TrainError;
use super::checkpoint::{
    Best, Checkpoint, CheckpointInfo, DataInfo, EpochRecord, EpochSums, ModelFile, ModelInfo, State, StepTime,
};
use super::config::Config;
use super::draw::{Drawer, Plan, PlanSize};
use super::file::FileError;
use super::log::Log;
use super::run::Run;
use super::stopping::{ended, is_better};
use super::tensorboard::EventFile;
use crate::batch::Batch;
use crate::batch::ahead;
use crate::data::{Dataset, Part};
use crate::device::Device;
use crate::evaluate::{self, ScoreOptions};
use crate::model::{Model, ModelError, Optimizer, PendingStep, SentBatch, StagedBatch, StepLoss, StepTimer};
use serde_json::json;
use std::collections::VecDeque;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Number of steps per `step` line of the log.
const LOG_EVERY: u64 = 20;

/// Progress of a run, reported to the caller.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event<'a> {
    /// An epoch begins, or continues after a resume.
    Epoch {
        /// Number of the epoch, from 1.
        epoch: usize,
        /// Largest number of epochs.
        epochs: usize,
        /// Size of the epoch.
        size: &'a PlanSize,
        /// Whether `sample_rate` drew no target, so that the epoch trains on a single one.
        topped_up: bool,
        /// Batches done before.
        done: usize,
    },
    /// A step was taken.
    Step {
        /// Batches done in this epoch.
        done: usize,
        /// Steps taken in the run.
        steps: u64,
        /// The step's loss.
        loss: &'a StepLoss,
        /// Sums over this epoch so far.
        sums: &'a EpochSums,
    },
    /// Groups of a part have been scored.
    Scored {
        /// The part.
        part: Part,
        /// Groups done.
        done: usize,
        /// Number of groups of the part.
        groups: usize,
    },
    /// An epoch was completed and validated.
    EpochEnd {
        /// Its results.
        record: &'a EpochRecord,
        /// Whether it is the best so far.
        best: bool,
    },
}

/// How a call to [`Fit::run`] ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Training is over: by early stopping, or at the last epoch.
    Finished,
    /// The caller stopped the run; the checkpoint is saved.
    Interrupted,
}

/// A run in progress.
pub struct Fit<'a, D: Device> {
    device: Arc<D>,
    data: &'a Dataset,
    config: Config,
    run: &'a Run,
    model: Model<D>,
    optimizer: Optimizer<D>,
    info: DataInfo,
    state: State,
    log: Log,
    session: Instant,
    saved: Instant,
}

/// A step in flight, and what its record needs.
struct InFlight<D: Device> {
    step: PendingStep<D>,
    rows: usize,
    timer: StepTimer<D>,
}

/// Divides the time of an epoch into steps, from the end of one to the end of the next.
struct Meter {
    since: Instant,
    waited: Duration,
    /// Since the last line of the log.
    lately: StepTime,
}

impl Meter {
    fn new() -> Self {
        Self { since: Instant::now(), waited: Duration::ZERO, lately: StepTime::default() }
    }

    /// The time of the step that ends now. `waited`: for all batches so far; `busy`: seconds of the
    /// device.
    fn step(&mut self, waited: Duration, busy: f64) -> StepTime {
        let now = Instant::now();
        let time = StepTime {
            seconds: (now - self.since).as_secs_f64(),
            input_wait: (waited - self.waited).as_secs_f64(),
            busy,
        };
        (self.since, self.waited) = (now, waited);
        self.lately += time;
        time
    }

    fn since_last_line(&mut self) -> StepTime {
        std::mem::take(&mut self.lately)
    }
}

/// Events for TensorBoard, if the configuration says so. `step` is the first step to come.
fn events(config: &Config, run: &Run, step: u64) -> Result<Option<EventFile>, FileError> {
    config.tensorboard.then(|| EventFile::begin(run.dir(), step)).transpose()
}

impl<'a, D: Device> Fit<'a, D> {
    /// Starts a run. Writes `config.toml` and a first checkpoint, so that it can be resumed at any
    /// time.
    pub fn start(
        device: Arc<D>,
        data: &'a Dataset,
        config: Config,
        run: &'a Run,
    ) -> Result<Self, TrainError> {
        let network = config.model(data.items());
        Model::check_room(&*device, &network, config.dense_embeddings)?;
        let model = Model::initialized(device.clone(), network, config.seed, config.init)?;
        let optimizer = Optimizer::new(&model)?;
        run.write_config(&config.to_toml())?;
        let log = Log::open(&run.log(), 0, events(&config, run, 1)?)?;
        let now = Instant::now();
        let (info, state) = (DataInfo::of(data), State::default());
        let mut fit =
            Self { device, data, config, run, model, optimizer, info, state, log, session: now, saved: now };
        fit.log.line(&json!({
            "event": "start", "version": env!("CARGO_PKG_VERSION"), "device": fit.device.name(),
            "parameters": fit.model.parameters(), "data": fit.info,
        }))?;
        fit.save()?;
        Ok(fit)
    }

    /// Continues a run from its checkpoint, with `config` in place of the checkpoint's. (The caller
    /// checks which keys may differ.)
    pub fn resume(
        device: Arc<D>,
        data: &'a Dataset,
        config: Config,
        run: &'a Run,
        checkpoint: Checkpoint,
    ) -> Result<Self, TrainError> {
        let CheckpointInfo { model: network, data: expected, mut state, .. } = checkpoint.info;
        let info = DataInfo::of(data);
        check_data(data, &expected, &info)?;
        Model::check_room(&*device, &network, config.dense_embeddings)?;
        let model = Model::from_tensors(device.clone(), network, &checkpoint.parameters)?;
        let optimizer = Optimizer::from_tensors(&model, &checkpoint.moments, state.steps)?;
        if config.epochs < state.epoch {
            let reason = format!("{} epochs are done; give at least as many", state.epoch);
            return Err(TrainError::Usage { argument: "--epochs", reason });
        }
        if let Some(crc32) = state.best.as_ref().map(|best| best.crc32) {
            let newer = ModelFile::load(&run.model())?;
            if newer.crc32 != crc32 {
                // The model of the epoch that is repeated next: its checkpoint was not written.
                let of = &newer.info;
                let (epoch, valid_auc) = (of.epoch, of.valid_auc);
                let same_run = of.model == *model.config() && of.feedback == config.feedback;
                if !same_run || epoch != state.epoch + 1 || check_data(data, &of.data, &info).is_err() {
                    return Err(TrainError::OtherModel { path: run.model() });
                }
                if ended(&config, state.epoch, state.stale) {
                    let reason = format!(
                        "{} is of epoch {epoch}, after the last one of this run: give the --epochs or \
                         --patience of the command that was interrupted",
                        run.model().display()
                    );
                    return Err(TrainError::Usage { argument: "--resume", reason });
                }
                state.best = Some(Best { epoch, valid_auc, crc32: newer.crc32 });
            }
        }
        run.write_config(&config.to_toml())?;
        let mut log = Log::open(&run.log(), state.log_bytes, events(&config, run, state.steps + 1)?)?;
        log.line(&json!({ "event": "resume", "epoch": state.epoch + 1, "batch": state.batch }))?;
        let now = Instant::now();
        let fit =
            Self { device, data, config, run, model, optimizer, info, state, log, session: now, saved: now };
        if !fit.ended() {
            // The run had ended and now continues, so its metrics are out of date.
            run.remove_metrics()?;
        }
        Ok(fit)
    }

    /// Progress of the run.
    pub fn state(&self) -> &State {
        &self.state
    }
    /// Identity of the data.
    pub fn data_info(&self) -> &DataInfo {
        &self.info
    }
    /// The model after the last step, not the best model.
    pub fn model(&self) -> &Model<D> {
        &self.model
    }

    /// Trains to the end. `observe` receives every event and stops the run by returning
    /// [`ControlFlow::Break`].
    pub fn run(
        &mut self,
        observe: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Outcome, TrainError> {
        let (before, done) = (self.state.seconds, self.state.epoch);
        self.session = Instant::now();
        let result = self.epochs(before, observe);
        self.state.seconds = before + self.session.elapsed().as_secs_f64();
        match result {
            // Every epoch saves. Without one, the configuration may still be new.
            Ok(Outcome::Finished) if self.state.epoch == done => self.save()?,
            Ok(Outcome::Finished) => {}
            // The last checkpoint is the last good state; later state is discarded.
            Err(_) => {}
            // Already saved.
            Ok(Outcome::Interrupted) => {}
        }
        result
    }

    fn epochs(
        &mut self,
        before: f64,
        observe: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Outcome, TrainError> {
        let drawer = Drawer::new(self.data, self.config.draw());
        while !self.ended() {
            let plan = drawer.training_plan(self.state.epoch as u64)?;
            let (epoch, epochs, done) = (self.state.epoch + 1, self.config.epochs, self.state.batch);
            let mut stop =
                observe(Event::Epoch { epoch, epochs, size: &plan.size, topped_up: plan.topped_up, done });
            if stop.is_continue() {
                stop = self.steps(&drawer, &plan, before, observe)?;
            }
            let mut scores = None;
            if stop.is_continue() {
                let start = Instant::now();
                match self.score(Part::Valid, observe) {
                    Ok(found) => scores = Some((found, start.elapsed())),
                    Err(TrainError::Evaluate(evaluate::EvaluateError::Interrupted)) => {}
                    Err(error) => return Err(error),
                }
            }
            let Some((scores, elapsed)) = scores else {
                self.state.seconds = before + self.session.elapsed().as_secs_f64();
                self.save()?;
                return Ok(Outcome::Interrupted);
            };
            let (record, best) = self.end_epoch(&scores, elapsed, &plan)?;
            self.state.seconds = before + self.session.elapsed().as_secs_f64();
            self.save()?;
            if observe(Event::EpochEnd { record: &record, best }).is_break() && !self.ended() {
                return Ok(Outcome::Interrupted);
            }
        }
        Ok(Outcome::Finished)
    }

    /// Whether no epoch is left.
    /// Whether no epoch is left.
    pub fn ended(&self) -> bool {
        ended(&self.config, self.state.epoch, self.state.stale)
    }

    /// Runs the remaining batches of an epoch; `Break` if the caller stopped the run.
    ///
    /// On a device that keeps several steps in flight, later steps are launched before the losses of
    /// a step are read. All steps are finished before a checkpoint and before the return.
    fn steps(
        &mut self,
        drawer: &Drawer<'_>,
        plan: &Plan,
        before: f64,
        observe: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, TrainError> {
        let (epoch, first) = (self.state.epoch, self.state.batch);
        let stager = self.model.stager();
        // Workers draw, pack and stage batches while the device works on earlier ones.
        let make = |batch| -> Result<StagedBatch<D>, TrainError> {
            Ok(stager.stage(&Batch::pack(&drawer.draw(plan, epoch as u64, batch))?)?)
        };
        let workers = self.config.workers_for(&*self.device);
        ahead::ahead(first..plan.size.batches, workers, make, |batches| {
            let mut meter = Meter::new();
            let mut in_flight = VecDeque::new();
            // A batch sent ahead, or the error of making it. The error is returned in the batch's
            // turn, after all earlier steps are finished and counted.
            let mut sent = None;
            loop {
                let next = sent.take().or_else(|| Some(send(&self.model, batches.next()?)));
                let Some(Ok(batch)) = next else {
                    let end = self.finish(&mut in_flight, 0, &mut meter, batches.waited(), observe)?;
                    return match next {
                        Some(Err(error)) if end.is_continue() => Err(error),
                        _ => Ok(end),
                    };
                };
                in_flight.push_back(self.begin(batch)?);
                // Does not wait for the next batch, which would delay the losses and an
                // interruption.
                sent = batches.next_if_ready().map(|batch| send(&self.model, batch));
                let is_due = self.saved.elapsed() >= Duration::from_secs(self.config.checkpoint_seconds);
                let later = if is_due { 0 } else { self.device.steps_in_flight() - 1 };
                let told = self.finish(&mut in_flight, later, &mut meter, batches.waited(), observe)?;
                if told.is_break() {
                    return self
                        .finish(&mut in_flight, 0, &mut meter, batches.waited(), observe)
                        .and(Ok(told));
                }
                if is_due {
                    self.state.seconds = before + self.session.elapsed().as_secs_f64();
                    self.save()?;
                }
            }
        })
    }

    /// Launches a step.
    fn begin(&mut self, batch: SentBatch<D>) -> Result<InFlight<D>, TrainError> {
        let (loss, adam) = (self.config.loss(), self.config.adam());
        let (rows, mut timer) = (batch.rows(), StepTimer::new(self.device.clone()));
        let step = self.model.begin_step(batch, &loss, &adam, &mut self.optimizer, &mut timer)?;
        Ok(InFlight { step, rows, timer })
    }

    /// Finishes the oldest steps, up to `later` that stay in flight. Counts, logs and reports each;
    /// `Break` if the caller stopped the run.
    fn finish(
        &mut self,
        in_flight: &mut VecDeque<InFlight<D>>,
        later: usize,
        meter: &mut Meter,
        waited: Duration,
        observe: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>, TrainError> {
        let mut told = ControlFlow::Continue(());
        while in_flight.len() > later {
            let Some(InFlight { step, rows, mut timer }) = in_flight.pop_front() else { break };
            let loss = step.finish(&mut self.optimizer).map_err(|error| match error {
                ModelError::NonFinite { tensor } => TrainError::NonFinite {
                    epoch: self.state.epoch + 1,
                    batch: self.state.batch + 1,
                    step: self.state.steps + 1,
                    tensor,
                },
                other => other.into(),
            })?;
            let time = meter.step(waited, timer.take()?);
            self.state.sums.add(rows, &loss, time);
            self.state.batch += 1;
            self.state.steps += 1;
            if self.state.steps.is_multiple_of(LOG_EVERY) {
                let lately = meter.since_last_line();
                self.log.line(&json!({
                    "event": "step", "epoch": self.state.epoch + 1, "batch": self.state.batch,
                    "step": self.state.steps, "loss": loss, "rows": rows, "seconds": time.seconds,
                    "input_wait": lately.input_wait, "utilization": lately.utilization(),
                }))?;
            }
            let event = Event::Step {
                done: self.state.batch,
                steps: self.state.steps,
                loss: &loss,
                sums: &self.state.sums,
            };
            if observe(event).is_break() {
                told = ControlFlow::Break(());
            }
        }
        Ok(told)
    }

    fn score(
        &self,
        part: Part,
        observe: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<f32>, TrainError> {
        let groups = self.data.groups(part).len();
        let options = score_options(&self.config, &*self.device);
        Ok(evaluate::score_part(&self.model, self.data, part, &options, &mut |done| {
            observe(Event::Scored { part, done, groups })
        })?)
    }

    /// Records the epoch, and saves its model if it is the best.
    fn end_epoch(
        &mut self,
        valid_scores: &[f32],
        valid_time: Duration,
        plan: &Plan,
    ) -> Result<(EpochRecord, bool), TrainError> {
        let valid = evaluate::part_report(self.data, Part::Valid, valid_scores, self.config.gauc_compat, &[]);
        let sums = std::mem::take(&mut self.state.sums);
        let mean = |sum: f64| sum / sums.rows as f64;
        let record = EpochRecord {
            epoch: self.state.epoch + 1,
            loss: mean(sums.loss),
            bce: mean(sums.bce),
            ibl: mean(sums.ibl),
            idl: mean(sums.idl),
            valid_auc: valid.as_ref().map(|v| v.liked.auc),
            valid_gauc: valid.as_ref().and_then(|v| v.liked.gauc),
            instances_per_second: sums.rows as f64 / sums.time.seconds,
            train_seconds: sums.time.seconds,
            input_wait: Some(sums.time.input_wait),
            utilization: Some(sums.time.utilization()),
            valid_seconds: valid_time.as_secs_f64(),
            size: plan.size,
        };
        let best = match &self.state.best {
            // The process was killed between writing this epoch's model and its checkpoint, and the
            // earlier best model is gone.
            Some(Best { epoch, .. }) if *epoch == record.epoch => true,
            best => is_better(record.valid_auc, best.as_ref().and_then(|best| best.valid_auc)),
        };
        if best {
            let parameters = self.finite_parameters()?;
            let info = ModelInfo {
                model: self.model.config().clone(),
                feedback: self.config.feedback,
                data: self.info.clone(),
                epoch: record.epoch,
                valid_auc: record.valid_auc,
            };
            let crc32 = ModelFile::save(&self.run.model(), &info, parameters, self.data)?;
            self.state.best = Some(Best { epoch: record.epoch, valid_auc: record.valid_auc, crc32 });
            self.state.stale = 0;
        } else {
            self.state.stale += 1;
        }
        self.state.epoch += 1;
        self.state.batch = 0;
        self.state.records.push(record.clone());
        let mut line = serde_json::to_value(&record).expect("a record is plain numbers");
        line["event"] = "epoch".into();
        line["step"] = self.state.steps.into();
        line["best"] = best.into();
        self.log.line(&line)?;
        Ok((record, best))
    }

    /// The parameters; an error if one is non-finite, because a saved model must be usable.
    fn finite_parameters(&self) -> Result<Vec<crate::model::HostTensor>, TrainError> {
        let parameters = self.model.tensors()?;
        match parameters.iter().find(|t| t.values.iter().any(|v| !v.is_finite())) {
            None => Ok(parameters),
            Some(tensor) => Err(TrainError::NonFinite {
                epoch: self.state.epoch + 1,
                batch: self.state.batch,
                step: self.state.steps,
                tensor: tensor.name.clone(),
            }),
        }
    }

    /// Writes the checkpoint.
    fn save(&mut self) -> Result<(), TrainError> {
        let parameters = self.finite_parameters()?;
        self.state.log_bytes = self.log.sync()?;
        let info = CheckpointInfo {
            config: self.config.clone(),
            model: self.model.config().clone(),
            data: self.info.clone(),
            state: self.state.clone(),
        };
        let moments = self.optimizer.tensors()?;
        Checkpoint { info, parameters, moments }.save(&self.run.checkpoint())?;
        self.saved = Instant::now();
        Ok(())
    }
}

/// Sends a batch, unless making it failed.
fn send<D: Device>(
    model: &Model<D>,
    batch: Result<StagedBatch<D>, TrainError>,
) -> Result<SentBatch<D>, TrainError> {
    Ok(model.send(batch?)?)
}

/// The options for scoring a run's model.
pub fn score_options(config: &Config, device: &impl Device) -> ScoreOptions {
    ScoreOptions {
        feedback: config.feedback,
        batch_tokens: config.batch_tokens.max(4096),
        batch_rows: config.batch_rows.max(4096),
        workers: config.workers_for(device),
    }
}

/// Checks that a data set is the one of a run or a model.
pub fn check_data(data: &Dataset, expected: &DataInfo, found: &DataInfo) -> Result<(), TrainError> {
    let path = data.path().to_owned();
    if expected.vocabulary != found.vocabulary || expected.items != found.items {
        return Err(TrainError::OtherData { path, what: "its items" });
    }
    if expected.content != found.content {
        return Err(TrainError::OtherData { path, what: "its events" });
    }
    if expected.protocol.candidates != found.protocol.candidates {
        return Err(TrainError::OtherData { path, what: "its evaluation candidates" });
    }
    Ok(())
}
