//! `dfar-compare`: trains the systems of Table 2 on a data set, under one protocol.

#[path = "../../src/bin/shared/cli.rs"]
mod cli;
#[path = "../../src/bin/dfar-train/flags.rs"]
mod flags;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use dfar::batch::Feedback;
use dfar::data::{Dataset, Part};
use dfar::evaluate::{part_report, popularity_scores};
use dfar::train::checkpoint::DataInfo;
use dfar::train::config::DeviceChoice;
use dfar::train::draw::TrainTargets;
use dfar::train::file::replace_bytes;
use dfar::train::{Config, TrainError, draw};
use dfar_baselines::fit::Epoch;
use dfar_baselines::loss::Ranking;
use dfar_baselines::results::{Identity, Options, ResultError, Row, RunResult, to_json};
use dfar_baselines::systems::sasrec::Pool;
use dfar_baselines::table::Table;
use dfar_baselines::verify::verify;
use dfar_tools::verify::{Summary, VerifyError, cases};
use flags::Flags;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

/// Train DIN, Caser, GRU4REC, DIEN, SASRec, THA4Rec, DFN, FeedRec and DFAR on a data set, and
/// compare them on its test groups (Table 2 of the paper).
///
/// All systems read the same events, targets and negatives, and are scored on the same groups. Each
/// finished run is a file in `DIR/results`; the same command continues an interrupted comparison.
/// The table goes to stdout and to `DIR/table.md`, `table.csv` and `table.json`, progress to
/// stderr.
#[derive(Parser)]
#[command(name = "dfar-compare", version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    compare: Compare,
}

#[derive(Subcommand)]
enum Command {
    /// Compare with reference cases: print the relative error of each tensor, exit with 1 beyond
    /// the tolerance
    Verify {
        /// Folder of case files (*.safetensors)
        folder: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

#[derive(Args)]
struct Compare {
    /// Directory of the results.
    #[arg(long, short, value_name = "DIR", default_value = "runs/compare")]
    out: PathBuf,
    /// Systems: din, caser, gru4rec, dien, sasrec, tha4rec, dfn, feedrec, dfar [default: all].
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = Row::parse)]
    systems: Vec<Row>,
    /// Number of seeds, from --seed on.
    #[arg(long, value_name = "N", default_value_t = 3)]
    seeds: u64,
    /// Ranking loss of the compared systems; DFAR always has its own.
    #[arg(long, value_enum, default_value_t, help_heading = "Loss")]
    loss: Ranking,
    /// Weight of the auxiliary loss of DIEN; that of FeedRec is --idl.
    #[arg(long, default_value_t = 1.0, help_heading = "Loss")]
    aux: f64,
    /// Pooling of SASRec and THA4Rec.
    #[arg(long, value_enum, default_value_t, help_heading = "Model")]
    pool: Pool,
    /// Configuration file of a run of dfar-train; flags override it.
    #[arg(long, value_name = "FILE.toml")]
    config: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
}

fn main() -> ExitCode {
    let Cli { command, compare } = parse();
    match command {
        Some(Command::Verify { folder, json }) => run_verify(&folder, json),
        None => match run_comparison(&compare) {
            Ok(()) => ExitCode::SUCCESS,
            Err(Failure::Result(error)) => cli::fail(&error, 1),
            Err(Failure::Other(error)) => cli::exit(Err(error)),
        },
    }
}

/// The flags of `dfar-train`, some of which mean something else here.
fn parse() -> Cli {
    let differs = [
        ("data", "Data set made by `dfar-data`"),
        ("seed", "First seed of initial values, shuffles and negatives [default: 2020]"),
        ("feedback", "Feedback that all systems read [default: that of each system's paper]"),
        ("idl", "Weight of the disentangling loss of DFAR and FeedRec [default: 0.001]"),
        ("bpr", "Weight of the interest-wise BPR loss of DFAR [default: 0.1]"),
    ];
    let command = differs.iter().fold(Cli::command(), |command, (flag, help)| {
        command.mut_arg(flag, |argument| argument.help(*help).long_help(*help))
    });
    let unused = ["device", "precision", "cuda_graphs", "checkpoint_seconds"];
    let command =
        unused.iter().fold(command, |command, flag| command.mut_arg(flag, |argument| argument.hide(true)));
    Cli::from_arg_matches(&command.get_matches()).unwrap_or_else(|error| error.exit())
}

fn run_verify(folder: &Path, json: bool) -> ExitCode {
    if let Err(error) = cli::start_threads(0) {
        return cli::exit(Err(error));
    }
    match reports(folder, json) {
        Err(error) => cli::fail(&error, 3),
        Ok(Err(error)) => cli::exit(Err(error)),
        Ok(Ok(true)) => ExitCode::SUCCESS,
        Ok(Ok(false)) => ExitCode::FAILURE,
    }
}

