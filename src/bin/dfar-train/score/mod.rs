//! `dfar-train score`: ranks items after histories, by their original ids.

mod input;
mod list;
mod output;

use crate::cli;
use crate::device::{self, on_device};
use crate::output::Output;
use crate::progress::Progress;
use crate::{STOP, data_path, stop_on_interrupt};
use clap::{ArgGroup, Args, ValueEnum};
use dfar::data::{Dataset, Part};
use dfar::device::Device;
use dfar::evaluate::{self, Query, probability};
use dfar::model::Model;
use dfar::replacement::replaced;
use dfar::train::checkpoint::{DataInfo, ModelFile};
use dfar::train::config::{Config, DeviceChoice};
use dfar::train::run;
use dfar::train::{TrainError, score_options};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use input::Named;
use list::Id;
use output::{Format, Value, Writer};
use std::collections::{HashMap, HashSet};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// Number of candidates scored before results are written: enough to keep the device busy, few
/// enough for memory.
const ROWS_AT_A_TIME: usize = 1 << 18;

#[derive(Args)]
#[command(group = ArgGroup::new("what").required(true).args(
    ["history", "histories", "user", "users", "all_users", "groups"]
))]
pub struct Score {
    /// Run directory.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Events oldest first, as `item:1` (liked) or `item:0` (skipped), separated by commas; may be
    /// empty. An id with commas is quoted as in CSV: `"a,b":1`.
    #[arg(long, value_name = "ITEM:LABEL,..", allow_hyphen_values = true)]
    history: Option<String>,
    /// Histories in a file (`-`: standard input): JSON lines
    /// `{"user": "u", "history": [["item", 1], ..], "candidates": ["item", ..]}`, or CSV with the
    /// columns user, item and label.
    #[arg(long, value_name = "FILE")]
    histories: Option<PathBuf>,
    /// A user of the data set, with all their events as history.
    #[arg(long, value_name = "ID", allow_hyphen_values = true)]
    user: Option<String>,
    /// Users of the data set, one id per line (`-`: standard input).
    #[arg(long, value_name = "FILE")]
    users: Option<PathBuf>,
    /// Every user of the data set.
    #[arg(long)]
    all_users: bool,
    /// The stored evaluation groups of a part: the scores that `evaluate` measures.
    #[arg(long, value_enum, conflicts_with_all = ["candidates", "top", "exclude_seen", "skip_unknown"])]
    groups: Option<Groups>,
    /// Data set of --user, --users, --all-users and --groups [default: the run's].
    #[arg(long, value_name = "X.dfar")]
    data: Option<PathBuf>,
    /// Items to rank, each once, separated by commas and quoted as in --history [default: all
    /// items].
    #[arg(long, value_name = "ITEM,..", allow_hyphen_values = true)]
    candidates: Option<String>,
    /// Print only the N best items of each user [default: 10, or all given candidates].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    top: Option<u32>,
    /// Exclude the items of the history.
    #[arg(long)]
    exclude_seen: bool,
    /// Leave out unknown items and users, and print their number.
    #[arg(long)]
    skip_unknown: bool,
    /// File to write [default: stdout].
    #[arg(long, short, value_name = "FILE", conflicts_with = "json")]
    output: Option<PathBuf>,
    /// Format of the output [default: by the ending of --output; on stdout a table for one history,
    /// else CSV].
    #[arg(long, value_enum, conflicts_with = "json")]
    output_format: Option<Format>,
    /// Device [default: the run's].
    #[arg(long, value_enum)]
    device: Option<DeviceChoice>,
    /// Threads; 0: one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[command(flatten)]
    print: Output,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Groups {
    Valid,
    Test,
}

/// A user's query, in the model's item numbers.
struct Asked {
    user: String,
    /// Whether candidates were given; then all of them are ranked by default.
    named: bool,
    query: Query,
}

pub fn score(args: Score) -> dfar::Result<()> {
    cli::start_threads(args.threads)?;
    let (config, file) = run::open(&args.run)?;
    let progress = Progress::new(args.print, &STOP);
    stop_on_interrupt(&progress);
    args.refuse_to_replace_input(&config)?;
    let chosen = device::open_for(&config, args.device, &|line| progress.line(line))?;
    let writer = Writer::new(args.columns(), args.format()?, args.path())?;
    on_device!(chosen, |device| {
        let model = Model::from_tensors(device, file.info.model.clone(), &file.parameters)?;
        match args.groups {
            Some(groups) => score_groups(&model, &args, &config, &file, groups, writer),
            None => Scorer::new(&model, &args, &config, &file, writer)?.run(&progress),
        }
    })
}

impl Score {
    fn is_single(&self) -> bool {
        self.history.is_some() || self.user.is_some()
    }

