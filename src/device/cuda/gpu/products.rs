//! Launches of `step/products.cu`: several matrix products, or several sums of partial results, in
//! one launch.

use crate::device::cuda::kernel::{Block, Kernel, Launch, Module, Pointer};
use crate::device::{Activation, Precision, Store};
use bytemuck::{Pod, Zeroable};

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("step/products.cu"), entry }
}

pub(super) const PRODUCTS: Kernel = kernel("products");
pub(super) const SUM: Kernel = kernel("products_sum");

/// All kernels of the file, each with its block.
pub const KERNELS: &[(Kernel, Block)] = &[
    (PRODUCTS, Block { warps: THREADS / 32, shared_bytes: SHARED }),
    (SUM, Block { warps: SUM_THREADS / 32, shared_bytes: SUM_SHARED }),
];

// As in step/products.cu.
const THREADS: usize = 128;
const COLUMNS: u32 = 32;
const SUM_THREADS: usize = 256;
/// Products of a launch, at most.
pub(super) const MOST_PRODUCTS: usize = 16;
/// Sums of a launch, at most.
pub(super) const MOST_SUMS: usize = 96;
/// A tile of 64 rows of `a` and one of `b`.
const SHARED: usize = (64 * 33 + 32 * 36) * size_of::<f32>();
/// One f64 sum per thread.
const SUM_SHARED: usize = SUM_THREADS * size_of::<f64>();

const A_TRANSPOSED: u32 = 1;
const B_TRANSPOSED: u32 = 2;
const ADDS: u32 = 4;
const RELU: u32 = 8;
const GATES_B: u32 = 16;
const ROUNDS: u32 = 32;
const ADDS_COLUMNS: u32 = 64;
const ALIGNED: u32 = 128;

/// As `Product` of `step/products.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Product {
    a: Pointer,
    b: Pointer,
    a2: Pointer,
    b2: Pointer,
    c: Pointer,
    bias: Pointer,
    gate: Pointer,
    rows: Pointer,
    m: u32,
    n: u32,
    k: u32,
    share: u32,
    first_block: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct ProductsParams {
    products: [Product; MOST_PRODUCTS],
    count: u32,
    unused: u32,
}

/// As `Sum` of `step/products.cu`: the column sums of `count` rows, `stride` values apart.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Pod, Zeroable)]
pub struct Sum {
    from: Pointer,
    to: Pointer,
    count: u32,
    width: u32,
    stride: u32,
    first_block: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(super) struct SumsParams {
    sums: [Sum; MOST_SUMS],
    count: u32,
    unused: u32,
}

const _: () = assert!(size_of::<Product>() == 88);
const _: () = assert!(size_of::<ProductsParams>() == 1416);
const _: () = assert!(size_of::<Sum>() == 32);
const _: () = assert!(size_of::<SumsParams>() == 3080);

impl Product {
    /// `c (+)= a b` for `shape = [m, n, k]`; each factor with whether it is stored transposed.
    pub fn new(
        shape: [usize; 3],
        (a, a_transposed): (Pointer, bool),
        (b, b_transposed): (Pointer, bool),
        (c, store): (Pointer, Store),
        precision: Precision,
    ) -> Self {
        let [m, n, k] = shape.map(|n| n as u32);
        let flags = [
            (a_transposed, A_TRANSPOSED),
            (b_transposed, B_TRANSPOSED),
            (store == Store::Add, ADDS),
            (precision == Precision::Bf16, ROUNDS),
            (n.is_multiple_of(4) && c.is_multiple_of(16), ALIGNED),
        ];
        let flags = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum();
        Self { a, b, c, m, n, k, flags, ..Self::zeroed() }
    }

    /// Adds a bias and an activation.
    pub fn activated(mut self, bias: Pointer, activation: Activation) -> Self {
        if activation == Activation::Relu {
            self.flags |= RELU;
        }
        Self { bias, ..self }
    }

    /// `a`, which is not transposed, counts as 0 where `gate` is not positive.
    pub fn gated(self, gate: Pointer) -> Self {
        debug_assert!(self.flags & A_TRANSPOSED == 0, "a transposed factor has no gate");
        Self { gate, ..self }
    }

    /// Takes these rows of `a` and `c`; if `a` is transposed, of `a` and `b`.
    pub fn of_rows(self, rows: Pointer) -> Self {
        Self { rows, ..self }
    }

