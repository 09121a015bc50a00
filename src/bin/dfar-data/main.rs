//! `dfar-data`: logs to data set files, and what is in them.

#[path = "../shared/cli.rs"]
mod cli;

use clap::{Args, Parser, Subcommand, ValueEnum};
use dfar::data::candidates::CandidateOptions;
use dfar::data::import::{self, ColumnOptions, ImportOptions, LogFormat, Progress, TimeUnit};
use dfar::data::statistics::{Statistics, statistics};
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::data::{BadRow, CountedRecords, Dataset, KCore, Made, Protocol, Repeats, Split};
use indicatif::{ProgressBar, ProgressStyle};
use std::fmt::Write;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// Import interaction logs into data set files, describe them, generate synthetic ones.
///
/// Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage, 3 bad input.
#[derive(Parser)]
#[command(name = "dfar-data", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Import logs: drop repeats, filter, split, draw evaluation negatives, write one file.
    Import(Import),
    /// Print what is in a data set: the paper's Table 1, history lengths, the split, how it was made.
    Info(Info),
    /// Generate a data set with planted structure, whose best possible AUC is known.
    Synth(Synth),
}

#[derive(Args)]
struct Import {
    /// Format of the logs.
    #[arg(long, value_enum)]
    format: Format,
    /// Log files, gzipped or not, read in this order; `-` is standard input.
    #[arg(long, short, required = true, num_args = 1.., value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Data set file to make.
    #[arg(long, short, value_name = "X.dfar")]
    output: PathBuf,

    /// Column of users: a name in the header, or a number counted from 0.
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    user_column: Option<String>,
    /// Column of items.
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    item_column: Option<String>,
    /// Column of times.
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    time_column: Option<String>,
    /// Column of ratings or flags, e.g. label, long_view, is_click.
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    label_column: Option<String>,
    /// Character between fields (`tab` for a tab) [default: by the first line].
    #[arg(long, value_parser = delimiter, value_name = "CHARACTER", help_heading = "Columns")]
    delimiter: Option<u8>,
    /// A label above this is liked [default: 3 for ratings, 2 for kuairec, flags are 0 or 1].
    #[arg(long, value_name = "LABEL", allow_negative_numbers = true, help_heading = "Columns")]
    positive_above: Option<f64>,
    /// Unit of the times; `auto` takes values below 10^11 as seconds, others as milliseconds.
    #[arg(long, value_enum, default_value = "auto", help_heading = "Columns")]
    time_unit: Unit,

    /// Skip up to so many bad rows instead of failing at the first.
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Filters")]
    skip_bad_rows: u64,
    /// Keep all events of a user with the same item, not only the first.
    #[arg(long, help_heading = "Filters")]
    keep_repeats: bool,
    /// Fewest records of an item, then of a user; 0 for no filter.
    #[arg(long, default_value_t = 10, value_name = "K", help_heading = "Filters")]
    k_core: u32,
    /// Records that count towards it [default: positive for kuairand and kuairec, else all].
    #[arg(long, value_enum, help_heading = "Filters")]
    k_core_on: Option<Counted>,
    /// Repeat the filter until every item and user that is left has K records.
    #[arg(long, help_heading = "Filters")]
    k_core_until_stable: bool,

    /// How to cut histories [default: temporal for kuairand and kuairec, else leave-last].
    #[arg(long, value_enum, help_heading = "Split and evaluation groups")]
    split: Option<SplitKind>,
    /// Share of events (temporal) or users (by-user) for training.
    #[arg(long, default_value_t = 0.8, value_name = "SHARE", help_heading = "Split and evaluation groups")]
    train_share: f64,
    /// Share of events or users for validation.
    #[arg(long, default_value_t = 0.1, value_name = "SHARE", help_heading = "Split and evaluation groups")]
    valid_share: f64,
    /// Negatives of each evaluation group, drawn by popularity in the training events.
    #[arg(long, default_value_t = 9, value_name = "N", help_heading = "Split and evaluation groups")]
    candidates: usize,
    /// Draw no item that the user meets anywhere in the log.
    #[arg(long, help_heading = "Split and evaluation groups")]
    exclude_seen: bool,
    /// Seed of the negatives and of the by-user split.
    #[arg(long, default_value_t = 1, help_heading = "Split and evaluation groups")]
    seed: u64,

    /// Folder of temporary files [default: that of the output].
    #[arg(long, value_name = "DIR", help_heading = "Running")]
    temp_dir: Option<PathBuf>,
    /// Mebibytes of events to sort in memory at a time.
    #[arg(long, default_value_t = 32, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1 << 20), help_heading = "Running")]
    sort_memory: u32,
    /// No progress bar and no messages but errors.
    #[arg(long, short, help_heading = "Running")]
    quiet: bool,
    /// No progress bar.
    #[arg(long, help_heading = "Running")]
    no_progress: bool,
}

