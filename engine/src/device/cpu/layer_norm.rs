//! Layer norm over rows.
//!
//! A sum over a row is sixteen interleaved partial sums, added in order. This addition is a chain
//! of dependent steps, longer than all other work on a short row. [`TOGETHER`] rows therefore
//! advance together, one step of each chain after the other.

use super::elementwise::{pad_rows, unpad_rows};
use super::scratch::{LINE, carve, carved_len, padded, with_scratch};
use super::slices::Slices;
use super::{Cpu, Done, Floats};
use crate::device::{LayerNorm, LayerNormGradients, Norm, Output, Store};
use crate::simd::{Kernel, Simd, dispatch};
use rayon::prelude::*;

/// Added to the variance, inside the root.
const EPS: f32 = 1e-8;
/// Rows per task. It fixes the order of summation, so it must not depend on the number of threads.
const ROWS: usize = 128;
/// Rows whose sums advance together: eight chains of additions, each four cycles long, keep both
/// adders busy.
const TOGETHER: usize = 8;

impl Norm for Cpu {
    fn layer_norm(&self, norm: LayerNorm<&Floats>, x: &Floats, y: &mut Floats) -> Done {
        let LayerNorm { width, gamma, beta } = norm.slices();
        assert_eq!(x.len(), y.len(), "x and y differ in length");
        assert!(x.len().is_multiple_of(width), "x is not [rows, width]");
        assert_eq!([gamma.len(), beta.len()], [width; 2], "gamma and beta are not [width]");
        let chunk = ROWS * width;
        y.par_chunks_mut(chunk)
            .zip(x.par_chunks(chunk))
            .for_each(|(y, x)| forward(LayerNorm { width, gamma, beta }, x, y));
        Ok(())
    }

    fn layer_norm_backward(
        &self,
        norm: LayerNorm<&Floats>,
        x: &Floats,
        dy: &Floats,
        gradients: LayerNormGradients<&mut Floats>,
    ) -> Done {
        let LayerNorm { width, gamma, .. } = norm.slices();
        let LayerNormGradients { dx: Output { values: dx, store }, dgamma, dbeta } = gradients.slices();
        assert!(x.len().is_multiple_of(width), "x is not [rows, width]");
        assert_eq!([dy.len(), dx.len()], [x.len(); 2], "x, dy and dx differ in length");
        assert_eq!(
            [gamma.len(), dgamma.len(), dbeta.len()],
            [width; 3],
            "gamma, dgamma or dbeta is not [width]"
        );
        let chunk = ROWS * width;
        let parts: Vec<(Vec<f32>, Vec<f32>)> = dx
            .par_chunks_mut(chunk)
            .zip(x.par_chunks(chunk).zip(dy.par_chunks(chunk)))
            .map(|(dx, (x, dy))| backward((width, gamma), x, dy, (dx, store)))
            .collect();
        let mut sum = vec![0f64; 2 * width];
        for (part_gamma, part_beta) in &parts {
            for (sum, &part) in sum.iter_mut().zip(part_gamma.iter().chain(part_beta)) {
                *sum += part as f64;
            }
        }
        for (out, sum) in dgamma.iter_mut().chain(dbeta).zip(sum) {
            *out = sum as f32;
        }
        Ok(())
    }
}

// The working memory is taken outside of `dispatch`: a closure in a kernel may not be inlined, and
// is then compiled without the kernel's instructions.

fn forward(norm: LayerNorm<&[f32]>, x: &[f32], y: &mut [f32]) {
    let LayerNorm { width, gamma, beta } = norm;
    let wide = padded(width);
    let lens = [wide, wide, TOGETHER * wide, TOGETHER * wide, TOGETHER * wide];
    with_scratch(carved_len(&lens), |memory| {
        let memory = carve(&mut { memory }, lens);
        dispatch(Forward { width, x, gamma, beta, y, memory })
    });
}

/// Sums over the rows: the gradients of `gamma` and `beta`.
fn backward(
    (width, gamma): (usize, &[f32]),
    x: &[f32],
    dy: &[f32],
    (dx, store): (&mut [f32], Store),
) -> (Vec<f32>, Vec<f32>) {
    let wide = padded(width);
    let block = TOGETHER * wide;
    let lens = [wide, block, block, block, block, block];
    with_scratch(carved_len(&lens), |memory| {
        let memory = carve(&mut { memory }, lens);
        dispatch(Backward { width, x, gamma, dy, dx, store, memory })
    })
}

