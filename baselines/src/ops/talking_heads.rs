//! Talking-heads attention (Shazeer et al., 2020) over packed sequences, causal.
//!
//! ```text
//! l_h[i, j]  = q_i . k_j / sqrt(d)              of head h
//! l'_g       = sum_h l_h ML[h, g]
//! w_g        = softmax over j <= i of l'_g
//! w'_h       = sum_g w_g MW[g, h]
//! o_h[i]     = sum_(j <= i) w'_h[i, j] v_h[j]
//! ```
//!
//! Backward, from `do`:
//!
//! ```text
//! dw'_h = do_h v_h^T               dv_h = w'_h^T do_h
//! dw_g  = sum_h dw'_h MW[g, h]     dl'_g = w_g (dw_g - sum_j w_g dw_g)
//! dl_h  = sum_g dl'_g ML[h, g]     dq_h = dl_h k_h / sqrt(d)     dk_h = dl_h^T q_h / sqrt(d)
//! dMW[g, h] = sum w_g dw'_h        dML[h, g] = sum l_h dl'_g
//! ```
//!
//! A tile of queries keeps the `[rows, keys]` matrices of all heads in the first cache levels. The
//! backward pass recomputes them. Sequences run in parallel; a sequence is one task.

use dfar::device::Qkv;
use dfar::device::cpu::elementwise::exp_sum;
use dfar::device::cpu::product::{Finish, Left, product};
use dfar::device::cpu::scratch::{padded, with_scratch};
use dfar::simd::{Kernel, Simd, dispatch};
use rayon::prelude::*;

/// Queries of a tile.
const TILE: usize = 16;

/// Sizes and the mixing matrices, `[H, H]` each.
#[derive(Clone, Copy)]
pub struct TalkingHeads<'a> {
    /// Heads `H`.
    pub heads: usize,
    /// Width `d` of a head.
    pub head_dim: usize,
    /// `[B + 1]`
    pub cu_seqlens: &'a [u32],
    /// `ML`
    pub mix_logits: &'a [f32],
    /// `MW`
    pub mix_weights: &'a [f32],
}

/// Gradients, all overwritten.
pub struct TalkingGradients<'a> {
    /// `[N, H, d]`
    pub dq: &'a mut [f32],
    /// `[N, H, d]`
    pub dk: &'a mut [f32],
    /// `[N, H, d]`
    pub dv: &'a mut [f32],
    /// `[H, H]`
    pub d_mix_logits: &'a mut [f32],
    /// `[H, H]`
    pub d_mix_weights: &'a mut [f32],
}

