//! `dfar-train`: train, evaluate and score.

#[path = "../shared/allocator.rs"]
mod allocator;
#[path = "../shared/cli.rs"]
mod cli;
mod device;
mod flags;
#[path = "../shared/manual.rs"]
mod manual;
#[path = "../shared/output.rs"]
mod output;
mod progress;
mod report;
mod score;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use device::on_device;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::data::{Dataset, Split};
use dfar::device::Device;
use dfar::model::Model;
use dfar::replacement::delete_unfinished;
use dfar::train::checkpoint::{Checkpoint, DataInfo};
use dfar::train::config::{Config, DeviceChoice};
use dfar::train::run::{self, Run};
use dfar::train::{Fit, Outcome, TrainError, draw};
use flags::Flags;
use output::Output;
use progress::Progress;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Train DFAR on a data set, evaluate it, and write the results to a run directory.
///
/// Without --data it trains on an embedded synthetic set, whose best possible metrics are known.
/// Results go to stdout, logs and progress bars to stderr. Exit codes: 0 done, 1 failed, 2 wrong
/// usage, 3 bad input, 4 no usable GPU, 5 non-finite loss, 130 interrupted (and saved).
#[derive(Parser)]
#[command(name = "dfar-train", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    train: Train,
}

#[derive(Subcommand)]
enum Command {
    /// Score the test and validation groups with a run's best model.
    Evaluate(Evaluate),
    /// Rank items after a history; items have their original ids.
    Score(Box<score::Score>),
    #[command(flatten)]
    Manual(manual::Manual),
}