struct Forward<'a> {
    width: usize,
    x: &'a [f32],
    gamma: &'a [f32],
    beta: &'a [f32],
    y: &'a mut [f32],
    /// Padded `gamma` and `beta`; `x`, `y`, and `normal` of a block of rows.
    memory: [&'a mut [f32]; 5],
}

impl Kernel for Forward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { width, x, gamma, beta, y, memory } = self;
        let [gamma_wide, beta_wide, x_wide, y_wide, normal] = memory;
        let wide = gamma_wide.len();
        pad_rows(gamma, width, wide, gamma_wide);
        pad_rows(beta, width, wide, beta_wide);
        let mut block = ForwardRows { width, gamma: gamma_wide, beta: beta_wide, normal };
        for (x, y) in x.chunks(TOGETHER * width).zip(y.chunks_mut(TOGETHER * width)) {
            if width == wide {
                block.each(s, x, y);
            } else {
                let len = x.len() / width * wide;
                pad_rows(x, width, wide, &mut x_wide[..len]);
                block.each(s, &x_wide[..len], &mut y_wide[..len]);
                unpad_rows(y_wide, width, wide, y);
            }
        }
    }
}

/// The forward pass on rows of whole vectors, padded with zeros.
struct ForwardRows<'a> {
    width: usize,
    gamma: &'a [f32],
    beta: &'a [f32],
    normal: &'a mut [f32],
}

impl ForwardRows<'_> {
    #[inline(always)]
    fn each<S: Simd>(&mut self, s: S, x: &[f32], y: &mut [f32]) {
        let wide = self.gamma.len();
        if y.len() == TOGETHER * wide {
            return self.rows::<S, TOGETHER>(s, x, y);
        }
        for (x, y) in x.chunks_exact(wide).zip(y.chunks_exact_mut(wide)) {
            self.rows::<S, 1>(s, x, y);
        }
    }

    #[inline(always)]
    fn rows<S: Simd, const R: usize>(&mut self, s: S, x: &[f32], y: &mut [f32]) {
        let Self { width, gamma, beta, normal } = self;
        let wide = gamma.len();
        normalize::<S, R>(s, *width, wide, x, normal);
        for (normal, y) in normal.chunks_exact(wide).zip(y.chunks_exact_mut(wide)) {
            for j in (0..wide).step_by(S::LANES) {
                let scaled = s.mul(s.load(&normal[j..]), s.load(&gamma[j..]));
                s.store(s.add(scaled, s.load(&beta[j..])), &mut y[j..]);
            }
        }
    }
}

struct Backward<'a> {
    width: usize,
    x: &'a [f32],
    gamma: &'a [f32],
    dy: &'a [f32],
    dx: &'a mut [f32],
    store: Store,
    /// Padded `gamma`; `x`, `dy`, `dx`, `normal` and `scaled` of a block of rows.
    memory: [&'a mut [f32]; 6],
}

impl Kernel for Backward<'_> {
    type Output = (Vec<f32>, Vec<f32>);
    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Self::Output {
        let Self { width, x, gamma, dy, dx, store, memory } = self;
        let [gamma_wide, x_wide, dy_wide, dx_wide, normal, scaled] = memory;
        let wide = gamma_wide.len();
        pad_rows(gamma, width, wide, gamma_wide);
        let (mut dgamma, mut dbeta) = (vec![0f32; wide], vec![0f32; wide]);
        let sums = [&mut dgamma[..], &mut dbeta[..]];
        let mut block = BackwardRows { width, gamma: gamma_wide, sums, normal, scaled, store };
        let rows = x.chunks(TOGETHER * width).zip(dy.chunks(TOGETHER * width));
        for ((x, dy), dx) in rows.zip(dx.chunks_mut(TOGETHER * width)) {
            if width == wide {
                block.each(s, x, dy, dx);
            } else {
                let len = x.len() / width * wide;
                pad_rows(x, width, wide, &mut x_wide[..len]);
                pad_rows(dy, width, wide, &mut dy_wide[..len]);
                pad_rows(dx, width, wide, &mut dx_wide[..len]);
                block.each(s, &x_wide[..len], &dy_wide[..len], &mut dx_wide[..len]);
                unpad_rows(dx_wide, width, wide, dx);
            }
        }
        dgamma.truncate(width);
        dbeta.truncate(width);
        (dgamma, dbeta)
    }
}

