//! `dfar-compare` without a subcommand: from arguments to results and tables.

mod jobs;
mod progress;

use crate::cli;
use crate::flags::Flags;
use crate::output::Output;
use clap::Args;
use dfar::batch::Feedback;
use dfar::data::{Dataset, Part};
use dfar::device::cpu::Cpu;
use dfar::device::cuda::plan::target_shape::MAX_WIDTH;
use dfar::device::cuda::{Cuda, Gpu};
use dfar::evaluate::{self, part_report, popularity_scores};
use dfar::model::Model;
use dfar::train::checkpoint::{DataInfo, ModelFile};
use dfar::train::config::DeviceChoice;
use dfar::train::config::is_weight;
use dfar::train::draw::TrainTargets;
use dfar::train::file::replace_bytes;
use dfar::train::run::Lock;
use dfar::train::{Config, TrainError, draw, score_options};
use dfar_baselines::loss::Ranking;
use dfar_baselines::markdown::{csv, markdown};
use dfar_baselines::page::page;
use dfar_baselines::plan::{Study, Variant};
use dfar_baselines::results::{Identity, Options, ResultError, Row, RunResult, make_results_folder, to_json};
use dfar_baselines::systems::sasrec::Pool;
use dfar_baselines::table::{PairsCell, References, Table};
use dfar_baselines::tune::Search;
use dfar_baselines::{Kind, SystemDevice};
use jobs::Jobs;
use progress::Progress;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

#[derive(Args)]
pub struct Compare {
    /// Directory of the results.
    #[arg(long, short, value_name = "DIR", default_value = "runs/compare")]
    out: PathBuf,
    /// Systems: din, caser, gru4rec, dien, sasrec, tha4rec, dfn, feedrec, dfar, in the order of
    /// their runs [default: all].
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = systems)]
    systems: Vec<Listed>,
    /// Number of seeds, from --seed on.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: u64,
    /// Try N settings of each system with the first seed: the given one, and N - 1 drawn at random
    /// (learning rate, embedding L2, the system's own weights). The one with the best validation
    /// AUC runs with all seeds, and is in the tables.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(..=1000))]
    tune: u16,
    /// Search DFAR's half-life too, from 0.5 to 64 events. It is not in the paper.
    #[arg(long, requires = "tune")]
    tune_half_life: bool,
    /// Add Table 3 (DFAR without FHA, MO, IDL, IBL), and each system with `--feedback ignored`.
    #[arg(long)]
    ablations: bool,
    /// Number of concurrent runs; they share --threads. Results do not depend on it.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    jobs: u16,
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
    #[command(flatten)]
    output: Output,
}

/// Keys of a configuration that a comparison does not use, with their flags. They may be in a file
/// of `dfar-train`.
pub const UNUSED_FLAGS: [(&str, &str); 4] = [
    ("precision", "--precision"),
    ("cuda_graphs", "--cuda-graphs"),
    ("checkpoint_seconds", "--checkpoint-seconds"),
    ("tensorboard", "--tensorboard"),
];

/// An entry of `--systems`.
#[derive(Clone)]
enum Listed {
    All,
    One(Row),
}

fn systems(name: &str) -> Result<Listed, String> {
    if name == "all" { Ok(Listed::All) } else { Row::parse(name).map(Listed::One) }
}

