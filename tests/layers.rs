//! Every operation of `trait Device` against finite differences of itself, on every device there is.
//!
//! An operation is checked as a function from its inputs to numbers: outputs are multiplied by fixed random
//! weights and added up, and the derivative of that sum along a random direction, by central differences, must
//! equal the analytic gradient times the direction.

use dfar::device::cpu::Cpu;
use dfar::device::{Activation, Device, Segments, Store, TargetIndex, TargetWeights};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

type Floats<D> = <D as Device>::Buffer<f32>;

/// Runs a test body on every device of this machine.
macro_rules! on_every_device {
    ($($name:ident)+) => {$(
        #[test]
        fn $name() {
            bodies::$name(&Cpu::new());
        }
    )+};
}

on_every_device! {
    layer_norm
    linear
    label_linear
    gather_and_segment_sum
    prefix_mean
    concat
    rank_loss
    cosine_loss
    target_attention
}

fn random(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
}

/// Checks `gradients` (one a tensor of `inputs`) of `value` at `inputs`, tensor by tensor.
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
            // f32 outputs near 1 carry 1e-7, over 2h; the scale is what the gradient could give along any direction.
            let scale = dot(gradient, gradient).sqrt() + 1.0;
            assert!(
                (numeric - analytic).abs() < 2e-3 * scale,
                "{what}, input {t}: numeric {numeric}, analytic {analytic}, scale {scale}"
            );
        }
    }
}

mod bodies {
    use super::*;

