//! What every system promises about its encoder: no future, exact sharing, the same bits on any
//! number of threads. The systems run at widths that are not whole vectors.

use dfar::batch::{Group, History, without_sharing};
use dfar::device::Clip;
use dfar::device::cpu::Cpu;
use dfar::model::{AdamOptions, HostTensor, Initialization};
use dfar_baselines::loss::Ranking;
use dfar_baselines::{Kind, LossOptions, Model, Optimizer, Settings};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::sync::Arc;

const ITEMS: usize = 30;

fn settings() -> Settings {
    Settings {
        items: ITEMS,
        max_length: 12,
        width: 20,
        attention: [7, 5],
        tower: [9, 6],
        horizontal: 6,
        vertical: 3,
        vertical_length: 5,
        ..Settings::default()
    }
}

fn model(kind: Kind) -> Model {
    initialized(kind, settings())
}

fn initialized(kind: Kind, settings: Settings) -> Model {
    let device = Arc::new(Cpu::new());
    Model::initialized(device, kind, settings, 7, Initialization::Scaled).expect("the settings are valid")
}

/// Histories with empty, equal and full prefixes, each with `candidates` candidates.
fn histories(candidates: usize) -> Vec<History> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut items = |count| (0..count).map(|_| rng.random_range(0..ITEMS as u32)).collect::<Vec<_>>();
    let prefixes: [&[u32]; 5] = [&[0, 1, 4, 4, 12], &[7], &[0], &[2, 3, 9], &[1, 1]];
    let history = |lengths: &[u32]| {
        let group = |&length: &u32| Group {
            length,
            candidates: items(candidates),
            targets: (0..candidates).map(|c| if c == 0 { 1.0 } else { 0.0 }).collect(),
        };
        let groups: Vec<Group> = lengths.iter().map(group).collect();
        let items = items(*lengths.last().expect("a history has groups") as usize);
        History { labels: items.iter().map(|x| (x % 2) as u8).collect(), items, groups }
    };
    prefixes.into_iter().map(history).collect()
}

/// An item for each event, if the system has a use for it.
fn negatives(kind: Kind, histories: &[History]) -> Vec<u32> {
    let sampled = |h: &History| h.items.iter().map(|x| (x + 11) % ITEMS as u32).collect::<Vec<_>>();
    match kind.samples_items() {
        true => histories.iter().flat_map(sampled).collect(),
        false => vec![],
    }
}

fn gradients(
    kind: Kind,
    histories: &[History],
    negatives: &[u32],
    options: &LossOptions,
) -> (f64, Vec<HostTensor>) {
    let model = model(kind);
    let x = model.inputs(histories, negatives).expect("the histories fit");
    let (loss, gradients) = model.gradients(&x, options).expect("a step");
    (loss.loss, gradients)
}

#[test]
fn later_events_change_no_earlier_prefix() {
    for kind in Kind::ALL {
        let model = model(kind);
        let before = histories(3);
        let score = |histories: &[History]| {
            model.score(&model.inputs(histories, &[]).expect("the histories fit")).expect("scores")
        };
        let expected = score(&before);
        for t in 0..12 {
            let mut after = before.clone();
            for history in &mut after {
                for (item, label) in history.items.iter_mut().zip(&mut history.labels).skip(t) {
                    (*item, *label) = ((*item + 13) % ITEMS as u32, 1 - *label);
                }
            }
            let found = score(&after);
            let lengths = before.iter().flat_map(|h| &h.groups).flat_map(|g| [g.length as usize; 3]);
            let mut changed = 0;
            for (row, length) in lengths.enumerate() {
                if length <= t {
                    assert_eq!(found[row], expected[row], "{kind:?}, event {t}, row {row}");
                } else {
                    changed += usize::from(found[row] != expected[row]);
                }
            }
            assert!(changed > 0, "{kind:?} does not read event {t}");
        }
    }
}

