//! The operations of a model, on buffers that a device owns.
//!
//! [`Device`] is the sum of one trait per topic. The model is written against these traits and runs
//! on the [CPU engine](cpu) and, in the crate `dfar`, on CUDA.
//!
//! | trait | operations |
//! |---|---|
//! | [`Execution`] | events, elapsed time, graph capture |
//! | [`Memory`] | buffers, staged uploads, downloads |
//! | [`Embedding`] | gather, scatter, segmented sums over rows of tables |
//! | [`Rows`] | addition, concatenation |
//! | [`PrefixMean`] | means of prefixes of packed sequences |
//! | [`Dense`] | linear layers |
//! | [`Norm`] | layer norm |
//! | [`Attention`] | factorization-heads attention |
//! | [`TargetAttention`] | attention of candidates over histories |
//! | [`Losses`] | ranking and cosine losses with their gradients |
//! | [`Optimizer`] | gradient clipping and Adam |
//!
//! # Conventions
//! - Matrices are row-major and packed. The number of rows follows from the length of the buffer
//!   and the width beside it.
//! - Operations on one device run in the order of the calls.
//! - Index values lie in what they index. The CPU panics otherwise; a GPU does not check them. In the
//!   crate `dfar`, a `Batch` holds such indices only.
//! - A backward operation **overwrites** the gradients of parameters. For the gradient of an
//!   activation, [`Output`] says whether it is overwritten or added to.
//! - Argument structs are generic over the reference they hold: `Linear<&B>` has buffers to read,
//!   `TargetGradients<&mut B>` has buffers to write.
//! - Letters in shapes: `N` tokens, `D` model width, `R` rows (instances), `C` pairs (a sequence
//!   and a candidate item), `G` groups.

mod attention;
pub mod cpu;
mod dense;
mod embedding;
mod execution;
mod layer_norm;
mod losses;
mod memory;
mod optimizer;
mod prefix_mean;
mod rows;
mod target_attention;

pub use attention::{Attention, Qkv, QkvGradients, SoftmaxState};
pub use dense::{Activation, Dense, LabelLinear, LabelLinearGradients, Linear, LinearGradients};
pub use embedding::{Embedding, Lookup, SegmentSum, Segments};
pub use execution::Execution;
pub use layer_norm::{LayerNorm, LayerNormGradients, Norm};
pub use losses::{Interests, Losses};
pub use memory::{Buffer, Element, Floats, Indices, Memory, Output, Slot, Store};
pub use optimizer::{AdamRows, AdamStep, AdamTensor, Clip, Optimizer};
pub use prefix_mean::{PrefixMean, Prefixes, Recency};
pub use rows::{Columns, ConcatPart, Rows};
pub use target_attention::{
    TargetAttention, TargetCounts, TargetGradients, TargetIndex, TargetInputs, TargetShape, TargetState,
    TargetWeights,
};

use thiserror::Error;

/// All operations of a model.
pub trait Device:
    Execution + Embedding + Rows + PrefixMean + Dense + Norm + Attention + TargetAttention + Losses + Optimizer
{
}

impl<D> Device for D where
    D: Execution
        + Embedding
        + Rows
        + PrefixMean
        + Dense
        + Norm
        + Attention
        + TargetAttention
        + Losses
        + Optimizer
{
}

/// An operation that failed, or whose arguments the device rejects.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// Arguments that the attention operation rejects.
    #[error(transparent)]
    Attention(#[from] crate::attention::AttentionError),
    /// The operating system refused memory on the host.
    #[error(
        "cannot allocate {bytes} bytes of memory; use smaller batches (--batch-tokens, --batch-rows) or a smaller model"
    )]
    Memory {
        /// Bytes requested.
        bytes: usize,
    },
    /// The CPU cannot compute in bf16.
    #[error("products in bf16 on the CPU need AVX512-BF16: {reason}; use --precision f32, or a GPU")]
    Bf16 {
        /// What is missing.
        reason: String,
    },
    /// A failure of a device that another crate implements: of CUDA,
    /// `dfar::device::cuda::CudaError`.
    #[error(transparent)]
    Backend(Box<dyn std::error::Error + Send + Sync>),
}
