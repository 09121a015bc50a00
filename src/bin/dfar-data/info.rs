//! `dfar-data info`: describes a data set.

use crate::cli;
use clap::Args;
use dfar::data::statistics::{PositionSize, Statistics, statistics};
use dfar::data::{CountedRecords, Dataset, KCore, Protocol, Split};
use std::fmt::Write;
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct Info {
    /// Data set file.
    file: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn info(args: &Info) -> dfar::Result<()> {
    let data = Dataset::open(&args.file)?;
    let statistics = statistics(&data);
    if args.json {
        let json = serde_json::to_string_pretty(&statistics).expect("statistics are plain data");
        return cli::print(&format!("{json}\n"));
    }
    cli::print(&table(&args.file, &statistics))
}

/// The statistics as text.
fn table(file: &Path, s: &Statistics) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let mut line = |words: std::fmt::Arguments| writeln!(text, "{words}").expect("memory takes any text");
    line(format_args!("{}", file.display()));
    line(format_args!(""));
    line(format_args!(
        "  {:>10} {:>10} {:>12} {:>12} {:>14}",
        "users", "items", "positive", "negative", "records/user"
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
    feedback_by_position(&mut line, s);
    transitions(&mut line, s);
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
        "              {} rows, {} bad, {} repeated{}",
        source.rows,
        source.bad_rows,
        source.repeated_rows,
        match source.other_events {
            0 => String::new(),
            count => format!(", {count} of other events"),
        }
    ));
    for decision in &source.decisions {
        line(format_args!("              {decision}"));
    }
    line(format_args!("  positive    {}", protocol.positive));
    line(format_args!("  k-core      {}", k_core_words(protocol)));
    line(format_args!("  split       {}", split_words(protocol.split)));
    let candidates = &protocol.candidates;
    line(format_args!(
        "  negatives   {} by training popularity, seen items {}, seed {}, hash {}",
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

fn feedback_by_position(line: &mut dyn FnMut(std::fmt::Arguments), s: &Statistics) {
    line(format_args!(""));
    line(format_args!("  feedback by position in the history"));
    line(format_args!("  {:>10} {:>10} {:>12} {:>14}", "", "liked", "skipped", "share liked"));
    for PositionSize { from, to, size } in &s.by_position {
        let name = if from == to { from.to_string() } else { format!("{from}-{to}") };
        let share = percent(size.liked, size.liked + size.skipped);
        line(format_args!("  {name:>10} {:>10} {:>12} {share:>14}", size.liked, size.skipped));
    }
}

/// How feedback follows on feedback.
fn transitions(line: &mut dyn FnMut(std::fmt::Arguments), s: &Statistics) {
    line(format_args!(""));
    line(format_args!("  feedback after feedback"));
    line(format_args!("  {:>10} {:>10} {:>12} {:>14}", "", "then liked", "then skipped", "share liked"));
    for (name, [skipped, liked]) in [("liked", s.transitions[1]), ("skipped", s.transitions[0])] {
        let share = percent(liked, liked + skipped);
        line(format_args!("  {name:>10} {liked:>10} {skipped:>12} {share:>14}"));
    }
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "-".to_owned() } else { format!("{:.1} %", 100.0 * part as f64 / whole as f64) }
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