#[derive(Args)]
struct Train {
    /// Directory of the new run [default: `runs/NAME`, named after the data set, with a number if
    /// it exists].
    #[arg(long, short, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Configuration file, of an earlier run or your own; flags override it.
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    /// Continue the run in this directory; its result is the same as without the interruption.
    #[arg(long, value_name = "DIR", conflicts_with_all = ["out", "config"])]
    resume: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct Evaluate {
    /// Run directory.
    #[arg(long, value_name = "DIR")]
    run: PathBuf,
    /// Data set with the same items [default: the run's].
    #[arg(long, value_name = "X.dfar")]
    data: Option<PathBuf>,
    /// Upper edges of the history lengths by which metrics are reported [default: the run's, or
    /// quartiles].
    #[arg(long, value_name = "EVENTS", value_delimiter = ',')]
    length_edges: Option<Vec<u32>>,
    /// Add the attention weight of the history encoder by the feedback of the two events (Figure 4
    /// of the paper)
    #[arg(long)]
    head_pairs: bool,
    /// Users that count in GAUC [default: the run's].
    #[arg(long, value_enum)]
    gauc_compat: Option<dfar::evaluate::metrics::GaucRule>,
    /// Device [default: the run's].
    #[arg(long, value_enum)]
    device: Option<DeviceChoice>,
    /// Threads; 0: one per core.
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[command(flatten)]
    output: Output,
}

/// The embedded set: small enough to learn in about a minute, with enough events per item to come
/// near its ceiling.
const SYNTHETIC: SyntheticOptions = SyntheticOptions {
    users: 1000,
    items: 64,
    events_per_user: 30.0,
    seed: 1,
    negatives: 9,
    split: Split::Temporal { train: 0.8, valid: 0.1 },
};

/// Set by Ctrl-C; checked after every batch.
static STOP: AtomicBool = AtomicBool::new(false);

fn main() -> ExitCode {
    // Parsed by hand, so that errors beyond derive's checks look like clap's own.
    let cli = Cli::from_arg_matches(&Cli::command().get_matches()).unwrap_or_else(|e| e.exit());
    let result = match cli.command {
        None => train(cli.train),
        Some(Command::Evaluate(args)) => evaluate(args),
        Some(Command::Score(args)) => score::score(*args),
        Some(Command::Manual(manual)) => manual.run(Cli::command()),
    };
    cli::exit(result)
}

fn train(args: Train) -> dfar::Result<()> {
    let flags = args.flags.table()?;
    let progress = Progress::new(args.output, &STOP);
    let open = |config: &Config| device::open(config, &|line| progress.line(line));
    let (run, config, chosen, checkpoint, opened) = match &args.resume {
        None => {
            let config = Config::layered(args.config.as_deref(), flags).map_err(TrainError::from)?;
            cli::start_threads(config.threads)?;
            // Checked before the directory is created, so that an error leaves no files.
            let data = config.data.as_ref().map(Dataset::open).transpose()?;
            if let Some(data) = &data {
                draw::require_targets(data, config.train_targets)?;
            }
            let items = data.as_ref().map_or(SYNTHETIC.items, Dataset::items);
            let network = config.model(items);
            network.check().map_err(TrainError::from)?;
            let chosen = open(&config)?;
            on_device!(&chosen, |device| Model::check_room(&**device, &network, config.dense_embeddings))
                .map_err(TrainError::from)?;
            let run = match &args.out {
                Some(dir) => Run::create(dir),
                None => Run::create_numbered(Path::new("runs"), &default_name(&config)),
            };
            (run.map_err(TrainError::from)?, config, chosen, None, data)
        }
        Some(dir) => {
            let run = Run::resume(dir).map_err(TrainError::from)?;
            let (saved, checkpoint) = match run.checkpoint().exists() {
                true => {
                    let checkpoint = Checkpoint::load(&run.checkpoint()).map_err(TrainError::from)?;
                    let saved = checkpoint.info.config.clone();
                    let edited = match Config::layered(Some(&run.config()), toml::Table::new()) {
                        Ok(edited) => edited.first_difference(&saved),
                        Err(error) => Some(error.to_string()),
                    };
                    if let Some(key) = edited {
                        progress.line(&format!(
                            "note: config.toml differs from the checkpoint ({key}); the checkpoint counts, \
                             with the flags of this command"
                        ));
                    }
                    (saved, Some(checkpoint))
                }
                false => {
                    progress.line("stopped before the first checkpoint: starting from the beginning");
                    let saved = Config::layered(Some(&run.config()), toml::Table::new());
                    (saved.map_err(TrainError::from)?, None)
                }
            };
            let config = saved.resumed(flags).map_err(TrainError::from)?;
            cli::start_threads(config.threads)?;
            let chosen = open(&config)?;
            (run, config, chosen, checkpoint, None)
        }
    };
    stop_on_interrupt(&progress);
    if checkpoint.is_none() {
        // Written first: with it, the run can be resumed.
        run.write_config(&config.to_toml()).map_err(TrainError::from)?;
    }
    let data = match (opened, &config.data) {
        (Some(data), _) => data,
        (None, Some(path)) => Dataset::open(path)?,
        (None, None) => synthetic_data(&run, &progress)?,
    };
    progress.line(&format!(
        "{}: {} users, {} items, {} events; run in {}",
        data.path().display(),
        report::count(data.users()),
        report::count(data.items()),
        report::count(data.events()),
        run.dir().display()
    ));
    let start = Start { data: &data, config: &config, run: &run, checkpoint };
    let captures = chosen.captures();
    let result = on_device!(chosen, |device| fit(device, start, &progress, args.output.json));
    captures().iter().for_each(|captures| progress.line(&captures.to_string()));
    result
}

/// A run to start or resume.
struct Start<'a> {
    data: &'a Dataset,
    config: &'a Config,
    run: &'a Run,
    checkpoint: Option<Checkpoint>,
}

/// Trains to the end and prints the report.
fn fit<D: Device>(device: Arc<D>, start: Start, progress: &Progress, json: bool) -> dfar::Result<()> {
    let Start { data, config, run, checkpoint } = start;
    let mut fit = match checkpoint {
        None => Fit::start(device.clone(), data, config.clone(), run)?,
        Some(checkpoint) => {
            let fit = Fit::resume(device.clone(), data, config.clone(), run, checkpoint)?;
            let (epoch, batch) = (fit.state().epoch + 1, fit.state().batch + 1);
            progress.line(&match fit.ended() {
                true => "no epoch is left to train".to_owned(),
                false => format!("resuming at epoch {epoch}, batch {batch}"),
            });
            fit
        }
    };
    let mut observe = |event: dfar::train::Event<'_>| progress.observe(event);
    let finished = match fit.run(&mut observe)? {
        Outcome::Finished => {
            report::finish(device, data, config, run, (fit.state(), fit.data_info()), &mut observe)
        }
        Outcome::Interrupted => Err(TrainError::Interrupted),
    };
    progress.clear();
    let report = finished.inspect_err(|error| {
        if error.exit_code() == 130 {
            progress.always(&format!(
                "interrupted; everything is saved. Continue with: dfar-train --resume {}",
                run.dir().display()
            ));
        }
    })?;
    cli::print(&match json {
        true => format!("{}\n", serde_json::to_string_pretty(&report).expect("a report is plain numbers")),
        false => report.to_string(),
    })
}

