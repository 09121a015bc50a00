//! Loss curves of two devices on the same batches, drawn as in `dfar-train` from a synthetic log.

use dfar::batch::Batch;
use dfar::data::Dataset;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::device::Device;
use dfar::model::{Model, ModelConfig, Optimizer};
use dfar::train::config::Config;
use dfar::train::draw::{Drawer, TrainTargets};
use std::sync::Arc;

/// Number of steps.
pub const STEPS: usize = 200;

/// Largest difference of two curves at any step, relative to the loss.
pub const TOLERANCE: f64 = 1e-3;

const ITEMS: usize = 40;

/// The configuration of the run.
pub fn config() -> Config {
    Config {
        max_length: 10,
        width: 16,
        heads: 4,
        train_targets: TrainTargets::Feedback,
        negatives: 4,
        negative_pool: 6,
        batch_tokens: 24,
        embed_l2: 1e-4,
        ..Config::default()
    }
}

/// The batches of a run, with short and long histories, both labels, and candidates shared by
/// groups.
pub fn batches() -> Vec<Batch> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.dfar");
    let options =
        SyntheticOptions { users: 60, items: ITEMS, events_per_user: 12.0, ..SyntheticOptions::default() };
    synthetic::write(&options, &path).expect("the log should be written");
    let data = Dataset::open(&path).expect("the log should be readable");
    let drawer = Drawer::new(&data, config().draw());
    let drawn = (0..).flat_map(|epoch| {
        let plan = drawer.plan(epoch);
        let draw = |batch| Batch::pack(&drawer.draw(&plan, epoch, batch)).expect("drawn histories are sound");
        (0..plan.size.batches).map(draw).collect::<Vec<_>>()
    });
    let batches: Vec<Batch> = drawn.take(STEPS).collect();
    let most = |what: &str, has: fn(&Batch) -> bool| {
        let count = batches.iter().filter(|batch| has(batch)).count();
        assert!(count > STEPS / 2, "only {count} batches have {what}");
    };
    most("a history of one event", |batch| batch.group_length.contains(&1));
    most("long histories", |batch| batch.group_length.iter().any(|&length| length >= 8));
    most("both labels", |batch| batch.split.iter().all(|split| !split.token.is_empty()));
    most("candidates that groups share", |batch| batch.pairs() < batch.rows());
    batches
}

/// The sizes of the model.
pub fn network() -> ModelConfig {
    ModelConfig { attention: [12, 7], tower: [20, 12], ..config().model(ITEMS) }
}

/// The loss of each step.
pub fn curve<D: Device>(device: Arc<D>, batches: &[Batch]) -> Vec<f64> {
    let config = config();
    let mut model =
        Model::initialized(device, network(), config.seed, config.init).expect("a model should be made");
    let mut optimizer = Optimizer::new(&model).expect("there is memory");
    let (loss, adam) = (config.loss(), config.adam());
    let step = |batch: &Batch| model.train_step(batch, &loss, &adam, &mut optimizer).expect("a step").loss;
    batches.iter().map(step).collect()
}

/// Asserts that the loss decreases and that the curves agree within [`TOLERANCE`] at each step.
#[track_caller]
pub fn assert_curves_agree(found: &[f64], reference: &[f64]) {
    assert_eq!((found.len(), reference.len()), (STEPS, STEPS));
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&reference[..20]), mean(&reference[STEPS - 20..]));
    assert!(last < 0.95 * first, "the loss only went from {first} to {last}");
    for (step, (found, reference)) in found.iter().zip(reference).enumerate() {
        let error = (found - reference).abs() / reference.abs();
        assert!(error <= TOLERANCE, "step {}: {found}, but {reference}: {error:.1e} apart", step + 1);
    }
}
