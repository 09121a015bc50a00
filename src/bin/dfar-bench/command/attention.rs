//! `dfar-bench attention`: the attention operation, naive and fused, by sequence length.

use super::{Device, Precision, at_least_one, effort, open_gpu, refuse_precision, usage};
use crate::attention::{batch, gpu, predict};
use crate::limits::gpu::Card;
use crate::{limits, say};
use clap::ValueEnum;
use dfar::Result;
use dfar::attention::{FhaOptions, Normalization};
use dfar::threads;
use dfar::train::{TrainError, file};
use std::path::PathBuf;

#[derive(clap::Args)]
pub struct Attention {
    /// Sequence lengths, one row of the table each
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "20,50,100,200,300,1024",
        value_parser = at_least_one()
    )]
    seq_lens: Vec<usize>,
    /// Heads, an even number
    #[arg(long, default_value_t = 2, value_parser = at_least_one())]
    heads: usize,
    /// Width of a head
    #[arg(long, default_value_t = 16, value_parser = at_least_one())]
    head_dim: usize,
    /// Tokens of a batch, rounded down to whole sequences but at least one [default: 16384; with
    /// --device cuda 1048576]
    #[arg(long, value_parser = at_least_one())]
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
    /// Element type of the tensors; on a CPU, f32 [default: f32; with --device cuda bf16]
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

/// Prints the table, row by row.
pub fn run(arguments: &Attention) -> Result<()> {
    let on_cpu = arguments.predict.is_none() && arguments.device == Device::Cpu;
    if on_cpu && arguments.precision() != Precision::F32 {
        refuse_precision("bf16 and f16 need --device cuda: attention on the CPU computes in f32");
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
        return run_on_gpu(arguments, &plan);
    }
    let plan = batch::Plan { options, batch_tokens, forward, backward, naive };
    let pool = threads::pool(arguments.threads)?;
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

fn run_on_gpu(arguments: &Attention, plan: &gpu::Plan) -> Result<()> {
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

/// Writes the rows of the printed table to the file of `--json`, if given.
fn write_json(arguments: &Attention, table: &impl serde::Serialize) -> Result<()> {
    let Some(path) = &arguments.json else { return Ok(()) };
    let text = serde_json::to_string_pretty(table).expect("numbers and strings are valid JSON");
    if path.file_name().is_none() {
        usage(&format!("--json {}: a file is needed", path.display()));
    }
    Ok(file::replace_bytes(path, (text + "\n").as_bytes()).map_err(TrainError::from)?)
}
