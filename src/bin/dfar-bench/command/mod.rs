//! The commands: their flags, and what they print. What they measure is in the modules beside.

mod attention;
mod limits;
mod train;
mod verify;

pub use attention::{Attention, run as run_attention};
pub use limits::{Limits, run as run_limits};
pub use train::{Train, run as run_train};
pub use verify::{Failure, Verify, run as run_verify};

use crate::Arguments;
use crate::limits::gpu::Effort;
use clap::error::ErrorKind;
use clap::{CommandFactory, ValueEnum};
use dfar::device::cuda::{self, Cuda, Element, Gpu};
use dfar::{Error, Result};

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    Cpu,
    Cuda,
}

/// Type of attention tensors.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    F32,
    /// On the GPU
    Bf16,
    /// On the GPU
    F16,
}

impl Precision {
    /// Precision of matrix products: bf16 for both 16-bit types.
    fn products(self) -> cuda::Precision {
        match self {
            Self::F32 => cuda::Precision::F32,
            Self::Bf16 | Self::F16 => cuda::Precision::Bf16,
        }
    }

    fn element(self) -> Element {
        match self {
            Self::F32 => Element::F32,
            Self::Bf16 => Element::Bf16,
            Self::F16 => Element::F16,
        }
    }
}

/// How much is measured on a GPU.
fn effort(quick: bool) -> Effort {
    if quick { Effort::QUICK } else { Effort::FULL }
}

fn pool(threads: usize) -> Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|error| Error::io("start threads on", "this machine")(std::io::Error::other(error)))
}

/// Exits with a usage error.
fn usage(message: &str) -> ! {
    Arguments::command().error(ErrorKind::ValueValidation, message).exit()
}

/// Exits with a usage error for a precision that the CPU does not support.
fn check_precision(device: Device, precision: Precision) {
    if device == Device::Cpu && precision != Precision::F32 {
        let message = "--precision bf16 and f16 need --device cuda: the CPU computes in f32";
        Arguments::command().error(ErrorKind::ArgumentConflict, message).exit();
    }
}

/// The first GPU.
fn open_gpu(precision: Precision) -> Result<Gpu<Cuda>> {
    Ok(Gpu::new(Cuda::new(0)?, precision.products()))
}
