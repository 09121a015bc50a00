//! Padded sizes and block sizes of `target/target_attention.cu`.

use super::shared_memory::Carve;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Block, Element};

/// Warps per block of the MLP: `WARPS` of `target/layers.cuh`.
pub const WARPS: usize = 4;
/// Pairs that a warp scores at once: `AT_ONCE` of `target/scores.cuh`.
const AT_ONCE: usize = 2;
/// Threads per block of the softmax: `ROW_THREADS` of `target/softmax.cuh`.
pub const ROW_THREADS: usize = 256;
/// Largest token width: each lane of the softmax holds four columns of a token.
pub const MAX_WIDTH: usize = 128;

/// Padded sizes of a compiled module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// `DFAR_WIDTH`: 16, 32, 64 or 128.
    pub width: usize,
    /// `DFAR_HIDDEN0`: a multiple of 16.
    pub hidden0: usize,
    /// `DFAR_HIDDEN1`: a multiple of 8.
    pub hidden1: usize,
}

/// Refuses tokens that no kernel is compiled for.
///
/// # Errors
/// [`CudaError::TargetWidth`] if `width` exceeds [`MAX_WIDTH`].
pub fn check_width(width: usize) -> Result<(), CudaError> {
    match width > MAX_WIDTH {
        true => Err(CudaError::TargetWidth { width, widest: MAX_WIDTH }),
        false => Ok(()),
    }
}

impl Shape {
    /// The smallest shape for tokens of `width` values and an MLP of these hidden widths.
    ///
    /// # Errors
    /// [`CudaError::TargetWidth`] if `width` exceeds [`MAX_WIDTH`].
    pub fn of(width: usize, [hidden0, hidden1]: [usize; 2]) -> Result<Self, CudaError> {
        assert!(width > 0 && hidden0 > 0 && hidden1 > 0, "a layer of width 0");
        check_width(width)?;
        Ok(Self {
            width: width.next_power_of_two().max(16),
            hidden0: hidden0.next_multiple_of(16),
            hidden1: hidden1.next_multiple_of(8),
        })
    }

    /// Columns of the partial sums of a token or pair in backward: dz, then the gradient of the
    /// input.
    pub(crate) fn sums(&self) -> usize {
        self.hidden0 + self.width
    }

    /// Number of partial weight gradients of a block.
    pub(crate) fn weight_sums(&self) -> usize {
        self.width * self.hidden0 + self.hidden0 * self.hidden1 + 2 * self.hidden1
    }

    /// Shared memory of the weights: `Weights` of `target/layers.cuh`.
    fn weights(&self, size: usize) -> Carve {
        let mut carve = Carve::default();
        carve.take(self.width * stride(self.hidden0, size), size);
        carve.take(self.hidden0 * stride(self.hidden1, size), size);
        carve.take(self.hidden1, 4).take(self.hidden1, 4);
        carve
    }

    /// Block of `target_scores`.
    pub fn scores(&self, element: Element) -> Block {
        let size = element.size();
        let scratch = if size == 4 { 16 * (stride(self.width, size) + stride(16, size)) } else { 0 };
        let mut carve = self.weights(size);
        carve.take(WARPS * 16 * self.width, 4).take(WARPS * 16 * self.hidden0, 4);
        carve.take(WARPS * AT_ONCE * scratch, size);
        Block { warps: WARPS, shared_bytes: carve.bytes() }
    }

    /// Block of `target_backward`.
    pub fn backward(&self, element: Element) -> Block {
        let (size, rows) = (element.size(), WARPS * 16);
        let [x, h0, h1] = [self.width, self.hidden0, self.hidden1].map(|columns| stride(columns, size));
        let mut carve = self.weights(size);
        carve.take(16 * self.width, 4).take(16 * self.hidden0, 4);
        carve.take(rows * x, size).take(rows * x, size);
        carve.take(rows * h0, size).take(rows * h0, size).take(rows * h1, size);
        Block { warps: WARPS, shared_bytes: carve.bytes() }
    }

    /// Block of `target_softmax_backward`: `s` of sixteen tokens in shared memory.
    pub(crate) fn softmax_backward(&self) -> Block {
        Block { warps: ROW_THREADS / 32, shared_bytes: 16 * self.width * size_of::<f32>() }
    }
}

/// `stride_of` of `target/layers.cuh`: an odd number of 16-byte pieces per row, so that eight rows
/// cover all banks without a bank conflict.
fn stride(columns: usize, size: usize) -> usize {
    if (columns * size / 16).is_multiple_of(2) { columns + 16 / size } else { columns }
}