impl TalkingHeads<'_> {
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// The output `o: [N, H, d]` and `lse: [N, H]`, the logarithms of the denominators of `w`.
    pub fn forward(&self, qkv: Qkv<&[f32]>, o: &mut [f32], lse: &mut [f32]) {
        let (o, lse) = (self.by_sequence(self.width(), o), self.by_sequence(self.heads, lse));
        (self.cu_seqlens.par_windows(2)).zip(o.into_par_iter().zip(lse)).for_each(|(bounds, (o, lse))| {
            let tokens = bounds[0] as usize..bounds[1] as usize;
            let rows = |x| slice(x, self.width(), &tokens);
            let [q, k, v] = [qkv.q, qkv.k, qkv.v].map(rows);
            if !tokens.is_empty() {
                self.forward_sequence(q, k, v, o, lse);
            }
        });
    }

    /// Gradients from `d_o: [N, H, d]`.
    pub fn backward(&self, qkv: Qkv<&[f32]>, lse: &[f32], d_o: &[f32], gradients: TalkingGradients) {
        let TalkingGradients { dq, dk, dv, d_mix_logits, d_mix_weights } = gradients;
        let split = |x| self.by_sequence(self.width(), x);
        let (dq, dk, dv) = (split(dq), split(dk), split(dv));
        let mixes: Vec<[Vec<f32>; 2]> = (self.cu_seqlens.par_windows(2))
            .zip(dq.into_par_iter().zip(dk).zip(dv))
            .map(|(bounds, ((dq, dk), dv))| {
                let tokens = bounds[0] as usize..bounds[1] as usize;
                let rows = |x| slice(x, self.width(), &tokens);
                let [q, k, v, d_o] = [qkv.q, qkv.k, qkv.v, d_o].map(rows);
                let lse = slice(lse, self.heads, &tokens);
                let mut mixes = [(); 2].map(|()| vec![0.0; self.heads * self.heads]);
                if !tokens.is_empty() {
                    self.backward_sequence([q, k, v, d_o], lse, [dq, dk, dv], &mut mixes);
                }
                mixes
            })
            .collect();
        for (which, out) in [d_mix_logits, d_mix_weights].into_iter().enumerate() {
            for (i, out) in out.iter_mut().enumerate() {
                *out = mixes.iter().map(|mixes| f64::from(mixes[which][i])).sum::<f64>() as f32;
            }
        }
    }

    fn by_sequence<'b>(&self, width: usize, mut x: &'b mut [f32]) -> Vec<&'b mut [f32]> {
        let rows = |bounds: &[u32]| (bounds[1] - bounds[0]) as usize * width;
        let split = |bounds| x.split_off_mut(..rows(bounds)).expect("one row for each token");
        self.cu_seqlens.windows(2).map(split).collect()
    }

    fn forward_sequence(&self, q: &[f32], k: &[f32], v: &[f32], o: &mut [f32], lse: &mut [f32]) {
        let Self { heads, head_dim: d, mix_logits, mix_weights, .. } = *self;
        let (tokens, width) = (q.len() / self.width(), self.width());
        let keys = Packed::new(self, k, 1.0);
        let values = Packed::new(self, v, 1.0);
        let queries = Packed::new(self, q, self.scale());
        let each = TILE * keys.long;
        with_scratch(2 * heads * each + TILE * keys.wide, |memory| {
            let (x, rest) = memory.split_at_mut(heads * each);
            let (y, out) = rest.split_at_mut(heads * each);
            for first in (0..tokens).step_by(TILE) {
                let tile = Tile { first, rows: TILE.min(tokens - first), long: keys.long, each };
                tile.products(&queries, &keys, x);
                tile.mix(heads, mix_logits, false, x, y);
                for (h, y) in y.chunks_exact_mut(each).enumerate() {
                    for (i, row) in y.chunks_exact_mut(tile.long).take(tile.rows).enumerate() {
                        let seen = first + i + 1;
                        let max = row[..seen].iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        let lse = &mut lse[(first + i) * heads + h];
                        *lse = max
                            + row[..seen].iter().map(|x| f64::from(x - max).exp()).sum::<f64>().ln() as f32;
                    }
                    tile.weights(heads, h, lse, y);
                }
                tile.mix(heads, mix_weights, false, y, x);
                for (h, x) in x.chunks_exact(each).enumerate() {
                    let right = (values.rows(h), values.wide);
                    let shape = [tile.rows, d, tile.keys()];
                    product(shape, Left::rows(x, tile.long), right, (out, values.wide), Finish::Store);
                    for (i, out) in out.chunks_exact(values.wide).take(tile.rows).enumerate() {
                        o[(first + i) * width + h * d..][..d].copy_from_slice(&out[..d]);
                    }
                }
            }
        });
    }

    fn backward_sequence(
        &self,
        [q, k, v, d_o]: [&[f32]; 4],
        lse: &[f32],
        [dq, dk, dv]: [&mut [f32]; 3],
        [d_mix_logits, d_mix_weights]: &mut [Vec<f32>; 2],
    ) {
        let Self { heads, head_dim: d, mix_logits, mix_weights, .. } = *self;
        let tokens = q.len() / self.width();
        let [keys, values, d_out] = [k, v, d_o].map(|x| Packed::new(self, x, 1.0));
        let queries = Packed::new(self, q, self.scale());
        let (long, wide) = (keys.long, keys.wide);
        let (each, sums) = (TILE * long, heads * tokens * wide);
        with_scratch(4 * heads * each + 3 * sums, |memory| {
            let (tiles, gradients) = memory.split_at_mut(4 * heads * each);
            gradients.fill(0.0);
            let (dq_wide, rest) = gradients.split_at_mut(sums);
            let (dk_wide, dv_wide) = rest.split_at_mut(sums);
            let mut tiles = tiles.chunks_exact_mut(heads * each);
            let [l, w, d_w, x] = [(); 4].map(|()| tiles.next().expect("there are four"));
            for first in (0..tokens).step_by(TILE) {
                let tile = Tile { first, rows: TILE.min(tokens - first), long, each };
                tile.products(&queries, &keys, l);
                tile.mix(heads, mix_logits, false, l, w);
                for (h, w) in w.chunks_exact_mut(each).enumerate() {
                    tile.weights(heads, h, lse, w);
                }
                // x = w', then d_w = dw'.
                tile.mix(heads, mix_weights, false, w, x);
                tile.add_transposed_products([d, tokens], x, &d_out, dv_wide);
                tile.products(&d_out, &values, d_w);
                tile.add_dots(heads, w, d_w, d_mix_weights);
                // x = dw, then dl'.
                tile.mix(heads, mix_weights, true, d_w, x);
                for (w, x) in w.chunks_exact(each).zip(x.chunks_exact_mut(each)) {
                    for (w, x) in w.chunks_exact(long).zip(x.chunks_exact_mut(long)).take(tile.rows) {
                        let mean = dot(w, x);
                        x.iter_mut().zip(w).for_each(|(x, w)| *x = w * (*x - mean));
                    }
                }
                tile.add_dots(heads, l, x, d_mix_logits);
                // d_w = dl.
                tile.mix(heads, mix_logits, true, x, d_w);
                tile.add_transposed_products([d, tokens], d_w, &queries, dk_wide);
                for (h, dl) in d_w.chunks_exact(each).enumerate() {
                    let out = &mut dq_wide[(h * tokens + first) * wide..];
                    let shape = [tile.rows, d, tile.keys()];
                    product(shape, Left::rows(dl, long), (keys.rows(h), wide), (out, wide), Finish::Store);
                }
            }
            self.unpack(dq_wide, wide, self.scale(), dq);
            self.unpack(dk_wide, wide, 1.0, dk);
            self.unpack(dv_wide, wide, 1.0, dv);
        });
    }

    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// `[H, T, wide]` to `[T, H, d]`, times `scale`.
    fn unpack(&self, x: &[f32], wide: usize, scale: f32, out: &mut [f32]) {
        let (d, tokens) = (self.head_dim, out.len() / self.width());
        for (i, out) in out.chunks_exact_mut(d).enumerate() {
            let (token, head) = (i / self.heads, i % self.heads);
            let x = &x[(head * tokens + token) * wide..][..d];
            out.iter_mut().zip(x).for_each(|(out, x)| *out = scale * x);
        }
    }
}