/// Whether every case passes. The outer error is a case that cannot be read, the inner one a
/// failure to print.
fn reports(folder: &Path, json: bool) -> Result<dfar::Result<bool>, VerifyError> {
    let mut reports = Vec::new();
    for path in cases(folder)? {
        let report = verify(&path)?;
        if !json && let Err(error) = cli::print(&report.to_string()) {
            return Ok(Err(error));
        }
        reports.push(report);
    }
    let summary = Summary::new(reports);
    let text = match json {
        true => format!("{:#}\n", to_json(&summary)),
        false => summary.to_string(),
    };
    Ok(cli::print(&text).map(|()| summary.failed == 0))
}

/// Why a comparison ended.
enum Failure {
    /// A result file.
    Result(ResultError),
    /// Everything else, with its exit code.
    Other(dfar::Error),
}

impl From<ResultError> for Failure {
    fn from(error: ResultError) -> Self {
        Self::Result(error)
    }
}

impl From<dfar::Error> for Failure {
    fn from(error: dfar::Error) -> Self {
        Self::Other(error)
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        Self::Other(error.into())
    }
}

fn run_comparison(arguments: &Compare) -> Result<(), Failure> {
    let usage = |argument, reason: &str| TrainError::Usage { argument, reason: reason.to_owned() };
    let flags = arguments.flags.table()?;
    let reads_own_feedback = !flags.contains_key("feedback");
    let config = Config::layered(arguments.config.as_deref(), flags).map_err(TrainError::from)?;
    let Some(path) = &config.data else {
        return Err(usage("--data", "a data set is needed; dfar-data makes one").into());
    };
    if config.device == DeviceChoice::Cuda {
        return Err(usage("--device", "the compared systems run on the CPU only").into());
    }
    if !arguments.aux.is_finite() {
        return Err(usage("--aux", "it must be a number").into());
    }
    cli::start_threads(config.threads)?;
    let data = Dataset::open(path).map_err(dfar::Error::from)?;
    draw::require_targets(&data, config.train_targets)?;
    let info = DataInfo::of(&data);
    let options = Options {
        feedback: if reads_own_feedback { None } else { Some(config.feedback) },
        ranking: arguments.loss,
        pool: arguments.pool,
        aux: arguments.aux,
    };
    let systems = if arguments.systems.is_empty() { Row::all() } else { arguments.systems.clone() };
    let blind = |system: &&Row| options.feedback_of(**system) != Feedback::Mixed;
    if config.train_targets == TrainTargets::Feedback
        && let Some(system) = systems.iter().find(blind)
    {
        let reason =
            format!("feedback: {} does not read skipped events; use positive or all", system.title());
        return Err(usage("--train-targets", &reason).into());
    }
    for seed in (0..arguments.seeds).map(|i| config.seed.wrapping_add(i)) {
        for &system in &systems {
            let config = Config { seed, ..config.clone() };
            let run = Identity::new(system, &config, &options, &info);
            if RunResult::load(&run, &arguments.out)?.is_some() {
                eprintln!("{} ({}), seed {seed}: finished before", system.title(), run.setting());
                continue;
            }
            run_one(&run, &data, config.workers)?.save(&run.path(&arguments.out))?;
        }
    }
    write_table(&arguments.out, &data, &info, &config)
}

fn run_one(run: &Identity, data: &Dataset, workers: usize) -> Result<RunResult, Failure> {
    let (title, setting, seed) = (run.system.title(), run.setting(), run.config.seed);
    let mut observe = |epoch: &Epoch| {
        let auc = epoch.valid_auc.map_or("-".to_owned(), |auc| format!("{auc:.4}"));
        let best = if epoch.best { " (best)" } else { "" };
        let seconds = epoch.train_seconds + epoch.valid_seconds;
        eprintln!(
            "{title} ({setting}), seed {seed}, epoch {}: loss {:.4}, validation AUC {auc}{best}, {seconds:.1} s",
            epoch.epoch, epoch.loss
        );
    };
    let start = Instant::now();
    let fitted = run.run(data, workers, &mut observe)?;
    Ok(RunResult::new(run, &fitted, rayon::current_num_threads(), start.elapsed().as_secs_f64()))
}

/// The table of all results in `out` that are of this data set.
fn write_table(out: &Path, data: &Dataset, info: &DataInfo, config: &Config) -> Result<(), Failure> {
    let mut results = RunResult::all(out)?;
    let own = to_json(info);
    results.retain(|result| result.data == own);
    let popularity = [Part::Test, Part::Valid].map(|part| {
        part_report(data, part, &popularity_scores(data, part), config.gauc_compat, &config.length_edges)
    });
    let table = Table::new(&results, popularity);
    let markdown = table.markdown();
    for (name, text) in [
        ("table.md", &markdown),
        ("table.csv", &table.csv()),
        ("table.json", &format!("{:#}\n", to_json(&table))),
    ] {
        replace_bytes(&out.join(name), text.as_bytes()).map_err(TrainError::from)?;
    }
    Ok(cli::print(&markdown)?)
}
