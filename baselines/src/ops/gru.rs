//! Gated recurrences over packed sequences: the GRU and, with a gate, the AUGRU of DIEN
//! (Zhou et al., AAAI 2019, equations 2 to 5 and 15).
//!
//! ```text
//! r = sigmoid(x_r + h U_r)     u = a sigmoid(x_u + h U_u)     n = tanh(x_n + r * (h U_n))
//! h' = h + u * (n - h),        h = 0 before the first step
//! ```
//!
//! `x = [x_r | x_u | x_n]` is the input product with its bias, which the caller makes for all
//! events at once. `a` is 1 in a GRU and the attention weight of the step in an AUGRU.
//!
//! Backward, from the gradient `dh'`, with `z_n = x_n + r * (h U_n)`:
//!
//! ```text
//! du = dh' * (n - h)           da = sum(du * u / a)         dz_n = dh' * u * (1 - n^2)
//! dz_u = du * a s (1 - s)      dr = dz_n * (h U_n)          dz_r = dr * r (1 - r)      s = u / a
//! dx = [dz_r | dz_u | dz_n]    dp = [dz_r | dz_u | dz_n r]
//! dh = dh' * (1 - u) + dp U^T  dU = sum h^T dp
//! ```
//!
//! The gates are computed again from the states, which are the only values kept. Sequences are cut
//! into tasks that do not depend on the number of threads. A task takes one step of all its
//! sequences at a time, the longest first, so that the sequences which have not ended are a prefix
//! of its rows. Partial gradients are added in the order of the tasks.

use super::rows::{pad_columns, transpose_padded};
use super::sequences::{RangeSums, Sequences};
use dfar::device::cpu::elementwise::{add_assign, unpad_rows};
use dfar::device::cpu::product::{Finish, Left, product};
use dfar::device::cpu::scratch::padded;
use dfar::simd::{Kernel, Simd, dispatch};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// A recurrence with its inputs.
#[derive(Clone, Copy)]
pub struct Recurrence<'a> {
    /// Width `D` of a state.
    pub width: usize,
    /// The steps.
    pub sequences: Sequences<'a>,
    /// `[N, 3D]` input product with its bias.
    pub x: &'a [f32],
    /// `[D, 3D]` recurrent weight.
    pub u: &'a [f32],
    /// `[steps]` factor of the update gate of each step; `None` for 1.
    pub gate: Option<&'a [f32]>,
}

/// States, or their gradients.
pub struct States<F> {
    /// `[steps, D]` state after each step.
    pub every: Option<F>,
    /// `[S, D]` last state of each sequence; 0 for an empty one.
    pub last: Option<F>,
}

/// Gradients of a [`Recurrence`], all overwritten.
pub struct RecurrenceGradients<'a> {
    /// `[N, 3D]`
    pub dx: &'a mut [f32],
    /// `[D, 3D]`
    pub du: &'a mut [f32],
    /// `[steps]`; only with a gate.
    pub dgate: Option<&'a mut [f32]>,
}