/// The backward pass on rows of whole vectors, padded with zeros.
struct BackwardRows<'a> {
    width: usize,
    gamma: &'a [f32],
    /// Gradients of `gamma` and `beta`, added to.
    sums: [&'a mut [f32]; 2],
    normal: &'a mut [f32],
    scaled: &'a mut [f32],
    store: Store,
}

impl BackwardRows<'_> {
    #[inline(always)]
    fn each<S: Simd>(&mut self, s: S, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        let wide = self.gamma.len();
        if dx.len() == TOGETHER * wide {
            return self.rows::<S, TOGETHER>(s, x, dy, dx);
        }
        let rows = x.chunks_exact(wide).zip(dy.chunks_exact(wide));
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(wide)) {
            self.rows::<S, 1>(s, x, dy, dx);
        }
    }

    #[inline(always)]
    fn rows<S: Simd, const R: usize>(&mut self, s: S, x: &[f32], dy: &[f32], dx: &mut [f32]) {
        let (wide, n) = (self.gamma.len(), self.width as f32);
        let inverse = normalize::<S, R>(s, self.width, wide, x, self.normal);
        for j in (0..wide).step_by(S::LANES) {
            let gamma = s.load(&self.gamma[j..]);
            let [mut dgamma, mut dbeta] = [s.load(&self.sums[0][j..]), s.load(&self.sums[1][j..])];
            for r in 0..R {
                let at = r * wide + j;
                let d = s.load(&dy[at..]);
                s.store(s.mul(d, gamma), &mut self.scaled[at..]);
                dgamma = s.add(dgamma, s.mul(d, s.load(&self.normal[at..])));
                dbeta = s.add(dbeta, d);
            }
            s.store(dgamma, &mut self.sums[0][j..]);
            s.store(dbeta, &mut self.sums[1][j..]);
        }
        let of_scaled = lane_sums::<S, R>(s, wide, self.scaled);
        let of_product = lane_products::<S, R>(s, wide, self.scaled, self.normal);
        for r in 0..R {
            let (inverse, of_scaled, of_product) =
                (s.splat(inverse[r]), s.splat(of_scaled[r] / n), s.splat(of_product[r] / n));
            for j in (0..wide).step_by(S::LANES) {
                let at = r * wide + j;
                let centred = s.sub(s.load(&self.scaled[at..]), of_scaled);
                let along = s.mul(s.load(&self.normal[at..]), of_product);
                let gradient = s.mul(inverse, s.sub(centred, along));
                let dx = &mut dx[at..];
                s.store(if self.store == Store::Add { s.add(s.load(dx), gradient) } else { gradient }, dx);
            }
        }
    }
}

/// `normal = (x - mean) / deviation` of `R` rows, 0 in the padding. Returns `1 / deviation`.
#[inline(always)]
fn normalize<S: Simd, const R: usize>(
    s: S,
    width: usize,
    wide: usize,
    x: &[f32],
    normal: &mut [f32],
) -> [f32; R] {
    let n = width as f32;
    let sums = lane_sums::<S, R>(s, wide, x);
    for r in 0..R {
        let mean = s.splat(sums[r] / n);
        for j in (0..wide).step_by(S::LANES) {
            let at = r * wide + j;
            s.store(s.sub(s.load(&x[at..]), mean), &mut normal[at..]);
        }
        normal[r * wide + width..(r + 1) * wide].fill(0.0);
    }
    let squares = lane_products::<S, R>(s, wide, normal, normal);
    let inverse = squares.map(|sum| 1.0 / (sum / n + EPS).sqrt());
    for (r, &factor) in inverse.iter().enumerate() {
        for j in (0..wide).step_by(S::LANES) {
            let at = r * wide + j;
            s.store(s.mul(s.load(&normal[at..]), s.splat(factor)), &mut normal[at..]);
        }
    }
    inverse
}

/// The sum of each of `R` rows.
#[inline(always)]
fn lane_sums<S: Simd, const R: usize>(s: S, wide: usize, x: &[f32]) -> [f32; R] {
    let mut lanes = [[0f32; LINE]; R];
    for (x, lanes) in x.chunks_exact(wide).zip(&mut lanes) {
        for first in (0..LINE).step_by(S::LANES) {
            let mut sum = s.zero();
            for j in (first..wide).step_by(LINE) {
                sum = s.add(sum, s.load(&x[j..]));
            }
            s.store(sum, &mut lanes[first..]);
        }
    }
    in_order(&lanes)
}

