//! The MLP in bf16, in tiles. Factors of products are rounded: `x = a * r`, both hidden
//! layers as inputs of products, the gradients `dh1` and `dz`, all weights except `w2`. Everything
//! else is f32, so biases, `de`, the last layer and its gradients, and the sums of `y` and `dz`
//! over tokens and pairs.
//!
//! On AMX, the products take a third of the time. Most of the rest goes to passes over the
//! activations, which finish one product and convert for the next. A pass therefore keeps what
//! belongs to 32 columns in registers and goes down the rows.

use super::backward::{Sums, Transposed};
use super::mlp::{Mlp, TileInputs};
use super::*;
use crate::device::cpu::bf16::{Bf16, pairs_of, transpose_pairs};
use crate::simd::bf16::{Begin, TILE, Unit, pairs};
use std::arch::x86_64::*;

/// Columns of a pass: a vector of pairs.
const PAIR: usize = 2 * TILE;

/// Rows that go through both layers, forward and backward, before the next rows: their activations
/// stay in the first-level cache. A multiple of 32, the inner dimension of a tile.
const BLOCK: usize = 32;

/// Distances between rows of a block's matrices: f32 values and pairs.
#[derive(Clone, Copy)]
struct Rows {
    width: usize,
    x: usize,
    h0: usize,
    h0_pairs: usize,
    h1: usize,
    h1_pairs: usize,
}

impl Rows {
    fn new(shape: Shape) -> Self {
        let [h0, h1] = shape.hidden_wide;
        Self {
            width: shape.width_wide,
            x: pairs_of(shape.width),
            h0,
            h0_pairs: pairs_of(h0),
            h1,
            h1_pairs: pairs_of(h1),
        }
    }

    /// Lengths of the matrices, in the order of [`Matrices`].
    fn lens(self) -> [usize; 10] {
        let (block, half, steps) = (BLOCK, BLOCK / 2, Bf16::TILE / 2);
        let Self { width, x, h0, h0_pairs, h1, h1_pairs } = self;
        let [first, second] = [block * h0, block * h1.max(width)];
        let [x, h0_factor, dh1] = [x, h0_pairs, h1_pairs].map(|row| block * row);
        let regrouped = half * h1.max(width);
        [x, h0_factor, first, second, dh1, regrouped, steps * h0, steps * h0, h1 * steps, width * steps]
    }
}

/// The matrices of a block, and the factors of the weight gradients of a whole tile.
struct Matrices<'a> {
    /// `a * r`, a left factor.
    x: &'a mut [u32],
    /// The first hidden layer, a left factor; later `dz`.
    h0: &'a mut [u32],
    /// Sums of the first layer; later `dz`.
    first: &'a mut [f32],
    /// Sums of the second layer; later `y`.
    second: &'a mut [f32],
    /// The gradient before the second ReLU, a left factor.
    dh1: &'a mut [u32],
    /// A factor that is to be transposed.
    regrouped: &'a mut [u32],
    /// Of the tile: `h0` and `dz` as right factors, the transposes of `dh1` and `x` as left
    /// factors.
    h0_right: &'a mut [u32],
    dz_right: &'a mut [u32],
    dh1_left: &'a mut [u32],
    x_left: &'a mut [u32],
}

impl<'a> Matrices<'a> {
    fn new(rows: Rows, mut scratch: &'a mut [f32]) -> Self {
        let [x, h0, first, second, dh1, regrouped, h0_right, dz_right, dh1_left, x_left] =
            carve(&mut scratch, rows.lens());
        let [x, h0, dh1, regrouped] = [x, h0, dh1, regrouped].map(bytemuck::cast_slice_mut);
        let [h0_right, dz_right, dh1_left, x_left] =
            [h0_right, dz_right, dh1_left, x_left].map(bytemuck::cast_slice_mut);
        Self { x, h0, first, second, dh1, regrouped, h0_right, dz_right, dh1_left, x_left }
    }
}