impl Recurrence<'_> {
    /// Writes the states that `states` asks for.
    ///
    /// # Panics
    /// If a length contradicts the width or the sequences.
    pub fn forward(&self, states: States<&mut [f32]>) {
        let padded = self.padded();
        let States { mut every, mut last } = states;
        let mut jobs = Vec::new();
        for sequences in self.tasks() {
            let every = take(&mut every, self.sequences.steps_of(&sequences).len() * self.width);
            let last = take(&mut last, sequences.len() * self.width);
            jobs.push((States { every, last }, sequences));
        }
        jobs.into_par_iter().for_each(|(states, sequences)| padded.forward(sequences, states));
    }

    /// Gradients from those of the states. `states` are the states of all steps.
    ///
    /// # Panics
    /// If a length contradicts the width or the sequences.
    pub fn backward(&self, states: &[f32], d_states: States<&[f32]>, gradients: RecurrenceGradients) {
        let padded = self.padded();
        let RecurrenceGradients { dx, du, mut dgate } = gradients;
        assert_eq!(states.len(), self.sequences.steps() * self.width, "states is not [steps, D]");
        assert_eq!(dx.len(), self.x.len(), "dx is not [N, 3D]");
        assert_eq!(du.len(), self.u.len(), "du is not [D, 3D]");
        let mut jobs = Vec::new();
        for sequences in self.tasks() {
            let steps = self.sequences.steps_of(&sequences).len();
            jobs.push((sequences, take(&mut dgate, steps)));
        }
        let partials: Vec<Partial> = jobs
            .into_par_iter()
            .map(|(sequences, dgate)| padded.backward(sequences, states, &d_states, dgate))
            .collect();
        let wide = padded.wide;
        let mut du_wide = vec![0.0; self.width * 3 * wide];
        for partial in &partials {
            add_assign(&partial.du, &mut du_wide);
        }
        unpad_rows(&du_wide, self.width, wide, du);
        let mut sums = RangeSums::new(dx.len() / (3 * self.width).max(1), 3 * wide);
        partials.into_iter().for_each(|partial| sums.add(partial.inputs.start, &partial.dx));
        unpad_rows(&sums.values, self.width, wide, dx);
    }

    /// Sequences of a task. The candidates of a prefix are many equally long sequences; the
    /// histories of a batch are few and long, and must still keep all threads busy.
    fn tasks(&self) -> impl Iterator<Item = Range<usize>> {
        self.sequences.tasks(if self.gate.is_some() { 64 } else { 16 })
    }

    fn padded(&self) -> Padded<'_> {
        let Self { width, sequences, x, u, gate } = *self;
        assert_eq!(u.len(), width * 3 * width, "u is not [D, 3D]");
        assert!(x.len().is_multiple_of(3 * width), "x is not [N, 3D]");
        sequences.check(x.len() / (3 * width));
        if let Some(gate) = gate {
            assert_eq!(gate.len(), sequences.steps(), "gate is not [steps]");
        }
        let wide = padded(width);
        let u = pad_columns(u, width, wide);
        let ut = transpose_padded(&u, 3 * wide, wide);
        Padded { width, wide, sequences, x: pad_columns(x, width, wide), u, ut, gate }
    }
}

/// A recurrence whose parts (`r`, `u`, `n`) start at whole vectors: `P` is `D` rounded up. The
/// added columns of a state stay 0, because their inputs and weights are 0.
struct Padded<'a> {
    width: usize,
    /// `P`
    wide: usize,
    sequences: Sequences<'a>,
    /// `[N, 3P]`
    x: Cow<'a, [f32]>,
    /// `[D, 3P]`
    u: Cow<'a, [f32]>,
    /// `[3P, P]`
    ut: Vec<f32>,
    gate: Option<&'a [f32]>,
}

/// Gradients of one task.
struct Partial {
    inputs: Range<usize>,
    /// `[inputs, 3P]`
    dx: Vec<f32>,
    /// `[D, 3P]`
    du: Vec<f32>,
}