#[derive(Args)]
struct Info {
    /// Data set file.
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Args)]
struct Synth {
    /// Users.
    #[arg(long, default_value_t = 1000)]
    users: usize,
    /// Items.
    #[arg(long, default_value_t = 500)]
    items: usize,
    /// Events of all users together, about [default: 50 a user].
    #[arg(long)]
    events: Option<u64>,
    /// Seed of everything.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Negatives of each evaluation group.
    #[arg(long, default_value_t = 9, value_name = "N")]
    candidates: usize,
    /// How to cut histories.
    #[arg(long, value_enum, default_value = "temporal")]
    split: SplitKind,
    /// Data set file to make.
    #[arg(long, short, value_name = "X.dfar")]
    output: PathBuf,
    /// No messages but errors.
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// u.data, ratings.dat, ratings.csv
    Movielens,
    /// Ratings or reviews of 2014, 2018, 2023, csv or JSON lines
    Amazon,
    /// log_*.csv and excerpts
    Kuairand,
    /// big_matrix.csv, small_matrix.csv
    Kuairec,
    /// RecBole atomic files
    Inter,
    /// Any delimited text; give the columns
    Csv,
}

#[derive(Clone, Copy, ValueEnum)]
enum Unit {
    Auto,
    S,
    Ms,
}

#[derive(Clone, Copy, ValueEnum)]
enum Counted {
    All,
    Positive,
}

#[derive(Clone, Copy, ValueEnum)]
enum SplitKind {
    /// The last event of a user is tested, the one before validates
    LeaveLast,
    /// One point in time for everybody
    Temporal,
    /// Whole users
    ByUser,
}

impl SplitKind {
    fn with(self, train: f64, valid: f64) -> Split {
        match self {
            SplitKind::LeaveLast => Split::LeaveLast,
            SplitKind::Temporal => Split::Temporal { train, valid },
            SplitKind::ByUser => Split::ByUser { train, valid },
        }
    }
}

/// One byte, or the word `tab`.
fn delimiter(text: &str) -> Result<u8, String> {
    match text.as_bytes() {
        b"tab" | b"\\t" => Ok(b'\t'),
        [b'"' | b'\n' | b'\r'] => Err("quotes and line ends cannot be delimiters".to_owned()),
        [byte] if byte.is_ascii() => Ok(*byte),
        _ => Err("must be one ASCII character, or `tab`".to_owned()),
    }
}

fn main() -> ExitCode {
    cli::exit(match Cli::parse().command {
        Command::Import(args) => import(args),
        Command::Info(args) => info(&args),
        Command::Synth(args) => synth(args),
    })
}

fn import(args: Import) -> dfar::Result<()> {
    let format = match args.format {
        Format::Movielens => LogFormat::MovieLens,
        Format::Amazon => LogFormat::Amazon,
        Format::Kuairand => LogFormat::KuaiRand,
        Format::Kuairec => LogFormat::KuaiRec,
        Format::Inter => LogFormat::Inter,
        Format::Csv => LogFormat::Csv,
    };
    let mut options = ImportOptions::new(format, args.input, args.output);
    options.columns = ColumnOptions {
        user: args.user_column,
        item: args.item_column,
        time: args.time_column,
        label: args.label_column,
        delimiter: args.delimiter,
    };
    options.positive_above = args.positive_above;
    options.time_unit = match args.time_unit {
        Unit::Auto => TimeUnit::Auto,
        Unit::S => TimeUnit::Seconds,
        Unit::Ms => TimeUnit::Milliseconds,
    };
    options.skip_bad_rows = args.skip_bad_rows;
    if args.keep_repeats {
        options.repeats = Repeats::Keep;
    }
    let on = match args.k_core_on {
        Some(Counted::All) => CountedRecords::All,
        Some(Counted::Positive) => CountedRecords::Positive,
        None => format.counted_records(),
    };
    let rule = KCore { k: args.k_core, on, until_stable: args.k_core_until_stable };
    options.k_core = (args.k_core > 0).then_some(rule);
    options.split = match args.split {
        Some(kind) => kind.with(args.train_share, args.valid_share),
        None => options.split.with_shares(args.train_share, args.valid_share),
    };
    options.candidates =
        CandidateOptions { negatives: args.candidates, exclude_seen: args.exclude_seen, seed: args.seed };
    options.temporary = args.temp_dir;
    options.sort_memory = (args.sort_memory as usize) << 20;

    let progress = Bar::new(&options.inputs, args.quiet, args.no_progress);
    let made = import::import(&options, &progress)?;
    progress.bar.finish_and_clear();
    if !args.quiet {
        report(&options.output, &made);
    }
    Ok(())
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
        negatives: args.candidates,
        split: args.split.with(0.8, 0.1),
    };
    let made = synthetic::write(&options, &args.output)?;
    if !args.quiet {
        report(&args.output, &made);
    }
    Ok(())
}

