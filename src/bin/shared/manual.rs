//! Shell completions and man pages of a binary, generated from its flags by clap's own crates.

use crate::cli;
use clap::{Args, Command, Subcommand};
use clap_complete::Shell;
use dfar::{Error, Result};
use std::path::PathBuf;

/// Subcommands that every binary has.
#[derive(Subcommand)]
pub enum Manual {
    /// Print the completions for a shell; see docs/install.md.
    Completions(Completions),
    /// Write man pages, one for each subcommand.
    Man(Man),
}

#[derive(Args)]
pub struct Completions {
    /// Shell to complete in.
    shell: Shell,
}

#[derive(Args)]
pub struct Man {
    /// Folder of the pages; made if missing.
    folder: PathBuf,
}

impl Manual {
    /// Runs the subcommand for the binary with this command line.
    pub fn run(self, mut command: Command) -> Result<()> {
        match self {
            Manual::Completions(Completions { shell }) => {
                let (name, mut script) = (command.get_name().to_owned(), Vec::new());
                clap_complete::generate(shell, &mut command, name, &mut script);
                cli::print(&String::from_utf8_lossy(&script))
            }
            Manual::Man(Man { folder }) => {
                let failed = |error| Error::io("write man pages to", &folder)(error);
                std::fs::create_dir_all(&folder).map_err(failed)?;
                clap_mangen::generate_to(command, &folder).map_err(failed)
            }
        }
    }
}
