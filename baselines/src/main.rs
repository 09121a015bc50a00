//! `dfar-compare`: trains the systems of Table 2 on a data set, under one protocol.

#[path = "../../src/bin/shared/allocator.rs"]
mod allocator;
#[path = "../../src/bin/shared/cli.rs"]
mod cli;
mod compare;
#[path = "../../src/bin/dfar-train/flags.rs"]
mod flags;
#[path = "../../src/bin/shared/manual.rs"]
mod manual;
#[path = "../../src/bin/shared/output.rs"]
mod output;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use compare::{Compare, Failure};
use dfar::device::Precision;
use dfar::device::cpu::Cpu;
use dfar::device::cuda::{Cuda, Gpu};
use dfar_baselines::SystemDevice;
use dfar_baselines::results::to_json;
use dfar_baselines::verify::verify;
use dfar_tools::verify::{Summary, VerifyError, cases};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

/// Train DIN, Caser, GRU4REC, DIEN, SASRec, THA4Rec, DFN, FeedRec and DFAR on a data set, and
/// compare them on its test groups (Table 2 of the paper).
///
/// All systems read the same events, targets and negatives, and are scored on the same groups. Each
/// finished run is a file in `DIR/results`; the same command continues an interrupted comparison.
/// The tables go to stdout and to `DIR/table.md`, `table.csv`, `table.json` and the page
/// `index.html`, progress to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 bad input, 4
/// no usable GPU, 5 non-finite loss.
#[derive(Parser)]
#[command(name = "dfar-compare", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    compare: Compare,
}

#[derive(Subcommand)]
enum Command {
    /// Compare with reference cases: print the relative error of each tensor, exit with 1 if one
    /// exceeds the tolerance
    Verify {
        /// Folder of case files (*.safetensors)
        folder: PathBuf,
        /// Device to run on
        #[arg(long, value_enum, default_value_t = Device::Cpu)]
        device: Device,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Manual(manual::Manual),
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Device {
    Cpu,
    /// DIN and SASRec; cases of other systems are skipped
    Cuda,
}

fn main() -> ExitCode {
    let Cli { command, compare } = parse();
    match command {
        Some(Command::Verify { folder, device, json }) => run_verify(&folder, device, json),
        Some(Command::Manual(manual)) => cli::exit(manual.run(command_line())),
        None => match compare::run(&compare) {
            Ok(()) => ExitCode::SUCCESS,
            Err(Failure::Result(error)) => cli::fail(&error, error.exit_code()),
            Err(Failure::Other(error)) => cli::exit(Err(error)),
        },
    }
}

fn parse() -> Cli {
    Cli::from_arg_matches(&command_line().get_matches()).unwrap_or_else(|error| error.exit())
}

/// The command line: flags of `dfar-train`, some of which mean something else here.
fn command_line() -> clap::Command {
    let differs = [
        ("data", "Data set made by `dfar-data`"),
        ("max_length", "Longest history; of longer ones, the most recent events are kept [default: 100]"),
        ("device", "Device; cuda runs DIN, SASRec and DFAR [default: cpu]"),
        ("seed", "First seed of initial values, shuffles and negatives [default: 2020]"),
        ("feedback", "Feedback that all systems read [default: that of each system's paper]"),
        ("idl", "Weight of the disentangling loss of DFAR and FeedRec [default: 0.001]"),
        ("half_life", "Half-life of the events that DFAR reads, in events; 0: none [default: 0]"),
        ("bpr", "Weight of the interest-wise BPR loss of DFAR [default: 0.1]"),
    ];
    let command = differs.iter().fold(Cli::command(), |command, (flag, help)| {
        command.mut_arg(flag, |argument| argument.help(*help).long_help(*help))
    });
    let unused = compare::UNUSED_FLAGS.iter();
    unused.fold(command, |command, (key, _)| command.mut_arg(key, |argument| argument.hide(true)))
}

fn run_verify(folder: &Path, device: Device, json: bool) -> ExitCode {
    if let Err(error) = cli::start_threads(0) {
        return cli::exit(Err(error));
    }
    let reports = match device {
        Device::Cpu => reports(&Arc::new(Cpu::new()), folder, json),
        Device::Cuda => match open_gpu() {
            Ok(gpu) => reports(&gpu, folder, json),
            Err(error) => return cli::exit(Err(error)),
        },
    };
    match reports {
        Err(error) => cli::fail(&error, 3),
        Ok(Err(error)) => cli::exit(Err(error)),
        Ok(Ok(true)) => ExitCode::SUCCESS,
        Ok(Ok(false)) => ExitCode::FAILURE,
    }
}

/// The first GPU, in f32.
fn open_gpu() -> dfar::Result<Arc<Gpu<Cuda>>> {
    let cuda = Cuda::new(0)?;
    cuda.require_libraries()?;
    Ok(Arc::new(Gpu::new(cuda, Precision::F32)))
}

/// [`Summary::passes`]. The outer error is a case that cannot be read or computed, the inner one a
/// failure to print.
fn reports<D: SystemDevice>(
    device: &Arc<D>,
    folder: &Path,
    json: bool,
) -> Result<dfar::Result<bool>, VerifyError> {
    let mut reports = Vec::new();
    for path in cases(folder)? {
        let report = verify(device, &path)?;
        if !json && let Err(error) = cli::print(&report.to_string()) {
            return Ok(Err(error));
        }
        reports.push(report);
    }
    let summary = Summary::new(reports);
    let text = match json {
        true => format!("{:#}\n", to_json(&summary)),
        false => summary.to_string(),
    };
    Ok(cli::print(&text).map(|()| summary.passes()))
}
