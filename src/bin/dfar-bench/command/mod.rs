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
use clap::builder::RangedU64ValueParser;
use clap::error::ErrorKind;
use clap::{CommandFactory, ValueEnum};
use dfar::Result;
use dfar::device;
use dfar::device::cpu::Cpu;
use dfar::device::cuda::{Cuda, Element, Gpu};
use std::sync::Arc;

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Device {
    Cpu,
    Cuda,
}

/// Type of attention tensors.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Precision {
    F32,
    Bf16,
    F16,
}

impl Precision {
    /// Precision of matrix products: bf16 for both 16-bit types.
    fn products(self) -> device::Precision {
        match self {
            Self::F32 => device::Precision::F32,
            Self::Bf16 | Self::F16 => device::Precision::Bf16,
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

/// Parses a size above 0.
fn at_least_one() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..)
}

/// Exits with a usage error.
fn usage(message: &str) -> ! {
    Arguments::command().error(ErrorKind::ValueValidation, message).exit()
}

/// Exits with a usage error for `--precision`.
fn refuse_precision(reason: &str) -> ! {
    Arguments::command().error(ErrorKind::ArgumentConflict, format!("--precision: {reason}")).exit()
}

/// The CPU in a precision of products. Exits with a usage error if it does not support it.
fn open_cpu(precision: Precision) -> Arc<Cpu> {
    Arc::new(match precision {
        Precision::F32 => Cpu::new(),
        Precision::Bf16 => Cpu::bf16().unwrap_or_else(|error| refuse_precision(&error.to_string())),
        Precision::F16 => refuse_precision("f16 needs --device cuda"),
    })
}

/// The first GPU.
fn open_gpu(precision: Precision) -> Result<Gpu<Cuda>> {
    Ok(Gpu::new(Cuda::new(0)?, precision.products()))
}
