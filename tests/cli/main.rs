//! The commands, run as a user runs them.

mod bench_attention;
mod bench_train;
mod data;
mod kill;
mod manual;
mod score;
#[path = "../common/skip.rs"]
mod skip;
mod train;
mod verify;

use dfar::data::synthetic::{self, SyntheticOptions};
use std::path::Path;
use std::process::Command;

/// `dfar-train` in `dir`, on one thread.
fn dfar_train(dir: &Path, args: &[&str]) -> Command {
    command(env!("CARGO_BIN_EXE_dfar-train"), dir, args)
}

/// A program in `dir`, on one thread.
fn command(program: &str, dir: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).args(args).env("RAYON_NUM_THREADS", "1");
    command
}

/// Writes a small synthetic set to `x.dfar` in `dir`: users 0 to 39, items 0 to 39.
fn write_set(dir: &Path) {
    let options =
        SyntheticOptions { users: 40, items: 40, events_per_user: 15.0, ..SyntheticOptions::default() };
    synthetic::write(&options, dir.join("x.dfar")).unwrap();
}

/// A small model on `x.dfar`; the run is `run`.
const SMALL_RUN: [&str; 8] = ["--data", "x.dfar", "--out", "run", "--width", "8", "--max-length", "10"];

/// Trains the small model for one epoch.
fn short_run() -> Vec<&'static str> {
    [&SMALL_RUN[..], &["--epochs", "1", "--negatives", "3"]].concat()
}