/// The vectors of 32 columns at `x`, the second 0 if there is only one.
///
/// # Safety
/// `x` is valid for reading one vector, or two if `both`.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load_pair(x: *const f32, both: bool) -> [__m512; 2] {
    // SAFETY: guaranteed by the caller.
    unsafe { [_mm512_loadu_ps(x), if both { _mm512_loadu_ps(x.add(TILE)) } else { _mm512_setzero_ps() }] }
}

/// `x = a * r` as pairs along the rows, for the tokens of one pair.
fn inputs(unit: Unit, a: &[f32], r: &[f32], x: &mut [u32], x_row: usize) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn inner(a: &[f32], r: &[f32], x: &mut [u32], x_row: usize) {
        for j in (0..r.len()).step_by(PAIR) {
            let both = j + TILE < r.len();
            // SAFETY: rows of `a` and `r` have whole vectors, those of `x` a vector of pairs for
            // every 32 columns.
            unsafe {
                let [r0, r1] = load_pair(r[j..].as_ptr(), both);
                for (a, x) in a.chunks_exact(r.len()).zip(x.chunks_exact_mut(x_row)) {
                    let [a0, a1] = load_pair(a.as_ptr().add(j), both);
                    let product = pairs::along_row(_mm512_mul_ps(a0, r0), _mm512_mul_ps(a1, r1));
                    _mm512_storeu_si512(x.as_mut_ptr().add(j / 2).cast(), product);
                }
            }
        }
    }
    assert!(r.len().is_multiple_of(TILE) && x_row >= pairs_of(r.len()));
    let _ = unit;
    // SAFETY: `unit` exists, so the processor has the instructions.
    unsafe { inner(a, r, x, x_row) }
}

/// `h0 = max(sums + (z + c), 0)` as pairs along the rows, for the tokens of one pair.
fn first_layer(unit: Unit, sums: &[f32], z: &[f32], c: &[f32], h0: &mut [u32], h0_row: usize) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn inner(sums: &[f32], z: &[f32], c: &[f32], h0: &mut [u32], h0_row: usize) {
        let wide = c.len();
        for j in (0..wide).step_by(PAIR) {
            let both = j + TILE < wide;
            // SAFETY: rows of `sums`, `z` and `c` have whole vectors, those of `h0` a vector of
            // pairs for every 32 columns.
            unsafe {
                let [c0, c1] = load_pair(c[j..].as_ptr(), both);
                let rows = sums.chunks_exact(wide).zip(z.chunks_exact(wide));
                for ((sums, z), h0) in rows.zip(h0.chunks_exact_mut(h0_row)) {
                    let [s0, s1] = load_pair(sums.as_ptr().add(j), both);
                    let [z0, z1] = load_pair(z.as_ptr().add(j), both);
                    let zero = _mm512_setzero_ps();
                    // The order of the operands keeps a NaN.
                    let low = _mm512_max_ps(zero, _mm512_add_ps(s0, _mm512_add_ps(z0, c0)));
                    let high = _mm512_max_ps(zero, _mm512_add_ps(s1, _mm512_add_ps(z1, c1)));
                    _mm512_storeu_si512(h0.as_mut_ptr().add(j / 2).cast(), pairs::along_row(low, high));
                }
            }
        }
    }
    assert!(c.len().is_multiple_of(TILE) && h0_row >= pairs_of(c.len()));
    let _ = unit;
    // SAFETY: `unit` exists, so the processor has the instructions.
    unsafe { inner(sums, z, c, h0, h0_row) }
}