impl Padded<'_> {
    fn forward(&self, sequences: Range<usize>, states: States<&mut [f32]>) {
        let Self { width, wide, .. } = *self;
        let States { mut every, mut last } = states;
        let order = self.longest_first(&sequences);
        let first_step = self.sequences.steps_of(&sequences).start;
        let mut h = vec![0.0; order.len() * wide];
        let mut hu = vec![0.0; order.len() * 3 * wide];
        for t in 0..order.first().map_or(0, |&i| self.sequences.length(i)) {
            let active = &order[..self.active(&order, t)];
            self.product(active.len(), t, &h, &mut hu);
            dispatch(StepForward { cell: self, active, t, hu: &hu, h: &mut h });
            if let Some(every) = &mut every {
                for (&i, h) in active.iter().zip(h.chunks_exact(wide)) {
                    let row = (self.sequences.offsets[i] as usize + t - first_step) * width;
                    every[row..row + width].copy_from_slice(&h[..width]);
                }
            }
        }
        if let Some(last) = &mut last {
            for (&i, h) in order.iter().zip(h.chunks_exact(wide)) {
                let row = (i - sequences.start) * width;
                last[row..row + width].copy_from_slice(&h[..width]);
            }
        }
    }

    fn backward(
        &self,
        sequences: Range<usize>,
        states: &[f32],
        d_states: &States<&[f32]>,
        mut dgate: Option<&mut [f32]>,
    ) -> Partial {
        let Self { width, wide, .. } = *self;
        let order = self.longest_first(&sequences);
        let first_step = self.sequences.steps_of(&sequences).start;
        let inputs = self.sequences.inputs_of(&sequences);
        let mut dx = vec![0.0; inputs.len() * 3 * wide];
        let mut du = vec![0.0; width * 3 * wide];
        let (mut h, mut dh) = (vec![0.0; order.len() * wide], vec![0.0; order.len() * wide]);
        let (mut hu, mut dp) = (vec![0.0; order.len() * 3 * wide], vec![0.0; order.len() * 3 * wide]);
        let mut da = vec![0.0; order.len()];
        for t in (0..order.first().map_or(0, |&i| self.sequences.length(i))).rev() {
            let active = &order[..self.active(&order, t)];
            for (k, &i) in active.iter().enumerate() {
                let step = self.sequences.offsets[i] as usize + t;
                let dh = &mut dh[k * wide..][..width];
                if let Some(last) = d_states.last.filter(|_| t + 1 == self.sequences.length(i)) {
                    add_assign(&last[i * width..][..width], dh);
                }
                if let Some(every) = d_states.every {
                    add_assign(&every[step * width..][..width], dh);
                }
                if t > 0 {
                    h[k * wide..][..width].copy_from_slice(&states[(step - 1) * width..][..width]);
                }
            }
            if t == 0 {
                h.fill(0.0);
            }
            let m = active.len();
            self.product(m, t, &h, &mut hu);
            dispatch(StepBackward {
                cell: self,
                active,
                t,
                h: &h,
                hu: &hu,
                dh: &mut dh,
                dp: &mut dp,
                dx: &mut dx,
                first_input: inputs.start,
                da: &mut da,
            });
            if let Some(dgate) = &mut dgate {
                for (&i, da) in active.iter().zip(&da) {
                    dgate[self.sequences.offsets[i] as usize + t - first_step] = *da;
                }
            }
            if t > 0 {
                let dp_rows = Left::rows(&dp, 3 * wide);
                product([m, width, 3 * wide], dp_rows, (&self.ut, wide), (&mut dh, wide), Finish::Add);
                let h = Left::transposed(&h, wide);
                let du = (&mut du[..], 3 * wide);
                product([width, 3 * wide, m], h, (&dp, 3 * wide), du, Finish::Add);
            }
        }
        Partial { inputs, dx, du }
    }

    /// `hu = h U` of the first `m` rows. Before the first step `h` is 0.
    fn product(&self, m: usize, t: usize, h: &[f32], hu: &mut [f32]) {
        let Self { width, wide, .. } = *self;
        if t == 0 {
            hu.fill(0.0);
            return;
        }
        let h = Left::rows(h, wide);
        product([m, 3 * wide, width], h, (&self.u, 3 * wide), (hu, 3 * wide), Finish::Store);
    }

    /// The sequences by falling length. The sort is stable.
    fn longest_first(&self, sequences: &Range<usize>) -> Vec<usize> {
        let mut order: Vec<usize> = sequences.clone().collect();
        order.sort_by_key(|&i| std::cmp::Reverse(self.sequences.length(i)));
        order
    }

    /// Number of sequences with a step `t`.
    fn active(&self, order: &[usize], t: usize) -> usize {
        order.partition_point(|&i| self.sequences.length(i) > t)
    }

    /// Row of `x` and gate of step `t` of sequence `i`.
    #[inline(always)]
    fn input(&self, i: usize, t: usize) -> (usize, f32) {
        let gate = self.gate.map_or(1.0, |gate| gate[self.sequences.offsets[i] as usize + t]);
        (self.sequences.first[i] as usize + t, gate)
    }
}