    fn columns(&self) -> &'static [&'static str] {
        match (self.groups, self.is_single()) {
            (Some(_), _) => &["user", "event", "liked", "candidate", "item", "probability", "logit"],
            (None, true) => &["rank", "item", "probability", "logit"],
            (None, false) => &["user", "rank", "item", "probability", "logit"],
        }
    }

    /// The output file; `None` for stdout.
    fn path(&self) -> Option<&Path> {
        self.output.as_deref().filter(|path| *path != Path::new("-"))
    }

    fn format(&self) -> Result<Format, TrainError> {
        match (self.output_format, self.path(), self.print.json) {
            (Some(format), _, _) => Ok(format),
            (None, Some(path), _) => Format::of(path).ok_or_else(|| TrainError::Usage {
                argument: "--output",
                reason: "its ending is none of .csv, .jsonl, .json and .parquet; give --output-format".into(),
            }),
            (None, None, json) => Ok(match (json, self.is_single()) {
                (true, true) => Format::Json,
                (true, false) => Format::Jsonl,
                (false, true) => Format::Table,
                (false, false) => Format::Csv,
            }),
        }
    }

    fn data_path(&self, config: &Config) -> PathBuf {
        data_path(self.data.as_deref(), config, &self.run)
    }

    fn data(&self, config: &Config) -> dfar::Result<Dataset> {
        Ok(Dataset::open(self.data_path(config))?)
    }

    /// The output must replace neither a file that this command reads nor one of the run.
    fn refuse_to_replace_input(&self, config: &Config) -> Result<(), TrainError> {
        let Some(output) = self.path() else { return Ok(()) };
        let data = self.data_path(config);
        let files = run::files(&self.run);
        let given = [Some(&data), self.histories.as_ref(), self.users.as_ref()].into_iter().flatten();
        match replaced(output, given.chain(&files).map(PathBuf::as_path)) {
            None => Ok(()),
            Some(read) => Err(TrainError::Usage {
                argument: "--output",
                reason: format!(
                    "{} is read by this command or belongs to the run; give another file",
                    read.display()
                ),
            }),
        }
    }
}

