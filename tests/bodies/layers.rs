//! The operations of `Device` against finite differences, on every device.
//!
//! The outputs of an operation are multiplied by fixed random weights and added up. The derivative
//! of this sum along a random direction, by central differences, must equal the analytic gradient
//! times the direction.
#![allow(dead_code, reason = "each test file uses its own part")]

use dfar::attention::{FhaOptions, LabelMask, Normalization, Pairing};
use dfar::device::{
    Activation, AdamRows, AdamStep, AdamTensor, Clip, Columns, ConcatPart, Device, Floats, Interests,
    LabelLinear, LabelLinearGradients, LayerNorm, LayerNormGradients, Linear, LinearGradients, Lookup,
    Output, Prefixes, Qkv, QkvGradients, Recency, SegmentSum, Segments, Slot, SoftmaxState, TargetGradients,
    TargetIndex, TargetInputs, TargetShape, TargetState, TargetWeights,
};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// All bodies as tests of `$device`.
#[allow(unused_macros, reason = "tests on a GPU, which may be absent, are written out")]
macro_rules! test_every_body {
    ($device:expr) => {
        test_every_body! { $device;
            layer_norm
            fused_layer_norms
            linear
            nan_survives_relu
            label_linear
            gather_and_segment_sum
            segments_of_any_length
            attention
            prefix_mean
            recent_events_weigh_more
            concat
            rank_loss
            cosine_loss
            target_attention
            adam
        }
    };
    ($device:expr; $($name:ident)+) => {$(
        #[test]
        fn $name() {
            bodies::$name(&$device);
        }
    )+};
}

fn random(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
}

/// Checks the gradients of `value` at `inputs`, one per tensor.
fn check(what: &str, inputs: &[Vec<f32>], value: impl Fn(&[Vec<f32>]) -> f64, gradients: &[Vec<f32>]) {
    let mut rng = ChaCha8Rng::seed_from_u64(99);
    assert_eq!(inputs.len(), gradients.len());
    for (t, gradient) in gradients.iter().enumerate() {
        for _ in 0..3 {
            let direction = random(&mut rng, gradient.len());
            let h = 2e-3f32;
            let moved = |sign: f32| {
                let mut inputs = inputs.to_vec();
                inputs[t].iter_mut().zip(&direction).for_each(|(x, d)| *x += sign * h * d);
                value(&inputs)
            };
            let numeric = (moved(1.0) - moved(-1.0)) / (2.0 * h as f64);
            let analytic = dot(gradient, &direction);
            // f32 outputs near 1 have errors of 1e-7, divided by 2h. The scale bounds the
            // derivative along a direction.
            let scale = dot(gradient, gradient).sqrt() + 1.0;
            assert!(
                (numeric - analytic).abs() < 2e-3 * scale,
                "{what}, input {t}: numeric {numeric}, analytic {analytic}, scale {scale}"
            );
        }
    }
}

pub fn layer_norm<D: Device>(device: &D) {
    for (rows, width) in [(1, 8), (5, 32), (300, 20), (0, 16)] {
        let mut rng = ChaCha8Rng::seed_from_u64(rows as u64);
        let inputs = vec![random(&mut rng, rows * width), random(&mut rng, width), random(&mut rng, width)];
        let weight = random(&mut rng, rows * width);
        let run = |i: &[Vec<f32>]| {
            let mut y = device.alloc(rows * width).unwrap();
            let [x, gamma, beta] = [0, 1, 2].map(|t| device.upload(&i[t]).unwrap());
            let norm = LayerNorm { width, gamma: &gamma, beta: &beta };
            device.layer_norm(norm, &x, &mut y).unwrap();
            device.download(&y).unwrap()
        };
        let [x, gamma, beta] = [0, 1, 2].map(|t| device.upload(&inputs[t]).unwrap());
        let dy = device.upload(&weight).unwrap();
        let before = random(&mut rng, rows * width);
        let (mut dx, mut dgamma, mut dbeta) = (
            device.upload(&before).unwrap(),
            device.upload(&vec![7.0; width]).unwrap(),
            device.upload(&vec![7.0; width]).unwrap(),
        );
        let norm = LayerNorm { width, gamma: &gamma, beta: &beta };
        let gradients =
            LayerNormGradients { dx: Output::add(&mut dx), dgamma: &mut dgamma, dbeta: &mut dbeta };
        device.layer_norm_backward(norm, &x, &dy, gradients).unwrap();
        let dx: Vec<f32> = device.download(&dx).unwrap().iter().zip(&before).map(|(x, b)| x - b).collect();
        let gradients = [dx, device.download(&dgamma).unwrap(), device.download(&dbeta).unwrap()];
        check("layer norm", &inputs, |i| dot(&run(i), &weight), &gradients);
    }
}