/// Sums of the lanes of sixteen vectors.
#[inline]
#[target_feature(enable = "avx512f")]
fn lane_sums(x: [__m512; 16]) -> __m512 {
    let mut a = [_mm512_setzero_ps(); 8];
    for i in 0..8 {
        let (x, y) = (x[2 * i], x[2 * i + 1]);
        a[i] = _mm512_add_ps(_mm512_unpacklo_ps(x, y), _mm512_unpackhi_ps(x, y));
    }
    let mut b = [_mm512_setzero_ps(); 4];
    for i in 0..4 {
        let (x, y) = (_mm512_castps_pd(a[2 * i]), _mm512_castps_pd(a[2 * i + 1]));
        let [low, high] = [_mm512_unpacklo_pd(x, y), _mm512_unpackhi_pd(x, y)].map(|x| _mm512_castpd_ps(x));
        b[i] = _mm512_add_ps(low, high);
    }
    let quarters =
        |x, y| _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(x, y), _mm512_shuffle_f32x4::<0xdd>(x, y));
    quarters(quarters(b[0], b[1]), quarters(b[2], b[3]))
}

/// `e = max(h1 + b1, 0) . w2 + b2` for rows of `h1`, of which there are whole tiles.
fn last_layer(unit: Unit, h1: &[f32], [b1, w2]: [&[f32]; 2], b2: f32, e: &mut [f32]) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn inner(h1: &[f32], [b1, w2]: [&[f32]; 2], b2: f32, e: &mut [f32]) {
        let wide = w2.len();
        for (h1, e) in h1.chunks_exact(TILE * wide).zip(e.chunks_mut(TILE)) {
            let mut sums = [_mm512_setzero_ps(); TILE];
            for j in (0..wide).step_by(TILE) {
                // SAFETY: all rows have whole vectors.
                unsafe {
                    let bias = _mm512_loadu_ps(b1[j..j + TILE].as_ptr());
                    let weight = _mm512_loadu_ps(w2[j..j + TILE].as_ptr());
                    for (row, sum) in sums.iter_mut().enumerate() {
                        let h = _mm512_add_ps(_mm512_loadu_ps(h1.as_ptr().add(row * wide + j)), bias);
                        *sum = _mm512_fmadd_ps(_mm512_max_ps(_mm512_setzero_ps(), h), weight, *sum);
                    }
                }
            }
            let scores = _mm512_add_ps(lane_sums(sums), _mm512_set1_ps(b2));
            let lanes = ((1u32 << e.len()) - 1) as __mmask16;
            // SAFETY: only the lanes of `e` are written.
            unsafe { _mm512_mask_storeu_ps(e.as_mut_ptr(), lanes, scores) };
        }
    }
    assert!(w2.len().is_multiple_of(TILE) && b1.len() == w2.len());
    assert!(h1.len() >= e.len().next_multiple_of(TILE) * w2.len());
    let _ = unit;
    // SAFETY: `unit` exists, so the processor has the instructions.
    unsafe { inner(h1, [b1, w2], b2, e) }
}

