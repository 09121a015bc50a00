//! The whole network on every device: shared work is exact, gradients match finite differences,
//! ablations run, steps are deterministic. `new` creates a device.
#![allow(dead_code, reason = "each test file uses its own part")]

use dfar::attention::Normalization;
use dfar::batch::without_sharing;
use dfar::batch::{Batch, Group, History};
use dfar::device::cpu::Cpu;
use dfar::device::{Clip, Device};
use dfar::model::{
    AdamOptions, HostTensor, Initialization, LossOptions, Model, ModelConfig, ModelError, Optimizer,
};
use dfar_tools::verify::network::{adam_amplifies, compare_after_adam};
use dfar_tools::verify::{compare, compare_gradients};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

const ITEMS: usize = 40;
const CANDIDATES: usize = 4;
pub const LOSS: LossOptions = LossOptions { bpr: 0.3, idl: 0.2, embed_l2: 1e-3 };
pub const ADAM: AdamOptions =
    AdamOptions { lr: 1e-2, clip: Some(Clip::PerTensor(2.0)), dense_embeddings: false };

pub fn config() -> ModelConfig {
    ModelConfig { width: 8, attention: [7, 4], tower: [6, 5], ..ModelConfig::new(ITEMS, 12) }
}

/// A model with values of order 1, so that no gradient is negligible.
pub fn model_of_order_one<D: Device>(device: Arc<D>, config: ModelConfig) -> Model<D> {
    let mut tensors = Model::initialized(device.clone(), config.clone(), 3, Initialization::Small)
        .unwrap()
        .tensors()
        .unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(17);
    for tensor in &mut tensors {
        let spread =
            if tensor.shape.len() == 2 { (3.0 / tensor.shape[0] as f32).sqrt().min(0.8) } else { 0.2 };
        tensor.values.iter_mut().for_each(|x| *x += rng.random_range(-spread..spread));
    }
    Model::from_tensors(device, config, &tensors).unwrap()
}

/// Histories of these lengths, each with several groups that share candidates.
pub fn histories(lengths: &[usize], seed: u64) -> Vec<History> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let draw = |n: usize, rng: &mut ChaCha8Rng| -> Vec<u32> {
        (0..n).map(|_| rng.random_range(0..ITEMS as u32)).collect()
    };
    let history = |&length: &usize| {
        let mut prefixes: Vec<u32> = (1..=length as u32).filter(|_| rng.random_bool(0.6)).collect();
        prefixes.push(length as u32);
        let pool = draw(6, &mut rng);
        let group = |length| {
            let candidates = (0..CANDIDATES).map(|_| pool[rng.random_range(0..pool.len())]).collect();
            let mut targets = vec![0.0; CANDIDATES];
            targets[0] = 1.0;
            Group { length, candidates, targets }
        };
        let groups = prefixes.into_iter().map(group).collect();
        History {
            items: draw(length, &mut rng),
            labels: (0..length).map(|_| rng.random_range(0..2)).collect(),
            groups,
        }
    };
    lengths.iter().map(history).collect()
}

/// `tolerance` is relative to the largest reference value. A tensor that cancels to zero may differ
/// by one rounding of `scale`, the largest value among similar tensors.
fn assert_close(name: &str, x: &[f32], reference: &[f32], tolerance: f32, scale: f32) {
    assert_eq!(x.len(), reference.len(), "{name}");
    // NaN, which `max` ignores, is an error.
    assert!(x.iter().chain(reference).all(|x| x.is_finite()), "{name}: {x:?}");
    let error = x.iter().zip(reference).fold(0f32, |m, (x, r)| m.max((x - r).abs()));
    assert!(error <= tolerance * largest(reference) + f32::EPSILON * scale, "{name}: error {error}");
}

fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0f32, |m, x| m.max(x.abs()))
}

fn variants() -> Vec<ModelConfig> {
    vec![
        config(),
        ModelConfig { normalization: Normalization::Masked, heads: 4, ..config() },
        ModelConfig { label_mask: false, ..config() },
        ModelConfig { fha: false, ..config() },
        ModelConfig { heads: 1, ..config() },
        ModelConfig { blocks: 2, ..config() },
        ModelConfig { half_life: Some(3.0), ..config() },
    ]
}