/// The first `len` values, cut off from `values`.
fn take<'a>(values: &mut Option<&'a mut [f32]>, len: usize) -> Option<&'a mut [f32]> {
    values.as_mut().map(|values| values.split_off_mut(..len).expect("one row for each step or sequence"))
}

/// `1 / (1 + e^-x)`
#[inline(always)]
pub(super) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let e = s.exp2(s.mul(x, s.splat(-std::f32::consts::LOG2_E)));
    s.div(s.splat(1.0), s.add(s.splat(1.0), e))
}

/// `1 - 2 / (1 + e^2x)`
#[inline(always)]
fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let e = s.exp2(s.mul(x, s.splat(2.0 * std::f32::consts::LOG2_E)));
    s.sub(s.splat(1.0), s.div(s.splat(2.0), s.add(s.splat(1.0), e)))
}

/// `r`, `sigmoid(z_u)`, `n` of the vectors at column `j`.
#[inline(always)]
fn gates<S: Simd>(s: S, wide: usize, x: &[f32], hu: &[f32], j: usize) -> [S::V; 3] {
    let part = |values: &[f32], part: usize| s.load(&values[part * wide + j..]);
    let r = sigmoid(s, s.add(part(x, 0), part(hu, 0)));
    let u = sigmoid(s, s.add(part(x, 1), part(hu, 1)));
    let n = tanh(s, s.mul_add(r, part(hu, 2), part(x, 2)));
    [r, u, n]
}

/// `h` after step `t` of the active sequences.
struct StepForward<'a> {
    cell: &'a Padded<'a>,
    active: &'a [usize],
    t: usize,
    hu: &'a [f32],
    h: &'a mut [f32],
}

impl Kernel for StepForward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let wide = self.cell.wide;
        for (k, &i) in self.active.iter().enumerate() {
            let (row, a) = self.cell.input(i, self.t);
            let x = &self.cell.x[row * 3 * wide..][..3 * wide];
            let hu = &self.hu[k * 3 * wide..][..3 * wide];
            let h = &mut self.h[k * wide..][..wide];
            for j in (0..wide).step_by(S::LANES) {
                let [_, u, n] = gates(s, wide, x, hu, j);
                let before = s.load(&h[j..]);
                let u = s.mul(u, s.splat(a));
                s.store(s.mul_add(u, s.sub(n, before), before), &mut h[j..]);
            }
        }
    }
}

/// The part of the backward step that is not a product: `dp`, `da`, `dh * (1 - u)` in place of
/// `dh`, and `dx`, to which the task adds.
struct StepBackward<'a> {
    cell: &'a Padded<'a>,
    active: &'a [usize],
    t: usize,
    h: &'a [f32],
    hu: &'a [f32],
    dh: &'a mut [f32],
    dp: &'a mut [f32],
    dx: &'a mut [f32],
    first_input: usize,
    da: &'a mut [f32],
}

