//! The MLP of target attention on a tile of scores: [`Mlp`], and its form in f32.

use super::backward::{Sums, Transposed};
use super::*;
use crate::device::cpu::product::F32;

/// What a tile of scores is computed from, for the pairs and tokens of a chunk; rows padded.
#[derive(Clone, Copy)]
pub struct TileInputs<'a> {
    /// The pairs of the chunk.
    pub(super) pairs: &'a [Pair],
    pub(super) a: &'a [f32],
    pub(super) r: &'a [f32],
    /// Terms of the tokens.
    pub(super) z: &'a [f32],
    /// Terms of the pairs.
    pub(super) c: &'a [f32],
}

/// The MLP in one precision of the factors.
#[allow(private_interfaces, reason = "the trait is public for the bound of `forward` only")]
pub trait Mlp: Products {
    /// Scores per tile.
    const TILE: usize;

    /// Scratch values for a tile.
    fn tile_len(shape: Shape) -> usize;

    /// Writes the scores `tile` of a chunk to `e`.
    fn scores(
        self,
        shape: Shape,
        packed: &Packed<Self>,
        inputs: TileInputs,
        tile: &Range<usize>,
        scratch: &mut [f32],
        e: &mut [f32],
    );

    /// Backward pass of the scores `tile` of a chunk with gradients `de`. Adds to the sums of the
    /// weight gradients. Emits `y = dz P^T` and `dz`, in padded rows, for consecutive ranges of the
    /// scores.
    #[allow(clippy::too_many_arguments, reason = "weights, inputs, outputs and scratch")]
    fn gradients(
        self,
        shape: Shape,
        packed: &Packed<Self>,
        transposed: &Transposed,
        inputs: TileInputs,
        tile: &Range<usize>,
        de: &[f32],
        sums: &mut Sums,
        scratch: &mut [f32],
        emit: impl FnMut(&Range<usize>, &[f32], &[f32]),
    );
}

#[allow(private_interfaces, reason = "as for the trait")]
impl Mlp for F32 {
    /// A compromise between activations that fit the first-level cache together with one weight,
    /// and few passes over the weight gradients. A multiple of 5 and 8, the rows of the register
    /// tiles of [`product`].
    const TILE: usize = 80;

    fn tile_len(shape: Shape) -> usize {
        carved_len(&activations(shape))
    }

    fn scores(
        self,
        shape: Shape,
        packed: &Packed<F32>,
        inputs: TileInputs,
        tile: &Range<usize>,
        mut scratch: &mut [f32],
        e: &mut [f32],
    ) {
        let [x, h0, h1] = carve(&mut scratch, activations(shape));
        fill_inputs(shape, inputs, tile, x, h0);
        hidden(shape, packed, tile.len(), x, h0, h1);
        scores(shape, &h1[..tile.len() * shape.hidden_wide[1]], packed.w2, packed.b2, e);
    }

    fn gradients(
        self,
        shape: Shape,
        packed: &Packed<F32>,
        transposed: &Transposed,
        inputs: TileInputs,
        tile: &Range<usize>,
        de: &[f32],
        sums: &mut Sums,
        mut scratch: &mut [f32],
        mut emit: impl FnMut(&Range<usize>, &[f32], &[f32]),
    ) {
        let [x, h0, h1] = carve(&mut scratch, activations(shape));
        fill_inputs(shape, inputs, tile, x, h0);
        hidden(shape, packed, tile.len(), x, h0, h1);
        let ([n0, n1], [h0_wide, h1_wide]) = (shape.hidden, shape.hidden_wide);
        let (n, width, width_wide) = (tile.len(), shape.width, shape.width_wide);
        scores_backward(de, packed.w2, &mut h1[..n * h1_wide], sums.b1, sums.w2);
        self.add_transposed([n1, n0, n], (h1, h1_wide), (h0, h0_wide), (sums.w1, h0_wide));
        let out = (&mut *h0, h0_wide);
        self.product([n, n0, n1], (h1, h1_wide), transposed.w1, out, Finish::WherePositive);
        self.add_transposed([width, n0, n], (x, width_wide), (h0, h0_wide), (sums.product, h0_wide));
        let out = (&mut *x, width_wide);
        self.product([n, width, n0], (h0, h0_wide), transposed.product, out, Finish::Store);
        emit(tile, x, h0);
    }
}

/// Lengths of `x`, `h0` and `h1` of a tile.
fn activations(shape: Shape) -> [usize; 3] {
    let [h0, h1] = shape.hidden_wide;
    [shape.width_wide, h0, h1].map(|wide| F32::TILE * wide)
}

/// Both hidden layers of a tile of `n` scores from `x = a * r` and `h0 = z + c`, rows padded.
fn hidden(shape: Shape, packed: &Packed<F32>, n: usize, x: &[f32], h0: &mut [f32], h1: &mut [f32]) {
    let ([n0, n1], wide) = (shape.hidden, shape.hidden_wide);
    let out = (&mut *h0, wide[0]);
    F32.product([n, n0, shape.width], (x, shape.width_wide), packed.product, out, Finish::AddRelu);
    F32.product([n, n1, n0], (h0, wide[0]), packed.w1, (h1, wide[1]), Finish::BiasRelu(packed.b1));
}

