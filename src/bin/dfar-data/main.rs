//! `dfar-data`: makes, describes and exports data set files.

#[path = "../shared/allocator.rs"]
mod allocator;
#[path = "../shared/cli.rs"]
mod cli;
#[path = "../shared/manual.rs"]
mod manual;

mod export;
mod import;
mod info;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use cli::note;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::data::{Made, Split};
use dfar::replacement::delete_unfinished;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Import interaction logs into data set files, describe, export and generate them.
///
/// Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3
/// bad input, 130 interrupted.
#[derive(Parser)]
#[command(name = "dfar-data", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Import logs: drop repeats, filter, split, draw evaluation negatives, write one file.
    Import(Box<import::Import>),
    /// Describe a data set: the paper's Table 1, history lengths, the split, how it was made.
    Info(info::Info),
    /// Write the events of a data set as CSV or Parquet.
    Export(export::Export),
    /// Generate a synthetic data set whose best possible AUC is known.
    Synth(Synth),
    #[command(flatten)]
    Manual(manual::Manual),
}

#[derive(Args)]
struct Synth {
    /// Number of users.
    #[arg(long, default_value_t = 1000)]
    users: usize,
    /// Number of items.
    #[arg(long, default_value_t = 500)]
    items: usize,
    /// Approximate number of events of all users [default: 50 per user].
    #[arg(long)]
    events: Option<u64>,
    /// Seed of the events, the split and the negatives.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Negatives per evaluation group.
    #[arg(long, alias = "candidates", default_value_t = 9, value_name = "N")]
    negatives: usize,
    /// How to split histories.
    #[arg(long, value_enum, default_value = "temporal")]
    split: SplitKind,
    /// Data set file to make.
    #[arg(long, short, value_name = "X.dfar")]
    output: PathBuf,
    /// Print only errors.
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum SplitKind {
    /// The last event of every user is for testing, the one before it for validation
    LeaveLast,
    /// The same points in time for all users
    Temporal,
    /// Whole users
    ByUser,
}

impl SplitKind {
    fn with_usual_shares(self) -> Split {
        match self {
            SplitKind::LeaveLast => Split::LeaveLast,
            SplitKind::Temporal => Split::TEMPORAL,
            SplitKind::ByUser => Split::BY_USER,
        }
    }
}

fn main() -> ExitCode {
    let command = Cli::parse().command;
    // Without a handler, Ctrl-C still ends the program, but a partial file remains.
    if dfar::threads::check_room().is_ok() {
        let _ = ctrlc::set_handler(|| {
            delete_unfinished();
            std::process::exit(130);
        });
    }
    cli::exit(cli::start_threads(0).and_then(|()| match command {
        Command::Import(args) => import::import(*args),
        Command::Info(args) => info::info(&args),
        Command::Export(args) => export::export(&args),
        Command::Synth(args) => synth(args),
        Command::Manual(manual) => manual.run(Cli::command()),
    }))
}

fn synth(args: Synth) -> dfar::Result<()> {
    let defaults = SyntheticOptions::default();
    let options = SyntheticOptions {
        users: args.users,
        items: args.items,
        events_per_user: match args.events {
            Some(events) => events as f64 / args.users as f64,
            None => defaults.events_per_user,
        },
        seed: args.seed,
        negatives: args.negatives,
        split: args.split.with_usual_shares(),
    };
    let made = synthetic::write(&options, &args.output)?;
    if !args.quiet {
        report(&args.output, &made);
    }
    Ok(())
}

/// Prints a summary of the data set to stderr.
fn report(output: &Path, made: &Made) {
    let Made { users, items, events, groups: [valid, test], protocol } = made;
    let source = &protocol.source;
    note(format_args!(
        "{}: {users} users, {items} items, {events} events of {} rows ({} bad, {} repeated); \
         {valid} events for validation, {test} for the test",
        output.display(),
        source.rows,
        source.bad_rows,
        source.repeated_rows,
    ));
    if valid + test == 0 {
        note("nothing can be evaluated: no history is long enough for the split");
    }
}