/// From the sums `h1` of the second layer: the gradient before its ReLU, as pairs along the rows.
/// Adds to `db1` and `dw2`.
fn last_layer_backward(
    unit: Unit,
    h1: &[f32],
    [b1, w2]: [&[f32]; 2],
    de: &[f32],
    (dh1, dh1_row): (&mut [u32], usize),
    [db1, dw2]: [&mut [f32]; 2],
) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn inner(
        h1: &[f32],
        [b1, w2]: [&[f32]; 2],
        de: &[f32],
        (dh1, dh1_row): (&mut [u32], usize),
        [db1, dw2]: [&mut [f32]; 2],
    ) {
        let wide = w2.len();
        for j in (0..wide).step_by(PAIR) {
            let both = j + TILE < wide;
            // SAFETY: all f32 rows have whole vectors, those of `dh1` a vector of pairs for every
            // 32 columns.
            unsafe {
                let (bias, weight) = (load_pair(b1[j..].as_ptr(), both), load_pair(w2[j..].as_ptr(), both));
                let mut bias_sum = load_pair(db1[j..].as_ptr(), both);
                let mut weight_sum = load_pair(dw2[j..].as_ptr(), both);
                let rows = h1.chunks_exact(wide).zip(dh1.chunks_exact_mut(dh1_row));
                for ((h1, dh1), de) in rows.zip(de) {
                    let (sums, de) = (load_pair(h1.as_ptr().add(j), both), _mm512_set1_ps(*de));
                    let mut gradient = [_mm512_setzero_ps(); 2];
                    for i in 0..2 {
                        let h = _mm512_max_ps(_mm512_setzero_ps(), _mm512_add_ps(sums[i], bias[i]));
                        let positive = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(h, _mm512_setzero_ps());
                        gradient[i] = _mm512_maskz_mul_ps(positive, de, weight[i]);
                        weight_sum[i] = _mm512_fmadd_ps(de, h, weight_sum[i]);
                        bias_sum[i] = _mm512_add_ps(bias_sum[i], gradient[i]);
                    }
                    let [low, high] = gradient;
                    _mm512_storeu_si512(dh1.as_mut_ptr().add(j / 2).cast(), pairs::along_row(low, high));
                }
                for i in 0..1 + usize::from(both) {
                    _mm512_storeu_ps(db1[j + i * TILE..].as_mut_ptr(), bias_sum[i]);
                    _mm512_storeu_ps(dw2[j + i * TILE..].as_mut_ptr(), weight_sum[i]);
                }
            }
        }
    }
    let wide = w2.len();
    assert!(wide.is_multiple_of(TILE) && [b1.len(), db1.len(), dw2.len()] == [wide; 3]);
    assert!(dh1_row >= pairs_of(wide));
    let _ = unit;
    // SAFETY: `unit` exists, so the processor has the instructions.
    unsafe { inner(h1, [b1, w2], de, (dh1, dh1_row), [db1, dw2]) }
}

/// Sets `dz` to 0 where `h0`, pairs along the rows, is not positive, and replaces `h0` by `dz`.
fn mask(unit: Unit, dz: &mut [f32], wide: usize, h0: &mut [u32], row: usize) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn inner(dz: &mut [f32], wide: usize, h0: &mut [u32], row: usize) {
        for j in (0..wide).step_by(PAIR) {
            let both = j + TILE < wide;
            for (dz, h0) in dz.chunks_exact_mut(wide).zip(h0.chunks_exact_mut(row)) {
                // SAFETY: rows of `dz` have whole vectors, those of `h0` a vector of pairs for
                // every 32 columns.
                unsafe {
                    let h0 = h0.as_mut_ptr().add(j / 2).cast();
                    // A bf16 is positive if it is as an integer.
                    let positive = _mm512_cmpgt_epi16_mask(_mm512_loadu_si512(h0), _mm512_setzero_si512());
                    let [low, high] = load_pair(dz.as_ptr().add(j), both);
                    let low = _mm512_maskz_mov_ps(positive as __mmask16, low);
                    let high = _mm512_maskz_mov_ps((positive >> 16) as __mmask16, high);
                    _mm512_storeu_ps(dz.as_mut_ptr().add(j), low);
                    if both {
                        _mm512_storeu_ps(dz.as_mut_ptr().add(j + TILE), high);
                    }
                    _mm512_storeu_si512(h0, pairs::along_row(low, high));
                }
            }
        }
    }
    assert!(wide.is_multiple_of(TILE) && row >= pairs_of(wide));
    let _ = unit;
    // SAFETY: `unit` exists, so the processor has the instructions.
    unsafe { inner(dz, wide, h0, row) }
}

