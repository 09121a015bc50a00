//! Padded sizes and blocks of `target_attention.cu`.

use super::shared_memory::Carve;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::kernel::{Block, Element};

/// Warps of a block of the perceptron: `WARPS` of `target_layers.cuh`.
pub const WARPS: usize = 4;
/// Pairs that a warp scores at once: `AT_ONCE` of `target_scores.cuh`.
const AT_ONCE: usize = 2;
/// Threads of a block of the softmax: `ROW_THREADS` of `target_softmax.cuh`.
pub const ROW_THREADS: usize = 256;
/// Widest tokens there is a kernel for: a lane of the softmax holds four columns of a token.
pub const MAX_WIDTH: usize = 128;

/// Padded sizes a module is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    /// `DFAR_WIDTH`: 16, 32, 64 or 128.
    pub width: usize,
    /// `DFAR_HIDDEN0`: a multiple of 16.
    pub hidden0: usize,
    /// `DFAR_HIDDEN1`: a multiple of 8.
    pub hidden1: usize,
}

impl Shape {
    /// The smallest that tokens of `width` and a perceptron of these hidden widths fit.
    ///
    /// # Errors
    /// [`CudaError::TargetWidth`] where there is none.
    pub fn of(width: usize, [hidden0, hidden1]: [usize; 2]) -> Result<Self, CudaError> {
        assert!(width > 0 && hidden0 > 0 && hidden1 > 0, "a layer of width 0");
        if width > MAX_WIDTH {
            return Err(CudaError::TargetWidth { width, widest: MAX_WIDTH });
        }
        Ok(Self {
            width: width.next_power_of_two().max(16),
            hidden0: hidden0.next_multiple_of(16),
            hidden1: hidden1.next_multiple_of(8),
        })
    }

    /// Columns of what backward leaves of a token or a pair: dz, then the gradient of the input.
    pub(crate) fn sums(&self) -> usize {
        self.hidden0 + self.width
    }

    /// Values of the weights' gradients by position.
    pub(crate) fn weight_sums(&self) -> usize {
        self.width * self.hidden0 + self.hidden0 * self.hidden1 + 2 * self.hidden1
    }

    /// The weights in shared memory: `Weights` of `target_layers.cuh`.
    fn weights(&self, size: usize) -> Carve {
        let mut carve = Carve::default();
        carve.take(self.width * stride(self.hidden0, size), size);
        carve.take(self.hidden0 * stride(self.hidden1, size), size);
        carve.take(self.hidden1, 4).take(self.hidden1, 4);
        carve
    }

    /// The block of `target_scores`.
    pub fn scores(&self, element: Element) -> Block {
        let size = element.size();
        let scratch = if size == 4 { 16 * (stride(self.width, size) + stride(16, size)) } else { 0 };
        let mut carve = self.weights(size);
        carve.take(WARPS * 16 * self.width, 4).take(WARPS * 16 * self.hidden0, 4);
        carve.take(WARPS * AT_ONCE * scratch, size);
        Block { warps: WARPS, shared_bytes: carve.bytes() }
    }

    /// The block of `target_backward`.
    pub fn backward(&self, element: Element) -> Block {
        let (size, rows) = (element.size(), WARPS * 16);
        let [x, h0, h1] = [self.width, self.hidden0, self.hidden1].map(|columns| stride(columns, size));
        let mut carve = self.weights(size);
        carve.take(16 * self.width, 4).take(16 * self.hidden0, 4);
        carve.take(rows * x, size).take(rows * x, size);
        carve.take(rows * h0, size).take(rows * h0, size).take(rows * h1, size);
        Block { warps: WARPS, shared_bytes: carve.bytes() }
    }

    /// The block of `target_softmax_backward`: s of sixteen tokens.
    pub(crate) fn softmax_backward(&self) -> Block {
        Block { warps: ROW_THREADS / 32, shared_bytes: 16 * self.width * size_of::<f32>() }
    }
}

/// `stride_of` of `target_layers.cuh`: an odd number of 16-byte pieces, so that eight rows meet all banks once.
fn stride(columns: usize, size: usize) -> usize {
    if (columns * size / 16).is_multiple_of(2) { columns + 16 / size } else { columns }
}
