//! The CPU engine: the operations of [`Device`](super::Device) on slices, in parallel on rayon's
//! threads.
//!
//! Each topic has a file with the implementation of its trait. Work is cut into chunks that do not
//! depend on the number of threads, and partial sums are added in the order of the chunks. Hence
//! results are bitwise equal for any number of threads.
//!
//! | file | contents |
//! |---|---|
//! | `memory` | pooled buffers |
//! | `embedding` | gather, scatter, segmented sums |
//! | `rows`, `prefix_mean` | addition and concatenation; prefix means |
//! | `linear`, `layer_norm` | linear layers; layer norm |
//! | `attention` | factorization-heads attention, by [`crate::attention`] |
//! | `target_attention` | target attention |
//! | `losses`, `optimizer` | losses, Adam |
//! | `product`, `elementwise` | matrix products, row passes, on the vectors of [`crate::simd`] |
//! | `scratch`, `slices` | working memory per thread, buffers as slices |

mod attention;
#[doc(hidden)]
pub mod elementwise;
mod embedding;
mod layer_norm;
#[doc(hidden)]
pub mod linear;
mod losses;
mod memory;
mod optimizer;
mod prefix_mean;
#[doc(hidden)]
pub mod product;
mod rows;
#[doc(hidden)]
pub mod scratch;
mod slices;
#[doc(hidden)]
pub mod target_attention;

pub use memory::CpuBuffer;

use super::{DeviceError, Execution};
use crate::simd;
use std::sync::Arc;
use std::time::Instant;

type Floats = CpuBuffer<f32>;
type Indices = CpuBuffer<u32>;
type Doubles = CpuBuffer<f64>;
type Done = Result<(), DeviceError>;

/// The host processor, on rayon's threads.
#[derive(Default)]
pub struct Cpu {
    pool: Arc<memory::Pool>,
}

impl Cpu {
    /// A CPU with an empty memory pool.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Execution for Cpu {
    /// Operations are complete when they return, so a host clock suffices.
    type Event = Instant;

    fn name(&self) -> String {
        format!("cpu ({}, {} threads)", simd::name(), rayon::current_num_threads())
    }
    /// One: more would take cores from the computation.
    fn default_workers(&self) -> usize {
        1
    }
    fn record_event(&self) -> Result<Instant, DeviceError> {
        Ok(Instant::now())
    }
    fn seconds_between(&self, from: &Instant, to: &Instant) -> Result<f64, DeviceError> {
        Ok((*to - *from).as_secs_f64())
    }
}
