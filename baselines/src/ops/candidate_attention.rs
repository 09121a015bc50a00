//! Attention, not causal, within the sequences `[candidate; tokens of a prefix]`, for all
//! candidates of a prefix at once.
//!
//! The candidates of a prefix stand beside the same tokens. With `p`, `lse` and `h` the weights,
//! the log-sum-exp and the result of attention among the tokens alone, a candidate `c` adds one key
//! to each query `i`, and one query:
//!
//! ```text
//! w_i = sigmoid(q_i . k_c - lse_i)                       o_i = h_i + w_i (v_c - h_i)
//! a   = softmax over (c, tokens j) of q_c . k            o_c = a_c v_c + sum_j a_j v_j
//! ```
//!
//! Logits are scaled by `1 / sqrt(head_dim)`. Backward, from `do`, first for each candidate, with
//! sums over the candidates of the prefix in `dh` and `dlse`:
//!
//! ```text
//! dl  = w_i (1 - w_i) do_i . (v_c - h_i)                 dq_i += dl k_c     dk_c += dl q_i
//! dh_i += (1 - w_i) do_i     dlse_i -= dl                dv_c += w_i do_i
//! ```
//!
//! then once for the prefix: `dl_ij = p_ij (dh_i . v_j - dh_i . h_i + dlse_i)`, and
//! `dv_j += p_ij dh_i`. The query of the candidate is that of plain attention. So the cost of a
//! (prefix, candidate) is linear in its length, and queries, keys and values are made once for each
//! event and candidate.
//!
//! A prefix is a task. Nothing but the inputs is kept for the backward pass.

use super::gru::sigmoid;
use super::rows::{pad_columns, transpose_padded};
use dfar::device::cpu::elementwise::{add_assign, unpad_rows};
use dfar::device::cpu::product::{Finish, Left, product};
use dfar::device::cpu::scratch::padded;
use dfar::simd::{Kernel, Simd, dispatch};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::Range;

/// The sequences: for each prefix its tokens, and the candidates that stand beside them.
#[derive(Clone, Debug, Default)]
pub struct CandidateSequences {
    /// `[G]` tokens of each prefix, as rows of queries, keys and values.
    pub tokens: Vec<Range<usize>>,
    /// `[G]` rows of each prefix, as indices of `candidate`.
    pub rows: Vec<Range<usize>>,
    /// `[R]` candidate of each row, as a row of queries, keys and values.
    pub candidate: Vec<usize>,
}

impl CandidateSequences {
    /// Number of tokens of all sequences, `T`.
    pub fn len(&self) -> usize {
        (0..self.tokens.len()).map(|g| self.len_of(g)).sum()
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.candidate.is_empty()
    }

    /// `y[t] = x[row of token t]` for `x: [events and candidates, width]`, `y: [T, width]`.
    pub fn gather(&self, width: usize, x: &[f32], mut y: &mut [f32]) {
        let mut jobs = Vec::new();
        for g in 0..self.tokens.len() {
            jobs.push((g, y.split_off_mut(..self.len_of(g) * width).expect("y is [T, width]")));
        }
        jobs.into_par_iter().for_each(|(g, y)| {
            let tokens = &x[self.tokens[g].start * width..self.tokens[g].end * width];
            let sequences = y.chunks_exact_mut(width + tokens.len());
            for (&c, y) in self.candidate[self.rows[g].clone()].iter().zip(sequences) {
                y[..width].copy_from_slice(&x[c * width..][..width]);
                y[width..].copy_from_slice(tokens);
            }
        });
    }

    /// The gradient of [`CandidateSequences::gather`]; `dx` is overwritten.
    pub fn gather_backward(&self, width: usize, mut dy: &[f32], dx: &mut [f32]) {
        let mut jobs = Vec::new();
        for g in 0..self.tokens.len() {
            jobs.push((g, dy.split_off(..self.len_of(g) * width).expect("dy is [T, width]")));
        }
        let sum = |(g, dy): (usize, &[f32])| {
            let tokens = self.tokens[g].len() * width;
            let mut partial = vec![0.0; tokens + self.rows[g].len() * width];
            let (of_tokens, of_candidates) = partial.split_at_mut(tokens);
            for (dy, d_c) in dy.chunks_exact(width + tokens).zip(of_candidates.chunks_exact_mut(width)) {
                d_c.copy_from_slice(&dy[..width]);
                add_assign(&dy[width..], of_tokens);
            }
            partial
        };
        let partials: Vec<Vec<f32>> = jobs.into_par_iter().map(sum).collect();
        dx.fill(0.0);
        partials.iter().enumerate().for_each(|(g, partial)| self.add_partial(g, width, partial, dx));
    }