pub fn shared_prefixes_and_candidates_do_not_change_results<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let histories = histories(&[12, 1, 7, 3], 5);
    for config in variants() {
        let model = model_of_order_one(new(), config.clone());
        let short = Batch::pack(&histories).unwrap();
        let long = Batch::pack(&without_sharing(&histories)).unwrap();
        assert!(
            short.pairs() < short.rows() && short.tokens() * 4 < long.tokens(),
            "the shared batch should have fewer tokens"
        );
        assert_eq!(short.target, long.target);
        let logits = |batch| model.logits(batch).unwrap();
        for (f, (x, reference)) in logits(&short).iter().zip(&logits(&long)).enumerate() {
            assert_close(&format!("{config:?}: logits {f}"), x, reference, 1e-5, 0.0);
        }
        assert_eq!(model.score(&short).unwrap(), model.logits(&short).unwrap()[1]);
        let (loss, gradients) = model.gradients(&short, &LOSS).unwrap();
        let (long_loss, long_gradients) = model.gradients(&long, &LOSS).unwrap();
        assert!((loss.loss - long_loss.loss).abs() < 1e-6, "{loss:?} {long_loss:?}");
        let scale = gradients.iter().fold(0f32, |m, g| m.max(largest(&g.values)));
        for (x, reference) in gradients.iter().zip(&long_gradients) {
            assert_close(
                &format!("{config:?}: gradient of {}", x.name),
                &x.values,
                &reference.values,
                5e-5,
                scale,
            );
        }
        let apart = Batch::pack_without_pair_sharing(&histories).unwrap();
        assert_eq!(apart.pairs(), apart.rows());
        assert!((model.gradients(&apart, &LOSS).unwrap().0.loss - loss.loss).abs() < 1e-6);
    }
}

/// Every `stride`-th tensor of each variant, with a different first tensor per variant.
pub fn gradients_match_finite_differences<D: Device>(new: &dyn Fn() -> Arc<D>, stride: usize) {
    let batch = Batch::pack(&histories(&[9, 4], 6)).unwrap();
    for (variant, config) in variants().into_iter().enumerate() {
        let model = model_of_order_one(new(), config.clone());
        let tensors = model.tensors().unwrap();
        let (_, gradients) = model.gradients(&batch, &LOSS).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (t, gradient) in gradients.iter().enumerate().skip(variant % stride).step_by(stride) {
            // A mix of the gradient and a random direction, so that the derivative is not small by
            // chance.
            let norm = gradient.values.iter().map(|g| g * g).sum::<f32>().sqrt();
            let direction: Vec<f32> =
                gradient.values.iter().map(|g| g / norm.max(1e-9) + rng.random_range(-0.1..0.1)).collect();
            // Small, to avoid crossing a kink of ReLU. The golden cases test more precisely.
            let h = 2e-4f32;
            let loss = |sign: f32| {
                let mut tensors = tensors.clone();
                tensors[t].values.iter_mut().zip(&direction).for_each(|(x, d)| *x += sign * h * d);
                let model = Model::from_tensors(model.device().clone(), config.clone(), &tensors).unwrap();
                model.gradients(&batch, &LOSS).unwrap().0.loss
            };
            let numeric = (loss(1.0) - loss(-1.0)) / (2.0 * h as f64);
            let analytic: f64 =
                gradient.values.iter().zip(&direction).map(|(&g, &d)| g as f64 * d as f64).sum();
            let bound = 1e-2 * analytic.abs() + 2e-3;
            assert!(
                (numeric - analytic).abs() < bound,
                "{config:?}: {}: numeric {numeric}, analytic {analytic}",
                gradient.name
            );
        }
    }
}

/// Scores, gradients and steps of several models on one device, each by a thread of its own.
pub fn threads_may_share_a_device<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let device = new();
    let results = |device: &Arc<D>, batch: &Batch| {
        let mut model = model_of_order_one(device.clone(), config());
        let (loss, gradients) = model.gradients(batch, &LOSS).unwrap();
        let logits = model.logits(batch).unwrap();
        let mut optimizer = Optimizer::new(&model).unwrap();
        let step = model.train_step(batch, &LOSS, &ADAM, &mut optimizer).unwrap();
        (loss, gradients, logits, step, model.tensors().unwrap())
    };
    let lengths: [&[usize]; 3] = [&[9, 4], &[3, 12, 1], &[7]];
    let batches = lengths.map(|lengths| Batch::pack(&histories(lengths, 6)).unwrap());
    let expected = batches.each_ref().map(|batch| results(&device, batch));
    std::thread::scope(|scope| {
        for (batch, expected) in batches.iter().zip(&expected) {
            let device = device.clone();
            scope.spawn(move || {
                (0..4).for_each(|_| assert!(&results(&device, batch) == expected, "launches of others"));
            });
        }
    });
}