/// The scores of the stored groups, as `evaluate` computes them.
fn score_groups<D: Device>(
    model: &Model<D>,
    args: &Score,
    config: &Config,
    file: &ModelFile,
    groups: Groups,
    mut writer: Writer,
) -> dfar::Result<()> {
    let data = args.data(config)?;
    if DataInfo::of(&data).vocabulary != file.info.data.vocabulary {
        return Err(TrainError::OtherData { path: data.path().to_owned(), what: "its items" }.into());
    }
    let part = if groups == Groups::Test { Part::Test } else { Part::Valid };
    let groups = data.groups(part);
    let bar = bar(&args.print, groups.len(), "groups");
    let options = score_options(config, &**model.device());
    let scores = evaluate::score_part(model, &data, part, &options, &mut |done| {
        bar.set_position(done as u64);
        if STOP.load(Ordering::SeqCst) { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    bar.finish_and_clear();
    let scores = scores.map_err(TrainError::from)?;
    for (group, logits) in groups.iter().zip(scores.chunks_exact(1 + groups.negatives_per_group)) {
        let events = data.user(group.user);
        let event = group.event as usize;
        let items = std::iter::once(events.items[event]).chain(group.negatives.iter().copied());
        for (candidate, (item, &logit)) in items.zip(logits).enumerate() {
            writer.row(vec![
                Value::Text(data.user_name(group.user).to_owned()),
                Value::Count(u64::from(group.event)),
                Value::Count(u64::from(events.feedback[event])),
                Value::Count(candidate as u64),
                Value::Text(data.item_name(item).to_owned()),
                Value::Real(probability(logit)),
                Value::Real(logit),
            ])?;
        }
    }
    writer.finish()
}

fn bar(print: &Output, length: usize, what: &str) -> ProgressBar {
    if !print.has_bars() {
        return ProgressBar::hidden();
    }
    let template = format!("{{bar:30}} {{pos}}/{{len}} {what}, {{per_sec}}, {{eta}} left");
    let style = ProgressStyle::with_template(&template).expect("the template is well-formed");
    let target = ProgressDrawTarget::stderr_with_hz(10);
    ProgressBar::with_draw_target(Some(length as u64), target).with_style(style.progress_chars("=> "))
}

/// Scores queries in blocks and writes the results in order.
struct Scorer<'a, D: Device> {
    model: &'a Model<D>,
    args: &'a Score,
    config: &'a Config,
    file: &'a ModelFile,
    index: HashMap<&'a str, u32>,
    candidates: Option<Vec<u32>>,
    waiting: Vec<Asked>,
    rows: usize,
    unknown: u64,
    unknown_users: u64,
    bar: ProgressBar,
    writer: Writer,
}

impl<'a, D: Device> Scorer<'a, D> {
    fn new(
        model: &'a Model<D>,
        args: &'a Score,
        config: &'a Config,
        file: &'a ModelFile,
        writer: Writer,
    ) -> Result<Self, TrainError> {
        let index = file.items.iter().map(String::as_str).zip(0..).collect();
        let mut scorer = Self {
            model,
            args,
            config,
            file,
            index,
            candidates: None,
            waiting: Vec::new(),
            rows: 0,
            unknown: 0,
            unknown_users: 0,
            bar: ProgressBar::hidden(),
            writer,
        };
        if let Some(list) = &args.candidates {
            let usage = |reason| TrainError::Usage { argument: "--candidates", reason };
            let ids = list::items(list).map_err(usage)?;
            if ids.is_empty() {
                return Err(usage("no item is named".to_owned()));
            }
            let found =
                ids.iter().map(|id| scorer.find_id(id, "--candidates")).collect::<Result<Vec<_>, _>>()?;
            scorer.candidates = Some(found.into_iter().flatten().collect());
        }
        Ok(scorer)
    }

    fn run(mut self, progress: &Progress) -> dfar::Result<()> {
        let args = self.args;
        if let Some(list) = &args.history {
            let usage = |reason| TrainError::Usage { argument: "--history", reason };
            let (mut items, mut labels) = (Vec::new(), Vec::new());
            for (id, label) in list::events(list).map_err(usage)? {
                if let Some(item) = self.find_id(&id, "--history")? {
                    items.push(item);
                    labels.push(label);
                }
            }
            self.ask(String::new(), items, labels, None)?;
        } else if let Some(path) = &args.histories {
            input::histories(path, &mut |file, named| self.ask_named(file, named))?;
        } else {
            self.ask_users()?;
        }
        self.flush()?;
        self.bar.finish_and_clear();
        self.writer.finish()?;
        for (count, what) in [(self.unknown, "unknown items"), (self.unknown_users, "unknown users")] {
            if count > 0 {
                progress.line(&format!("left out {count} {what}"));
            }
        }
        Ok(())
    }

    /// Adds queries for users of the data set, each with the whole history.
    fn ask_users(&mut self) -> dfar::Result<()> {
        let data = self.args.data(self.config)?;
        // The model's number of each item of the data set.
        let items: Vec<Option<u32>> =
            (0..data.items() as u32).map(|item| self.index.get(data.item_name(item)).copied()).collect();
        let users: Vec<u32> = match (&self.args.user, &self.args.users) {
            (Some(name), _) => self.find_user(&data, name, "--user")?.into_iter().collect(),
            (None, Some(path)) => {
                let named = input::users(path)?;
                let found = named.iter().map(|(name, place)| self.find_user(&data, name, place));
                found.collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect()
            }
            (None, None) => (0..data.users() as u32).collect(),
        };
        self.bar = bar(&self.args.print, users.len(), "users");
        for user in users {
            let events = data.user(user);
            let (mut seen, mut labels) = (Vec::new(), Vec::new());
            for (&item, &label) in events.items.iter().zip(events.feedback) {
                match items[item as usize] {
                    Some(item) => {
                        seen.push(item);
                        labels.push(label);
                    }
                    None => self.skip(data.item_name(item), &data.path().display().to_string())?,
                }
            }
            self.ask(data.user_name(user).to_owned(), seen, labels, None)?;
        }
        Ok(())
    }

    fn ask_named(&mut self, file: &str, named: Named) -> dfar::Result<()> {
        let place = format!("{file}:{}", named.line);
        let (mut items, mut labels) = (Vec::new(), Vec::new());
        for (item, label) in &named.events {
            if let Some(item) = self.find(item, &place)? {
                items.push(item);
                labels.push(*label);
            }
        }
        let candidates = match &named.candidates {
            None => None,
            Some(ids) => {
                let found = ids.iter().map(|item| self.find(item, &place)).collect::<Result<Vec<_>, _>>()?;
                Some(found.into_iter().flatten().collect())
            }
        };
        self.ask(named.user, items, labels, candidates)
    }

    fn ask(
        &mut self,
        user: String,
        items: Vec<u32>,
        labels: Vec<u8>,
        candidates: Option<Vec<u32>>,
    ) -> dfar::Result<()> {
        let named = candidates.is_some() || self.candidates.is_some();
        let mut candidates = candidates
            .or_else(|| self.candidates.clone())
            .unwrap_or_else(|| (0..self.file.items.len() as u32).collect());
        let mut left_out = HashSet::new();
        if self.args.exclude_seen {
            left_out.extend(&items);
        }
        if named {
            // An item has one rank, however often it is listed.
            candidates.retain(|&item| left_out.insert(item));
        } else if self.args.exclude_seen {
            candidates.retain(|item| !left_out.contains(item));
        }
        self.rows += candidates.len();
        self.waiting.push(Asked { user, named, query: Query { items, labels, candidates } });
        if self.rows >= ROWS_AT_A_TIME || self.waiting.len() >= ROWS_AT_A_TIME / 64 {
            self.flush()
        } else {
            Ok(())
        }
    }

    /// Scores the pending queries and writes the results.
    fn flush(&mut self) -> dfar::Result<()> {
        if STOP.load(Ordering::SeqCst) {
            return Err(TrainError::Interrupted.into());
        }
        let asked = std::mem::take(&mut self.waiting);
        self.rows = 0;
        let (users, queries): (Vec<(String, bool)>, Vec<Query>) =
            asked.into_iter().map(|asked| ((asked.user, asked.named), asked.query)).unzip();
        let workers = self.config.workers_for(&**self.model.device());
        let scores = evaluate::rank(self.model, self.file.info.feedback, &queries, workers);
        let scores = scores.map_err(TrainError::from)?;
        for (((user, named), query), logits) in users.iter().zip(&queries).zip(&scores) {
            let n = self.args.top.map_or(if *named { usize::MAX } else { 10 }, |top| top as usize);
            for (at, rank) in evaluate::top(logits, n).into_iter().zip(1u64..) {
                let mut row = vec![
                    Value::Count(rank),
                    Value::Text(self.file.items[query.candidates[at] as usize].clone()),
                    Value::Real(probability(logits[at])),
                    Value::Real(logits[at]),
                ];
                if !self.args.is_single() {
                    row.insert(0, Value::Text(user.clone()));
                }
                self.writer.row(row)?;
            }
        }
        self.bar.inc(users.len() as u64);
        Ok(())
    }

    /// The model's number of an item; `None` if it is unknown and left out.
    fn find(&mut self, item: &str, place: &str) -> Result<Option<u32>, TrainError> {
        match self.index.get(item) {
            Some(&item) => Ok(Some(item)),
            None => self.skip(item, place).map(|()| None),
        }
    }

    /// [`Self::find`] for an id in a list. Blanks around an unquoted id are ignored, unless the id
    /// with them is known.
    fn find_id(&mut self, id: &Id, place: &str) -> Result<Option<u32>, TrainError> {
        if id.quoted || self.index.contains_key(&id.text[..]) {
            return self.find(&id.text, place);
        }
        self.find(id.text.trim_ascii(), place)
    }

    fn skip(&mut self, item: &str, place: &str) -> Result<(), TrainError> {
        if !self.args.skip_unknown {
            return Err(TrainError::UnknownItem { item: item.to_owned(), argument: place.to_owned() });
        }
        self.unknown += 1;
        Ok(())
    }

    fn find_user(&mut self, data: &Dataset, user: &str, place: &str) -> Result<Option<u32>, TrainError> {
        match data.find_user(user) {
            Some(user) => Ok(Some(user)),
            None if self.args.skip_unknown => {
                self.unknown_users += 1;
                Ok(None)
            }
            None => Err(TrainError::UnknownUser { user: user.to_owned(), argument: place.to_owned() }),
        }
    }
}
