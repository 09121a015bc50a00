//! What a program prints: included by `dfar-train` and `dfar-compare`.

use clap::Args;
use std::io::IsTerminal;

/// Output options.
#[derive(Args, Clone, Copy)]
pub struct Output {
    /// Print results as JSON.
    #[arg(long)]
    pub json: bool,
    /// Print only results and errors.
    #[arg(long, short)]
    pub quiet: bool,
    /// Print lines instead of progress bars, as when stderr is not a terminal.
    #[arg(long)]
    no_progress: bool,
}

impl Output {
    /// Whether progress bars are drawn on stderr.
    pub fn has_bars(&self) -> bool {
        !self.quiet && !self.no_progress && std::io::stderr().is_terminal()
    }
}