/// Why a comparison ended.
pub enum Failure {
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

pub fn run(arguments: &Compare) -> Result<(), Failure> {
    let usage = |argument, reason: &str| TrainError::Usage { argument, reason: reason.to_owned() };
    let flags = arguments.flags.table()?;
    if let Some(&(_, flag)) = UNUSED_FLAGS.iter().find(|(key, _)| flags.contains_key(*key)) {
        let reason = match flag {
            "--precision" => "dfar-compare has no such option: all systems compute in f32",
            _ => "dfar-compare has no such option",
        };
        return Err(usage(flag, reason).into());
    }
    let reads_own_feedback = !flags.contains_key("feedback");
    let config = Config::layered(arguments.config.as_deref(), flags).map_err(TrainError::from)?;
    let Some(path) = &config.data else {
        return Err(usage("--data", "a data set is needed; dfar-data makes one").into());
    };
    if arguments.tune_half_life && arguments.tune < 2 {
        return Err(usage("--tune-half-life", "it needs --tune 2 or more").into());
    }
    if !is_weight(arguments.aux) {
        return Err(
            usage("--aux", "it must be 0, or a positive number that 32-bit floating point can hold").into()
        );
    }
    cli::start_threads(config.threads)?;
    let data = Dataset::open(path).map_err(dfar::Error::from)?;
    draw::require_targets(&data, config.train_targets)?;
    let options = Options {
        feedback: if reads_own_feedback { None } else { Some(config.feedback) },
        ranking: arguments.loss,
        pool: arguments.pool,
        aux: arguments.aux,
    };
    let study = Study {
        systems: arguments.systems(),
        seeds: (0..arguments.seeds).map(|i| config.seed.wrapping_add(i)).collect(),
        ablations: arguments.ablations,
        settings: arguments.tune.into(),
        tune_half_life: arguments.tune_half_life,
        config,
        options,
        data: DataInfo::of(&data),
    };
    check_targets(&study)?;
    check_sizes(&study)?;
    make_results_folder(&arguments.out)?;
    let _lock = Lock::take(&arguments.out).map_err(TrainError::from)?;
    let searches = match study.config.device {
        DeviceChoice::Cpu => execute(&study, &data, arguments, &|| Ok(Arc::new(Cpu::new()))),
        _ => {
            check_gpu_runs(&study, arguments)?;
            // Opened by the first run: tables of finished runs need none.
            let opened = OnceLock::new();
            let gpu = || -> Result<Arc<Gpu<Cuda>>, Failure> {
                if let Some(gpu) = opened.get() {
                    return Ok(Arc::clone(gpu));
                }
                let gpu = crate::open_gpu()?;
                Ok(opened.get_or_init(|| gpu).clone())
            };
            execute(&study, &data, arguments, &gpu)
        }
    }?;
    write_tables(arguments, &data, &study, &searches)
}

impl Compare {
    fn systems(&self) -> Vec<Row> {
        let mut systems = Vec::new();
        let listed = self.systems.iter().flat_map(|entry| match entry {
            Listed::All => Row::all(),
            Listed::One(row) => vec![*row],
        });
        for row in listed {
            if !systems.contains(&row) {
                systems.push(row);
            }
        }
        if systems.is_empty() { Row::all() } else { systems }
    }
}

/// A system that does not read skipped events is not trained on them.
fn check_targets(study: &Study) -> Result<(), TrainError> {
    let runs = study.runs(|_| 0);
    let blind = |run: &&Identity| run.config.feedback != Feedback::Mixed;
    match runs.iter().find(blind) {
        Some(run) if study.config.train_targets == TrainTargets::Feedback => Err(TrainError::Usage {
            argument: "--train-targets",
            reason: format!(
                "feedback: {} does not read skipped events ({}); use positive or all",
                run.system.title(),
                run.setting()
            ),
        }),
        _ => Ok(()),
    }
}

/// Refuses a network that some system cannot have, before the first run.
fn check_sizes(study: &Study) -> Result<(), TrainError> {
    for run in study.runs(|_| 0) {
        match &run.settings {
            Some(settings) => settings.check()?,
            None => run.config.model(study.data.items).check()?,
        }
    }
    Ok(())
}

/// Refuses a study that cannot run on a GPU.
fn check_gpu_runs(study: &Study, arguments: &Compare) -> Result<(), TrainError> {
    let usage = |argument, reason: String| Err(TrainError::Usage { argument, reason });
    if study.config.device == DeviceChoice::Auto {
        let reason = "a comparison has one device, which its results name: choose cpu or cuda, not auto";
        return usage("--device", reason.to_owned());
    }
    let runs = |row: &Row| match row {
        Row::Baseline(kind) => Gpu::<Cuda>::computes(*kind),
        Row::Dfar => true,
    };
    let others: Vec<&str> = study.systems.iter().filter(|row| !runs(row)).map(|row| row.title()).collect();
    if !others.is_empty() {
        let on_gpu: Vec<&str> = Row::all().iter().filter(|row| runs(row)).map(|row| row.name()).collect();
        let reason = format!(
            "there are no CUDA kernels for {}: list some of {}, or use --device cpu",
            others.join(", "),
            on_gpu.join(", ")
        );
        return usage("--systems", reason);
    }
    if arguments.jobs > 1 {
        return usage("--jobs", "with --device cuda, one run follows the other: use --jobs 1".to_owned());
    }
    let attends = |row: &&Row| matches!(row, Row::Baseline(Kind::Din) | Row::Dfar);
    match study.systems.iter().find(attends) {
        Some(row) if study.config.width > MAX_WIDTH => {
            let reason = format!("{} is at most {MAX_WIDTH} wide on a GPU", row.title());
            usage("--width", reason)
        }
        _ => Ok(()),
    }
}

/// Executes the search and then the runs of the tables. Returns the searches.
fn execute<D: SystemDevice>(
    study: &Study,
    data: &Dataset,
    arguments: &Compare,
    device: &(dyn Fn() -> Result<Arc<D>, Failure> + Sync),
) -> Result<Vec<Search>, Failure> {
    let out = &arguments.out;
    let jobs = usize::from(arguments.jobs);
    let threads = (rayon::current_num_threads() / jobs).max(1);
    let jobs = Jobs { device, data, out, jobs, threads, workers: study.config.workers };
    let search = study.search();
    // Where the setting is not chosen yet, the number of runs is nearly known.
    let found = searches(study, out)?;
    let later = study.runs(|system| chosen(study, &found, system).unwrap_or(0));
    let (_, planned) = unfinished(search.iter().chain(&later), out)?;
    let known = RunResult::all(out)?;
    for result in known.iter().filter(|result| result.is_of(&study.data)) {
        result.check_study(&study.run(result.system, Variant::Full, result.tuned, result.seed), out)?;
    }
    let progress = Progress::new(arguments.output, jobs.jobs, &planned, &known);
    let execute = |runs: &[Identity], names_finished: bool| -> Result<(), Failure> {
        let (finished, left) = unfinished(runs.iter(), out)?;
        for run in finished.iter().filter(|_| names_finished) {
            progress.line(&format!("{}: finished before", progress::name(run)));
        }
        jobs.execute(&left, &progress)
    };
    execute(&search, true)?;
    let searches = searches(study, out)?;
    // After a search, some of the runs have just finished.
    execute(&study.runs(|system| chosen(study, &searches, system).unwrap_or(0)), search.is_empty())?;
    Ok(searches)
}

/// The finished and the other ones of some runs, each once.
fn unfinished<'a>(
    runs: impl Iterator<Item = &'a Identity>,
    out: &Path,
) -> Result<(Vec<Identity>, Vec<Identity>), ResultError> {
    let (mut finished, mut left) = (Vec::<Identity>::new(), Vec::<Identity>::new());
    for run in runs {
        if finished.contains(run) || left.contains(run) {
            continue;
        }
        match RunResult::load(run, out)? {
            Some(_) => finished.push(run.clone()),
            None => left.push(run.clone()),
        }
    }
    Ok((finished, left))
}

