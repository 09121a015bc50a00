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
//! | `bf16` | matrix products of factors in bf16 |
//! | `scratch`, `slices` | working memory per thread, buffers as slices |

mod attention;
#[cfg(target_arch = "x86_64")]
mod bf16;
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

/// The precision of the factors of matrix products.
#[derive(Clone, Copy, Default)]
enum Chosen {
    #[default]
    F32,
    #[cfg(target_arch = "x86_64")]
    Bf16(bf16::Bf16),
}

/// Evaluates an expression with `$products` bound to the [`Products`](product::Products) of a
/// [`Cpu`].
macro_rules! with_products {
    ($cpu:expr, |$products:ident| $run:expr) => {
        match $cpu.products {
            $crate::device::cpu::Chosen::F32 => {
                let $products = $crate::device::cpu::product::F32;
                $run
            }
            #[cfg(target_arch = "x86_64")]
            $crate::device::cpu::Chosen::Bf16($products) => $run,
        }
    };
}
use with_products;

/// The host processor, on rayon's threads.
#[derive(Default)]
pub struct Cpu {
    pool: Arc<memory::Pool>,
    products: Chosen,
}

impl Cpu {
    /// A CPU with an empty memory pool, which computes in f32.
    pub fn new() -> Self {
        Self::default()
    }

    /// A CPU that rounds the factors of matrix products to bf16. Sums and values in memory are
    /// f32. Multiplies on AMX if possible, else by AVX512-BF16, which is slower than f32 on some
    /// processors.
    ///
    /// # Errors
    /// [`DeviceError::Bf16`] without AVX512-BF16.
    pub fn bf16() -> Result<Self, DeviceError> {
        #[cfg(target_arch = "x86_64")]
        return Self::on_unit(simd::bf16::Unit::new());
        #[cfg(not(target_arch = "x86_64"))]
        Err(DeviceError::Bf16 { reason: "this is no x86-64 processor".to_owned() })
    }

    /// [`bf16`](Self::bf16) from the result of the probe.
    #[cfg(target_arch = "x86_64")]
    fn on_unit(unit: Result<simd::bf16::Unit, simd::bf16::Missing>) -> Result<Self, DeviceError> {
        let unit = unit.map_err(|missing| DeviceError::Bf16 { reason: missing.to_string() })?;
        Ok(Self { products: Chosen::Bf16(bf16::Bf16(unit)), ..Self::default() })
    }
}

impl Execution for Cpu {
    /// Operations are complete when they return, so a host clock suffices.
    type Event = Instant;

    fn name(&self) -> String {
        let products = match self.products {
            Chosen::F32 => String::new(),
            #[cfg(target_arch = "x86_64")]
            Chosen::Bf16(bf16::Bf16(unit)) => format!(", bf16 on {}", unit.name()),
        };
        format!("cpu ({}{products}, {} threads)", simd::name(), rayon::current_num_threads())
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

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::*;
    use crate::simd::bf16::Missing;

    #[test]
    fn bf16_is_refused_with_what_is_missing_and_what_to_do() {
        let refused = |missing| Cpu::on_unit(Err(missing)).map(|_| ()).expect_err("it is missing");
        for (missing, words) in [
            (Missing::Processor, "flag avx512_bf16"),
            (Missing::Selected("portable"), "DFAR_SIMD selects portable"),
        ] {
            let error = refused(missing);
            assert!(matches!(error, DeviceError::Bf16 { .. }));
            let message = error.to_string();
            assert!(message.contains(words) && message.contains("--precision f32"), "{message}");
        }
    }
}