impl Kernel for StepBackward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let wide = self.cell.wide;
        let one = s.splat(1.0);
        for (k, &i) in self.active.iter().enumerate() {
            let (row, a) = self.cell.input(i, self.t);
            let x = &self.cell.x[row * 3 * wide..][..3 * wide];
            let hu = &self.hu[k * 3 * wide..][..3 * wide];
            let h = &self.h[k * wide..][..wide];
            let dh = &mut self.dh[k * wide..][..wide];
            let dp = &mut self.dp[k * 3 * wide..][..3 * wide];
            let dx = &mut self.dx[(row - self.first_input) * 3 * wide..][..3 * wide];
            let mut da = s.zero();
            for j in (0..wide).step_by(S::LANES) {
                let [r, share, n] = gates(s, wide, x, hu, j);
                let u = s.mul(share, s.splat(a));
                let d = s.load(&dh[j..]);
                let du = s.mul(d, s.sub(n, s.load(&h[j..])));
                da = s.mul_add(du, share, da);
                let dz_n = s.mul(s.mul(d, u), s.sub(one, s.mul(n, n)));
                let dz_u = s.mul(du, s.mul(u, s.sub(one, share)));
                let dr = s.mul(dz_n, s.load(&hu[2 * wide + j..]));
                let dz_r = s.mul(dr, s.mul(r, s.sub(one, r)));
                s.store(s.mul(d, s.sub(one, u)), &mut dh[j..]);
                for (part, dz) in [dz_r, dz_u, dz_n].into_iter().enumerate() {
                    let at = part * wide + j;
                    s.store(s.add(s.load(&dx[at..]), dz), &mut dx[at..]);
                    s.store(if part == 2 { s.mul(dz, r) } else { dz }, &mut dp[at..]);
                }
            }
            self.da[k] = s.sum(da);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, differences, random, wide};
    use super::*;

    /// A part of a vector, a full one, and more than one.
    const WIDTHS: [usize; 3] = [3, 16, 17];
    /// Overlapping sequences, some empty, more than one task without and with a gate.
    fn cases() -> Vec<(Vec<u32>, Vec<u32>, usize)> {
        let packed = |lengths: &[u32]| {
            let mut offsets = vec![0];
            for length in lengths {
                offsets.push(offsets.last().unwrap() + length);
            }
            offsets
        };
        let lengths: Vec<u32> = (0..18).map(|i| i * 5 % 4).collect();
        let offsets = packed(&lengths);
        let distinct = (offsets[..18].to_vec(), offsets.clone(), offsets[18] as usize);
        let lengths: Vec<u32> = (0..70).map(|i| i * 7 % 5).collect();
        let shared = ((0..70).map(|i| i / 10).collect(), packed(&lengths), 6 + 4);
        vec![distinct, shared, (vec![0, 2], vec![0, 0, 0], 2), (vec![], vec![0], 0)]
    }

    /// The equations at the head of the file, one value at a time, in f64.
    struct Naive<'a> {
        width: usize,
        sequences: Sequences<'a>,
    }

    impl Naive<'_> {
        /// States of all steps and last states.
        fn states(&self, x: &[f64], u: &[f64], gate: &[f64]) -> [Vec<f64>; 2] {
            let d = self.width;
            let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
            let (mut every, mut last) = (vec![], vec![]);
            for i in 0..self.sequences.count() {
                let mut h = vec![0.0; d];
                for t in 0..self.sequences.length(i) {
                    let x = &x[(self.sequences.first[i] as usize + t) * 3 * d..];
                    let a = gate[self.sequences.offsets[i] as usize + t];
                    let hu = |j: usize| (0..d).map(|l| h[l] * u[l * 3 * d + j]).sum::<f64>();
                    h = (0..d)
                        .map(|j| {
                            let r = sigmoid(x[j] + hu(j));
                            let u = a * sigmoid(x[d + j] + hu(d + j));
                            let n = (x[2 * d + j] + r * hu(2 * d + j)).tanh();
                            (1.0 - u) * h[j] + u * n
                        })
                        .collect();
                    every.extend(&h);
                }
                last.extend(&h);
            }
            [every, last]
        }
    }

    #[test]
    fn states_and_gradients_agree_with_the_equations_in_f64() {
        for (case, (first, offsets, inputs)) in cases().into_iter().enumerate() {
            for width in WIDTHS {
                let sequences = Sequences { first: &first, offsets: &offsets };
                let steps = sequences.steps();
                let x = random(inputs * 3 * width, 1);
                let u = random(width * 3 * width, 2);
                let gate: Vec<f32> = random(steps, 3).iter().map(|a| a.abs()).collect();
                let [d_every, d_last] = [random(steps * width, 4), random(first.len() * width, 5)];
                for gate in [None, Some(&gate[..])] {
                    let recurrence = Recurrence { width, sequences, x: &x, u: &u, gate };
                    let ones = vec![1.0; steps];
                    let naive = Naive { width, sequences };
                    let at = [wide(&x), wide(&u), wide(gate.unwrap_or(&ones))];
                    let [want_every, want_last] = naive.states(&at[0], &at[1], &at[2]);
                    let mut every = vec![f32::NAN; steps * width];
                    let mut last = vec![f32::NAN; first.len() * width];
                    recurrence.forward(States { every: Some(&mut every), last: Some(&mut last) });
                    assert_close("every", &every, &want_every, 1e-5);
                    assert_close("last", &last, &want_last, 1e-5);

                    let mut dx = vec![f32::NAN; x.len()];
                    let mut du = vec![f32::NAN; u.len()];
                    let mut dgate = vec![f32::NAN; steps];
                    let gradients = RecurrenceGradients {
                        dx: &mut dx,
                        du: &mut du,
                        dgate: gate.is_some().then_some(&mut dgate[..]),
                    };
                    let d_states = States { every: Some(&d_every[..]), last: Some(&d_last[..]) };
                    recurrence.backward(&every, d_states, gradients);
                    let loss = |at: &[Vec<f64>]| {
                        let [every, last] = naive.states(&at[0], &at[1], &at[2]);
                        let dot = |x: &[f64], d: &[f32]| -> f64 {
                            x.iter().zip(d).map(|(x, &d)| x * f64::from(d)).sum()
                        };
                        dot(&every, &d_every) + dot(&last, &d_last)
                    };
                    let want = differences(&loss, &at);
                    assert_close(&format!("case {case}, width {width}: dx"), &dx, &want[0], 5e-5);
                    assert_close("du", &du, &want[1], 5e-5);
                    if gate.is_some() {
                        assert_close("dgate", &dgate, &want[2], 5e-5);
                    }
                }
            }
        }
    }

    /// The paper's reading of the attention weight, not that of the published code.
    #[test]
    fn a_gate_of_0_keeps_the_state_and_a_gate_of_1_is_a_gru() {
        let (width, first, offsets) = (5, [0, 1], [0, 4, 6]);
        let sequences = Sequences { first: &first, offsets: &offsets };
        let (x, u) = (random(4 * 3 * width, 1), random(width * 3 * width, 2));
        let states = |gate: Option<&[f32]>| {
            let mut every = vec![f32::NAN; 6 * width];
            let recurrence = Recurrence { width, sequences, x: &x, u: &u, gate };
            recurrence.forward(States { every: Some(&mut every), last: None });
            every
        };
        assert_eq!(states(Some(&[1.0; 6])), states(None));
        let kept = states(Some(&[1.0, 1.0, 0.0, 0.0, 0.0, 1.0]));
        assert_eq!(kept[width..2 * width], kept[3 * width..4 * width]);
        assert!(kept[4 * width..5 * width].iter().all(|&h| h == 0.0));
        assert!(kept[5 * width..].iter().all(|&h| h != 0.0));
    }

    #[test]
    fn gradients_are_bitwise_equal_for_any_number_of_threads() {
        let first: Vec<u32> = (0..300).map(|i| i / 7).collect();
        let offsets: Vec<u32> = (0..=300).map(|i| i * 6).collect();
        let (width, inputs) = (20, 50);
        let sequences = Sequences { first: &first, offsets: &offsets };
        let (x, u) = (random(inputs * 3 * width, 1), random(width * 3 * width, 2));
        let (gate, d_last) = (random(1800, 3), random(300 * width, 4));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("threads");
            pool.install(|| {
                let recurrence = Recurrence { width, sequences, x: &x, u: &u, gate: Some(&gate) };
                let mut every = vec![0.0; 1800 * width];
                recurrence.forward(States { every: Some(&mut every), last: None });
                let (mut dx, mut du) = (vec![0.0; x.len()], vec![0.0; u.len()]);
                let mut dgate = vec![0.0; 1800];
                let out = RecurrenceGradients { dx: &mut dx, du: &mut du, dgate: Some(&mut dgate) };
                recurrence.backward(&every, States { every: None, last: Some(&d_last) }, out);
                [every, dx, du, dgate]
            })
        };
        assert!(run(1) == run(3));
    }
}