    /// The gradient of a weight, `x^T dy`, and of a bias, the column sums of `dy`, in shares of
    /// `rows`: `partial` is `[shares_of(rows), inputs * outputs + outputs]`. `dy` counts as 0 where
    /// `gate` is not positive.
    pub fn weight_gradient(
        [inputs, outputs, rows]: [usize; 3],
        x: Pointer,
        (dy, gate): (Pointer, Pointer),
        partial: Pointer,
        precision: Precision,
    ) -> Self {
        let c = (partial, Store::Overwrite);
        let product = Self::new([inputs, outputs, rows], (x, true), (dy, false), c, precision);
        let flags = product.flags | GATES_B | ADDS_COLUMNS;
        Self { gate, share: share_of(rows) as u32, flags, ..product }
    }

    /// Address of the result.
    pub(super) fn c(&self) -> Pointer {
        self.c
    }

    /// Blocks of the launch.
    fn blocks(&self) -> u32 {
        let height = if self.m <= 32 { 32 } else { 64 };
        let shares = if self.share == 0 { 1 } else { self.k.div_ceil(self.share) };
        self.m.div_ceil(height) * self.n.div_ceil(COLUMNS) * shares
    }

    /// This product and `other`, which adds to its result, as one product; `None` if the kernel
    /// cannot.
    pub(super) fn with(&self, other: &Self) -> Option<Self> {
        let plain = |p: &Self| [p.a2, p.bias, p.gate, p.rows].iter().all(|&at| at == 0) && p.share == 0;
        let alike = [other.m, other.n, other.k] == [self.m, self.n, self.k]
            && (self.flags ^ other.flags) & !ADDS == 0
            && self.flags & RELU == 0;
        let fits = plain(self) && plain(other) && alike && other.flags & ADDS != 0;
        fits.then_some(Self { a2: other.a, b2: other.b, ..*self })
    }
}

/// Rows of a share: at most 128 shares. They determine the order of summation, so they depend on
/// the number of rows only.
fn share_of(rows: usize) -> usize {
    rows.div_ceil(128).max(256).next_multiple_of(32)
}

/// Shares of a product over `rows` rows.
pub fn shares_of(rows: usize) -> usize {
    rows.div_ceil(share_of(rows))
}

impl Sum {
    /// The sums of the columns `first..first + width` of rows `rows` of `from: [.., stride]`.
    pub fn new(
        (from, stride): (Pointer, usize),
        rows: std::ops::Range<usize>,
        first: usize,
        (to, width): (Pointer, usize),
    ) -> Self {
        let from = from + ((rows.start * stride + first) * size_of::<f32>()) as Pointer;
        let [count, width, stride] = [rows.len(), width, stride].map(|n| n as u32);
        Self { from, to, count, width, stride, first_block: 0 }
    }
}

/// The launch of at most [`MOST_PRODUCTS`] products, with its argument; `None` without work.
pub(super) fn products(products: &[Product]) -> Option<(Launch, ProductsParams)> {
    let mut params = ProductsParams::zeroed();
    let mut blocks = 0;
    for product in products.iter().filter(|product| product.blocks() > 0) {
        params.products[params.count as usize] = Product { first_block: blocks, ..*product };
        params.count += 1;
        blocks += product.blocks();
    }
    let launch = Launch { grid: [blocks, 1], threads: THREADS as u32, shared_bytes: SHARED as u32 };
    (blocks > 0).then_some((launch, params))
}

/// The launch of at most [`MOST_SUMS`] sums, with its argument; `None` without work.
pub(super) fn sums(sums: &[Sum]) -> Option<(Launch, SumsParams)> {
    let mut params = SumsParams::zeroed();
    let mut blocks = 0;
    for sum in sums.iter().filter(|sum| sum.width > 0) {
        params.sums[params.count as usize] = Sum { first_block: blocks, ..*sum };
        params.count += 1;
        blocks += sum.width.div_ceil(32);
    }
    let launch = Launch { grid: [blocks, 1], threads: SUM_THREADS as u32, shared_bytes: SUM_SHARED as u32 };
    (blocks > 0).then_some((launch, params))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_at_most_128_shares() {
        assert_eq!([0, 1, 256, 257, 60_000, 1 << 22].map(shares_of), [0, 1, 1, 2, 125, 128]);
    }

    #[test]
    fn products_with_one_result_become_one() {
        let product =
            |a, store| Product::new([8, 4, 4], (a, false), (64, true), (256, store), Precision::F32);
        let (first, second) = (product(512, Store::Overwrite), product(1024, Store::Add));
        let both = first.with(&second).expect("they are alike");
        assert_eq!((both.a, both.a2, both.flags), (512, 1024, first.flags));
        assert_eq!(both.with(&second), None, "a third term");
        assert_eq!(first.with(&first), None, "the second overwrites");
        assert_eq!(first.gated(2048).with(&second), None);
    }
}