    /// Adds the gradients of the tokens of prefix `g`, then of its rows, to `out`.
    fn add_partial(&self, g: usize, width: usize, partial: &[f32], out: &mut [f32]) {
        let tokens = &self.tokens[g];
        let (of_tokens, of_candidates) = partial.split_at(tokens.len() * width);
        add_assign(of_tokens, &mut out[tokens.start * width..tokens.end * width]);
        for (&c, d) in self.candidate[self.rows[g].clone()].iter().zip(of_candidates.chunks_exact(width)) {
            add_assign(d, &mut out[c * width..][..width]);
        }
    }

    /// Number of tokens of the sequences of prefix `g`.
    fn len_of(&self, g: usize) -> usize {
        self.rows[g].len() * (1 + self.tokens[g].len())
    }
}

/// Queries, keys and values, `[events and candidates, D]` each, and their sequences.
#[derive(Clone, Copy)]
pub struct CandidateAttention<'a> {
    /// Number of heads.
    pub heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// The sequences.
    pub sequences: &'a CandidateSequences,
    /// Queries, keys, values.
    pub qkv: [&'a [f32]; 3],
}

impl CandidateAttention<'_> {
    /// Writes `o: [T, D]`, the candidate first in each sequence.
    ///
    /// # Panics
    /// If a length contradicts the sequences.
    pub fn forward(&self, mut o: &mut [f32]) {
        let padded = self.padded();
        let width = self.heads * self.head_dim;
        assert_eq!(o.len(), self.sequences.len() * width, "o is not [T, D]");
        let mut jobs = Vec::new();
        for g in 0..self.sequences.tokens.len() {
            jobs.push((g, o.split_off_mut(..self.sequences.len_of(g) * width).expect("o is [T, D]")));
        }
        jobs.into_par_iter().for_each(|(g, o)| {
            if padded.wide == self.head_dim {
                padded.forward(g, o);
            } else {
                let mut wide = vec![0.0; o.len() / self.head_dim * padded.wide];
                padded.forward(g, &mut wide);
                unpad_rows(&wide, self.head_dim, padded.wide, o);
            }
        });
    }

    /// Gradients of queries, keys and values, overwritten, from `d_o: [T, D]`.
    ///
    /// # Panics
    /// If a length contradicts the sequences.
    pub fn backward(&self, d_o: &[f32], d_qkv: [&mut [f32]; 3]) {
        let padded = self.padded();
        let Self { heads, head_dim, sequences, .. } = *self;
        assert_eq!(d_o.len(), sequences.len() * heads * head_dim, "d_o is not [T, D]");
        let mut d_o = d_o;
        let mut jobs = Vec::new();
        for g in 0..sequences.tokens.len() {
            let len = sequences.len_of(g) * heads * head_dim;
            jobs.push((g, d_o.split_off(..len).expect("d_o is [T, D]")));
        }
        let run = |(g, d_o)| padded.backward(g, &pad_columns(d_o, head_dim, padded.wide));
        let partials: Vec<[Vec<f32>; 3]> = jobs.into_par_iter().map(run).collect();
        let row = heads * padded.wide;
        let sum = |(part, out): (usize, &mut [f32])| {
            let mut wide = vec![0.0; out.len() / head_dim * padded.wide];
            for (g, partial) in partials.iter().enumerate() {
                sequences.add_partial(g, row, &partial[part], &mut wide);
            }
            unpad_rows(&wide, head_dim, padded.wide, out);
        };
        d_qkv.into_par_iter().enumerate().for_each(sum);
    }

    fn padded(&self) -> Padded<'_> {
        let wide = padded(self.head_dim);
        let qkv = self.qkv.map(|x| pad_columns(x, self.head_dim, wide));
        let scale = 1.0 / (self.head_dim as f32).sqrt();
        Padded { heads: self.heads, head_dim: self.head_dim, wide, scale, sequences: self.sequences, qkv }
    }
}

/// Heads of `head_dim` values, `wide` apart.
struct Padded<'a> {
    heads: usize,
    head_dim: usize,
    wide: usize,
    scale: f32,
    sequences: &'a CandidateSequences,
    qkv: [Cow<'a, [f32]>; 3],
}