/// The sum of `x * y` for each of `R` rows.
#[inline(always)]
fn lane_products<S: Simd, const R: usize>(s: S, wide: usize, x: &[f32], y: &[f32]) -> [f32; R] {
    let mut lanes = [[0f32; LINE]; R];
    for ((x, y), lanes) in x.chunks_exact(wide).zip(y.chunks_exact(wide)).zip(&mut lanes) {
        for first in (0..LINE).step_by(S::LANES) {
            let mut sum = s.zero();
            for j in (first..wide).step_by(LINE) {
                sum = s.add(sum, s.mul(s.load(&x[j..]), s.load(&y[j..])));
            }
            s.store(sum, &mut lanes[first..]);
        }
    }
    in_order(&lanes)
}

/// The sum of the lanes of each row, first lane first.
#[inline(always)]
fn in_order<const R: usize>(lanes: &[[f32; LINE]; R]) -> [f32; R] {
    let mut sums = lanes.map(|lanes| lanes[0]);
    for lane in 1..LINE {
        for (sum, lanes) in sums.iter_mut().zip(lanes) {
            *sum += lanes[lane];
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};

    /// The definition, one row at a time, in the same order of additions: results must have the
    /// same bits, whatever the instruction set and the number of rows together.
    struct OneRow {
        normal: Vec<f32>,
        inverse: f32,
    }

    fn lane_sum(x: &[f32]) -> f32 {
        let mut lanes = [0f32; LINE];
        x.iter().enumerate().for_each(|(i, x)| lanes[i % LINE] += x);
        lanes.iter().sum()
    }

    impl OneRow {
        fn new(x: &[f32]) -> Self {
            let n = x.len() as f32;
            let mean = lane_sum(x) / n;
            let squares: Vec<f32> = x.iter().map(|x| (x - mean) * (x - mean)).collect();
            let inverse = 1.0 / (lane_sum(&squares) / n + EPS).sqrt();
            Self { normal: x.iter().map(|x| (x - mean) * inverse).collect(), inverse }
        }

        fn backward(&self, dy: &[f32], gamma: &[f32]) -> Vec<f32> {
            let n = dy.len() as f32;
            let scaled: Vec<f32> = dy.iter().zip(gamma).map(|(dy, gamma)| dy * gamma).collect();
            let product: Vec<f32> = scaled.iter().zip(&self.normal).map(|(s, normal)| s * normal).collect();
            let (of_scaled, of_product) = (lane_sum(&scaled) / n, lane_sum(&product) / n);
            let gradient = |(s, normal)| self.inverse * (s - of_scaled - normal * of_product);
            scaled.iter().zip(&self.normal).map(gradient).collect()
        }
    }

    #[test]
    fn rows_together_have_the_bits_of_rows_alone() {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let mut random = |n: usize| (0..n).map(|_| rng.random_range(-2.0..2.0)).collect::<Vec<f32>>();
        for (rows, width) in [1, 7, 8, 9, 21].into_iter().flat_map(|r| [1, 5, 16, 20, 32, 50].map(|w| (r, w)))
        {
            let (x, dy, before) = (random(rows * width), random(rows * width), random(rows * width));
            let (gamma, beta) = (&random(width)[..], &random(width)[..]);
            let mut y = vec![f32::NAN; rows * width];
            forward(LayerNorm { width, gamma, beta }, &x, &mut y);
            let (mut replaced, mut added) = (vec![f32::NAN; rows * width], before.clone());
            let sums = backward((width, gamma), &x, &dy, (&mut replaced, Store::Overwrite));
            assert_eq!(backward((width, gamma), &x, &dy, (&mut added, Store::Add)), sums);
            let (mut dgamma, mut dbeta) = (vec![0.0; width], vec![0.0; width]);
            for (r, (x, dy)) in x.chunks(width).zip(dy.chunks(width)).enumerate() {
                let row = OneRow::new(x);
                let gradient = row.backward(dy, gamma);
                for i in 0..width {
                    let at = r * width + i;
                    assert_eq!(y[at], row.normal[i] * gamma[i] + beta[i], "{rows} rows of {width}, {at}");
                    assert_eq!(replaced[at], gradient[i], "{rows} rows of {width}, {at}");
                    assert_eq!(added[at], before[at] + gradient[i], "{rows} rows of {width}, {at}");
                    dgamma[i] += dy[i] * row.normal[i];
                    dbeta[i] += dy[i];
                }
            }
            assert_eq!(sums, (dgamma, dbeta), "{rows} rows of {width}");
        }
    }
}
