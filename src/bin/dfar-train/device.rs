//! The device a command runs on.

use dfar::device::cpu::Cpu;
use dfar::device::cuda::{Cuda, Gpu};
use dfar::train::config::{Config, DeviceChoice};
use std::sync::Arc;

/// One of the devices there are.
pub enum Chosen {
    Cpu(Arc<Cpu>),
    Cuda(Arc<Gpu<Cuda>>),
}

impl Chosen {
    /// What the configuration asks for; `note` is told when `auto` does without a GPU, and why.
    ///
    /// # Errors
    /// `cuda` where no GPU is usable.
    pub fn open(config: &Config, note: impl FnOnce(&str)) -> dfar::Result<Self> {
        let cpu = || Ok(Self::Cpu(Arc::new(Cpu::new())));
        match config.device {
            DeviceChoice::Cpu => return cpu(),
            DeviceChoice::Cuda | DeviceChoice::Auto => {}
        }
        match Cuda::new(0) {
            Ok(cuda) => Ok(Self::Cuda(Arc::new(Gpu::new(cuda, config.precision)))),
            Err(error) if config.device == DeviceChoice::Auto => {
                note(&format!("on the CPU, since there is no usable GPU: {error}"));
                cpu()
            }
            Err(error) => Err(error.into()),
        }
    }
}

/// Runs an expression with `$device` bound to the device there is, whichever type it has.
macro_rules! with_device {
    ($chosen:expr, $device:ident => $body:expr) => {
        match $chosen {
            $crate::device::Chosen::Cpu($device) => $body,
            $crate::device::Chosen::Cuda($device) => $body,
        }
    };
}
pub(crate) use with_device;