/// One head of one prefix of `n` tokens and `m` candidates.
struct Head<'a> {
    n: usize,
    m: usize,
    /// Distance between rows of one score for each token, and one for the candidate.
    np: usize,
    /// Distance between rows of one score for each candidate.
    mp: usize,
    /// Distance between the tokens of `q`, `k`, `v`.
    row: usize,
    wide: usize,
    head_dim: usize,
    scale: f32,
    /// The tokens.
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// `[m, wide]` the candidates.
    qc: Vec<f32>,
    kc: Vec<f32>,
    vc: Vec<f32>,
    /// `[n, np]` weights among the tokens.
    p: Vec<f32>,
    /// `[n, wide]` result of attention among the tokens.
    h: Vec<f32>,
    /// `[n, mp]` weight of each candidate for each token.
    w: Vec<f32>,
    /// `[m, np]` weights of each candidate's query, its own in column `n`.
    a: Vec<f32>,
}

impl Padded<'_> {
    fn head(&self, g: usize, head: usize) -> Head<'_> {
        let Self { wide, head_dim, scale, sequences, .. } = *self;
        let row = self.heads * wide;
        let tokens = sequences.tokens[g].clone();
        let candidates = &sequences.candidate[sequences.rows[g].clone()];
        let (n, m) = (tokens.len(), candidates.len());
        let [q, k, v] = self.qkv.each_ref().map(|x| &x[(tokens.start * row + head * wide).min(x.len())..]);
        let [qc, kc, vc] = self.qkv.each_ref().map(|x| {
            let of = |&c: &usize| x[c * row + head * wide..][..wide].iter().copied();
            candidates.iter().flat_map(of).collect::<Vec<f32>>()
        });
        let (np, mp) = (padded(n + 1), padded(m));
        let mut p = vec![0.0; n * np];
        let mut w = vec![0.0; n * mp];
        let mut a = vec![0.0; m * np];
        let mut h = vec![0.0; n * wide];
        let mut lse = vec![0.0; n];
        let kt = transposed(k, n, row, wide, np);
        let kct = transpose_padded(&kc, wide, mp);
        product([n, n, head_dim], Left::rows(q, row), (&kt, np), (&mut p, np), Finish::Store);
        dispatch(Softmax { valid: n, row: np, scale, x: &mut p, lse: &mut lse });
        product([n, head_dim, n], Left::rows(&p, np), (v, row), (&mut h, wide), Finish::Store);
        product([n, m, head_dim], Left::rows(q, row), (&kct, mp), (&mut w, mp), Finish::Store);
        dispatch(Gate { row: mp, scale, lse: &lse, x: &mut w });
        product([m, n, head_dim], Left::rows(&qc, wide), (&kt, np), (&mut a, np), Finish::Store);
        for ((a, q), k) in a.chunks_exact_mut(np).zip(qc.chunks_exact(wide)).zip(kc.chunks_exact(wide)) {
            a[n] = dot(q, k);
        }
        dispatch(Softmax { valid: n + 1, row: np, scale, x: &mut a, lse: &mut vec![0.0; m] });
        Head { n, m, np, mp, row, wide, head_dim, scale, q, k, v, qc, kc, vc, p, h, w, a }
    }

    /// `o` of the sequences of prefix `g`.
    fn forward(&self, g: usize, o: &mut [f32]) {
        for head in 0..self.heads {
            self.head(g, head).forward(&mut o[head * self.wide..]);
        }
    }

    /// Gradients of queries, keys and values of prefix `g`: of its tokens, then of its rows.
    fn backward(&self, g: usize, d_o: &[f32]) -> [Vec<f32>; 3] {
        let (n, m) = (self.sequences.tokens[g].len(), self.sequences.rows[g].len());
        let mut out = [(); 3].map(|()| vec![0.0; (n + m) * self.heads * self.wide]);
        for head in 0..self.heads {
            let gradients = self.head(g, head).backward(&d_o[(head * self.wide).min(d_o.len())..]);
            for (of_head, out) in gradients.into_iter().zip(&mut out) {
                let rows = out.chunks_exact_mut(self.heads * self.wide);
                for (x, row) in of_head.chunks_exact(self.wide).zip(rows) {
                    row[head * self.wide..][..self.wide].copy_from_slice(x);
                }
            }
        }
        out
    }
}