fn evaluate(args: Evaluate) -> dfar::Result<()> {
    cli::start_threads(args.threads)?;
    let (mut config, file) = run::open(&args.run)?;
    let progress = Progress::new(args.output, &STOP);
    stop_on_interrupt(&progress);
    let data = Dataset::open(data_path(args.data.as_deref(), &config, &args.run))?;
    let info = DataInfo::of(&data);
    if info.vocabulary != file.info.data.vocabulary {
        return Err(TrainError::OtherData { path: data.path().to_owned(), what: "its items" }.into());
    }
    if info.content != file.info.data.content {
        progress.line("note: these are not the events the model was trained on");
    }
    config.gauc_compat = args.gauc_compat.unwrap_or(config.gauc_compat);
    config.length_edges = args.length_edges.unwrap_or(config.length_edges);
    config.check_length_edges().map_err(TrainError::from)?;
    let chosen = device::open_for(&config, args.device, &|line| progress.line(line))?;
    let evaluated = on_device!(chosen, |device| {
        let model = Model::from_tensors(device, file.info.model, &file.parameters)?;
        let mut observe = |event: dfar::train::Event<'_>| progress.observe(event);
        let pairs = args
            .head_pairs
            .then(|| report::HeadPairsReport::of(&model, &data, &config, &mut observe))
            .transpose()?;
        report::evaluate_model(&model, &data, &config, &mut observe).map(|evaluation| (evaluation, pairs))
    });
    progress.clear();
    let (evaluation, head_pairs) = evaluated?;
    cli::print(&match args.output.json {
        true => {
            let mut json = serde_json::to_value(&evaluation).expect("an evaluation is plain numbers");
            json["data"] = serde_json::to_value(&info).expect("plain data");
            json["best_epoch"] = file.info.epoch.into();
            if let Some(head_pairs) = &head_pairs {
                json["head_pairs"] = serde_json::to_value(head_pairs).expect("plain numbers");
            }
            format!("{}\n", serde_json::to_string_pretty(&json).expect("plain JSON"))
        }
        false => {
            let text = report::evaluation_text(&evaluation, info.protocol.candidates.negatives);
            match head_pairs {
                Some(head_pairs) => format!("{text}\n{head_pairs}"),
                None => text,
            }
        }
    })
}

/// The given data set, or the run's own.
fn data_path(given: Option<&Path>, config: &Config, run: &Path) -> PathBuf {
    given.map(Path::to_owned).or_else(|| config.data.clone()).unwrap_or_else(|| run::synthetic_path(run))
}

/// The embedded set, made once per run.
fn synthetic_data(run: &Run, progress: &Progress) -> dfar::Result<Dataset> {
    let path = run.synthetic_data();
    if !path.exists() {
        progress.line("no --data: making the embedded synthetic set");
        run.make_synthetic_data(|path| -> dfar::Result<()> {
            synthetic::write(&SYNTHETIC, path)?;
            Ok(())
        })?;
    }
    Ok(Dataset::open(path)?)
}

fn default_name(config: &Config) -> String {
    let stem = config.data.as_deref().and_then(Path::file_stem);
    stem.map_or_else(|| "synthetic".to_owned(), |stem| stem.to_string_lossy().into_owned())
}

/// The first Ctrl-C stops the run after the current batch; the second exits at once (checkpoints
/// are complete at any time).
fn stop_on_interrupt(progress: &Progress) {
    let shown = progress.clone();
    let handler = move || {
        if STOP.swap(true, Ordering::SeqCst) {
            delete_unfinished();
            std::process::exit(130);
        }
        shown.line("stopping after this batch; press Ctrl-C again to stop at once");
    };
    // Without a handler, Ctrl-C still ends the program; the last checkpoint remains.
    if dfar::threads::check_room().is_ok() {
        let _ = ctrlc::set_handler(handler);
    }
}