pub fn lazy_and_dense_adam_agree_while_every_row_is_touched<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let batch = Batch::pack(&histories(&[12, 10, 11], 7)).unwrap();
    let step = |dense_embeddings, batches: &[&Batch]| {
        let mut model = model_of_order_one(new(), config());
        let mut optimizer = Optimizer::new(&model).unwrap();
        for batch in batches {
            model
                .train_step(batch, &LOSS, &AdamOptions { dense_embeddings, ..ADAM }, &mut optimizer)
                .unwrap();
        }
        assert_eq!(optimizer.steps(), batches.len() as u64);
        model.tensors().unwrap()
    };
    assert_eq!(step(false, &[&batch]), step(true, &[&batch]));
    let other = Batch::pack(&histories(&[2], 8)).unwrap();
    assert_ne!(
        step(false, &[&batch, &other])[0],
        step(true, &[&batch, &other])[0],
        "dense Adam also moves rows outside the batch"
    );
}

/// A device in f32 sums the attention weights by feedback as the CPU does.
pub fn attention_by_feedback_matches_the_cpu<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let (found, cpu) = (head_pairs(new), head_pairs(&|| Arc::new(Cpu::new())));
    assert!(found.iter().zip(&cpu).all(|(found, cpu)| (found - cpu).abs() < 1e-5 * cpu), "{found:?} {cpu:?}");
}

/// Attention weight by feedback, with the label mask and without FHA: `[setting][from][to]`. The
/// softmax of each token adds up to 1 over the keys of both labels where no mask drops weights.
pub fn head_pairs<D: Device>(new: &dyn Fn() -> Arc<D>) -> Vec<f64> {
    let batch = Batch::pack(&histories(&[12, 3, 9, 12, 5, 8, 12, 1], 9)).unwrap();
    let liked = batch.label.iter().filter(|&&label| label == 1).count();
    let queries = [batch.label.len() - liked, liked];
    let mut found = Vec::new();
    for fha in [true, false] {
        let config = ModelConfig { fha, width: 32, attention: [80, 40], tower: [100, 64], ..config() };
        let (heads, blocks) = (config.heads, config.blocks);
        let sums = model_of_order_one(new(), config).head_pairs(&batch).unwrap();
        for query in [0, 1] {
            let weight = sums.weight[0][query] + sums.weight[1][query];
            let rows = (queries[query] * heads * blocks) as f64;
            if fha {
                assert!(weight > 0.0 && weight < rows, "{weight} of {rows}");
            } else {
                assert!((weight - rows).abs() < 1e-2 * rows, "{weight} of {rows}");
            }
        }
        found.extend(sums.weight.iter().flatten());
    }
    found
}

/// The losses and the parameters after three steps, which lower the loss.
pub fn three_steps<D: Device>(new: &dyn Fn() -> Arc<D>) -> (Vec<f64>, Vec<HostTensor>) {
    let batch = Batch::pack(&histories(&[12, 3, 9, 12, 5, 8, 12, 1], 9)).unwrap();
    let config = ModelConfig { width: 32, attention: [80, 40], tower: [100, 64], ..config() };
    let mut model = model_of_order_one(new(), config);
    let mut optimizer = Optimizer::new(&model).unwrap();
    let losses: Vec<f64> =
        (0..3).map(|_| model.train_step(&batch, &LOSS, &ADAM, &mut optimizer).unwrap().loss).collect();
    assert!(losses[2] < losses[0], "{losses:?}");
    (losses, model.tensors().unwrap())
}

/// A model in training.
struct Training<D: Device> {
    model: Model<D>,
    optimizer: Optimizer<D>,
}

/// The tensors of a checkpoint.
#[derive(PartialEq)]
struct State {
    parameters: Vec<HostTensor>,
    moments: Vec<HostTensor>,
    steps: u64,
}

