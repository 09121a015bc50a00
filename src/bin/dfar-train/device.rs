//! `--device`, `--precision` and `--cuda-graphs`: opens the device of a command.

use dfar::device::cpu::Cpu;
use dfar::device::cuda::plan::target_shape::check_width;
use dfar::device::cuda::{Captures, Cuda, CudaError, Gpu};
use dfar::device::{DeviceError, Precision};
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

/// Opens the device for a finished run: `asked` if given, or else the run's own. A CPU that lacks
/// the run's precision computes in f32, which accepts any model; `note` receives the reason.
///
/// # Errors
/// `cuda` without a usable GPU.
pub fn open_for(config: &Config, asked: Option<DeviceChoice>, note: &dyn Fn(&str)) -> dfar::Result<Chosen> {
    match asked.unwrap_or(config.device) {
        DeviceChoice::Cpu => Ok(cpu_or_f32(config.precision, note)),
        device => open(&Config { device, cuda_graphs: false, ..config.clone() }, note),
    }
}

/// Opens the device of a new run. `note` receives the reason when `auto` selects the CPU, or f32.
///
/// # Errors
/// `cuda` without a usable GPU or with a model too wide for its kernels, or `cpu` with a precision
/// that this CPU does not support.
pub fn open(config: &Config, note: &dyn Fn(&str)) -> dfar::Result<Chosen> {
    let usage = |argument, reason| TrainError::Usage { argument, reason };
    let (precision, graphs) = (config.precision, config.cuda_graphs);
    let cuda = || -> Result<Chosen, CudaError> {
        // Refused before a GPU is opened.
        check_width(config.width)?;
        let cuda = Cuda::new(0)?;
        cuda.require_libraries()?;
        let gpu = Gpu::new(cuda, precision);
        Ok(Chosen::Cuda(Arc::new(if graphs { gpu.with_graphs() } else { gpu })))
    };
    match config.device {
        DeviceChoice::Cuda => cuda().map_err(|error| match error {
            CudaError::TargetWidth { .. } => usage("--width", error.to_string()).into(),
            error => error.into(),
        }),
        DeviceChoice::Cpu => {
            if graphs {
                note("--cuda-graphs has no effect on the CPU");
            }
            Ok(cpu(precision).map_err(|error| usage("--precision", error.to_string()))?)
        }
        DeviceChoice::Auto => Ok(cuda().unwrap_or_else(|error| {
            note(&format!("computing on the CPU ({error})"));
            cpu_or_f32(precision, note)
        })),
    }
}

fn cpu(precision: Precision) -> Result<Chosen, DeviceError> {
    Ok(Chosen::Cpu(Arc::new(match precision {
        Precision::F32 => Cpu::new(),
        Precision::Bf16 => Cpu::bf16()?,
    })))
}

/// The CPU in f32 if it lacks the precision.
fn cpu_or_f32(precision: Precision, note: &dyn Fn(&str)) -> Chosen {
    cpu(precision).unwrap_or_else(|error| {
        note(&format!("computing in f32 ({error})"));
        Chosen::Cpu(Arc::new(Cpu::new()))
    })
}
