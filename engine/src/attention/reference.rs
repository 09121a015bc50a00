//! The naive operation: all scores of a sequence in memory, one loop per index of the formulas.
//!
//! [`forward`] and [`backward`] compute in f64; the tests compare the fused engine with them.
//! [`naive_forward`] and [`naive_backward`] are the same code in f32, the unfused baseline of the
//! benchmarks. Sequences run in parallel, and the code is compiled for the instruction set of the
//! fused engine.

use super::{
    AttentionError, FhaOptions, Gradients, Inputs, LabelMask, Normalization, Pairing, check::length,
};
use crate::simd::{Kernel, Simd, dispatch};
use rayon::prelude::*;

/// A floating-point type of the reference.
pub trait Real:
    Copy
    + Send
    + Sync
    + PartialOrd
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + std::ops::AddAssign
    + std::ops::MulAssign
    + From<f32>
{
    /// `e^self`
    fn exp(self) -> Self;
    /// Natural logarithm.
    fn ln(self) -> Self;
}

macro_rules! real {
    ($($float:ident)+) => {$(
        impl Real for $float {
            #[inline(always)]
            fn exp(self) -> Self {
                self.exp()
            }
            #[inline(always)]
            fn ln(self) -> Self {
                self.ln()
            }
        }
    )+};
}
real!(f32 f64);

/// [`Inputs`] in any precision.
#[derive(Clone, Copy, Debug)]
pub struct Tokens<'a, F> {
    /// Queries, `[N, H, d]`.
    pub q: &'a [F],
    /// Keys, `[N, H, d]`.
    pub k: &'a [F],
    /// Values, `[N, H, d]`.
    pub v: &'a [F],
}

/// The output and the logarithms of the denominators.
#[derive(Clone, Debug)]
pub struct Output<F> {
    /// `[N, Q, K, d]`
    pub o: Vec<F>,
    /// `[N, Q]`
    pub lse: Vec<F>,
}

/// Gradients of queries, keys and values, each `[N, H, d]`.
#[derive(Clone, Debug)]
pub struct InputGradients<F> {
    /// Of the queries.
    pub dq: Vec<F>,
    /// Of the keys.
    pub dk: Vec<F>,
    /// Of the values.
    pub dv: Vec<F>,
}

/// The forward pass in f64.
///
/// # Errors
/// As [`FhaOptions::check`].
pub fn forward(options: &FhaOptions, inputs: Inputs) -> Result<Output<f64>, AttentionError> {
    options.check(&inputs)?;
    let [q, k, v] = [inputs.q, inputs.k, inputs.v].map(widen);
    Ok(forward_in(options, Tokens { q: &q, k: &k, v: &v }, inputs.cu_seqlens, inputs.label))
}

/// The backward pass in f64, from the inputs and `d_o` (`[N, Q, K, d]`) alone.
///
/// # Errors
/// As [`FhaOptions::check`], and for a `d_o` of the wrong length.
pub fn backward(
    options: &FhaOptions,
    inputs: Inputs,
    d_o: &[f32],
) -> Result<InputGradients<f64>, AttentionError> {
    let tokens = options.check(&inputs)?;
    length("d_o", "[N, Q, K, d]", d_o.len(), options.output_len(tokens))?;
    let [q, k, v, d_o] = [inputs.q, inputs.k, inputs.v, d_o].map(widen);
    Ok(backward_in(options, Tokens { q: &q, k: &k, v: &v }, inputs.cu_seqlens, inputs.label, &d_o))
}

/// The forward pass in f32; arguments as [`super::forward`].
///
/// # Errors
/// As [`super::forward`].
pub fn naive_forward(
    options: &FhaOptions,
    inputs: Inputs,
    o: &mut [f32],
    lse: &mut [f32],
) -> Result<(), AttentionError> {
    options.check_outputs(&inputs, o.len(), lse.len())?;
    let Inputs { q, k, v, cu_seqlens, label } = inputs;
    let output = forward_in(options, Tokens { q, k, v }, cu_seqlens, label);
    o.copy_from_slice(&output.o);
    lse.copy_from_slice(&output.lse);
    Ok(())
}

