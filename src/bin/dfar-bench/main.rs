//! `dfar-bench`: comparison with reference cases, and measurements.

#[allow(dead_code, reason = "benches run more of it: tests/tools")]
mod attention;
#[path = "../shared/cli.rs"]
mod cli;
mod limits;
#[path = "../shared/manual.rs"]
mod manual;
mod timing;
mod train;
mod verify;

use attention::{batch, gpu, predict};
use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand, ValueEnum};
use dfar::attention::{FhaOptions, Normalization};
use dfar::data::Dataset;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::device::cpu::Cpu;
use dfar::device::cuda::{self, Cuda, Element, Gpu};
use dfar::train::{Config, TrainError, file};
use dfar::{Error, Result};
use limits::gpu::{Card, Effort};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use train::steps::{self, Batches, Peak};
use verify::{CpuEngine, Engine, GpuEngine, Summary, VerifyError};

/// `println!` that reports a closed pipe instead of panicking.
macro_rules! say {
    ($($text:tt)*) => { cli::print(&format!("{}\n", format_args!($($text)*)))? };
}

/// Compare results with reference cases, and measure speed
#[derive(Parser)]
#[command(name = "dfar-bench", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Compare with reference cases: print the relative error of each tensor, exit with 1 if one
    /// exceeds the tolerance
    Verify(Verify),
    /// Time the attention operation, naive and fused, by sequence length
    Attention(Attention),
    /// Time training steps on a data set: with and without sharing of histories and candidates, and
    /// by part
    Train(Train),
    /// Measure the peak rates of the CPU: multiply-adds and exponentials per second
    Limits {
        /// Threads; 0: one per core
        #[arg(long, default_value_t = 0)]
        threads: usize,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    #[command(flatten)]
    Manual(manual::Manual),
}

#[derive(clap::Args)]
struct Verify {
    /// Folder of case files (*.safetensors)
    folder: PathBuf,
    /// Device to run on
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Element type of the attention tensors
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(clap::Args)]
struct Attention {
    /// Sequence lengths, one row of the table each
    #[arg(long, value_delimiter = ',', default_value = "20,50,100,200,300,1024")]
    seq_lens: Vec<usize>,
    /// Heads, an even number
    #[arg(long, default_value_t = 2)]
    heads: usize,
    /// Width of a head
    #[arg(long, default_value_t = 16)]
    head_dim: usize,
    /// Tokens of a batch, rounded down to whole sequences but at least one [default: 16384; with
    /// --device cuda 1048576]
    #[arg(long)]
    batch_tokens: Option<usize>,
    /// Passes to time
    #[arg(long, value_enum, default_value_t = Pass::Both)]
    pass: Pass,
    /// Softmax denominator
    #[arg(long, value_enum, default_value_t = Denominator::Joint)]
    normalization: Denominator,
    /// Device to run on
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Element type of the tensors [default: f32; with --device cuda bf16]
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// Measure nothing: print lower bounds of the kernels' time on this GPU, by its datasheet
    #[arg(long, value_enum, value_name = "GPU")]
    predict: Option<Card>,
    /// Number of polynomials among 8 exponentials of long 16-bit sequences (experiment, GPU only)
    #[arg(long, default_value_t = 0, value_name = "0..8", value_parser = clap::value_parser!(u32).range(0..=8))]
    polynomial: u32,
    /// Omit the naive form
    #[arg(long)]
    no_naive: bool,
    /// Threads; 0: one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Also write the rows to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Measure as little as possible, to see that the command works on a GPU
    #[arg(long, hide = true)]
    quick: bool,
}

impl Attention {
    fn precision(&self) -> Precision {
        let default = if self.device == Device::Cuda { Precision::Bf16 } else { Precision::F32 };
        self.precision.unwrap_or(default)
    }

    /// A GPU needs many tokens: with fewer, the launch takes longer than the kernel.
    fn batch_tokens(&self) -> usize {
        self.batch_tokens.unwrap_or(if self.device == Device::Cuda { 1 << 20 } else { 1 << 14 })
    }
}