impl Head<'_> {
    fn forward(&self, o: &mut [f32]) {
        let Self { n, m, np, row, wide, head_dim, .. } = *self;
        let mut of_candidates = vec![0.0; m * wide];
        let a = Left::rows(&self.a, np);
        product([m, head_dim, n], a, (self.v, row), (&mut of_candidates, wide), Finish::Store);
        for (r, o_c) in of_candidates.chunks_exact(wide).enumerate() {
            let own = self.a[r * np + n];
            let out = &mut o[r * (1 + n) * row..][..wide];
            out.copy_from_slice(o_c);
            add_scaled(own, &self.vc[r * wide..][..wide], out);
        }
        dispatch(Blend { head: self, o });
    }

    /// Gradients of queries, keys and values: `[n + m, wide]` each, tokens first.
    fn backward(&self, d_o: &[f32]) -> [Vec<f32>; 3] {
        let Self { n, m, np, mp, row, wide, head_dim, scale, q, k, .. } = *self;
        let zeros = |rows: usize| vec![0.0; rows * wide];
        let mut gradients = [(); 3].map(|()| zeros(n + m));
        let [(dq, dq_c), (dk, dk_c), (dv, dv_c)] = gradients.each_mut().map(|d| d.split_at_mut(n * wide));

        // Each candidate as a key of the tokens.
        let (mut dh, mut d_lse, mut dl) = (zeros(n), vec![0.0; n], vec![0.0; n * mp]);
        dispatch(BlendBackward { head: self, d_o, dh: &mut dh, d_lse: &mut d_lse, dl: &mut dl, dv_c });
        product([n, head_dim, m], Left::rows(&dl, mp), (&self.kc, wide), (dq, wide), Finish::Store);
        product([m, head_dim, n], Left::transposed(&dl, mp), (q, row), (dk_c, wide), Finish::Store);

        // The tokens among themselves.
        let vt = transposed(self.v, n, row, wide, np);
        let mut dp = vec![0.0; n * np];
        product([n, n, head_dim], Left::rows(&dh, wide), (&vt, np), (&mut dp, np), Finish::Store);
        for (i, dp) in dp.chunks_exact_mut(np).enumerate() {
            let shift = d_lse[i] - dot(&dh[i * wide..][..wide], &self.h[i * wide..][..wide]);
            let p = &self.p[i * np..][..np];
            dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = p * (*dp + shift));
        }
        product([n, head_dim, n], Left::rows(&dp, np), (k, row), (dq, wide), Finish::Add);
        product([n, head_dim, n], Left::transposed(&dp, np), (q, row), (dk, wide), Finish::Store);
        product([n, head_dim, n], Left::transposed(&self.p, np), (&dh, wide), (dv, wide), Finish::Store);

        // Each candidate as a query.
        let step = (1 + n) * row;
        let mut ds = vec![0.0; m * np];
        product([m, n, head_dim], Left::rows(d_o, step), (&vt, np), (&mut ds, np), Finish::Store);
        for (r, ds) in ds.chunks_exact_mut(np).enumerate() {
            let d_o = &d_o[r * step..][..wide];
            ds[n] = dot(d_o, &self.vc[r * wide..][..wide]);
            let a = &self.a[r * np..][..np];
            let mean = dot(a, ds);
            ds.iter_mut().zip(a).for_each(|(ds, a)| *ds = a * (*ds - mean));
            add_scaled(a[n], d_o, &mut dv_c[r * wide..][..wide]);
            add_scaled(ds[n], &self.qc[r * wide..][..wide], &mut dk_c[r * wide..][..wide]);
        }
        product([m, head_dim, n], Left::rows(&ds, np), (k, row), (dq_c, wide), Finish::Store);
        for (r, ds) in ds.chunks_exact(np).enumerate() {
            add_scaled(ds[n], &self.kc[r * wide..][..wide], &mut dq_c[r * wide..][..wide]);
        }
        product([n, head_dim, m], Left::transposed(&ds, np), (&self.qc, wide), (dk, wide), Finish::Add);
        product([n, head_dim, m], Left::transposed(&self.a, np), (d_o, step), (dv, wide), Finish::Add);
        gradients[..2].iter_mut().flatten().for_each(|d| *d *= scale);
        gradients
    }
}

/// Rows `row` apart as columns of rows of `columns` values: `[wide, columns]`.
fn transposed(x: &[f32], rows: usize, row: usize, wide: usize, columns: usize) -> Vec<f32> {
    let mut out = vec![0.0; wide * columns];
    for (i, x) in x.chunks(row).take(rows).enumerate() {
        for (out, x) in out.chunks_exact_mut(columns).zip(x) {
            out[i] = *x;
        }
    }
    out
}