/// The backward pass in f32. It recomputes the probabilities.
///
/// # Errors
/// As [`super::backward`].
pub fn naive_backward(
    options: &FhaOptions,
    inputs: Inputs,
    d_o: &[f32],
    gradients: Gradients,
) -> Result<(), AttentionError> {
    let tokens = options.check(&inputs)?;
    length("d_o", "[N, Q, K, d]", d_o.len(), options.output_len(tokens))?;
    for (name, found) in [("dq", gradients.dq.len()), ("dk", gradients.dk.len()), ("dv", gradients.dv.len())]
    {
        length(name, "[N, H, d]", found, inputs.q.len())?;
    }
    let Inputs { q, k, v, cu_seqlens, label } = inputs;
    let result = backward_in(options, Tokens { q, k, v }, cu_seqlens, label, d_o);
    gradients.dq.copy_from_slice(&result.dq);
    gradients.dk.copy_from_slice(&result.dk);
    gradients.dv.copy_from_slice(&result.dv);
    Ok(())
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

/// The forward pass in any precision. The caller has validated the arguments with
/// [`FhaOptions::check`].
pub fn forward_in<F: Real>(
    options: &FhaOptions,
    tokens: Tokens<F>,
    cu_seqlens: &[u32],
    label: &[u8],
) -> Output<F> {
    let parts: Vec<Output<F>> =
        sequences(options, tokens, cu_seqlens, label).map(|sequence| dispatch(Forward(sequence)).1).collect();
    Output { o: concat(&parts, |x| &x.o), lse: concat(&parts, |x| &x.lse) }
}

/// The backward pass in any precision. The caller has validated the arguments with
/// [`FhaOptions::check`] and the length of `d_o`, `[N, Q, K, d]`.
pub fn backward_in<F: Real>(
    options: &FhaOptions,
    tokens: Tokens<F>,
    cu_seqlens: &[u32],
    label: &[u8],
    d_o: &[F],
) -> InputGradients<F> {
    let width = options.output_len(1);
    let parts: Vec<InputGradients<F>> = sequences(options, tokens, cu_seqlens, label)
        .map(|sequence| {
            let d_o = &d_o[sequence.start * width..][..sequence.tokens * width];
            dispatch(Backward(sequence, d_o))
        })
        .collect();
    InputGradients {
        dq: concat(&parts, |x| &x.dq),
        dk: concat(&parts, |x| &x.dk),
        dv: concat(&parts, |x| &x.dv),
    }
}

fn concat<P, F: Copy>(parts: &[P], field: impl Fn(&P) -> &Vec<F>) -> Vec<F> {
    parts.iter().flat_map(|part| field(part).iter().copied()).collect()
}

/// One sequence of the batch.
#[derive(Clone, Copy)]
struct Sequence<'a, F> {
    options: &'a FhaOptions,
    start: usize,
    tokens: usize,
    q: &'a [F],
    k: &'a [F],
    v: &'a [F],
    label: &'a [u8],
}

fn sequences<'a, F: Real>(
    options: &'a FhaOptions,
    all: Tokens<'a, F>,
    cu_seqlens: &'a [u32],
    label: &'a [u8],
) -> impl IndexedParallelIterator<Item = Sequence<'a, F>> {
    let width = options.heads * options.head_dim;
    cu_seqlens.par_windows(2).map(move |w| {
        let (start, end) = (w[0] as usize, w[1] as usize);
        let part = |x: &'a [F]| &x[start * width..end * width];
        let label = if options.label_mask == LabelMask::None { &[] } else { &label[start..end] };
        let (q, k, v) = (part(all.q), part(all.k), part(all.v));
        Sequence { options, start, tokens: end - start, q, k, v, label }
    })
}

impl<'a, F: Real> Sequence<'a, F> {
    /// Row of head `h` and token `t` in one of `q`, `k`, `v`.
    #[inline(always)]
    fn row(&self, x: &'a [F], t: usize, h: usize) -> &'a [F] {
        &x[(t * self.options.heads + h) * self.options.head_dim..][..self.options.head_dim]
    }

    #[inline(always)]
    fn group(&self, head: usize) -> u8 {
        u8::from(head >= self.options.heads / 2)
    }

    /// Head of slot `a` of query token `i`.
    #[inline(always)]
    fn query_head(&self, i: usize, a: usize) -> usize {
        match self.options.label_mask {
            LabelMask::Feedback => a + self.label[i] as usize * (self.options.heads / 2),
            LabelMask::None => a,
        }
    }

    /// Key head of slot `b` of query head `a`.
    #[inline(always)]
    fn key_head(&self, a: usize, b: usize) -> usize {
        match self.options.pairing {
            Pairing::Factorized => b,
            Pairing::PerHead => a,
        }
    }

    /// Whether the label mask keeps the pair.
    #[inline(always)]
    fn keep(&self, j: usize, key_head: usize) -> bool {
        self.options.label_mask == LabelMask::None || self.group(key_head) == self.label[j]
    }

    /// Whether the pair enters the denominator.
    #[inline(always)]
    fn inside(&self, i: usize, j: usize, key_head: usize) -> bool {
        (j <= i || !self.options.causal)
            && (self.options.normalization == Normalization::Joint || self.keep(j, key_head))
    }
}

#[inline(always)]
fn dot<F: Real>(a: &[F], b: &[F]) -> F {
    // Eight partial sums, so that the compiler can vectorize the loop.
    let zero = F::from(0.0);
    let mut sums = [zero; 8];
    let (a8, b8) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest = a8.remainder().iter().zip(b8.remainder());
    let mut sum = zero;
    for (&x, &y) in rest {
        sum += x * y;
    }
    for (x, y) in a8.zip(b8) {
        for lane in 0..8 {
            sums[lane] += x[lane] * y[lane];
        }
    }
    for part in sums {
        sum += part;
    }
    sum
}

#[inline(always)]
fn add_scaled<F: Real>(out: &mut [F], factor: F, x: &[F]) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out += factor * x;
    }
}

