//! `dfar-bench train`: training steps, with and without sharing, and by part.

use super::{Device, Precision, at_least_one, effort, open_cpu, open_gpu, refuse_precision};
use crate::limits::gpu::Card;
use crate::train::steps::{self, Batches, Peak};
use crate::train::{launches, sharing};
use crate::{cli, limits, say};
use dfar::data::Dataset;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::train::{Config, TrainError};
use dfar::{Error, Result, threads};
use std::path::PathBuf;
use std::sync::Arc;

#[derive(clap::Args)]
pub struct Train {
    /// Data set made by dfar-data [default: a synthetic one]
    #[arg(long, value_name = "X.dfar")]
    data: Option<PathBuf>,
    /// Events of the longest history
    #[arg(long, default_value_t = 100, value_parser = at_least_one())]
    max_length: usize,
    /// Windows of longer histories begin at multiples of this; 1: keep exactly the last max-length
    /// events; 0: a quarter of max-length, rounded up
    #[arg(long, default_value_t = 0)]
    window_stride: usize,
    /// Sampled negatives of each target
    #[arg(long, default_value_t = 9, value_parser = at_least_one())]
    negatives: usize,
    /// Distinct negatives that all targets of one history draw from; 0: no limit
    #[arg(long, default_value_t = 0)]
    negative_pool: usize,
    /// Batches to time, spread evenly over an epoch
    #[arg(long, default_value_t = 12, value_parser = at_least_one())]
    batches: usize,
    /// Tokens of a batch, with full sharing
    #[arg(long, default_value_t = 512, value_parser = at_least_one())]
    batch_tokens: usize,
    /// Largest number of instances in a batch
    #[arg(long, default_value_t = 16384, value_parser = at_least_one())]
    batch_rows: usize,
    /// Time steps on random batches only: batch-rows instances, histories of exactly max-length
    /// events, one group of candidates each
    #[arg(long, conflicts_with = "data")]
    uniform: bool,
    /// Measure nothing: print the lower bound of each part of a step on this GPU, by its datasheet
    #[arg(long, value_enum, value_name = "GPU")]
    predict: Option<Card>,
    /// With --predict: microseconds of a launch, an assumption
    #[arg(long, value_name = "US", default_value_t = 2.5, requires = "predict")]
    launch_us: f64,
    /// Device to run on
    #[arg(long, value_enum, default_value_t = Device::Cpu)]
    device: Device,
    /// Precision of matrix products: f32 or bf16. bf16 needs a GPU, or a CPU with AVX512-BF16
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Replay the launches of a step as a CUDA graph, except in steps that are timed by part (GPU
    /// only)
    #[arg(long)]
    cuda_graphs: bool,
    /// Compute all matrix products of layers by cuBLASLt, each in a launch of its own (GPU only)
    #[arg(long)]
    library_products: bool,
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

/// Times steps, or predicts their time.
pub fn run(arguments: &Train) -> Result<()> {
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
    config.check().map_err(TrainError::from)?;
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
    if arguments.precision == Precision::F16 {
        refuse_precision("products are computed in f32 or bf16");
    }
    if let Some(card) = arguments.predict {
        return predict_steps(arguments, &config, data, card);
    }
    let pool = threads::pool(arguments.threads)?;
    match arguments.device {
        Device::Cpu => {
            let cpu = open_cpu(arguments.precision);
            pool.install(|| time_steps(arguments, &config, data, &cpu, None))
        }
        Device::Cuda => {
            let mut gpu = open_gpu(arguments.precision)?;
            if arguments.library_products {
                gpu = gpu.with_library_products();
            }
            let gpu = Arc::new(if arguments.cuda_graphs { gpu.with_graphs() } else { gpu });
            let limits = limits::gpu::measure(&gpu, effort(arguments.quick))?;
            let peak = Peak { limits, precision: arguments.precision.products() };
            pool.install(|| time_steps(arguments, &config, data, &gpu, Some(&peak)))?;
            if let Some(captures) = gpu.captures() {
                cli::note(captures);
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
    let source = batches(data, config)?;
    let profile = steps::predict(&source, config, arguments.batches, &peak)?;
    let seconds = arguments.launch_us * 1e-6;
    let launches = launches::predict(&source, config, peak.precision, &peak.limits, seconds)?;
    if arguments.json {
        let json = serde_json::json!({ "peak": peak, "steps": profile, "launches": launches });
        say!("{json:#}");
        return Ok(());
    }
    say!("PREDICTIONS, not measurements: the lower bound of each part, by bytes, products and exponentials.");
    say!("{}", peak.limits);
    say!("{}, width {}, in {}", described(arguments), config.width, peak.precision.name());
    cli::print(&format!("{profile}\n{launches}\n"))
}

/// Times the degrees of sharing (with a data set) and the parts of a step.
fn time_steps<D: dfar::device::Device>(
    arguments: &Train,
    config: &Config,
    data: Option<&Dataset>,
    device: &Arc<D>,
    peak: Option<&Peak>,
) -> Result<()> {
    let measured = data.map(|data| sharing::measure(device, data, config, arguments.batches));
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

fn print_sharing(rows: &[sharing::Row]) -> Result<()> {
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