impl<D: Device> Training<D> {
    fn new(device: Arc<D>, config: ModelConfig) -> Self {
        let model = model_of_order_one(device, config);
        Self { optimizer: Optimizer::new(&model).unwrap(), model }
    }

    fn at(state: &State, device: Arc<D>, config: ModelConfig) -> Self {
        let model = Model::from_tensors(device, config, &state.parameters).unwrap();
        Self { optimizer: Optimizer::from_tensors(&model, &state.moments, state.steps).unwrap(), model }
    }

    fn state(&self) -> State {
        let (parameters, moments) = (self.model.tensors().unwrap(), self.optimizer.tensors().unwrap());
        State { parameters, moments, steps: self.optimizer.steps() }
    }

    fn step(&mut self, batch: &Batch) -> f64 {
        self.model.train_step(batch, &LOSS, &ADAM, &mut self.optimizer).unwrap().loss
    }
}

/// Takes a step on two devices from the same state. The loss and the gradients (computed, and
/// accumulated in the first moments) agree within the tolerances of the golden cases. A parameter
/// differs by at most the effect of the difference of its gradient.
#[track_caller]
fn assert_step_agrees<A: Device, B: Device>(
    reference: &mut Training<A>,
    other: &mut Training<B>,
    batch: &Batch,
) {
    assert!(reference.state() == other.state(), "both steps should start from the same state");
    let (_, expected) = reference.model.gradients(batch, &LOSS).unwrap();
    let (_, gradients) = other.model.gradients(batch, &LOSS).unwrap();
    let expected = widened(&expected);
    let mut errors = compare_gradients(&pairs(&gradients, &expected));

    let (expected_loss, loss) = (reference.step(batch), other.step(batch));
    errors.push(compare("loss", &[loss as f32], &[expected_loss]));
    let (expected_state, state) = (reference.state(), other.state());
    let count = state.parameters.len();
    let moments = widened(&expected_state.moments);
    errors.extend(compare_gradients(&pairs(&state.moments[..count], &moments[..count])));

    let correction = 1.0 - 0.999f64.powf(state.steps as f64);
    let parameters = widened(&expected_state.parameters);
    for (t, (found, expected_value)) in state.parameters.iter().zip(&parameters).enumerate() {
        let of_adam = |i: usize| {
            let difference = (f64::from(gradients[t].values[i]) - expected[t][i]).abs();
            // An Adam update divides a mean of gradients by their root mean square: both carry the
            // difference.
            f64::from(ADAM.lr) * adam_amplifies(2.0 * difference, (moments[count + t][i] / correction).sqrt())
        };
        errors.push(compare_after_adam(&found.name, &found.values, expected_value, of_adam));
    }
    let failed: Vec<_> = errors.iter().filter(|e| !e.passes).collect();
    assert!(failed.is_empty(), "step {}: {failed:?}", state.steps);
}

fn widened(tensors: &[HostTensor]) -> Vec<Vec<f64>> {
    tensors.iter().map(|t| t.values.iter().map(|&x| x.into()).collect()).collect()
}

fn pairs<'a>(found: &'a [HostTensor], reference: &'a [Vec<f64>]) -> Vec<(&'a str, &'a [f32], &'a [f64])> {
    found.iter().zip(reference).map(|(t, r)| (&t.name[..], &t.values[..], &r[..])).collect()
}

/// Three steps, each on both devices from the state of the first.
pub fn steps_agree<A: Device, B: Device>(new: &dyn Fn() -> Arc<A>, other: &dyn Fn() -> Arc<B>) {
    let wide = ModelConfig { width: 32, attention: [80, 40], tower: [100, 64], ..config() };
    for (config, lengths) in [(config(), &[12, 3, 9][..]), (wide, &[12, 3, 9, 12, 5, 8, 12, 1])] {
        let batch = Batch::pack(&histories(lengths, 9)).unwrap();
        let mut reference = Training::new(new(), config.clone());
        for _ in 0..3 {
            let mut other = Training::at(&reference.state(), other(), config.clone());
            assert_step_agrees(&mut reference, &mut other, &batch);
        }
    }
}

