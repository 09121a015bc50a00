//! `dfar-bench verify`: the error of each tensor of the reference cases.

use super::{Device, Precision, open_cpu, open_gpu};
use crate::verify::{self, CpuBf16, CpuEngine, Engine, GpuEngine, Summary, VerifyError};
use crate::{cli, say};
use dfar::{Error, Result};
use std::path::PathBuf;
use std::sync::Arc;

#[derive(clap::Args)]
pub struct Verify {
    /// Folder of case files (*.safetensors)
    folder: PathBuf,
    /// Device to run on
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Element type of the attention tensors, and precision of matrix products. bf16 needs a GPU, or a
    /// CPU with AVX512-BF16; f16 needs a GPU
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Compute each case N times, and compare the bits of the results
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    repeat: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// A failure of `verify`.
pub enum Failure {
    /// A case could not be read or computed.
    Case(VerifyError),
    Other(Error),
}

impl From<VerifyError> for Failure {
    fn from(error: VerifyError) -> Self {
        Self::Case(error)
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// Verifies all cases. Returns [`Summary::passes`].
pub fn run(arguments: &Verify) -> Result<bool, Failure> {
    match arguments.device {
        Device::Cpu if arguments.precision == Precision::F32 => run_on(arguments, &CpuEngine),
        Device::Cpu => run_on(arguments, &CpuBf16(open_cpu(arguments.precision))),
        Device::Cuda => {
            let element = arguments.precision.element();
            run_on(arguments, &GpuEngine { gpu: Arc::new(open_gpu(arguments.precision)?), element })
        }
    }
}

fn run_on<E: Engine>(arguments: &Verify, engine: &E) -> Result<bool, Failure> {
    let mut reports = Vec::new();
    for path in verify::cases(&arguments.folder)? {
        let mut report = verify::verify(&path, engine)?;
        for run in 2..=arguments.repeat as usize {
            report.compare_run(&verify::verify(&path, engine)?, run);
        }
        if !arguments.json {
            cli::print(&report.to_string())?;
        }
        reports.push(report);
    }
    let summary = Summary::new(reports);
    if arguments.json {
        say!("{}", serde_json::to_string_pretty(&summary).expect("numbers and strings are valid JSON"));
    } else {
        cli::print(&summary.to_string())?;
        if arguments.repeat > 1 {
            say!("each case computed {} times", arguments.repeat);
        }
    }
    Ok(summary.passes())
}
