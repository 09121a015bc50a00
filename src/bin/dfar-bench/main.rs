//! `dfar-bench`: comparison with reference cases, and measurements.

#[path = "../shared/allocator.rs"]
mod allocator;
#[allow(dead_code, reason = "benches run more of it: tests/tools")]
mod attention;
#[path = "../shared/cli.rs"]
mod cli;
mod command;
mod limits;
#[path = "../shared/manual.rs"]
mod manual;
mod timing;
mod train;
mod verify;

use clap::{CommandFactory, Parser, Subcommand};
use std::process::ExitCode;

/// `println!` that reports a closed pipe instead of panicking.
macro_rules! say {
    ($($text:tt)*) => { $crate::cli::print(&format!("{}\n", format_args!($($text)*)))? };
}
use say;

/// Compare results with reference cases, and measure speed
#[derive(Parser)]
#[command(name = "dfar-bench", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compare with reference cases: print the relative error of each tensor, exit with 1 if one
    /// exceeds the tolerance
    Verify(command::Verify),
    /// Time the attention operation, naive and fused, by sequence length
    Attention(command::Attention),
    /// Time training steps on a data set: with and without sharing of histories and candidates, and
    /// by part
    Train(command::Train),
    /// Measure the peak rates of the CPU: multiply-adds and exponentials per second
    Limits(command::Limits),
    #[command(flatten)]
    Manual(manual::Manual),
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    if let Err(error) = cli::start_threads(0) {
        return cli::exit(Err(error));
    }
    cli::exit(match command {
        Command::Verify(arguments) => match command::run_verify(&arguments) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(command::Failure::Case(error)) => return cli::fail(&error, 3),
            Err(command::Failure::Other(error)) => Err(error),
        },
        Command::Attention(arguments) => command::run_attention(&arguments),
        Command::Train(arguments) => command::run_train(&arguments),
        Command::Limits(arguments) => command::run_limits(&arguments),
        Command::Manual(manual) => manual.run(Arguments::command()),
    })
}