/// All probabilities `[T, Q, T, K]` of a sequence, and its output.
struct Forward<'a, F>(Sequence<'a, F>);

impl<F: Real> Kernel for Forward<'_, F> {
    type Output = (Vec<F>, Output<F>);

    #[inline(always)]
    fn run<S: Simd>(self, _: S) -> Self::Output {
        let s = self.0;
        let (t, d) = (s.tokens, s.options.head_dim);
        let (query_slots, key_slots) = (s.options.query_slots(), s.options.key_slots());
        let (zero, infinity) = (F::from(0.0), F::from(f32::INFINITY));
        let scale = F::from(s.options.scale);
        let mut p = vec![zero; t * query_slots * t * key_slots];
        let mut o = vec![zero; t * query_slots * key_slots * d];
        let mut lse = vec![zero - infinity; t * query_slots];
        for i in 0..t {
            for a in 0..query_slots {
                let row = i * query_slots + a;
                let head = s.query_head(i, a);
                let p = &mut p[row * t * key_slots..][..t * key_slots];
                let mut max = zero - infinity;
                for j in 0..t {
                    for b in 0..key_slots {
                        if s.inside(i, j, s.key_head(head, b)) {
                            let score = scale * dot(s.row(s.q, i, head), s.row(s.k, j, s.key_head(head, b)));
                            p[j * key_slots + b] = score;
                            if score > max {
                                max = score;
                            }
                        }
                    }
                }
                let mut sum = zero;
                for j in 0..t {
                    for b in 0..key_slots {
                        if s.inside(i, j, s.key_head(head, b)) {
                            let e = (p[j * key_slots + b] - max).exp();
                            p[j * key_slots + b] = e;
                            sum += e;
                        }
                    }
                }
                if max == zero - infinity && sum == zero {
                    continue; // no keys: output 0, lse -inf
                }
                lse[row] = max + sum.ln();
                for x in p.iter_mut() {
                    *x = *x / sum;
                }
                for j in 0..t {
                    for b in 0..key_slots {
                        let key_head = s.key_head(head, b);
                        if s.inside(i, j, key_head) && s.keep(j, key_head) {
                            let out = &mut o[(row * key_slots + b) * d..][..d];
                            add_scaled(out, p[j * key_slots + b], s.row(s.v, j, key_head));
                        }
                    }
                }
            }
        }
        (p, Output { o, lse })
    }
}

/// Gradients of a sequence from the gradient of its output.
struct Backward<'a, F>(Sequence<'a, F>, &'a [F]);

impl<F: Real> Kernel for Backward<'_, F> {
    type Output = InputGradients<F>;

    #[inline(always)]
    fn run<S: Simd>(self, simd: S) -> Self::Output {
        let Self(s, d_o) = self;
        let (p, Output { o, .. }) = Forward(s).run(simd);
        let (t, d) = (s.tokens, s.options.head_dim);
        let (query_slots, key_slots) = (s.options.query_slots(), s.options.key_slots());
        let (zero, scale) = (F::from(0.0), F::from(s.options.scale));
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![zero; t * s.options.heads * d]);
        for i in 0..t {
            for a in 0..query_slots {
                let row = i * query_slots + a;
                let head = s.query_head(i, a);
                let out = row * key_slots * d..(row + 1) * key_slots * d;
                let delta = dot(&d_o[out.clone()], &o[out]);
                for j in 0..t {
                    for b in 0..key_slots {
                        let key_head = s.key_head(head, b);
                        if !s.inside(i, j, key_head) {
                            continue;
                        }
                        let p = p[(row * t + j) * key_slots + b];
                        let d_o = &d_o[(row * key_slots + b) * d..][..d];
                        let at = |t: usize, h: usize| (t * s.options.heads + h) * d;
                        let mut dp = zero;
                        if s.keep(j, key_head) {
                            dp = dot(d_o, s.row(s.v, j, key_head));
                            add_scaled(&mut dv[at(j, key_head)..][..d], p, d_o);
                        }
                        let ds = scale * (p * (dp - delta));
                        add_scaled(&mut dq[at(i, head)..][..d], ds, s.row(s.k, j, key_head));
                        add_scaled(&mut dk[at(j, key_head)..][..d], ds, s.row(s.q, i, head));
                    }
                }
            }
        }
        InputGradients { dq, dk, dv }
    }
}
