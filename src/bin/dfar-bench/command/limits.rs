//! `dfar-bench limits`: the peak rates of the CPU.

use crate::{limits, say};
use dfar::{Result, threads};

#[derive(clap::Args)]
pub struct Limits {
    /// Threads; 0: one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Measures and prints the rates.
pub fn run(arguments: &Limits) -> Result<()> {
    let limits = threads::pool(arguments.threads)?.install(limits::cpu::measure);
    if arguments.json {
        say!("{}", serde_json::to_string_pretty(&limits).expect("numbers and strings are valid JSON"));
    } else {
        say!("{limits}");
    }
    Ok(())
}
