//! `--device`, `--precision` and `--cuda-graphs`: opens the device of a command.

use dfar::device::cpu::Cpu;
use dfar::device::cuda::{Captures, Cuda, CudaError, Gpu, Precision};
use dfar::train::TrainError;
use dfar::train::config::{Config, DeviceChoice};
use std::sync::Arc;

/// The chosen device. See [`on_device`] for code that is generic over it.
pub enum Chosen {
    Cpu(Arc<Cpu>),
    Cuda(Arc<Gpu<Cuda>>),
}

impl Chosen {
    /// Returns a function that reads the counts of graph captures, for use after the device has
    /// been moved.
    pub fn captures(&self) -> impl Fn() -> Option<Captures> + use<> {
        let gpu = match self {
            Chosen::Cpu(_) => None,
            Chosen::Cuda(gpu) => Some(gpu.clone()),
        };
        move || gpu.as_ref()?.captures()
    }
}

/// Evaluates an expression with `$device` bound to the chosen device.
macro_rules! on_device {
    ($chosen:expr, |$device:ident| $run:expr) => {
        match $chosen {
            $crate::device::Chosen::Cpu($device) => $run,
            $crate::device::Chosen::Cuda($device) => $run,
        }
    };
}
pub(crate) use on_device;

/// Opens the device for a finished run: `asked` if given, or else the run's own. The CPU accepts
/// models of any precision.
///
/// # Errors
/// As [`open`].
pub fn open_for(config: &Config, asked: Option<DeviceChoice>, note: &dyn Fn(&str)) -> dfar::Result<Chosen> {
    let choice = asked.unwrap_or(config.device);
    let precision = if choice == DeviceChoice::Cpu { Precision::F32 } else { config.precision };
    open(choice, precision, false, note)
}

/// Opens the device; `graphs` applies only to a GPU. `note` receives the reason when `auto` selects
/// the CPU.
///
/// # Errors
/// `cuda` without a usable GPU, or a precision that the CPU does not support.
pub fn open(
    choice: DeviceChoice,
    precision: Precision,
    graphs: bool,
    note: &dyn Fn(&str),
) -> dfar::Result<Chosen> {
    let cuda = || -> Result<Chosen, CudaError> {
        let cuda = Cuda::new(0)?;
        cuda.require_libraries()?;
        let gpu = Gpu::new(cuda, precision);
        Ok(Chosen::Cuda(Arc::new(if graphs { gpu.with_graphs() } else { gpu })))
    };
    let cpu = || Chosen::Cpu(Arc::new(Cpu::new()));
    match choice {
        DeviceChoice::Cuda => Ok(cuda()?),
        DeviceChoice::Cpu if precision != Precision::F32 => {
            let reason = format!("{} needs a GPU: the CPU computes in f32", precision.name());
            Err(TrainError::Usage { argument: "--precision", reason }.into())
        }
        DeviceChoice::Cpu => Ok(cpu()),
        DeviceChoice::Auto => Ok(cuda().unwrap_or_else(|error| {
            note(&format!("computing on the CPU, in f32 ({error})"));
            cpu()
        })),
    }
}