pub fn linear<D: Device>(device: &D) {
    for (rows, inputs, outputs, activation) in [
        (7, 5, 3, Activation::None),
        (700, 32, 32, Activation::Relu),
        (40, 16, 1, Activation::None),
        (0, 4, 4, Activation::Relu),
    ] {
        let mut rng = ChaCha8Rng::seed_from_u64(outputs as u64);
        // Small inputs and biases beyond ±4 keep all units away from the kink of ReLU, where
        // central differences fail. About half of the units are active.
        let mut values = vec![
            random(&mut rng, rows * inputs),
            random(&mut rng, inputs * outputs),
            random(&mut rng, outputs),
        ];
        values[0].iter_mut().for_each(|x| *x *= 0.3);
        values[2].iter_mut().for_each(|b| *b += 4.0f32.copysign(*b));
        let weight = random(&mut rng, rows * outputs);
        let run = |i: &[Vec<f32>]| -> Floats<D> {
            let mut y = device.alloc(rows * outputs).unwrap();
            let [x, w, b] = [0, 1, 2].map(|t| device.upload(&i[t]).unwrap());
            let layer = Linear { w: &w, bias: Some(&b), activation, inputs, outputs };
            device.linear(layer, &x, Output::overwrite(&mut y)).unwrap();
            y
        };
        let y = run(&values);
        let [x, w, b] = [0, 1, 2].map(|t| device.upload(&values[t]).unwrap());
        let mut dy = device.upload(&weight).unwrap();
        let (mut dx, mut dw, mut db) = (
            device.alloc(rows * inputs).unwrap(),
            device.alloc(inputs * outputs).unwrap(),
            device.alloc(outputs).unwrap(),
        );
        let layer = Linear { w: &w, bias: Some(&b), activation, inputs, outputs };
        let gradients =
            LinearGradients { dx: Some(Output::overwrite(&mut dx)), dw: &mut dw, dbias: Some(&mut db) };
        device.linear_backward(layer, &x, &y, &mut dy, gradients).unwrap();
        let gradients = [dx, dw, db].map(|g| device.download(&g).unwrap());
        let value = |i: &[Vec<f32>]| dot(&device.download(&run(i)).unwrap(), &weight);
        check("linear", &values, value, &gradients);
    }
}

/// A ReLU that returns the larger of 0 and NaN would hide a NaN.
pub fn nan_survives_relu<D: Device>(device: &D) {
    let (rows, inputs, outputs) = (4, 8, 8);
    let mut x = vec![0.5f32; rows * inputs];
    x[inputs] = f32::NAN;
    let up = |values: &[f32]| device.upload(values).unwrap();
    let (x, w, bias) = (up(&x), up(&vec![0.25; inputs * outputs]), up(&vec![1.0; outputs]));
    for bias in [None, Some(&bias)] {
        let mut y = device.alloc(rows * outputs).unwrap();
        let layer = Linear { w: &w, bias, activation: Activation::Relu, inputs, outputs };
        device.linear(layer, &x, Output::overwrite(&mut y)).unwrap();
        for (row, y) in device.download(&y).unwrap().chunks(outputs).enumerate() {
            assert!(y.iter().all(|y| y.is_nan() == (row == 1)), "row {row}: {y:?}, bias {}", bias.is_some());
        }
    }
}

pub fn label_linear<D: Device>(device: &D) {
    let (rows, inputs, outputs) = (37, 6, 5);
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let values = vec![
        random(&mut rng, rows * inputs),
        random(&mut rng, 2 * inputs * outputs),
        random(&mut rng, outputs),
    ];
    let weight = random(&mut rng, rows * outputs);
    let (ones, zeros): (Vec<u32>, Vec<u32>) = (0..rows as u32).partition(|i| i % 3 == 0);
    let tokens = [device.upload(&zeros).unwrap(), device.upload(&ones).unwrap()];
    let tokens = [&tokens[0], &tokens[1]];
    let run = |i: &[Vec<f32>]| {
        let mut y = device.alloc(rows * outputs).unwrap();
        let [x, w, b] = [0, 1, 2].map(|t| device.upload(&i[t]).unwrap());
        let layer = LabelLinear { w: &w, bias: &b, tokens_by_label: tokens, inputs, outputs };
        device.label_linear(layer, &x, Output::overwrite(&mut y)).unwrap();
        device.download(&y).unwrap()
    };
    // Row 1 has label 0: it uses the first half of the weight.
    let y = run(&values);
    let by_hand =
        (0..inputs).map(|i| values[0][inputs + i] * values[1][i * outputs]).sum::<f32>() + values[2][0];
    assert!((y[outputs] - by_hand).abs() < 1e-5);
    let [x, w, b] = [0, 1, 2].map(|t| device.upload(&values[t]).unwrap());
    let dy = device.upload(&weight).unwrap();
    let (mut dx, mut dw, mut db) = (
        device.alloc(rows * inputs).unwrap(),
        device.alloc(2 * inputs * outputs).unwrap(),
        device.alloc(outputs).unwrap(),
    );
    let layer = LabelLinear { w: &w, bias: &b, tokens_by_label: tokens, inputs, outputs };
    let gradients = LabelLinearGradients { dx: &mut dx, dw: &mut dw, dbias: &mut db };
    device.label_linear_backward(layer, &x, &dy, gradients).unwrap();
    let gradients = [dx, dw, db].map(|g| device.download(&g).unwrap());
    check("label linear", &values, |i| dot(&run(i), &weight), &gradients);
}