/// The finished searches, also those of other systems with results in `out`; none without `--tune`.
fn searches(study: &Study, out: &Path) -> Result<Vec<Search>, ResultError> {
    if study.settings < 2 {
        return Ok(Vec::new());
    }
    let seed = study.seeds[0];
    let of_system = |system: Row| {
        let mut valid_auc = Vec::new();
        for number in 0..study.settings {
            let run = study.run(system, Variant::Full, number, seed);
            let Some(result) = RunResult::load(&run, out)? else { return Ok(None) };
            valid_auc.push(result.valid.and_then(|valid| valid.values[0]));
        }
        Ok(Some(Search::new(study, system, &valid_auc)))
    };
    let others = Row::all().into_iter().filter(|row| !study.systems.contains(row));
    let systems = study.systems.iter().copied().chain(others);
    systems.filter_map(|system| of_system(system).transpose()).collect()
}

/// The setting of a system in the tables; `None` if its search is not finished.
fn chosen(study: &Study, searches: &[Search], system: Row) -> Option<usize> {
    if study.settings < 2 {
        return Some(0);
    }
    searches.iter().find(|search| search.system == system).map(|search| search.chosen)
}

/// The tables of all results in `out` that are of this data set.
fn write_tables(
    arguments: &Compare,
    data: &Dataset,
    study: &Study,
    searches: &[Search],
) -> Result<(), Failure> {
    let out = &arguments.out;
    let mut results = RunResult::all(out)?;
    results.retain(|result| result.is_of(&study.data));
    for row in Row::all().into_iter().filter(|&row| chosen(study, searches, row).is_none()) {
        if results.iter().any(|result| result.system == row) {
            let reason = format!("its search with --tune {} is not finished", study.settings);
            cli::note(format_args!("{} is not in the tables: {reason}", row.title()));
        }
    }
    let own = study.run(Row::Dfar, Variant::Full, chosen(study, searches, Row::Dfar).unwrap_or(0), 0);
    if study.settings < 2 {
        results.retain(|result| result.tuned == 0);
    } else {
        // The number of a setting means another one in another search.
        results.retain(|result| {
            let chosen = chosen(study, searches, result.system);
            chosen.is_some_and(|chosen| study.settings_of(result.system, chosen).contains(&result.setting))
        });
    }
    let edges = evaluate::length_edges(data, &study.config.length_edges);
    let report = |part, scores: &[f32]| part_report(data, part, scores, study.config.gauc_compat, &edges);
    let parts = [Part::Test, Part::Valid];
    let references = References {
        popularity: parts.map(|part| report(part, &popularity_scores(data, part))),
        ceiling: parts.map(|part| report(part, data.groups(part).ceiling?)),
    };
    let head_pairs = head_pairs(out, data, study, &results)?;
    let table = Table::new(&results, &own.setting(), references, searches.to_vec(), head_pairs);
    if table.groups == 0 {
        let reason = evaluate::no_metrics(data.protocol().candidates.negatives);
        cli::note(format_args!("no metrics: {reason}"));
    }
    let (markdown, json) = (markdown(&table), format!("{:#}\n", to_json(&table)));
    let (title, about) = about(data, &study.data);
    for (name, text) in [
        ("table.md", &markdown),
        ("table.csv", &csv(&table)),
        ("table.json", &json),
        ("index.html", &page(&table, &title, &about)),
    ] {
        replace_bytes(&out.join(name), text.as_bytes()).map_err(TrainError::from)?;
    }
    Ok(cli::print(if arguments.output.json { &json } else { &markdown })?)
}