/// Takes two steps on one device and a third on another, from the same bits. Returns the loss of
/// the third.
pub fn a_run_moves<A: Device, B: Device>(first: Arc<A>, second: Arc<B>) -> f64 {
    let batch = Batch::pack(&histories(&[12, 3, 9], 9)).unwrap();
    let mut training = Training::new(first, config());
    for _ in 0..2 {
        training.step(&batch);
    }
    let mut moved = Training::at(&training.state(), second, config());
    assert_step_agrees(&mut training, &mut moved, &batch);
    assert_eq!(moved.optimizer.steps(), 3);
    moved.model.gradients(&batch, &LOSS).unwrap().0.loss
}

pub fn steps_are_deterministic<D: Device>(new: &dyn Fn() -> Arc<D>) {
    assert!(three_steps(new) == three_steps(new));
}

pub fn a_non_finite_value_stops_the_step_and_is_named<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let batch = Batch::pack(&histories(&[6], 10)).unwrap();
    let mut tensors = model_of_order_one(new(), config()).tensors().unwrap();
    tensors.iter_mut().find(|t| t.name == "tower_negative.1.w").unwrap().values[0] = f32::NAN;
    let mut model = Model::from_tensors(new(), config(), &tensors).unwrap();
    let mut optimizer = Optimizer::new(&model).unwrap();
    let error = model.train_step(&batch, &LOSS, &ADAM, &mut optimizer).unwrap_err();
    assert!(matches!(&error, ModelError::NonFinite { tensor } if tensor == "loss.ibl"), "{error}");
    assert_eq!(optimizer.steps(), 0);
}

pub fn errors_name_the_index_beyond_the_model<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let device = new;
    let model = model_of_order_one(new(), config());
    let mut wrong = histories(&[5], 11);
    wrong[0].items[2] = ITEMS as u32;
    let error = model.score(&Batch::pack(&wrong).unwrap()).unwrap_err();
    assert!(matches!(error, ModelError::Batch { what: "item", found: ITEMS, limit: ITEMS }), "{error}");
    let error = model.score(&Batch::pack(&histories(&[13], 12)).unwrap()).unwrap_err();
    assert!(matches!(error, ModelError::Batch { what: "history position", found: 12, limit: 12 }), "{error}");

    for (bad, field) in [
        (ModelConfig { heads: 3, width: 9, ..config() }, "heads"),
        (ModelConfig { heads: 4, width: 10, ..config() }, "width"),
        (ModelConfig { attention: [0, 4], ..config() }, "attention"),
        (ModelConfig { blocks: 0, ..config() }, "blocks"),
    ] {
        let error = Model::initialized(device(), bad, 0, Initialization::Small).err().unwrap();
        assert!(matches!(error, ModelError::Config { field: f, .. } if f == field), "{error}");
    }

    let tensors = model.tensors().unwrap();
    let name_of = |tensors: &[HostTensor]| match Model::from_tensors(device(), config(), tensors) {
        Err(ModelError::Tensor { name, .. }) => name,
        other => panic!("{:?}", other.err()),
    };
    assert_eq!(name_of(&tensors[1..]), "item");
    let mut extra = tensors.clone();
    extra.push(HostTensor { name: "surplus".into(), shape: vec![1], values: vec![0.0] });
    assert_eq!(name_of(&extra), "surplus");
    let mut reshaped = tensors.clone();
    reshaped[3].shape.push(1);
    assert_eq!(name_of(&reshaped), reshaped[3].name);
}

pub fn histories_without_events_or_of_one_label_score_finitely<D: Device>(new: &dyn Fn() -> Arc<D>) {
    let group = |length| Group { length, candidates: vec![1, 2], targets: vec![1.0, 0.0] };
    let history = |labels: &[u8], groups: &[u32]| History {
        items: vec![3; labels.len()],
        labels: labels.to_vec(),
        groups: groups.iter().map(|&g| group(g)).collect(),
    };
    let all = [history(&[], &[0]), history(&[1, 1], &[0, 1, 2]), history(&[0], &[1]), history(&[0, 1], &[])];
    let model = model_of_order_one(new(), config());
    let batch = Batch::pack(&all).unwrap();
    assert!(model.score(&batch).unwrap().iter().all(|x| x.is_finite()));
    let (loss, gradients) = model.gradients(&batch, &LOSS).unwrap();
    assert!(loss.loss.is_finite() && gradients.iter().all(|g| g.values.iter().all(|x| x.is_finite())));
    let empty = Batch::pack(&[]).unwrap();
    assert_eq!(model.score(&empty).unwrap(), Vec::<f32>::new());
}