pub fn gather_and_segment_sum<D: Device>(device: &D) {
    let (width, rows) = (6, 50);
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let values = vec![random(&mut rng, 4 * width), random(&mut rng, 3 * width)];
    let index: [Vec<u32>; 2] = [
        (0..rows).map(|_| rng.random_range(0..4)).collect(),
        (0..rows).map(|_| rng.random_range(0..3)).collect(),
    ];
    let weight = random(&mut rng, rows * width);
    let run = |i: &[Vec<f32>]| {
        let mut y = device.alloc(rows * width).unwrap();
        let [a, b] = [0, 1].map(|t| device.upload(&i[t]).unwrap());
        let [ia, ib] = [0, 1].map(|t| device.upload(&index[t]).unwrap());
        let tables = [Lookup { table: &a, index: &ia }, Lookup { table: &b, index: &ib }];
        device.gather_sum(width, &tables, &mut y).unwrap();
        device.download(&y).unwrap()
    };
    // The gradient of a table is the segment sum of dy by row. dy is split into two sources after
    // row 20.
    let sources =
        [device.upload(&weight[..20 * width]).unwrap(), device.upload(&weight[20 * width..]).unwrap()];
    let gradients = [0, 1].map(|t| {
        let count = values[t].len() / width;
        let lists: Vec<Vec<u32>> = (0..count as u32)
            .map(|r| (0..rows as u32).filter(|&i| index[t][i as usize] == r).collect())
            .collect();
        let mut offsets = vec![0u32];
        lists.iter().for_each(|l| offsets.push(offsets.last().unwrap() + l.len() as u32));
        let [offsets, members, row] =
            [offsets, lists.concat(), (0..count as u32).collect()].map(|v| device.upload(&v).unwrap());
        let mut y = device.alloc(count * width).unwrap();
        let table = device.upload(&values[t]).unwrap();
        let rows = Lookup { table: &table, index: &row };
        let segments = Segments { offsets: &offsets, members: &members };
        let sum = SegmentSum { sources: &[&sources[0], &sources[1]], segments, l2: 0.5, rows };
        device.segment_sum(width, sum, &mut y).unwrap();
        let mut sum = device.zeros::<f64>(2).unwrap();
        device.half_square_sum(width, rows, Slot { values: &mut sum, index: 1 }).unwrap();
        let half = device.download(&sum).unwrap()[1];
        assert!((half - 0.5 * dot(&values[t], &values[t])).abs() < 1e-6);
        device.download(&y).unwrap()
    });
    let value = |i: &[Vec<f32>]| dot(&run(i), &weight) + 0.25 * (dot(&i[0], &i[0]) + dot(&i[1], &i[1]));
    check("gather", &values, value, &gradients);
}