    pub fn layer_norm<D: Device>(device: &D) {
        for (rows, width) in [(1, 8), (5, 32), (300, 20), (0, 16)] {
            let mut rng = ChaCha8Rng::seed_from_u64(rows as u64);
            let inputs =
                vec![random(&mut rng, rows * width), random(&mut rng, width), random(&mut rng, width)];
            let weight = random(&mut rng, rows * width);
            let run = |i: &[Vec<f32>]| {
                let mut y = device.alloc(rows * width).unwrap();
                let [x, gamma, beta] = [0, 1, 2].map(|t| device.upload(&i[t]).unwrap());
                device.layer_norm(width, &x, &gamma, &beta, &mut y).unwrap();
                device.download(&y).unwrap()
            };
            let [x, gamma] = [0, 1].map(|t| device.upload(&inputs[t]).unwrap());
            let dy = device.upload(&weight).unwrap();
            let before = random(&mut rng, rows * width);
            let (mut dx, mut dgamma, mut dbeta) = (
                device.upload(&before).unwrap(),
                device.upload(&vec![7.0; width]).unwrap(),
                device.upload(&vec![7.0; width]).unwrap(),
            );
            device
                .layer_norm_backward(width, &x, &gamma, &dy, (&mut dx, Store::Add), &mut dgamma, &mut dbeta)
                .unwrap();
            let dx: Vec<f32> =
                device.download(&dx).unwrap().iter().zip(&before).map(|(x, b)| x - b).collect();
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
            // Small inputs and biases beyond ±4 keep every unit off the kink of ReLU, where a central difference
            // measures neither side; about half of the units are on.
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
                device
                    .linear(&x, &w, Some(&b), activation, (&mut y, Store::Overwrite), (inputs, outputs))
                    .unwrap();
                y
            };
            let y = run(&values);
            let [x, w] = [0, 1].map(|t| device.upload(&values[t]).unwrap());
            let mut dy = device.upload(&weight).unwrap();
            let (mut dx, mut dw, mut db) = (
                device.alloc(rows * inputs).unwrap(),
                device.alloc(inputs * outputs).unwrap(),
                device.alloc(outputs).unwrap(),
            );
            device
                .linear_backward(
                    &x,
                    &w,
                    activation,
                    &y,
                    &mut dy,
                    Some((&mut dx, Store::Overwrite)),
                    &mut dw,
                    Some(&mut db),
                    (inputs, outputs),
                )
                .unwrap();
            let gradients = [dx, dw, db].map(|g| device.download(&g).unwrap());
            let value = |i: &[Vec<f32>]| dot(&device.download(&run(i)).unwrap(), &weight);
            check("linear", &values, value, &gradients);
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
            device.label_linear(&x, &w, &b, tokens, (&mut y, Store::Overwrite), (inputs, outputs)).unwrap();
            device.download(&y).unwrap()
        };
        // Row 1 has label 0: it sees the first half of the weight.
        let y = run(&values);
        let by_hand =
            (0..inputs).map(|i| values[0][inputs + i] * values[1][i * outputs]).sum::<f32>() + values[2][0];
        assert!((y[outputs] - by_hand).abs() < 1e-5);
        let [x, w] = [0, 1].map(|t| device.upload(&values[t]).unwrap());
        let dy = device.upload(&weight).unwrap();
        let (mut dx, mut dw, mut db) = (
            device.alloc(rows * inputs).unwrap(),
            device.alloc(2 * inputs * outputs).unwrap(),
            device.alloc(outputs).unwrap(),
        );
        device
            .label_linear_backward(&x, &w, tokens, &dy, &mut dx, &mut dw, &mut db, (inputs, outputs))
            .unwrap();
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
            device.gather_sum(width, &[(&a, &ia), (&b, &ib)], &mut y).unwrap();
            device.download(&y).unwrap()
        };
        // The gradient of a table is the segment sum of dy by row; dy is given in two sources, cut after row 20.
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
            device
                .segment_sum(
                    width,
                    &[&sources[0], &sources[1]],
                    Segments { offsets: &offsets, members: &members },
                    0.5,
                    &table,
                    &row,
                    &mut y,
                )
                .unwrap();
            let half = device.half_square_sum(width, &table, &row).unwrap();
            assert!((half - 0.5 * dot(&values[t], &values[t])).abs() < 1e-6);
            device.download(&y).unwrap()
        });
        let value = |i: &[Vec<f32>]| dot(&run(i), &weight) + 0.25 * (dot(&i[0], &i[0]) + dot(&i[1], &i[1]));
        check("gather", &values, value, &gradients);
    }

    pub fn prefix_mean<D: Device>(device: &D) {
        let width = 5;
        // Three sequences of 4, 0 and 3 tokens; the second has a group over nothing.
        let (start, offsets) = (vec![0u32, 4, 4, 7], vec![0u32, 3, 4, 6]);
        let (count, divisor) = (vec![0u32, 2, 4, 0, 1, 3], vec![0u32, 3, 4, 2, 1, 5]);
        let mut rng = ChaCha8Rng::seed_from_u64(6);
        let values = vec![random(&mut rng, 7 * width)];
        let weight = random(&mut rng, 6 * width);
        let [start, offsets, counts, divisors] =
            [&start, &offsets, &count, &divisor].map(|v| device.upload(v).unwrap());
        let run = |i: &[Vec<f32>]| {
            let mut mean = device.alloc(6 * width).unwrap();
            device
                .prefix_mean(
                    width,
                    &device.upload(&i[0]).unwrap(),
                    &start,
                    &offsets,
                    &counts,
                    &divisors,
                    &mut mean,
                )
                .unwrap();
            device.download(&mean).unwrap()
        };
        let mean = run(&values);
        assert!(
            mean[..width].iter().chain(&mean[3 * width..4 * width]).all(|&x| x == 0.0),
            "nothing to add up gives 0"
        );
        assert!((mean[width] - (values[0][0] + values[0][width]) / 3.0).abs() < 1e-6);
        let mut dx = device.alloc(7 * width).unwrap();
        device
            .prefix_mean_backward(
                width,
                &start,
                &offsets,
                &counts,
                &divisors,
                &device.upload(&weight).unwrap(),
                &mut dx,
            )
            .unwrap();
        check("prefix mean", &values, |i| dot(&run(i), &weight), &[device.download(&dx).unwrap()]);
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
            device.concat(width, &[(&a, Some(&index_buffer)), (&b, None)], &mut y).unwrap();
            device.download(&y).unwrap()
        };
        let dy = device.upload(&weight).unwrap();
        let [offsets, members] =
            [vec![0u32, 2, 5, 5, 6], (0..6).collect()].map(|v| device.upload(&v).unwrap());
        let (mut da, mut db) = (device.alloc(4 * width).unwrap(), device.zeros(rows * width).unwrap());
        device
            .concat_backward(
                width,
                0,
                2,
                &dy,
                Some(Segments { offsets: &offsets, members: &members }),
                (&mut da, Store::Overwrite),
            )
            .unwrap();
        device.concat_backward(width, 1, 2, &dy, None, (&mut db, Store::Add)).unwrap();
        check("concat", &values, |i| dot(&run(i), &weight), &[da, db].map(|g| device.download(&g).unwrap()));
    }

    pub fn rank_loss<D: Device>(device: &D) {
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let values = vec![random(&mut rng, 9), random(&mut rng, 9)];
        let target = device.upload(&[1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0]).unwrap();
        let run = |i: &[Vec<f32>]| {
            let [pos, neg] = [0, 1].map(|t| device.upload(&i[t]).unwrap());
            let (mut d_pos, mut d_neg) = (device.alloc(9).unwrap(), device.alloc(9).unwrap());
            let [bce, ibl] = device.rank_loss(0.3, &pos, &neg, &target, &mut d_pos, &mut d_neg).unwrap();
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
            let mean = device.cosine_loss(width, 0.7, &x, &y, &mut dx, &mut dy).unwrap();
            (0.7f32 as f64 * mean, [dx, dy].map(|d| device.download(&d).unwrap()))
        };
        check("cosine", &values, |i| run(i).0, &run(&values).1);
        let (mean, gradients) = run(&[vec![0.0; 4], vec![1.0; 4]]);
        assert_eq!((mean, gradients.concat()), (0.0, vec![0.0; 8]), "a vector of norm 0 has no direction");
    }

    pub fn target_attention<D: Device>(device: &D) {
        let (width, hidden) = (4, [5, 3]);
        // Two sequences of 3 and 2 tokens; pairs of lengths 3, 2, 2; rows over prefixes 3, 1, 2, 0, 2.
        let (cu_seqlens, pair_offsets, score_offsets) =
            (vec![0u32, 3, 5], vec![0u32, 2, 3], vec![0u32, 3, 5, 7]);
        let (row_offsets, row_members, row_length) =
            (vec![0u32, 2, 4, 5], vec![0u32, 1, 2, 3, 4], vec![3u32, 1, 2, 0, 2]);
        let lists = [cu_seqlens, pair_offsets, score_offsets, row_offsets, row_members, row_length]
            .map(|v| device.upload(&v).unwrap());
        let [cu_seqlens, pair_offsets, score_offsets, offsets, members, row_length] = &lists;
        let index = || TargetIndex {
            cu_seqlens,
            pair_offsets,
            score_offsets,
            rows: Segments { offsets, members },
            row_length,
        };
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
            device
                .target_attention(
                    width,
                    hidden,
                    index(),
                    &b[0],
                    &b[1],
                    &b[2],
                    weights,
                    &mut e,
                    &mut lse,
                    &mut att,
                )
                .unwrap();
            (b, e, lse, att)
        };
        let (b, e, lse, att) = run(&values);
        let weights = TargetWeights { w0: &b[3], b0: &b[4], w1: &b[5], b1: &b[6], w2: &b[7], b2: &b[8] };
        let datt = device.upload(&weight).unwrap();
        let mut g: Vec<Floats<D>> = sizes.iter().map(|&n| device.zeros(n).unwrap()).collect();
        let [ds, da, dr, w0, b0, w1, b1, w2, b2] = g.get_disjoint_mut([0, 1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
        device
            .target_attention_backward(
                width,
                hidden,
                index(),
                &b[0],
                &b[1],
                &b[2],
                weights,
                &e,
                &lse,
                &att,
                &datt,
                ds,
                da,
                dr,
                TargetWeights { w0, b0, w1, b1, w2, b2 },
            )
            .unwrap();
        let gradients: Vec<Vec<f32>> = g.iter().map(|g| device.download(g).unwrap()).collect();
        assert_eq!(gradients[8], [0.0], "a softmax does not see a constant");
        let att = device.download(&att).unwrap();
        assert!(att[3 * width..4 * width].iter().all(|&x| x == 0.0), "an empty history attends to nothing");
        check(
            "target attention",
            &values,
            |i| dot(&device.download(&run(i).3).unwrap(), &weight),
            &gradients,
        );
    }
}