/// Says on stderr what was made.
fn report(output: &Path, made: &Made) {
    let Made { users, items, events, protocol } = made;
    let source = &protocol.source;
    eprintln!(
        "{}: {users} users, {items} items, {events} events of {} rows ({} bad, {} repeated)",
        output.display(),
        source.rows,
        source.bad_rows,
        source.repeated_rows,
    );
}

/// A bar over the bytes of all inputs, shown only on a terminal.
struct Bar {
    bar: ProgressBar,
    quiet: bool,
}

impl Bar {
    fn new(inputs: &[PathBuf], quiet: bool, no_progress: bool) -> Bar {
        if quiet || no_progress || !std::io::stderr().is_terminal() {
            return Bar { bar: ProgressBar::hidden(), quiet };
        }
        let sizes: Option<Vec<u64>> =
            inputs.iter().map(|path| std::fs::metadata(path).ok().map(|data| data.len())).collect();
        let bar = match sizes {
            Some(sizes) => ProgressBar::new(sizes.iter().sum()),
            None => ProgressBar::no_length(),
        };
        let style = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {eta}";
        bar.set_style(ProgressStyle::with_template(style).expect("the template is well-formed"));
        bar.set_message("reading");
        Bar { bar, quiet }
    }
}

impl Progress for Bar {
    fn bytes(&self, count: u64) {
        self.bar.inc(count);
    }

    fn skipped(&self, row: &BadRow) {
        if !self.quiet {
            self.bar.suspend(|| eprintln!("skipped: {row}"));
        }
    }

    fn finishing(&self) {
        self.bar.set_message("writing");
    }
}

fn info(args: &Info) -> dfar::Result<()> {
    let data = Dataset::open(&args.file)?;
    let statistics = statistics(&data);
    if args.json {
        let json = serde_json::to_string_pretty(&statistics).expect("statistics are plain data");
        return cli::print(&format!("{json}\n"));
    }
    cli::print(&table(&args.file, &statistics))
}

/// The statistics for people.
fn table(file: &Path, s: &Statistics) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let mut line = |words: std::fmt::Arguments| writeln!(text, "{words}").expect("memory takes any text");
    line(format_args!("{}", file.display()));
    line(format_args!(""));
    line(format_args!(
        "  {:>10} {:>10} {:>12} {:>12} {:>14}",
        "users", "items", "positive", "negative", "mean per user"
    ));
    line(format_args!(
        "  {:>10} {:>10} {:>12} {:>12} {:>14.2}",
        s.users, s.items, s.positive, s.negative, s.mean_records_per_user
    ));
    line(format_args!(""));
    line(format_args!("  events of a user"));
    for quantile in &s.history_length {
        let name = match quantile.share {
            0.0 => "shortest".to_owned(),
            1.0 => "longest".to_owned(),
            share => format!("{:.0} %", share * 100.0),
        };
        line(format_args!("  {name:>10} {:>10}", quantile.events));
    }
    line(format_args!(""));
    line(format_args!("  {:>10} {:>10} {:>12}", "", "liked", "skipped"));
    for (name, part) in [("train", s.train), ("valid", s.valid), ("test", s.test)] {
        line(format_args!("  {name:>10} {:>10} {:>12}", part.liked, part.skipped));
    }
    if s.test_without_history > 0 {
        line(format_args!("  ({} liked test events have no event before them)", s.test_without_history));
    }
    line(format_args!(""));
    let protocol = &s.protocol;
    let source = &protocol.source;
    line(format_args!("  source      {} {}", source.format, source.files.join(" ")));
    line(format_args!(
        "              {} rows, {} bad, {} repeated",
        source.rows, source.bad_rows, source.repeated_rows
    ));
    line(format_args!("  positive    {}", protocol.positive));
    line(format_args!("  k-core      {}", k_core_words(protocol)));
    line(format_args!("  split       {}", split_words(protocol.split)));
    let candidates = &protocol.candidates;
    line(format_args!(
        "  candidates  {} by training popularity, seen items {}, seed {}, hash {}",
        candidates.negatives,
        if candidates.exclude_seen { "excluded" } else { "allowed" },
        candidates.seed,
        candidates.hash
    ));
    if let Some(auc) = s.ceiling_auc {
        line(format_args!("  ceiling     test AUC {auc:.4} by the generating process's own probabilities"));
    }
    text
}

fn k_core_words(protocol: &Protocol) -> String {
    let Some(KCore { k, on, until_stable }) = protocol.k_core else { return "none".to_owned() };
    let records = match on {
        CountedRecords::All => "all records",
        CountedRecords::Positive => "positive records",
    };
    let passes = if until_stable { "until stable" } else { "items then users, once" };
    format!("{k} on {records}, {passes}")
}

fn split_words(split: Split) -> String {
    match split {
        Split::LeaveLast => "leave-last: last event test, the one before validation".to_owned(),
        Split::Temporal { train, valid } => format!("temporal: {train} train, {valid} validation, rest test"),
        Split::ByUser { train, valid } => format!("by-user: {train} train, {valid} validation, rest test"),
    }
}