/// Rows of a sequence by head, padded with zeros, and transposed.
struct Packed {
    /// `[H, T, wide]`
    rows: Vec<f32>,
    /// `[H, d, long]`
    columns: Vec<f32>,
    tokens: usize,
    head_dim: usize,
    /// `d`, and `T`, to whole vectors.
    wide: usize,
    long: usize,
}

impl Packed {
    fn new(shape: &TalkingHeads, x: &[f32], scale: f32) -> Self {
        let TalkingHeads { heads, head_dim, .. } = *shape;
        let tokens = x.len() / shape.width();
        let (wide, long) = (padded(head_dim), padded(tokens));
        let (mut rows, mut columns) = (vec![0.0; heads * tokens * wide], vec![0.0; heads * head_dim * long]);
        for (i, x) in x.chunks_exact(head_dim).enumerate() {
            let (token, head) = (i / heads, i % heads);
            for (j, x) in x.iter().enumerate() {
                rows[(head * tokens + token) * wide + j] = scale * x;
                columns[(head * head_dim + j) * long + token] = scale * x;
            }
        }
        Self { rows, columns, tokens, head_dim, wide, long }
    }

    fn rows(&self, head: usize) -> &[f32] {
        &self.rows[head * self.tokens * self.wide..][..self.tokens * self.wide]
    }

    fn columns(&self, head: usize) -> &[f32] {
        &self.columns[head * self.head_dim * self.long..][..self.head_dim * self.long]
    }
}