/// Pairs along the rows of `from` as pairs along its columns, of which the first `wide` are wanted.
fn regroup(unit: Unit, (from, from_row): (&[u32], usize), to: &mut [u32], wide: usize) {
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    fn inner((from, from_row): (&[u32], usize), to: &mut [u32], wide: usize) {
        for (from, to) in from.chunks_exact(2 * from_row).zip(to.chunks_exact_mut(wide)) {
            for j in (0..wide).step_by(PAIR) {
                // SAFETY: rows of `from` have a vector of pairs for every 32 columns, those of `to`
                // whole vectors.
                unsafe {
                    let even = _mm512_loadu_si512(from.as_ptr().add(j / 2).cast());
                    let odd = _mm512_loadu_si512(from.as_ptr().add(from_row + j / 2).cast());
                    let [low, high] = pairs::regroup(even, odd);
                    _mm512_storeu_si512(to.as_mut_ptr().add(j).cast(), low);
                    if j + TILE < wide {
                        _mm512_storeu_si512(to.as_mut_ptr().add(j + TILE).cast(), high);
                    }
                }
            }
        }
    }
    assert!(wide.is_multiple_of(TILE) && from_row >= pairs_of(wide));
    let _ = unit;
    // SAFETY: `unit` exists, so the processor has the instructions.
    unsafe { inner((from, from_row), to, wide) }
}

/// The blocks of the scores `tile`.
fn blocks(tile: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = tile.end;
    tile.clone().step_by(BLOCK).map(move |start| start..(start + BLOCK).min(end))
}

impl Bf16 {
    /// `x` as a left factor, with rows of 0 at the end, and the sums of the first layer.
    fn begin(
        self,
        at: Rows,
        packed: &Packed<Bf16>,
        from: TileInputs,
        block: &Range<usize>,
        m: &mut Matrices,
    ) {
        for Segment { pair, rows: here, tokens } in segments(from.pairs, block) {
            let (a, r) = (&from.a[rows(&tokens, at.width)], &from.r[pair * at.width..][..at.width]);
            inputs(self.0, a, r, &mut m.x[rows(&here, at.x)], at.x);
        }
        m.x[block.len() * at.x..].fill(0);
        let right = (bytemuck::cast_slice(packed.product), at.h0);
        let sizes = [BLOCK / TILE, at.h0 / TILE, at.x / TILE];
        self.0.tiles().product(sizes, (m.x, at.x), right, (m.first, at.h0), Begin::Zero);
    }

    /// `h0` as a left factor, with rows of 0 at the end, and the sums of the second layer.
    fn proceed(
        self,
        at: Rows,
        packed: &Packed<Bf16>,
        from: TileInputs,
        block: &Range<usize>,
        m: &mut Matrices,
    ) {
        for Segment { pair, rows: here, tokens } in segments(from.pairs, block) {
            let (z, c) = (&from.z[rows(&tokens, at.h0)], &from.c[pair * at.h0..][..at.h0]);
            let h0 = &mut m.h0[rows(&here, at.h0_pairs)];
            first_layer(self.0, &m.first[rows(&here, at.h0)], z, c, h0, at.h0_pairs);
        }
        m.h0[block.len() * at.h0_pairs..].fill(0);
        let right = (bytemuck::cast_slice(packed.w1), at.h1);
        let sizes = [BLOCK / TILE, at.h1 / TILE, at.h0_pairs / TILE];
        self.0.tiles().product(sizes, (m.h0, at.h0_pairs), right, (m.second, at.h1), Begin::Zero);
    }
}

/// Between a product and the pass that reads its sums stands work that does not, so that a
/// processor with AMX need not wait for the tiles.
#[allow(private_interfaces, reason = "as for the trait")]
impl Mlp for Bf16 {
    /// So many rows that the sums of the weight gradients, which do not fit the first-level cache
    /// with the rest, are seldom read and written. A multiple of [`BLOCK`].
    const TILE: usize = 128;

    fn tile_len(shape: Shape) -> usize {
        carved_len(&Rows::new(shape).lens())
    }