/// How much is measured on a GPU.
fn effort(quick: bool) -> Effort {
    if quick { Effort::QUICK } else { Effort::FULL }
}

#[derive(clap::Args)]
struct Train {
    /// Data set made by dfar-data [default: a synthetic one]
    #[arg(long, value_name = "X.dfar")]
    data: Option<PathBuf>,
    /// Events of the longest history
    #[arg(long, default_value_t = 100)]
    max_length: usize,
    /// Windows of longer histories begin at multiples of this; 1: keep exactly the last max-length
    /// events; 0: a quarter of max-length
    #[arg(long, default_value_t = 0)]
    window_stride: usize,
    /// Sampled negatives of each target
    #[arg(long, default_value_t = 9)]
    negatives: usize,
    /// Distinct negatives that all targets of one history draw from; 0: no limit
    #[arg(long, default_value_t = 0)]
    negative_pool: usize,
    /// Batches to time, spread evenly over an epoch
    #[arg(long, default_value_t = 12)]
    batches: usize,
    /// Tokens of a batch, with full sharing
    #[arg(long, default_value_t = 512)]
    batch_tokens: usize,
    /// Largest number of instances in a batch
    #[arg(long, default_value_t = 16384)]
    batch_rows: usize,
    /// Time steps on random batches only: batch-rows instances, histories of exactly max-length
    /// events, one group of candidates each
    #[arg(long, conflicts_with = "data")]
    uniform: bool,
    /// Measure nothing: print the lower bound of each part of a step on this GPU, by its datasheet
    #[arg(long, value_enum, value_name = "GPU")]
    predict: Option<Card>,
    /// Device to run on
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Precision of matrix products on the GPU: f32 or bf16
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Replay the launches of a step as a CUDA graph, except in steps that are timed by part (GPU
    /// only)
    #[arg(long)]
    cuda_graphs: bool,
    /// Threads; 0: one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Threads that draw and pack batches ahead of the steps that are timed by part; 0: one for the
    /// CPU, several for a GPU
    #[arg(long, default_value_t = 0)]
    workers: usize,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Measure the limits of the GPU as little as possible, to see that the command works
    #[arg(long, hide = true)]
    quick: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Pass {
    Forward,
    Backward,
    Both,
}

#[derive(Clone, Copy, ValueEnum)]
enum Denominator {
    Joint,
    Masked,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Device {
    Cpu,
    Cuda,
}

/// Type of attention tensors.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Precision {
    F32,
    /// On the GPU
    Bf16,
    /// On the GPU
    F16,
}

impl Precision {
    /// Precision of matrix products: bf16 for both 16-bit types.
    fn products(self) -> cuda::Precision {
        match self {
            Self::F32 => cuda::Precision::F32,
            Self::Bf16 | Self::F16 => cuda::Precision::Bf16,
        }
    }

    fn element(self) -> Element {
        match self {
            Self::F32 => Element::F32,
            Self::Bf16 => Element::Bf16,
            Self::F16 => Element::F16,
        }
    }
}

/// Exits with a usage error.
fn usage(message: &str) -> ! {
    Arguments::command().error(ErrorKind::ValueValidation, message).exit()
}

/// Exits with a usage error for a precision that the CPU does not support.
fn check_precision(device: Device, precision: Precision) {
    if device == Device::Cpu && precision != Precision::F32 {
        let message = "--precision bf16 and f16 need --device cuda: the CPU computes in f32";
        Arguments::command().error(ErrorKind::ArgumentConflict, message).exit();
    }
}

/// The first GPU.
fn open_gpu(precision: Precision) -> Result<Gpu<Cuda>> {
    Ok(Gpu::new(Cuda::new(0)?, precision.products()))
}

fn main() -> ExitCode {
    let command = Arguments::parse().command;
    if let Err(error) = cli::start_threads(0) {
        return cli::exit(Err(error));
    }
    cli::exit(match command {
        Command::Verify(arguments) => match run_verify(&arguments) {
            Ok(true) => Ok(()),
            Ok(false) => return ExitCode::FAILURE,
            Err(VerifyFailure::Case(error)) => return cli::fail(&error, 3),
            Err(VerifyFailure::Other(error)) => Err(error),
        },
        Command::Attention(arguments) => run_attention(&arguments),
        Command::Train(arguments) => run_train(&arguments),
        Command::Limits { threads, json } => run_limits(threads, json),
        Command::Manual(manual) => manual.run(Arguments::command()),
    })
}

/// A failure of `verify`.
enum VerifyFailure {
    /// A case could not be read or computed.
    Case(VerifyError),
    Other(Error),
}

impl From<VerifyError> for VerifyFailure {
    fn from(error: VerifyError) -> Self {
        Self::Case(error)
    }
}

impl From<Error> for VerifyFailure {
    fn from(error: Error) -> Self {
        Self::Other(error)
    }
}

/// Verifies all cases; returns whether all passed.
fn run_verify(arguments: &Verify) -> Result<bool, VerifyFailure> {
    check_precision(arguments.device, arguments.precision);
    match arguments.device {
        Device::Cpu => run_verify_on(arguments, &CpuEngine),
        Device::Cuda => {
            let element = arguments.precision.element();
            run_verify_on(arguments, &GpuEngine { gpu: Arc::new(open_gpu(arguments.precision)?), element })
        }
    }
}

fn run_verify_on<E: Engine>(arguments: &Verify, engine: &E) -> Result<bool, VerifyFailure> {
    let mut reports = Vec::new();
    for path in verify::cases(&arguments.folder)? {
        let report = verify::verify(&path, engine)?;
        if !arguments.json {
            cli::print(&report.to_string())?;
        }
        reports.push(report);
    }
    let summary = Summary::new(reports);
    if arguments.json {
        say!("{}", serde_json::to_string_pretty(&summary).expect("numbers and strings are valid JSON"));
    } else {
        cli::print(&summary.to_string())?;
    }
    Ok(summary.failed == 0)
}

fn run_attention(arguments: &Attention) -> Result<()> {
    if arguments.predict.is_none() {
        check_precision(arguments.device, arguments.precision());
    }
    let options = FhaOptions {
        normalization: match arguments.normalization {
            Denominator::Joint => Normalization::Joint,
            Denominator::Masked => Normalization::Masked,
        },
        ..FhaOptions::new(arguments.heads, arguments.head_dim)
    };
    let (batch_tokens, naive) = (arguments.batch_tokens(), !arguments.no_naive);
    let forward = !matches!(arguments.pass, Pass::Backward);
    let backward = !matches!(arguments.pass, Pass::Forward);
    if let Some(card) = arguments.predict {
        return run_prediction(arguments, &options, card);
    }
    if arguments.device == Device::Cuda {
        let polynomial = arguments.polynomial;
        let plan = gpu::Plan {
            options,
            batch_tokens,
            forward,
            backward,
            naive,
            polynomial,
            repeats: if arguments.quick { 1 } else { 101 },
        };
        return run_attention_on_gpu(arguments, &plan);
    }
    let plan = batch::Plan { options, batch_tokens, forward, backward, naive };
    let pool = pool(arguments.threads)?;
    say!("{}", plan.conditions(pool.current_num_threads()));
    say!("{}", batch::Row::HEADER);
    let mut rows = Vec::new();
    for &length in &arguments.seq_lens {
        for row in pool.install(|| plan.measure(length))? {
            say!("{row}");
            rows.push(row);
        }
    }
    say!("{}", batch::Row::FOOTNOTE);
    write_json(arguments, &rows)
}

/// Writes the rows of the printed table to the file of `--json`, if given.
fn write_json(arguments: &Attention, table: &impl serde::Serialize) -> Result<()> {
    let Some(path) = &arguments.json else { return Ok(()) };
    let text = serde_json::to_string_pretty(table).expect("numbers and strings are valid JSON");
    if path.file_name().is_none() {
        usage(&format!("--json {}: a file is needed", path.display()));
    }
    Ok(file::replace_bytes(path, (text + "\n").as_bytes()).map_err(TrainError::from)?)
}

/// Prints the table of predictions; with `--json`, writes its rows too.
fn run_prediction(arguments: &Attention, options: &FhaOptions, card: Card) -> Result<()> {
    let limits = card.datasheet();
    let (element, tokens) = (arguments.precision().element(), arguments.batch_tokens());
    let (heads, d, normalization) = (options.heads, options.head_dim, options.normalization);
    say!("PREDICTIONS, not measurements: the largest of three lower bounds for the work of the kernels.");
    say!("{limits}");
    say!("attention in {}, H = {heads}, d = {d}, {normalization:?}, causal, random labels", element.name());
    say!("{}", predict::Prediction::HEADER);
    let mut rows = Vec::new();
    for &length in &arguments.seq_lens {
        // No GPU is involved, so only the arguments can be wrong.
        let [forward, backward] = predict::predict(element, options, &limits, length, tokens)
            .unwrap_or_else(|error| usage(&error.to_string()));
        if !matches!(arguments.pass, Pass::Backward) {
            rows.push(forward);
            say!("{forward}");
        }
        if !matches!(arguments.pass, Pass::Forward) {
            rows.push(backward);
            say!("{backward}");
        }
    }
    write_json(arguments, &serde_json::json!({ "limits": limits, "predictions": rows }))
}

fn run_attention_on_gpu(arguments: &Attention, plan: &gpu::Plan) -> Result<()> {
    let gpu = open_gpu(arguments.precision())?;
    let limits = limits::gpu::measure(&gpu, effort(arguments.quick))?;
    say!("{limits}");
    let (heads, d, element) = (arguments.heads, arguments.head_dim, arguments.precision().element().name());
    say!(
        "attention in {element}, H = {heads}, d = {d}, {} tokens per batch; median of many runs",
        plan.batch_tokens
    );
    say!("{}", gpu::Row::HEADER);
    let mut rows = Vec::new();
    for &length in &arguments.seq_lens {
        let measured = match arguments.precision() {
            Precision::F32 => plan.measure(&gpu, &limits, length, |x| x)?,
            Precision::Bf16 => plan.measure(&gpu, &limits, length, half::bf16::from_f32)?,
            Precision::F16 => plan.measure(&gpu, &limits, length, half::f16::from_f32)?,
        };
        for row in measured {
            say!("{row}");
            rows.push(row);
        }
    }
    say!("{}", gpu::Row::FOOTNOTE);
    write_json(arguments, &serde_json::json!({ "limits": limits, "rows": rows }))
}

fn run_train(arguments: &Train) -> Result<()> {
    if arguments.predict.is_none() {
        check_precision(arguments.device, arguments.precision);
    }
    let config = Config {
        max_length: arguments.max_length,
        window_stride: arguments.window_stride,
        negatives: arguments.negatives,
        negative_pool: arguments.negative_pool,
        batch_tokens: arguments.batch_tokens,
        batch_rows: arguments.batch_rows,
        workers: arguments.workers,
        ..Config::default()
    };
    let folder = tempfile::tempdir().map_err(Error::io("make", "a temporary folder"))?;
    let data = match &arguments.data {
        _ if arguments.uniform => None,
        Some(path) => Some(Dataset::open(path)?),
        None => {
            let path = folder.path().join("synthetic.dfar");
            synthetic::write(&SyntheticOptions::default(), &path)?;
            Some(Dataset::open(&path)?)
        }
    };
    let data = data.as_ref();
    if let Some(card) = arguments.predict {
        return predict_steps(arguments, &config, data, card);
    }
    let pool = pool(arguments.threads)?;
    match arguments.device {
        Device::Cpu => pool.install(|| time_steps(arguments, &config, data, &Arc::new(Cpu::new()), None)),
        Device::Cuda => {
            let gpu = open_gpu(arguments.precision)?;
            let gpu = Arc::new(if arguments.cuda_graphs { gpu.with_graphs() } else { gpu });
            let limits = limits::gpu::measure(&gpu, effort(arguments.quick))?;
            let peak = Peak { limits, precision: arguments.precision.products() };
            pool.install(|| time_steps(arguments, &config, data, &gpu, Some(&peak)))?;
            if let Some(captures) = gpu.captures() {
                eprintln!("{captures}");
            }
            Ok(())
        }
    }
}

/// Batches of the data set, or random ones without a data set.
fn batches<'a>(data: Option<&'a Dataset>, config: &Config) -> Result<Batches<'a>, TrainError> {
    data.map_or_else(|| Ok(Batches::uniform(config)), |data| Batches::drawn(data, config))
}