/// Consecutive queries of a sequence, with one matrix `[TILE, long]` for each head, `each` apart.
#[derive(Clone, Copy)]
struct Tile {
    first: usize,
    rows: usize,
    long: usize,
    each: usize,
}

impl Tile {
    /// Keys that the last query sees.
    fn keys(&self) -> usize {
        self.first + self.rows
    }

    /// Rows of `x` by columns of `y`, for each head, up to the last visible key; 0 behind.
    fn products(&self, x: &Packed, y: &Packed, out: &mut [f32]) {
        out.fill(0.0);
        for (h, out) in out.chunks_exact_mut(self.each).enumerate() {
            let left = Left::rows(&x.rows(h)[self.first * x.wide..], x.wide);
            let shape = [self.rows, self.keys(), x.head_dim];
            product(shape, left, (y.columns(h), self.long), (out, self.long), Finish::Store);
        }
    }

    /// `out_h [keys, d] += x_h^T y_h` for each head.
    fn add_transposed_products(&self, [d, tokens]: [usize; 2], x: &[f32], y: &Packed, out: &mut [f32]) {
        for (h, x) in x.chunks_exact(self.each).enumerate() {
            let right = (&y.rows(h)[self.first * y.wide..], y.wide);
            let out = &mut out[h * tokens * y.wide..][..tokens * y.wide];
            let shape = [self.keys(), d, self.rows];
            product(shape, Left::transposed(x, self.long), right, (out, y.wide), Finish::Add);
        }
    }

    /// Logits to softmax weights of head `h`; 0 behind the visible keys.
    fn weights(&self, heads: usize, h: usize, lse: &[f32], logits: &mut [f32]) {
        let mut visible = [0.0; 16];
        for (i, row) in logits.chunks_exact_mut(self.long).take(self.rows).enumerate() {
            let (seen, lse) = (self.first + i + 1, lse[(self.first + i) * heads + h]);
            for (j, block) in row[..padded(seen)].chunks_exact_mut(visible.len()).enumerate() {
                exp_sum(block, lse, &mut visible);
                block.copy_from_slice(&visible);
                block.iter_mut().skip(seen.saturating_sub(j * visible.len())).for_each(|w| *w = 0.0);
            }
            row[padded(seen)..].fill(0.0);
        }
    }

    /// `y_g = sum_h x_h mix[h, g]`, or with `mix[g, h]` where `transposed`.
    fn mix(&self, heads: usize, mix: &[f32], transposed: bool, x: &[f32], y: &mut [f32]) {
        for (g, y) in y.chunks_exact_mut(self.each).enumerate() {
            for (h, x) in x.chunks_exact(self.each).enumerate() {
                let factor = if transposed { mix[g * heads + h] } else { mix[h * heads + g] };
                dispatch(ScaledAdd { factor, first: h == 0, x, y });
            }
        }
    }

    /// `sums[h, g] += x_h . y_g`
    fn add_dots(&self, heads: usize, x: &[f32], y: &[f32], sums: &mut [f32]) {
        for (h, x) in x.chunks_exact(self.each).enumerate() {
            for (g, y) in y.chunks_exact(self.each).enumerate() {
                let used = self.rows * self.long;
                sums[h * heads + g] += dot(&x[..used], &y[..used]);
            }
        }
    }
}

/// `y = factor x` for the first term, then `y += factor x`, on whole vectors.
struct ScaledAdd<'a> {
    factor: f32,
    first: bool,
    x: &'a [f32],
    y: &'a mut [f32],
}

impl Kernel for ScaledAdd<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let factor = s.splat(self.factor);
        for (x, y) in self.x.chunks_exact(S::LANES).zip(self.y.chunks_exact_mut(S::LANES)) {
            let before = if self.first { s.zero() } else { s.load(y) };
            s.store(s.mul_add(factor, s.load(x), before), y);
        }
    }
}

/// Dot product of whole vectors.
fn dot(x: &[f32], y: &[f32]) -> f32 {
    struct Dot<'a>(&'a [f32], &'a [f32]);
    impl Kernel for Dot<'_> {
        type Output = f32;
        #[inline(always)]
        fn run<S: Simd>(self, s: S) -> f32 {
            let mut sum = s.zero();
            for (x, y) in self.0.chunks_exact(S::LANES).zip(self.1.chunks_exact(S::LANES)) {
                sum = s.mul_add(s.load(x), s.load(y), sum);
            }
            s.sum(sum)
        }
    }
    dispatch(Dot(x, y))
}