fn dot(x: &[f32], y: &[f32]) -> f32 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

/// `y += factor * x`
fn add_scaled(factor: f32, x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += factor * x);
}

/// Softmax of `scale * x` over the first `valid` values of each row; the others become 0.
struct Softmax<'a> {
    valid: usize,
    row: usize,
    scale: f32,
    x: &'a mut [f32],
    lse: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { valid, row, scale, x, lse } = self;
        let (scale, below) = (s.splat(scale), s.splat(f32::NEG_INFINITY));
        for (x, lse) in x.chunks_exact_mut(row).zip(lse) {
            let mut max = below;
            for (j, x) in x.chunks_exact_mut(S::LANES).enumerate() {
                let left = valid.saturating_sub(j * S::LANES);
                let scaled = s.first(left, s.mul(s.load(x), scale), below);
                max = s.max(max, scaled);
                s.store(scaled, x);
            }
            let largest = s.max_lane(max);
            let mut total = s.zero();
            for x in x.chunks_exact_mut(S::LANES) {
                let shifted = s.sub(s.load(x), s.splat(largest));
                let value = s.exp2(s.mul(shifted, s.splat(std::f32::consts::LOG2_E)));
                total = s.add(total, value);
                s.store(value, x);
            }
            let total = s.sum(total);
            *lse = largest + total.ln();
            let inverse = s.splat(1.0 / total);
            for x in x.chunks_exact_mut(S::LANES) {
                s.store(s.mul(s.load(x), inverse), x);
            }
        }
    }
}

/// `x = sigmoid(scale * x - lse)`, one `lse` for each row.
struct Gate<'a> {
    row: usize,
    scale: f32,
    lse: &'a [f32],
    x: &'a mut [f32],
}

impl Kernel for Gate<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { row, scale, lse, x } = self;
        for (x, lse) in x.chunks_exact_mut(row).zip(lse) {
            for x in x.chunks_exact_mut(S::LANES) {
                let logit = s.mul_sub(s.load(x), s.splat(scale), s.splat(*lse));
                s.store(sigmoid(s, logit), x);
            }
        }
    }
}

/// `o_i = h_i + w_i (v_c - h_i)` of every candidate.
struct Blend<'a> {
    head: &'a Head<'a>,
    o: &'a mut [f32],
}

impl Kernel for Blend<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Head { n, m, mp, row, wide, .. } = *self.head;
        for r in 0..m {
            let vc = &self.head.vc[r * wide..][..wide];
            for i in 0..n {
                let w = s.splat(self.head.w[i * mp + r]);
                let h = &self.head.h[i * wide..][..wide];
                let o = &mut self.o[(r * (1 + n) + 1 + i) * row..][..wide];
                for j in (0..wide).step_by(S::LANES) {
                    let h = s.load(&h[j..]);
                    s.store(s.mul_add(w, s.sub(s.load(&vc[j..]), h), h), &mut o[j..]);
                }
            }
        }
    }
}

/// Gradients of [`Blend`]: `dh` and `d_lse`, summed over the candidates; `dl` of the logits of `w`,
/// and `dv_c`, to which it adds.
struct BlendBackward<'a> {
    head: &'a Head<'a>,
    d_o: &'a [f32],
    dh: &'a mut [f32],
    d_lse: &'a mut [f32],
    dl: &'a mut [f32],
    dv_c: &'a mut [f32],
}

