//! `dfar-compare`: the systems that DFAR is compared with.

#[path = "../../src/bin/shared/cli.rs"]
mod cli;

use clap::{Parser, Subcommand};
use dfar_baselines::verify::verify;
use dfar_tools::verify::{Summary, VerifyError, cases};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Train and compare DIN, Caser, GRU4REC, DIEN, SASRec, THA4Rec, DFN, FeedRec and DFAR.
#[derive(Parser)]
#[command(name = "dfar-compare", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compare with reference cases: print the relative error of each tensor, exit with 1 beyond
    /// the tolerance
    Verify {
        /// Folder of case files (*.safetensors)
        folder: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

fn main() -> ExitCode {
    let Arguments { command: Command::Verify { folder, json } } = Arguments::parse();
    if let Err(error) = cli::start_threads(0) {
        return cli::fail(&error, error.exit_code());
    }
    match reports(&folder, json) {
        Err(error) => cli::fail(&error, 3),
        Ok(Err(error)) => cli::exit(Err(error)),
        Ok(Ok(true)) => ExitCode::SUCCESS,
        Ok(Ok(false)) => ExitCode::from(1),
    }
}

/// Whether every case passes. The outer error is a case that cannot be read, the inner one a failure to
/// print.
fn reports(folder: &Path, json: bool) -> Result<dfar::Result<bool>, VerifyError> {
    let mut reports = Vec::new();
    for path in cases(folder)? {
        let report = verify(&path)?;
        if !json && let Err(error) = cli::print(&report.to_string()) {
            return Ok(Err(error));
        }
        reports.push(report);
    }
    let summary = Summary::new(reports);
    let text = match json {
        true => serde_json::to_string_pretty(&summary).expect("numbers and strings are valid JSON") + "\n",
        false => summary.to_string(),
    };
    Ok(cli::print(&text).map(|()| summary.failed == 0))
}