/// `x = a * r` and `h0 = z + c` for the scores `tile`; all rows padded.
fn fill_inputs(
    shape: Shape,
    TileInputs { pairs, a, r, z, c }: TileInputs,
    tile: &Range<usize>,
    x: &mut [f32],
    h0: &mut [f32],
) {
    let (width, hidden) = (shape.width_wide, shape.hidden_wide[0]);
    for Segment { pair, rows: here, tokens } in segments(pairs, tile) {
        dispatch(Inputs {
            a: &a[rows(&tokens, width)],
            r: &r[pair * width..][..width],
            z: &z[rows(&tokens, hidden)],
            c: &c[pair * hidden..][..hidden],
            x: &mut x[rows(&here, width)],
            h0: &mut h0[rows(&here, hidden)],
        });
    }
}

/// `x = a * r` and `h0 = z + c` for the tokens of one pair, rows padded.
struct Inputs<'a> {
    a: &'a [f32],
    r: &'a [f32],
    z: &'a [f32],
    c: &'a [f32],
    x: &'a mut [f32],
    h0: &'a mut [f32],
}

impl Kernel for Inputs<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        for_columns!(S, self.r.len(), |C, j| {
            let r = load_columns::<S, C>(s, self.r, j);
            for (a, x) in self.a.chunks_exact(self.r.len()).zip(self.x.chunks_exact_mut(self.r.len())) {
                let (a, x) = (&a[j..j + C * S::LANES], &mut x[j..j + C * S::LANES]);
                for c in 0..C {
                    s.store(s.mul(s.load(&a[c * S::LANES..]), r[c]), &mut x[c * S::LANES..]);
                }
            }
        });
        for_columns!(S, self.c.len(), |C, j| {
            let constant = load_columns::<S, C>(s, self.c, j);
            for (z, h0) in self.z.chunks_exact(self.c.len()).zip(self.h0.chunks_exact_mut(self.c.len())) {
                let (z, h0) = (&z[j..j + C * S::LANES], &mut h0[j..j + C * S::LANES]);
                for c in 0..C {
                    s.store(s.add(s.load(&z[c * S::LANES..]), constant[c]), &mut h0[c * S::LANES..]);
                }
            }
        });
    }
}

/// `e[t] = h1[t] . w2 + b2` for padded rows `h1`.
fn scores(shape: Shape, h1: &[f32], w2: &[f32], b2: f32, e: &mut [f32]) {
    struct Scores<'a>(usize, &'a [f32], &'a [f32], f32, &'a mut [f32]);
    impl Kernel for Scores<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(width, h1, w2, b2, e) = self;
            // Padding behind the last vector is of an earlier call: 0 times it may be NaN.
            let used = &w2[..width.next_multiple_of(S::LANES)];
            for (h1, e) in h1.chunks_exact(w2.len()).zip(e) {
                let mut sum = s.zero();
                for (h1, w2) in h1.chunks_exact(S::LANES).zip(used.chunks_exact(S::LANES)) {
                    sum = s.mul_add(s.load(h1), s.load(w2), sum);
                }
                *e = s.sum(sum) + b2;
            }
        }
    }
    dispatch(Scores(shape.hidden[1], h1, w2, b2, e));
}

/// Replaces `h1` by the gradient before its ReLU, `de[t] * w2` for positive `h1`. Adds to `db1` and
/// `dw2`.
fn scores_backward(de: &[f32], w2: &[f32], h1: &mut [f32], db1: &mut [f32], dw2: &mut [f32]) {
    struct ScoresBackward<'a>(&'a [f32], &'a [f32], &'a mut [f32], &'a mut [f32], &'a mut [f32]);
    impl Kernel for ScoresBackward<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self(de, w2, h1, db1, dw2) = self;
            let wide = w2.len();
            for_columns!(S, wide, |C, j| {
                let w2 = load_columns::<S, C>(s, w2, j);
                let mut bias = load_columns::<S, C>(s, db1, j);
                let mut weight = load_columns::<S, C>(s, dw2, j);
                for (h1, de) in h1.chunks_exact_mut(wide).zip(de) {
                    let (h1, de) = (&mut h1[j..j + C * S::LANES], s.splat(*de));
                    for c in 0..C {
                        let h = s.load(&h1[c * S::LANES..]);
                        let gradient = s.where_positive(h, s.mul(de, w2[c]));
                        weight[c] = s.mul_add(de, h, weight[c]);
                        bias[c] = s.add(bias[c], gradient);
                        s.store(gradient, &mut h1[c * S::LANES..]);
                    }
                }
                for c in 0..C {
                    s.store(bias[c], &mut db1[j + c * S::LANES..]);
                    s.store(weight[c], &mut dw2[j + c * S::LANES..]);
                }
            });
        }
    }
    dispatch(ScoresBackward(de, w2, h1, db1, dw2));
}