pub fn prefix_mean<D: Device>(device: &D) {
    let width = 5;
    // Three sequences of 4, 0 and 3 tokens. The second has a group with an empty prefix.
    let (start, offsets) = (vec![0u32, 4, 4, 7], vec![0u32, 3, 4, 6]);
    let (count, divisor) = (vec![0u32, 2, 4, 0, 1, 3], vec![0u32, 3, 4, 2, 1, 5]);
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let values = vec![random(&mut rng, 7 * width)];
    let weight = random(&mut rng, 6 * width);
    let lengths = vec![0u32, 4, 6, 2, 1, 5];
    let [cu_seqlens, group_offsets, count, divisor, lengths] =
        [&start, &offsets, &count, &divisor, &lengths].map(|v| device.upload(v).unwrap());
    // Of the first two rows, one event lies between; one is newer than both.
    let position = device.upload(&[0u32, 2, 4, 5, 0, 2, 4]).unwrap();
    let halved = Recency { half_life: 2.0, position: &position };
    for recency in [None, Some(halved)] {
        let prefixes = Prefixes {
            cu_seqlens: &cu_seqlens,
            group_offsets: &group_offsets,
            count: &count,
            divisor: [&divisor, &lengths][usize::from(recency.is_some())],
            recency,
        };
        let run = |i: &[Vec<f32>]| {
            let mut mean = device.alloc(6 * width).unwrap();
            let x = device.upload(&i[0]).unwrap();
            device.prefix_mean(width, prefixes, &x, &mut mean).unwrap();
            device.download(&mean).unwrap()
        };
        let mean = run(&values);
        assert!(
            mean[..width].iter().chain(&mean[3 * width..4 * width]).all(|&x| x == 0.0),
            "the mean of an empty prefix is 0"
        );
        let (old, new) = (values[0][0], values[0][width]);
        let root = 0.5f32.sqrt();
        let expected = match recency {
            None => (old + new) / 3.0,
            // Positions 0 and 2 of 4.
            Some(_) => (0.5 * root * old + root * new) / (1.0 + root + 0.5 + 0.5 * root),
        };
        assert!((mean[width] - expected).abs() < 1e-6, "{} for {expected}", mean[width]);
        let mut dx = device.alloc(7 * width).unwrap();
        let dmean = device.upload(&weight).unwrap();
        device.prefix_mean_backward(width, prefixes, &dmean, &mut dx).unwrap();
        check("prefix mean", &values, |i| dot(&run(i), &weight), &[device.download(&dx).unwrap()]);
    }
}

/// Prefixes of long histories, whose rows more than one group of lanes sums, against sums in f64.
pub fn recent_events_weigh_more<D: Device>(device: &D) {
    let mut rng = ChaCha8Rng::seed_from_u64(23);
    for (width, lengths) in [(4, vec![1usize, 300, 0, 65]), (132, vec![40, 9])] {
        for half_life in [0.5f32, 8.0, 1e6] {
            // Some events of each history are rows, as those of one feedback are.
            let (mut cu_seqlens, mut group_offsets) = (vec![0u32], vec![0u32]);
            let [mut position, mut count, mut divisor] = [const { Vec::<u32>::new() }; 3];
            for &length in &lengths {
                let rows: Vec<u32> = (0..length as u32).filter(|_| rng.random_bool(0.6)).collect();
                for prefix in (0..=length as u32).filter(|_| rng.random_bool(0.3)) {
                    count.push(rows.partition_point(|&place| place < prefix) as u32);
                    divisor.push(prefix);
                }
                position.extend(rows);
                cu_seqlens.push(position.len() as u32);
                group_offsets.push(count.len() as u32);
            }
            let x = random(&mut rng, position.len() * width);
            let dmean = random(&mut rng, count.len() * width);
            let [mut mean, mut dx] = [vec![0.0f64; dmean.len()], vec![0.0f64; x.len()]];
            for b in 0..lengths.len() {
                for g in group_offsets[b] as usize..group_offsets[b + 1] as usize {
                    let weight = |age: u32| (-f64::from(age) / f64::from(half_life)).exp2();
                    let sum: f64 = (0..divisor[g]).map(weight).sum();
                    for row in cu_seqlens[b] as usize..(cu_seqlens[b] + count[g]) as usize {
                        let share = weight(divisor[g] - 1 - position[row]) / sum;
                        for c in 0..width {
                            mean[g * width + c] += share * f64::from(x[row * width + c]);
                            dx[row * width + c] += share * f64::from(dmean[g * width + c]);
                        }
                    }
                }
            }
            let up = |v: &[u32]| device.upload(v).unwrap();
            let indices = [&cu_seqlens, &group_offsets, &count, &divisor, &position].map(|v| up(v));
            let [cu_seqlens, group_offsets, count, divisor, position] = &indices;
            let recency = Some(Recency { half_life, position });
            let prefixes = Prefixes { cu_seqlens, group_offsets, count, divisor, recency };
            let mut found = [device.alloc(mean.len()).unwrap(), device.alloc(dx.len()).unwrap()];
            let [found_mean, found_dx] = &mut found;
            device.prefix_mean(width, prefixes, &device.upload(&x).unwrap(), found_mean).unwrap();
            let dmean = device.upload(&dmean).unwrap();
            device.prefix_mean_backward(width, prefixes, &dmean, found_dx).unwrap();
            for (what, found, expected) in [("mean", &found[0], &mean), ("dx", &found[1], &dx)] {
                let largest = expected.iter().fold(0f64, |m, x| m.max(x.abs()));
                for (found, expected) in device.download(found).unwrap().iter().zip(expected) {
                    let error = (f64::from(*found) - expected).abs() / largest;
                    assert!(error < 1e-6, "width {width}, half-life {half_life}: {what} off by {error:.1e}");
                }
            }
        }
    }
}

