//! `dfar-data import`: makes a data set file from logs.

use crate::cli::note;
use crate::{Cli, SplitKind, report};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, ValueEnum};
use dfar::data::candidates::CandidateOptions;
use dfar::data::import::{self, ColumnOptions, ImportOptions, Liked, LogFormat, Progress, TimeUnit};
use dfar::data::{BadRow, CountedRecords, KCore, Repeats};
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::PathBuf;

#[derive(Args)]
pub struct Import {
    /// Format of the logs.
    #[arg(long, value_enum)]
    format: Format,
    /// Log files, read in this order; `-` is standard input. gzip, zstd, tar, JSON, Parquet and
    /// Arrow files are recognized by their content.
    #[arg(long, short, required = true, num_args = 1.., value_name = "FILE")]
    input: Vec<PathBuf>,
    /// Members of tar archives to read; `*` stands for any text [default: all that are logs by
    /// their names].
    #[arg(long, value_name = "PATTERN")]
    member: Option<String>,
    /// Data set file to make.
    #[arg(long, short, value_name = "X.dfar")]
    output: PathBuf,

    /// Column of users: a name in the header, or a number counted from 0.
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    user_column: Option<String>,
    /// Column of items.
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    item_column: Option<String>,
    /// Column of times: numbers, or ISO 8601 dates (UTC unless they name a zone).
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    time_column: Option<String>,
    /// Column of dates, if the time column holds only the time of day.
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    date_column: Option<String>,
    /// Column of ratings or flags, e.g. label, long_view, is_click.
    #[arg(long, value_name = "COLUMN", help_heading = "Columns")]
    label_column: Option<String>,
    /// Character between fields (`tab` for a tab) [default: by the first line].
    #[arg(long, value_parser = delimiter, value_name = "CHARACTER", help_heading = "Columns")]
    delimiter: Option<u8>,
    /// Unit of times that are numbers; `auto` decides once for the whole log.
    #[arg(long, value_enum, default_value = "auto", help_heading = "Columns")]
    time_unit: Unit,