    fn scores(
        self,
        shape: Shape,
        packed: &Packed<Bf16>,
        inputs: TileInputs,
        tile: &Range<usize>,
        scratch: &mut [f32],
        e: &mut [f32],
    ) {
        let at = Rows::new(shape);
        let mut m = Matrices::new(at, scratch);
        let _tiles = self.0.tiles(); // for all products below
        let mut blocks = blocks(tile).peekable();
        if let Some(block) = blocks.peek() {
            self.begin(at, packed, inputs, block, &mut m);
        }
        while let Some(block) = blocks.next() {
            self.proceed(at, packed, inputs, &block, &mut m);
            if let Some(block) = blocks.peek() {
                self.begin(at, packed, inputs, block, &mut m);
            }
            let e = &mut e[block.start - tile.start..block.end - tile.start];
            last_layer(self.0, m.second, [packed.b1, packed.w2], packed.b2, e);
        }
    }

    fn gradients(
        self,
        shape: Shape,
        packed: &Packed<Bf16>,
        transposed: &Transposed,
        inputs: TileInputs,
        tile: &Range<usize>,
        de: &[f32],
        sums: &mut Sums,
        scratch: &mut [f32],
        mut emit: impl FnMut(&Range<usize>, &[f32], &[f32]),
    ) {
        let (at, unit) = (Rows::new(shape), self.0);
        let mut m = Matrices::new(at, scratch);
        let tiles = unit.tiles();
        // Pairs along the columns of the tile, in whole blocks.
        let steps = tile.len().next_multiple_of(BLOCK) / 2;
        for block in blocks(tile) {
            let (n, first) = (block.len(), block.start - tile.start);
            let step = first / 2;
            self.begin(at, packed, inputs, &block, &mut m);
            regroup(unit, (m.x, at.x), m.regrouped, at.width);
            let (from, to) = ((&*m.regrouped, at.width), (&mut m.x_left[step..], steps));
            transpose_pairs(unit, [BLOCK / PAIR, at.width / TILE], from, to);

            self.proceed(at, packed, inputs, &block, &mut m);
            regroup(unit, (m.h0, at.h0_pairs), &mut m.h0_right[step * at.h0..], at.h0);

            let (de, dh1) = (&de[first..first + n], (&mut *m.dh1, at.h1_pairs));
            last_layer_backward(unit, m.second, [packed.b1, packed.w2], de, dh1, [sums.b1, sums.w2]);
            m.dh1[n * at.h1_pairs..].fill(0);
            let right = (bytemuck::cast_slice(transposed.w1), at.h0);
            let sizes = [BLOCK / TILE, at.h0 / TILE, at.h1_pairs / TILE];
            tiles.product(sizes, (m.dh1, at.h1_pairs), right, (m.first, at.h0), Begin::Zero);
            regroup(unit, (m.dh1, at.h1_pairs), m.regrouped, at.h1);
            let (from, to) = ((&*m.regrouped, at.h1), (&mut m.dh1_left[step..], steps));
            transpose_pairs(unit, [BLOCK / PAIR, at.h1 / TILE], from, to);

            // From here on `h0` holds dz.
            mask(unit, m.first, at.h0, m.h0, at.h0_pairs);
            let right = (bytemuck::cast_slice(transposed.product), at.width);
            let sizes = [BLOCK / TILE, at.width / TILE, at.h0_pairs / TILE];
            tiles.product(sizes, (m.h0, at.h0_pairs), right, (m.second, at.width), Begin::Zero);
            regroup(unit, (m.h0, at.h0_pairs), &mut m.dz_right[step * at.h0..], at.h0);
            emit(&block, m.second, m.first);
        }
        // dW1^T += dh1^T h0, dP += x^T dz
        let sizes = [at.h1 / TILE, at.h0 / TILE, steps / TILE];
        tiles.product(sizes, (m.dh1_left, steps), (m.h0_right, at.h0), (sums.w1, at.h0), Begin::Output);
        let sizes = [at.width / TILE, at.h0 / TILE, steps / TILE];
        tiles.product(sizes, (m.x_left, steps), (m.dz_right, at.h0), (sums.product, at.h0), Begin::Output);
    }
}