fn slice<'a>(x: &'a [f32], width: usize, rows: &std::ops::Range<usize>) -> &'a [f32] {
    &x[rows.start * width..rows.end * width]
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, differences, random, wide};
    use super::*;

    const HEADS: usize = 2;

    /// The definition, from `[q, k, v, ML, MW]`.
    fn naive(head_dim: usize, cu_seqlens: &[u32], at: &[Vec<f64>]) -> Vec<f64> {
        let [q, k, v, mix_logits, mix_weights] = at else { panic!("five inputs") };
        let width = HEADS * head_dim;
        let mut o = vec![0.0; q.len()];
        let place = |token: usize, head: usize, j: usize| token * width + head * head_dim + j;
        for bounds in cu_seqlens.windows(2) {
            for i in bounds[0] as usize..bounds[1] as usize {
                let seen = bounds[0] as usize..i + 1;
                let logit = |h: usize, t: usize| {
                    let dot = |j| q[place(i, h, j)] * k[place(t, h, j)];
                    (0..head_dim).map(dot).sum::<f64>() / (head_dim as f64).sqrt()
                };
                for g in 0..HEADS {
                    let mixed = |t| (0..HEADS).map(|h| logit(h, t) * mix_logits[h * HEADS + g]).sum::<f64>();
                    let e: Vec<f64> = seen.clone().map(|t| mixed(t).exp()).collect();
                    let sum: f64 = e.iter().sum();
                    for (h, (t, e)) in (0..HEADS).flat_map(|h| seen.clone().zip(&e).map(move |te| (h, te))) {
                        let weight = e / sum * mix_weights[g * HEADS + h];
                        (0..head_dim).for_each(|j| o[place(i, h, j)] += weight * v[place(t, h, j)]);
                    }
                }
            }
        }
        o
    }

    /// Sequences of several tiles, of one, and of none.
    #[test]
    fn output_and_gradients_agree_with_the_definition() {
        for (head_dim, cu_seqlens) in [(3, vec![0, 37, 37, 38, 54]), (17, vec![0, 16, 17])] {
            let len = cu_seqlens[cu_seqlens.len() - 1] as usize * HEADS * head_dim;
            let [q, k, v, d_o] = [1, 2, 3, 4].map(|seed| random(len, seed));
            let [mix_logits, mix_weights] = [5, 6].map(|seed| random(HEADS * HEADS, seed));
            let heads = TalkingHeads {
                heads: HEADS,
                head_dim,
                cu_seqlens: &cu_seqlens,
                mix_logits: &mix_logits,
                mix_weights: &mix_weights,
            };
            let qkv = Qkv { q: &q[..], k: &k[..], v: &v[..] };
            let (mut o, mut lse) = (vec![f32::NAN; len], vec![f32::NAN; len / head_dim]);
            heads.forward(qkv, &mut o, &mut lse);
            let at = [&q, &k, &v, &mix_logits, &mix_weights].map(|x| wide(x));
            assert_close("o", &o, &naive(head_dim, &cu_seqlens, &at), 1e-5);

            let mut found = [len, len, len, mix_logits.len(), mix_weights.len()].map(|n| vec![f32::NAN; n]);
            let [dq, dk, dv, d_mix_logits, d_mix_weights] = found.each_mut().map(|x| &mut x[..]);
            let gradients = TalkingGradients { dq, dk, dv, d_mix_logits, d_mix_weights };
            heads.backward(qkv, &lse, &d_o, gradients);
            let loss = |at: &[Vec<f64>]| {
                let o = naive(head_dim, &cu_seqlens, at);
                o.iter().zip(&d_o).map(|(o, &d)| o * f64::from(d)).sum()
            };
            let names = ["dq", "dk", "dv", "d_mix_logits", "d_mix_weights"];
            for ((name, found), want) in names.iter().zip(&found).zip(differences(&loss, &at)) {
                assert_close(name, found, &want, 5e-5);
            }
        }
    }
}