/// Figure 4: the attention of DFAR and of DFAR without FHA, from the models of their runs.
fn head_pairs(
    out: &Path,
    data: &Dataset,
    study: &Study,
    results: &[RunResult],
) -> Result<Vec<PairsCell>, Failure> {
    let device = Arc::new(Cpu::new());
    let mut sums: BTreeMap<(usize, &str), Vec<_>> = BTreeMap::new();
    for result in results {
        let words: Vec<&str> = result.setting.split(' ').filter(|word| !word.starts_with("tuned")).collect();
        let place = [&["mixed"][..], &["mixed", "no-fha"]].iter().position(|setting| *setting == words);
        let (Some(place), true) = (place, result.system == Row::Dfar) else { continue };
        let path = result.model_path(out);
        // Result files may have been copied without the models.
        if !path.exists() {
            continue;
        }
        let file = ModelFile::load(&path).map_err(TrainError::from)?;
        let variant = [Variant::Full, Variant::WithoutFha][place];
        let run = study.run(Row::Dfar, variant, result.tuned, result.seed);
        if file.info.model != run.config.model(data.items()) || !result.is_of(&file.info.data) {
            let path = path.display();
            cli::note(format_args!("{path} is not the model of its result; Figure 4 leaves it out"));
            continue;
        }
        let model = Model::from_tensors(device.clone(), file.info.model, &file.parameters)
            .map_err(TrainError::from)?;
        let config = Config { feedback: file.info.feedback, ..study.config.clone() };
        let options = score_options(&config, &*device);
        let go_on = &mut |_| ControlFlow::Continue(());
        let of_run =
            evaluate::head_pairs(&model, data, Part::Test, &options, go_on).map_err(TrainError::from)?;
        sums.entry((place, &result.setting)).or_default().push(of_run);
    }
    Ok(sums.iter().filter_map(|((_, setting), of_seeds)| PairsCell::new(setting, of_seeds)).collect())
}

/// The name of a data set and a sentence about it.
fn about(data: &Dataset, info: &DataInfo) -> (String, String) {
    let title = data.path().file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    let about = format!("{} users, {} items, {} events.", info.users, info.items, info.events);
    (title, about)
}