#[test]
fn a_pass_for_each_prefix_and_candidate_has_the_same_gradients() {
    for kind in Kind::ALL {
        // DIEN counts its auxiliary loss once for each pass: it is left out.
        let auxiliary = if kind.samples_items() { 0.0 } else { 0.3 };
        let options = LossOptions { ranking: Ranking::Bce, embed_l2: 1e-2, auxiliary };
        let shared = histories(4);
        let mut alone = without_sharing(&shared);
        let (loss, expected) = gradients(kind, &shared, &[], &options);
        let (loss_alone, found) = gradients(kind, &alone, &[], &options);
        assert!((loss - loss_alone).abs() < 1e-6 * loss.abs(), "{kind:?}: {loss} and {loss_alone}");
        compare(kind, &found, &expected);
        // One event more in one of the passes is noticed.
        alone[0].items.push(3);
        alone[0].labels.push(1);
        alone[0].groups[0].length += 1;
        let (loss_longer, _) = gradients(kind, &alone, &[], &options);
        assert!((loss - loss_longer).abs() > 1e-6 * loss.abs(), "{kind:?}");
    }
}

fn compare(kind: Kind, found: &[HostTensor], expected: &[HostTensor]) {
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let scale = expected.values.iter().fold(1e-4f32, |max, x| max.max(x.abs()));
        for (x, y) in found.values.iter().zip(&expected.values) {
            assert!((x - y).abs() <= 5e-5 * scale, "{kind:?}, {}: {x} and {y}", found.name);
        }
    }
}

#[test]
fn gradients_are_bitwise_equal_for_any_number_of_threads() {
    let options = LossOptions { ranking: Ranking::Bce, embed_l2: 1e-3, auxiliary: 0.5 };
    // More sequences than a task of any operation has.
    let histories: Vec<History> = (0..20).flat_map(|_| histories(10)).collect();
    for kind in Kind::ALL {
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| gradients(kind, &histories, &negatives(kind, &histories), &options))
        };
        let ((loss, expected), (found_loss, found)) = (run(1), run(3));
        assert_eq!(loss, found_loss, "{kind:?}");
        for (x, y) in found.iter().zip(&expected) {
            assert!(x.values == y.values, "{kind:?}: {}", x.name);
        }
    }
}

#[test]
fn talking_heads_that_do_not_mix_are_sasrec() {
    let (sasrec, tha4rec) = (model(Kind::Sasrec), model(Kind::Tha4rec));
    let mut tensors = sasrec.tensors().expect("parameters");
    tensors.extend(tha4rec.tensors().expect("parameters").into_iter().filter(|t| t.name.contains(".mix_")));
    let tha4rec =
        Model::from_tensors(Arc::new(Cpu::new()), Kind::Tha4rec, sasrec.settings().clone(), &tensors)
            .expect("the same names");
    let options = LossOptions { ranking: Ranking::Bce, embed_l2: 1e-2, auxiliary: 0.0 };
    let gradients = |model: &Model| {
        let x = model.inputs(&histories(3), &[]).expect("the histories fit");
        model.gradients(&x, &options).expect("a step")
    };
    let ((loss, of_sasrec), (same, of_tha4rec)) = (gradients(&sasrec), gradients(&tha4rec));
    assert!((loss.loss - same.loss).abs() < 1e-6 * loss.loss);
    for own in &of_sasrec {
        let other = of_tha4rec.iter().find(|t| t.name == own.name).expect("the same names");
        let largest = own.values.iter().fold(1e-3f32, |m, x| m.max(x.abs()));
        for (a, b) in own.values.iter().zip(&other.values) {
            assert!((a - b).abs() <= 2e-5 * largest, "{}: {a}, {b}", own.name);
        }
    }
    assert!(of_tha4rec.iter().any(|t| t.name == "encoder.mix_weights" && t.values.iter().any(|x| *x != 0.0)));
}

#[test]
fn a_batch_beyond_the_tables_is_refused() {
    let model = model(Kind::Sasrec);
    let history = |items: Vec<u32>, candidates: Vec<u32>| History {
        labels: vec![1; items.len()],
        groups: vec![Group { length: items.len() as u32, targets: vec![1.0; candidates.len()], candidates }],
        items,
    };
    let too_long = history(vec![1; 13], vec![2]);
    for bad in [history(vec![ITEMS as u32], vec![1]), history(vec![1], vec![ITEMS as u32]), too_long] {
        assert!(model.inputs(&[bad], &[]).is_err());
    }
}

