//! The training loop of DFAR, for every model: the batches of [`Drawer`], validation after each
//! epoch, early stopping, the test groups with the best epoch. A run depends on its configuration
//! alone, not on threads.

use crate::learner::Learner;
use crate::users::{UserFigures, user_figures};
use dfar::batch::ahead;
use dfar::data::{Dataset, Part};
use dfar::evaluate::{self, PartReport, ScoreOptions};
use dfar::model::{HostTensor, ModelError};
use dfar::train::draw::{Drawer, Plan};
use dfar::train::stopping::{ended, is_better};
use dfar::train::{Config, TrainError};
use serde::Serialize;
use std::ops::ControlFlow;
use std::time::Instant;

/// One epoch.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Epoch {
    /// From 1.
    pub epoch: usize,
    /// Mean over the rows.
    pub loss: f64,
    /// AUC of the liked validation events; none without any.
    pub valid_auc: Option<f64>,
    /// Whether it is the best so far.
    pub best: bool,
    /// Rows trained on.
    pub rows: usize,
    /// Seconds of training, with drawing and packing that the model waits for.
    pub train_seconds: f64,
    /// Seconds of validation.
    pub valid_seconds: f64,
}

/// A trained model's figures.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Fitted {
    /// Number of trainable values.
    pub parameters: usize,
    /// All epochs.
    pub epochs: Vec<Epoch>,
    /// The epoch of the figures below, from 1.
    pub best_epoch: usize,
    /// Liked test events; none without any.
    pub test: Option<PartReport>,
    /// Liked validation events; none without any.
    pub valid: Option<PartReport>,
    /// Liked test events by user; none without any.
    pub test_users: Option<UserFigures>,
}

/// Trains and tests a model. `observe` is told of each epoch.
///
/// # Errors
/// No training targets, a non-finite value, and failures of the device.
pub fn fit<L: Learner>(
    learner: &mut L,
    data: &Dataset,
    config: &Config,
    scoring: &ScoreOptions,
    observe: &mut dyn FnMut(&Epoch),
) -> Result<Fitted, TrainError> {
    let drawer = Drawer::new(data, config.draw());
    let edges = evaluate::length_edges(data, &config.length_edges);
    let report = |part, scores: &[f32]| evaluate::part_report(data, part, scores, config.gauc_compat, &edges);
    let mut epochs: Vec<Epoch> = Vec::new();
    let mut best: Option<Best> = None;
    let (mut stale, mut steps) = (0, 0);
    while !ended(config, epochs.len(), stale) {
        let plan = drawer.training_plan(epochs.len() as u64)?;
        let start = Instant::now();
        let (rows, loss) = train_epoch(learner, &drawer, &plan, (epochs.len(), steps), scoring.workers)?;
        steps += plan.size.batches as u64;
        let train_seconds = start.elapsed().as_secs_f64();
        let start = Instant::now();
        let valid = report(Part::Valid, &score(learner, data, Part::Valid, scoring)?);
        let valid_auc = valid.as_ref().map(|valid| valid.liked.auc);
        let is_best = is_better(valid_auc, best.as_ref().and_then(|best| best.valid_auc));
        let epoch = Epoch {
            epoch: epochs.len() + 1,
            loss,
            valid_auc,
            best: is_best,
            rows,
            train_seconds,
            valid_seconds: start.elapsed().as_secs_f64(),
        };
        stale = if is_best { 0 } else { stale + 1 };
        if is_best {
            best = Some(Best { epoch: epoch.epoch, valid_auc, valid, tensors: learner.tensors()? });
        }
        observe(&epoch);
        epochs.push(epoch);
    }
    let Best { epoch: best_epoch, valid, tensors, .. } = best.expect("a configuration has an epoch");
    learner.restore(&tensors)?;
    let scores = score(learner, data, Part::Test, scoring)?;
    let (test, test_users) = (report(Part::Test, &scores), user_figures(data, Part::Test, &scores));
    Ok(Fitted { parameters: learner.parameters(), epochs, best_epoch, test, valid, test_users })
}

struct Best {
    epoch: usize,
    valid_auc: Option<f64>,
    valid: Option<PartReport>,
    tensors: Vec<HostTensor>,
}

/// Trains on all batches of a plan, after `epoch` epochs of `steps` steps. Returns the number of rows
/// and their mean loss.
fn train_epoch<L: Learner>(
    learner: &mut L,
    drawer: &Drawer,
    plan: &Plan,
    (epoch, steps): (usize, u64),
    workers: usize,
) -> Result<(usize, f64), TrainError> {
    let (packer, samples) = (learner.packer(), learner.samples_items());
    let make = |batch: usize| {
        let histories = drawer.draw(plan, epoch as u64, batch);
        let negatives = match samples {
            true => drawer.event_negatives(plan, epoch as u64, batch, &histories),
            false => Vec::new(),
        };
        L::pack(&packer, &histories, &negatives)
    };
    ahead::ahead(0..plan.size.batches, workers, make, |made| {
        let (mut rows, mut sum) = (0, 0.0);
        for (batch, packed) in made.enumerate() {
            let (of_batch, loss) = learner.step(packed?).map_err(|error| match error {
                ModelError::NonFinite { tensor } => {
                    let step = steps + batch as u64 + 1;
                    TrainError::NonFinite { epoch: epoch + 1, batch: batch + 1, step, tensor }
                }
                other => other.into(),
            })?;
            rows += of_batch;
            sum += loss * of_batch as f64;
        }
        Ok((rows, sum / rows as f64))
    })
}

fn score<L: Learner>(
    learner: &L,
    data: &Dataset,
    part: Part,
    options: &ScoreOptions,
) -> Result<Vec<f32>, TrainError> {
    let packer = learner.packer();
    Ok(evaluate::score_histories(
        data,
        part,
        learner.max_length(),
        options,
        |histories| Ok(L::pack(&packer, histories, &[])?),
        |packed| Ok(learner.score(packed)?),
        &mut |_| ControlFlow::Continue(()),
    )?)
}