pub fn concat<D: Device>(device: &D) {
    let (width, rows) = (3, 6);
    let index = vec![0u32, 0, 1, 1, 1, 3];
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let values = vec![random(&mut rng, 4 * width), random(&mut rng, rows * width)];
    let weight = random(&mut rng, rows * 2 * width);
    let index_buffer = device.upload(&index).unwrap();
    let run = |i: &[Vec<f32>]| {
        let mut y = device.alloc(rows * 2 * width).unwrap();
        let [a, b] = [0, 1].map(|t| device.upload(&i[t]).unwrap());
        let parts =
            [ConcatPart { values: &a, index: Some(&index_buffer) }, ConcatPart { values: &b, index: None }];
        device.concat(width, &parts, &mut y).unwrap();
        device.download(&y).unwrap()
    };
    let dy = device.upload(&weight).unwrap();
    let [offsets, members] = [vec![0u32, 2, 5, 5, 6], (0..6).collect()].map(|v| device.upload(&v).unwrap());
    let (mut da, mut db) = (device.alloc(4 * width).unwrap(), device.zeros(rows * width).unwrap());
    let segments = Segments { offsets: &offsets, members: &members };
    let columns = |part| Columns { width, part, parts: 2 };
    device.concat_backward(columns(0), &dy, Some(segments), Output::overwrite(&mut da)).unwrap();
    device.concat_backward(columns(1), &dy, None, Output::add(&mut db)).unwrap();
    check("concat", &values, |i| dot(&run(i), &weight), &[da, db].map(|g| device.download(&g).unwrap()));
}

pub fn rank_loss<D: Device>(device: &D) {
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let values = vec![random(&mut rng, 9), random(&mut rng, 9)];
    let target = device.upload(&[1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]).unwrap();
    let run = |i: &[Vec<f32>]| {
        let [pos, neg] = [0, 1].map(|t| device.upload(&i[t]).unwrap());
        let (mut d_pos, mut d_neg) = (device.alloc(9).unwrap(), device.alloc(9).unwrap());
        let mut losses = device.zeros::<f64>(3).unwrap();
        let slot = Slot { values: &mut losses, index: 1 };
        let logits = Interests { positive: &pos, negative: &neg };
        let gradients = Interests { positive: &mut d_pos, negative: &mut d_neg };
        device.rank_loss(0.3, logits, &target, gradients, slot).unwrap();
        let [_, bce, ibl] = device.download(&losses).unwrap()[..] else { panic!("three values") };
        (bce + 0.3f32 as f64 * ibl, [d_pos, d_neg].map(|d| device.download(&d).unwrap()))
    };
    check("rank loss", &values, |i| run(i).0, &run(&values).1);
    let extreme = run(&[vec![1e4, -1e4, 1e4, -1e4, 0.0, 0.0, 0.0, 0.0, 0.0], vec![-1e4; 9]]);
    assert!(extreme.0.is_finite() && extreme.1.concat().iter().all(|x| x.is_finite()));
}

pub fn cosine_loss<D: Device>(device: &D) {
    let width = 4;
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    let values = vec![random(&mut rng, 5 * width), random(&mut rng, 5 * width)];
    let run = |i: &[Vec<f32>]| {
        let [x, y] = [0, 1].map(|t| device.upload(&i[t]).unwrap());
        let (mut dx, mut dy) = (device.zeros(i[0].len()).unwrap(), device.zeros(i[0].len()).unwrap());
        let mut loss = device.zeros::<f64>(1).unwrap();
        let slot = Slot { values: &mut loss, index: 0 };
        let vectors = Interests { positive: &x, negative: &y };
        let gradients = Interests { positive: &mut dx, negative: &mut dy };
        device.cosine_loss(width, 0.7, vectors, gradients, slot).unwrap();
        let mean = device.download(&loss).unwrap()[0];
        (0.7f32 as f64 * mean, [dx, dy].map(|d| device.download(&d).unwrap()))
    };
    check("cosine", &values, |i| run(i).0, &run(&values).1);
    let (mean, gradients) = run(&[vec![0.0; 4], vec![1.0; 4]]);
    assert_eq!((mean, gradients.concat()), (0.0, vec![0.0; 8]), "a vector of norm 0 has no direction");
}

pub fn target_attention<D: Device>(device: &D) {
    target_attention_of(device, TargetShape { width: 4, hidden: [5, 3], half_life: 0.0 });
    target_attention_of(device, TargetShape { width: 16, hidden: [16, 8], half_life: 1.5 });
}