/// The reference cases have one block.
#[test]
fn every_gradient_of_two_blocks_is_the_slope_of_the_loss() {
    let options = LossOptions { ranking: Ranking::Bce, embed_l2: 1e-3, auxiliary: 0.5 };
    let settings = Settings { blocks: 2, ..settings() };
    let histories = histories(3);
    for kind in [Kind::Sasrec, Kind::Tha4rec, Kind::Dfn, Kind::Feedrec] {
        let start = initialized(kind, settings.clone());
        let loss_and_gradients = |model: &Model| {
            let x = model.inputs(&histories, &[]).expect("the histories fit");
            model.gradients(&x, &options).expect("a step")
        };
        let (_, gradients) = loss_and_gradients(&start);
        let mut checked = 0;
        for (i, gradient) in gradients.iter().enumerate() {
            let norm = gradient.values.iter().map(|&d| f64::from(d).powi(2)).sum::<f64>().sqrt();
            // A smaller slope drowns in the rounding of f32: that of a bias of the keys is 0.
            if norm < 5e-3 {
                continue;
            }
            // Small enough that hardly any ReLU bends within it.
            let step = 2e-4;
            let moved = |by: f64| {
                let mut tensors = start.tensors().expect("tensors");
                for (x, &d) in tensors[i].values.iter_mut().zip(&gradient.values) {
                    *x += (by * f64::from(d) / norm) as f32;
                }
                let device = Arc::new(Cpu::new());
                let model = Model::from_tensors(device, kind, settings.clone(), &tensors).expect("a model");
                loss_and_gradients(&model).0.loss
            };
            let slope = (moved(step) - moved(-step)) / (2.0 * step);
            assert!((slope - norm).abs() < 0.01 * norm, "{kind:?}, {}: {slope}, {norm}", gradient.name);
            checked += 1;
        }
        assert!(checked > gradients.len() / 2, "{kind:?}: {checked} of {}", gradients.len());
    }
}

/// Two steps on one batch, for the values whose gradient is well above rounding.
#[test]
fn every_parameter_takes_the_steps_of_adam() {
    let options = LossOptions { ranking: Ranking::Bce, embed_l2: 1e-3, auxiliary: 0.5 };
    let (lr, norm) = (0.01, 0.05);
    let adam =
        AdamOptions { lr: lr as f32, clip: Some(Clip::PerTensor(norm as f32)), dense_embeddings: false };
    for kind in Kind::ALL {
        let mut model = model(kind);
        let histories = histories(3);
        let x = model.inputs(&histories, &negatives(kind, &histories)).expect("the histories fit");
        let mut optimizer = Optimizer::new(&model).expect("moments");
        // Value, first and second moment of each parameter.
        let mut expected: Vec<Vec<[f64; 3]>> = Vec::new();
        for tensor in model.tensors().expect("tensors") {
            expected.push(tensor.values.iter().map(|&x| [f64::from(x), 0.0, 0.0]).collect());
        }
        let mut clear: Vec<Vec<bool>> = expected.iter().map(|values| vec![true; values.len()]).collect();
        for step in 1..=2 {
            let (_, gradients) = model.gradients(&x, &options).expect("a step");
            for (t, gradient) in gradients.iter().enumerate() {
                let length = gradient.values.iter().map(|&d| f64::from(d).powi(2)).sum::<f64>().sqrt();
                let scale = (norm / length).min(1.0);
                let largest = gradient.values.iter().fold(0.0f32, |m, d| m.max(d.abs()));
                for (i, &d) in gradient.values.iter().enumerate() {
                    clear[t][i] &= largest > 1e-6 && d.abs() > 1e-2 * largest;
                    let d = f64::from(d) * scale;
                    let [x, first, second] = &mut expected[t][i];
                    *first = 0.9 * *first + 0.1 * d;
                    *second = 0.999 * *second + 0.001 * d * d;
                    let [first, second] =
                        [*first / (1.0 - 0.9f64.powi(step)), *second / (1.0 - 0.999f64.powi(step))];
                    *x -= lr * first / (second.sqrt() + 1e-8);
                }
            }
            model.train_step(&x, &options, &adam, &mut optimizer).expect("a step");
        }
        let mut checked = 0;
        for ((tensor, expected), clear) in model.tensors().expect("tensors").iter().zip(&expected).zip(&clear)
        {
            for ((&x, [wanted, ..]), _) in
                tensor.values.iter().zip(expected).zip(clear).filter(|(_, clear)| **clear)
            {
                let error = (f64::from(x) - wanted).abs();
                assert!(error < 1e-4 * lr, "{kind:?}, {}: {x}, {wanted}", tensor.name);
                checked += 1;
            }
        }
        assert!(checked > expected.iter().map(Vec::len).sum::<usize>() / 4, "{kind:?}: {checked}");
    }
}