    /// A label above this is liked [default: 3 for ratings, 2 for kuairec, flags are 0 or 1].
    #[arg(long, value_name = "LABEL", allow_negative_numbers = true, help_heading = "Feedback")]
    positive_above: Option<f64>,
    /// Count every event as liked; the log needs no label column.
    #[arg(long, conflicts_with_all = ["positive_above", "label_column"], help_heading = "Feedback")]
    all_liked: bool,
    /// Labels of liked events, if labels are names, e.g. buy,cart.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', conflicts_with_all = ["positive_above", "all_liked"], help_heading = "Feedback")]
    liked: Vec<String>,
    /// Labels of skipped events.
    #[arg(
        long,
        value_name = "NAME,..",
        value_delimiter = ',',
        requires = "liked",
        help_heading = "Feedback"
    )]
    skipped: Vec<String>,
    /// Ignore events with other labels instead of refusing the log.
    #[arg(long, requires = "liked", help_heading = "Feedback")]
    ignore_others: bool,

    /// Number of bad rows to skip before the import fails.
    #[arg(long, default_value_t = 0, value_name = "N", help_heading = "Filters")]
    skip_bad_rows: u64,
    /// Keep all events of a user with the same item, not only the first.
    #[arg(long, help_heading = "Filters")]
    keep_repeats: bool,
    /// Fewest records of an item, then of a user; 0: no filter.
    #[arg(long, default_value_t = 10, value_name = "K", help_heading = "Filters")]
    k_core: u32,
    /// Records counted by the filter [default: positive for kuairand and kuairec, else all].
    #[arg(long, value_enum, help_heading = "Filters")]
    k_core_on: Option<Counted>,
    /// Repeat the filter until every remaining item and user has K records.
    #[arg(long, help_heading = "Filters")]
    k_core_until_stable: bool,

    /// How to split histories [default: temporal for kuairand and kuairec, else leave-last].
    #[arg(long, value_enum, help_heading = "Split and evaluation groups")]
    split: Option<SplitKind>,
    /// Share of events (temporal) or users (by-user) for training [default: 0.8].
    #[arg(long, value_name = "SHARE", help_heading = "Split and evaluation groups")]
    train_share: Option<f64>,
    /// Share of events or users for validation [default: 0.1].
    #[arg(long, value_name = "SHARE", help_heading = "Split and evaluation groups")]
    valid_share: Option<f64>,
    /// Negatives per evaluation group, drawn by popularity in the training events.
    #[arg(
        long,
        alias = "candidates",
        default_value_t = 9,
        value_name = "N",
        help_heading = "Split and evaluation groups"
    )]
    negatives: usize,
    /// Exclude all items of the user's whole history from the negatives.
    #[arg(long, help_heading = "Split and evaluation groups")]
    exclude_seen: bool,
    /// Seed of the negatives and of the by-user split.
    #[arg(long, default_value_t = 1, help_heading = "Split and evaluation groups")]
    seed: u64,

    /// Folder of temporary files [default: the folder of the output].
    #[arg(long, value_name = "DIR", help_heading = "Running")]
    temp_dir: Option<PathBuf>,
    /// Mebibytes of events to sort in memory at a time.
    #[arg(long, default_value_t = 32, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1 << 20), help_heading = "Running")]
    sort_memory: u32,
    /// Print only errors.
    #[arg(long, short, help_heading = "Running")]
    quiet: bool,
    /// Show no progress bar.
    #[arg(long, help_heading = "Running")]
    no_progress: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Format {
    /// u.data, ratings.dat, ratings.csv
    Movielens,
    /// Ratings or reviews of 2014, 2018 and 2023, CSV or JSON
    Amazon,
    /// log_*.csv and excerpts
    Kuairand,
    /// big_matrix.csv, small_matrix.csv
    Kuairec,
    /// RecBole atomic files
    Inter,
    /// Any log with the columns user, item, time and label, or others that options name
    Csv,
}

#[derive(Clone, Copy, ValueEnum)]
enum Unit {
    Auto,
    S,
    Ms,
    Us,
    Ns,
}

#[derive(Clone, Copy, ValueEnum)]
enum Counted {
    All,
    Positive,
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

pub fn import(args: Import) -> dfar::Result<()> {
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
        date: args.date_column,
        label: args.label_column,
        delimiter: args.delimiter,
    };
    options.member = args.member;
    options.liked = match args.positive_above {
        Some(threshold) => Liked::Above(threshold),
        None if args.all_liked => Liked::Every,
        None if !args.liked.is_empty() => {
            Liked::Named { liked: args.liked, skipped: args.skipped, ignore_others: args.ignore_others }
        }
        None => Liked::ByFormat,
    };
    options.time_unit = match args.time_unit {
        Unit::Auto => TimeUnit::Auto,
        Unit::S => TimeUnit::Seconds,
        Unit::Ms => TimeUnit::Milliseconds,
        Unit::Us => TimeUnit::Microseconds,
        Unit::Ns => TimeUnit::Nanoseconds,
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
    let split = args.split.map_or(options.split, SplitKind::with_usual_shares);
    options.split = split.with_shares(args.train_share, args.valid_share).unwrap_or_else(|| {
        let reason = "--train-share and --valid-share are for --split temporal and by-user; \
                      this split is leave-last";
        Cli::command().error(ErrorKind::ArgumentConflict, reason).exit()
    });
    options.candidates =
        CandidateOptions { negatives: args.negatives, exclude_seen: args.exclude_seen, seed: args.seed };
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

/// A progress bar over the bytes of all inputs, shown only on a terminal.
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
            self.bar.suspend(|| note(format_args!("skipped: {row}")));
        }
    }

    fn note(&self, decision: &str) {
        if !self.quiet {
            self.bar.suspend(|| note(decision));
        }
    }

    fn finishing(&self) {
        self.bar.set_message("writing");
    }
}