fn target_attention_of<D: Device>(device: &D, shape: TargetShape) {
    let TargetShape { width, hidden, .. } = shape;
    // Two sequences of 3 and 2 tokens; pairs of lengths 3, 2, 2; rows over prefixes 3, 1, 2, 0, 2.
    let (cu_seqlens, pair_offsets, score_offsets) = (vec![0u32, 3, 5], vec![0u32, 2, 3], vec![0u32, 3, 5, 7]);
    let (row_offsets, row_members, row_length) =
        (vec![0u32, 2, 4, 5], vec![0u32, 1, 2, 3, 4], vec![3u32, 1, 2, 0, 2]);
    let index = TargetIndex {
        cu_seqlens: &cu_seqlens[..],
        pair_offsets: &pair_offsets,
        score_offsets: &score_offsets,
        rows: Segments { offsets: &row_offsets[..], members: &row_members },
        row_length: &row_length,
    };
    let mut staging = device.staging().unwrap();
    let plan = device.target_plan(&mut staging, shape, index).unwrap();
    device.send(staging).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(10);
    let sizes = [
        5 * width,
        5 * width,
        3 * width,
        4 * width * hidden[0],
        hidden[0],
        hidden[0] * hidden[1],
        hidden[1],
        hidden[1],
        1,
    ];
    let values: Vec<Vec<f32>> = sizes.iter().map(|&n| random(&mut rng, n)).collect();
    let weight = random(&mut rng, 5 * width);
    let run = |i: &[Vec<f32>]| {
        let b: Vec<Floats<D>> = i.iter().map(|v| device.upload(v).unwrap()).collect();
        let weights = TargetWeights { w0: &b[3], b0: &b[4], w1: &b[5], b1: &b[6], w2: &b[7], b2: &b[8] };
        let (mut e, mut lse, mut att) =
            (device.alloc(7).unwrap(), device.alloc(5).unwrap(), device.alloc(5 * width).unwrap());
        let inputs = TargetInputs { s: &b[0], a: &b[1], r: &b[2] };
        let state = TargetState { e: &mut e, lse: &mut lse, att: &mut att };
        device.target_attention(&plan, inputs, weights, state).unwrap();
        (b, e, lse, att)
    };
    let (b, e, lse, att) = run(&values);
    let weights = TargetWeights { w0: &b[3], b0: &b[4], w1: &b[5], b1: &b[6], w2: &b[7], b2: &b[8] };
    let datt = device.upload(&weight).unwrap();
    let mut g: Vec<Floats<D>> = sizes.iter().map(|&n| device.zeros(n).unwrap()).collect();
    let [ds, da, dr, w0, b0, w1, b1, w2, b2] = g.get_disjoint_mut([0, 1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    let inputs = TargetInputs { s: &b[0], a: &b[1], r: &b[2] };
    let state = TargetState { e: &e, lse: &lse, att: &att };
    let weights_gradients = TargetWeights { w0, b0, w1, b1, w2, b2 };
    let target_gradients = TargetGradients { ds, da, dr, weights: weights_gradients };
    device.target_attention_backward(&plan, inputs, weights, state, &datt, target_gradients).unwrap();
    let gradients: Vec<Vec<f32>> = g.iter().map(|g| device.download(g).unwrap()).collect();
    assert_eq!(gradients[8], [0.0], "a softmax is invariant to a constant");
    let att = device.download(&att).unwrap();
    assert!(att[3 * width..4 * width].iter().all(|&x| x == 0.0), "an empty history has output 0");
    check("target attention", &values, |i| dot(&device.download(&run(i).3).unwrap(), &weight), &gradients);
}

/// Widths that are no multiple of a vector, long segments and empty segments, against sums in f64.
pub fn segments_of_any_length<D: Device>(device: &D) {
    for (width, sizes) in [
        (8, vec![1usize, 0, 63, 1, 64, 65, 0, 0, 200, 3, 1000, 0]),
        (5, vec![0, 130, 2]),
        (132, vec![64, 64]),
        (4, vec![0, 0]),
        (12, vec![128]),
        (160, vec![1, 300]),
    ] {
        let mut rng = ChaCha8Rng::seed_from_u64(width as u64);
        let total: usize = sizes.iter().sum();
        let rows = [7, 3, 11];
        let sources = rows.map(|rows| random(&mut rng, rows * width));
        let stacked = sources.concat();
        let members: Vec<u32> = (0..total).map(|_| rng.random_range(0..21)).collect();
        let mut offsets = vec![0u32];
        sizes.iter().for_each(|n| offsets.push(offsets.last().unwrap() + *n as u32));
        let table = random(&mut rng, 9 * width);
        let row: Vec<u32> = (0..sizes.len()).map(|_| rng.random_range(0..9)).collect();
        let mut want = vec![];
        for (i, bounds) in offsets.windows(2).enumerate() {
            for c in 0..width {
                let members = members[bounds[0] as usize..bounds[1] as usize].iter();
                let sum: f64 = members.map(|&m| stacked[m as usize * width + c] as f64).sum();
                want.push(sum + 0.25 * table[row[i] as usize * width + c] as f64);
            }
        }
        let sources = sources.map(|s| device.upload(&s).unwrap());
        let [offsets, members, row] = [offsets, members, row].map(|v| device.upload(&v).unwrap());
        let table = device.upload(&table).unwrap();
        let mut y = device.alloc(want.len()).unwrap();
        let sum = SegmentSum {
            sources: &sources.each_ref(),
            segments: Segments { offsets: &offsets, members: &members },
            l2: 0.25,
            rows: Lookup { table: &table, index: &row },
        };
        device.segment_sum(width, sum, &mut y).unwrap();
        for (got, want) in device.download(&y).unwrap().iter().zip(&want) {
            assert!((*got as f64 - want).abs() < 1e-4, "width {width}: {got}, not {want}");
        }
    }
}

/// The fused layer norms equal their parts.
pub fn fused_layer_norms<D: Device>(device: &D) {
    for (rows, width) in [(7, 32), (130, 5), (3, 200), (0, 8), (9, 33)] {
        let mut rng = ChaCha8Rng::seed_from_u64(20);
        let tables = [random(&mut rng, 6 * width), random(&mut rng, 4 * width), random(&mut rng, 2 * width)];
        let index = [6, 4, 2].map(|n| (0..rows).map(|_| rng.random_range(0..n)).collect::<Vec<u32>>());
        let [gamma, beta] = [0, 1].map(|_| device.upload(&random(&mut rng, width)).unwrap());
        let more = random(&mut rng, rows * width);
        let tables = tables.map(|t| device.upload(&t).unwrap());
        let index = index.map(|i| device.upload(&i).unwrap());
        let list: Vec<_> = tables.iter().zip(&index).map(|(table, index)| Lookup { table, index }).collect();
        let norm = LayerNorm { width, gamma: &gamma, beta: &beta };
        let x = device.upload(&more).unwrap();
        let fresh = || device.alloc(rows * width).unwrap();
        let (mut y, mut n, mut fused_y, mut fused_n) = (fresh(), fresh(), fresh(), fresh());
        let compare = |y: &Floats<D>, fused: &Floats<D>| {
            let (y, fused) = (device.download(y).unwrap(), device.download(fused).unwrap());
            assert!(y.iter().zip(&fused).all(|(y, f)| (y - f).abs() < 1e-5), "{rows} rows of {width}");
        };
        device.gather_sum(width, &list, &mut y).unwrap();
        device.layer_norm(norm, &y, &mut n).unwrap();
        device.gather_layer_norm(norm, &list, &mut fused_y, &mut fused_n).unwrap();
        compare(&y, &fused_y);
        compare(&n, &fused_n);
        device.add(&x, &mut y).unwrap();
        device.layer_norm(norm, &y, &mut n).unwrap();
        device.add_layer_norm(norm, &x, &mut fused_y, &mut fused_n).unwrap();
        compare(&y, &fused_y);
        compare(&n, &fused_n);
    }
}

pub fn attention<D: Device>(device: &D) {
    let (cu_seqlens, label) = ([0u32, 3, 3, 4, 8], [0u8, 1, 1, 0, 1, 0, 0, 1]);
    for (heads, head_dim, masked) in [(2, 4, true), (4, 2, true), (2, 8, false), (1, 5, false)] {
        let options = FhaOptions {
            label_mask: if masked { LabelMask::Feedback } else { LabelMask::None },
            normalization: Normalization::Joint,
            pairing: Pairing::Factorized,
            ..FhaOptions::new(heads, head_dim)
        };
        let label = if masked { &label[..] } else { &[] };
        let mut staging = device.staging().unwrap();
        let plan = device.attention_plan(&mut staging, &options, &cu_seqlens, label).unwrap();
        device.send(staging).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(21);
        let values: Vec<Vec<f32>> = (0..3).map(|_| random(&mut rng, 8 * heads * head_dim)).collect();
        let weight = random(&mut rng, options.output_len(8));
        let run = |i: &[Vec<f32>]| {
            let [q, k, v] = [0, 1, 2].map(|t| device.upload(&i[t]).unwrap());
            let mut o = device.alloc(options.output_len(8)).unwrap();
            let mut lse = device.alloc(options.lse_len(8)).unwrap();
            let state = SoftmaxState { o: &mut o, lse: &mut lse };
            device.attention(&plan, Qkv { q: &q, k: &k, v: &v }, state).unwrap();
            ([q, k, v], o, lse)
        };
        let ([q, k, v], o, lse) = run(&values);
        let d_o = device.upload(&weight).unwrap();
        let [mut dq, mut dk, mut dv] = [0, 1, 2].map(|t| device.alloc(values[t].len()).unwrap());
        let (qkv, state) = (Qkv { q: &q, k: &k, v: &v }, SoftmaxState { o: &o, lse: &lse });
        let gradients = QkvGradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        device.attention_backward(&plan, qkv, state, &d_o, gradients).unwrap();
        let gradients = [dq, dk, dv].map(|g| device.download(&g).unwrap());
        let value = |i: &[Vec<f32>]| dot(&device.download(&run(i).1).unwrap(), &weight);
        check("attention", &values, value, &gradients);
    }
}

/// One step on a dense tensor, a tensor with rows and an empty tensor, against Adam in f64.
pub fn adam<D: Device>(device: &D) {
    let mut rng = ChaCha8Rng::seed_from_u64(22);
    let (dense, width, rows) = (5003, 6, vec![1u32, 4]);
    let lens = [dense, 7 * width, 0];
    for (clip, loss, previous) in [
        (None, 1.0, None),
        (Some(Clip::PerTensor(1.0)), 1.0, Some(2.0)),
        (Some(Clip::Global(2.0)), 1.0, Some(0.0)),
        (Some(Clip::PerTensor(1.0)), f64::NAN, None),
        (Some(Clip::PerTensor(1.0)), 1.0, Some(f64::NAN)),
        (None, 1.0, Some(f64::INFINITY)),
    ] {
        let refused = loss.is_nan() || previous.is_some_and(|norm: f64| !norm.is_finite());
        let step = AdamStep { lr: 0.01, beta1: 0.9, beta2: 0.999, eps: 1e-8, step: 3, clip };
        let values: Vec<Vec<f32>> = lens.map(|n| random(&mut rng, n)).to_vec();
        let first: Vec<Vec<f32>> = lens.map(|n| random(&mut rng, n)).to_vec();
        let second: Vec<Vec<f32>> =
            lens.map(|n| random(&mut rng, n).iter().map(|x| x * x).collect()).to_vec();
        let gradients = [random(&mut rng, dense), random(&mut rng, rows.len() * width), vec![]];
        let upload =
            |v: &[Vec<f32>]| -> Vec<Floats<D>> { v.iter().map(|v| device.upload(v).unwrap()).collect() };
        let (mut v, mut m1, mut m2, g) =
            (upload(&values), upload(&first), upload(&second), upload(&gradients));
        let row = device.upload(&rows).unwrap();
        let mut report = device.upload(&[loss, 0.0]).unwrap();
        let state = v.iter_mut().zip(m1.iter_mut().zip(&mut m2)).zip(&g).enumerate();
        let mut tensors: Vec<_> = state
            .map(|(i, ((value, (first, second)), gradient))| AdamTensor {
                value,
                first,
                second,
                gradient,
                rows: (i == 1).then_some(AdamRows { index: &row, width }),
            })
            .collect();
        let previous = previous.map(|norm| device.upload(&[f64::NAN, norm]).unwrap());
        let slot = Slot { values: &mut report, index: 1 };
        device.adam(&step, &mut tensors, slot, previous.as_ref()).unwrap();
        drop(tensors);
        let norms = gradients.each_ref().map(|g| dot(g, g).sqrt());
        let global = norms.iter().map(|n| n * n).sum::<f64>().sqrt();
        let found = device.download(&report).unwrap()[1];
        if refused {
            assert!(found.is_nan(), "the norm of a refused step is NaN, not {found}");
        } else {
            assert!((found - global).abs() < 1e-9 * global, "{found}, not {global}");
        }
        for t in 0..3 {
            let factor = match clip {
                None => 1.0,
                Some(Clip::PerTensor(limit)) => (limit as f64 / norms[t]).min(1.0),
                Some(Clip::Global(limit)) => (limit as f64 / global).min(1.0),
            };
            let mut want = values[t].clone();
            for (i, g) in gradients[t].iter().enumerate() {
                let at = if t == 1 { rows[i / width] as usize * width + i % width } else { i };
                let g = *g as f64 * factor;
                let m = 0.9 * first[t][at] as f64 + 0.1 * g;
                let v = 0.999 * second[t][at] as f64 + 0.001 * g * g;
                let (m, v) = (m / (1.0 - 0.9f64.powi(3)), v / (1.0 - 0.999f64.powi(3)));
                want[at] -= (0.01 * m / (v.sqrt() + 1e-8)) as f32;
            }
            let got = device.download(&v[t]).unwrap();
            if refused {
                assert_eq!(got, values[t], "a refused step changes no value");
                continue;
            }
            for (i, (got, want)) in got.iter().zip(&want).enumerate() {
                assert!((got - want).abs() < 1e-5 * (1.0 + want.abs()), "tensor {t}[{i}]: {got}, not {want}");
            }
        }
    }
}