impl Kernel for BlendBackward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { head, d_o, dh, d_lse, dl, dv_c } = self;
        let Head { n, m, mp, row, wide, .. } = *head;
        for r in 0..m {
            let vc = &head.vc[r * wide..][..wide];
            let dvc = &mut dv_c[r * wide..][..wide];
            for i in 0..n {
                let weight = head.w[i * mp + r];
                let w = s.splat(weight);
                let h = &head.h[i * wide..][..wide];
                let d_o = &d_o[(r * (1 + n) + 1 + i) * row..][..wide];
                let dh = &mut dh[i * wide..][..wide];
                let mut dw = s.zero();
                for j in (0..wide).step_by(S::LANES) {
                    let d = s.load(&d_o[j..]);
                    dw = s.mul_add(d, s.sub(s.load(&vc[j..]), s.load(&h[j..])), dw);
                    let to_candidate = s.mul(w, d);
                    s.store(s.add(s.load(&dvc[j..]), to_candidate), &mut dvc[j..]);
                    s.store(s.add(s.load(&dh[j..]), s.sub(d, to_candidate)), &mut dh[j..]);
                }
                let d = s.sum(dw) * weight * (1.0 - weight);
                dl[i * mp + r] = d;
                d_lse[i] -= d;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, differences, random, wide};
    use super::*;

    /// Prefixes of two packed sequences of 4 and 3 tokens, and candidates in the rows behind them.
    /// An empty prefix, and candidates that several prefixes share.
    fn sequences() -> CandidateSequences {
        CandidateSequences {
            tokens: vec![0..0, 0..3, 0..4, 4..7],
            rows: vec![0..2, 2..5, 5..6, 6..9],
            candidate: vec![7, 8, 7, 8, 9, 9, 10, 11, 10],
        }
    }
    const ROWS: usize = 12;

    /// Attention as in the first line of the file, a value at a time.
    fn naive(heads: usize, dim: usize, qkv: &[Vec<f64>]) -> Vec<f64> {
        let (sequences, width) = (sequences(), heads * dim);
        let mut o = vec![];
        for (tokens, rows) in sequences.tokens.iter().zip(&sequences.rows) {
            for r in rows.clone() {
                let own: Vec<usize> = std::iter::once(sequences.candidate[r]).chain(tokens.clone()).collect();
                for (&i, head) in own.iter().flat_map(|i| (0..heads).map(move |head| (i, head * dim))) {
                    let at = |x: usize, row: usize, l: usize| qkv[x][row * width + head + l];
                    let logit = |j: usize| (0..dim).map(|l| at(0, i, l) * at(1, j, l)).sum::<f64>();
                    let e: Vec<f64> = own.iter().map(|&j| (logit(j) / (dim as f64).sqrt()).exp()).collect();
                    let sum: f64 = e.iter().sum();
                    let of = |l| own.iter().zip(&e).map(move |(&j, e)| e * at(2, j, l)).sum::<f64>() / sum;
                    o.extend((0..dim).map(of));
                }
            }
        }
        o
    }

    #[test]
    fn tokens_are_gathered_candidate_first_and_their_gradients_summed() {
        let sequences = sequences();
        let x: Vec<f32> = (0..ROWS).map(|x| x as f32).collect();
        let mut y = vec![f32::NAN; sequences.len()];
        sequences.gather(1, &x, &mut y);
        assert_eq!(y[..10], [7.0, 8.0, 7.0, 0.0, 1.0, 2.0, 8.0, 0.0, 1.0, 2.0]);
        assert_eq!(y[y.len() - 4..], [10.0, 4.0, 5.0, 6.0]);
        let mut dx = vec![f32::NAN; ROWS];
        sequences.gather_backward(1, &vec![1.0; y.len()], &mut dx);
        assert_eq!(dx, [4.0, 4.0, 4.0, 1.0, 3.0, 3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 1.0]);
    }

    #[test]
    fn attention_and_its_gradients_agree_with_the_definition_in_f64() {
        for (heads, head_dim) in [(1, 16), (2, 3), (3, 17)] {
            let (sequences, width) = (sequences(), heads * head_dim);
            // Queries are large, so that the weights differ.
            let q: Vec<f32> = random(ROWS * width, 1).iter().map(|q| 3.0 * q).collect();
            let (k, v) = (random(ROWS * width, 2), random(ROWS * width, 3));
            let attention = CandidateAttention { heads, head_dim, sequences: &sequences, qkv: [&q, &k, &v] };
            let mut o = vec![f32::NAN; sequences.len() * width];
            attention.forward(&mut o);
            let at = [wide(&q), wide(&k), wide(&v)];
            assert_close("o", &o, &naive(heads, head_dim, &at), 1e-5);
            let d_o = random(o.len(), 4);
            let mut gradients = [(); 3].map(|()| vec![f32::NAN; ROWS * width]);
            attention.backward(&d_o, gradients.each_mut().map(|d| &mut d[..]));
            let loss = |at: &[Vec<f64>]| -> f64 {
                naive(heads, head_dim, at).iter().zip(&d_o).map(|(o, &d)| o * f64::from(d)).sum()
            };
            for (found, want) in gradients.iter().zip(differences(&loss, &at)) {
                assert_close(&format!("{heads} heads of {head_dim}"), found, &want, 5e-5);
            }
        }
    }
}