/// The source of the batches, for the heading.
fn described(arguments: &Train) -> String {
    let source = match &arguments.data {
        Some(path) => path.display().to_string(),
        None if arguments.uniform => "random histories of one length".to_owned(),
        None => "a synthetic set".to_owned(),
    };
    let (events, candidates) = (arguments.max_length, arguments.negatives + 1);
    format!("training steps on {source}, at most {events} events per history, {candidates} candidates")
}

/// Prints the lower bounds of steps without running any.
fn predict_steps(arguments: &Train, config: &Config, data: Option<&Dataset>, card: Card) -> Result<()> {
    let peak = Peak { limits: card.datasheet(), precision: arguments.precision.products() };
    let profile = steps::predict(&batches(data, config)?, config, arguments.batches, &peak)?;
    if arguments.json {
        let json = serde_json::json!({ "peak": peak, "steps": profile });
        say!("{json:#}");
        return Ok(());
    }
    say!("PREDICTIONS, not measurements: the lower bound of each part, by bytes, products and exponentials.");
    say!("{}", peak.limits);
    say!("{}, width {}, in {}", described(arguments), config.width, peak.precision.name());
    cli::print(&profile.to_string())
}

/// Times the degrees of sharing (with a data set) and the parts of a step.
fn time_steps<D: dfar::device::Device>(
    arguments: &Train,
    config: &Config,
    data: Option<&Dataset>,
    device: &Arc<D>,
    peak: Option<&Peak>,
) -> Result<()> {
    let measured = data.map(|data| train::sharing::measure(device, data, config, arguments.batches));
    let sharing = measured.transpose()?.unwrap_or_default();
    let profile = steps::measure(device, &batches(data, config)?, config, arguments.batches, peak)?;
    if arguments.json {
        let json = serde_json::json!({ "sharing": sharing, "peak": peak, "steps": profile });
        say!("{json:#}");
        return Ok(());
    }
    say!("{}, on {}", described(arguments), device.name());
    print_sharing(&sharing)?;
    if let Some(peak) = peak {
        say!("{}", peak.limits);
    }
    say!("{profile}");
    Ok(())
}

fn print_sharing(rows: &[train::sharing::Row]) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    say!(
        "{:<26}{:>11}{:>11}{:>10}{:>14}{:>9}{:>9}",
        "shared",
        "instances",
        "tokens",
        "seconds",
        "instances/s",
        "ratio",
        "loss"
    );
    for row in rows {
        let ratio = rows[0].instances_per_second / row.instances_per_second;
        say!(
            "{:<26}{:>11}{:>11}{:>10.2}{:>14.0}{:>9.1}{:>9.4}",
            row.sharing.name(),
            row.instances,
            row.tokens,
            row.seconds,
            row.instances_per_second,
            ratio,
            row.loss
        );
    }
    say!("");
    Ok(())
}

fn pool(threads: usize) -> Result<rayon::ThreadPool> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|error| Error::io("start threads on", "this machine")(std::io::Error::other(error)))
}

fn run_limits(threads: usize, json: bool) -> Result<()> {
    let limits = pool(threads)?.install(limits::cpu::measure);
    if json {
        say!("{}", serde_json::to_string_pretty(&limits).expect("numbers and strings are valid JSON"));
    } else {
        say!("{limits}");
    }
    Ok(())
}
