//! The flags that are keys of a configuration. An absent flag is not a key, so that the value of
//! the file holds.

use clap::Args;
use dfar::attention::Normalization;
use dfar::batch::Feedback;
use dfar::device::Precision;
use dfar::evaluate::metrics::GaucRule;
use dfar::model::Initialization;
use dfar::train::config::{ClipMode, DeviceChoice};
use dfar::train::draw::TrainTargets;
use dfar::train::negatives::NegativeSource;
use dfar::train::{Config, TrainError};
use serde::Serialize;
use std::path::PathBuf;

/// Names, meanings and defaults are those of `dfar::train::Config`.
#[derive(Args, Serialize)]
pub struct Flags {
    /// Data set made by `dfar-data` [default: an embedded synthetic set].
    #[arg(long, short, value_name = "X.dfar")]
    #[serde(skip)] // `table` adds it
    data: Option<PathBuf>,
    /// Seed of initial values, shuffles and negatives [default: 2020].
    #[arg(long)]
    #[serde(serialize_with = "dfar::train::config::seed::serialize_option")]
    seed: Option<u64>,
    /// Threads; 0: one per core. Results do not depend on it [default: 0].
    #[arg(long)]
    threads: Option<usize>,
    /// Threads that draw and pack batches ahead of the device; 0: one for the CPU, several for a
    /// GPU. Results do not depend on it [default: 0].
    #[arg(long, alias = "num-workers")]
    workers: Option<usize>,
    /// Device [default: cpu].
    #[arg(long, value_enum)]
    device: Option<DeviceChoice>,
    /// Precision of matrix products; values in memory are always f32. bf16 needs a GPU, or a CPU
    /// with AVX512-BF16 [default: f32].
    #[arg(long, value_enum)]
    precision: Option<Precision>,
    /// Launch each step as one CUDA graph, on a GPU; `=false` switches it off and overrides --config.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    cuda_graphs: Option<bool>,
    /// Also write the numbers of log.jsonl as TensorBoard events, to the directory of the run;
    /// `=false` switches it off and overrides --config.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    tensorboard: Option<bool>,

    /// Largest number of epochs [default: 100].
    #[arg(long, help_heading = "Training")]
    epochs: Option<usize>,
    /// Stop after this many epochs without a better validation AUC; 0: never [default: 5].
    #[arg(long, help_heading = "Training")]
    patience: Option<usize>,
    /// Largest number of tokens in a batch [default: 512].
    #[arg(long, help_heading = "Training")]
    batch_tokens: Option<usize>,
    /// Largest number of instances in a batch [default: 16384].
    #[arg(long, help_heading = "Training")]
    batch_rows: Option<usize>,
    /// Learning rate of Adam [default: 0.003].
    #[arg(long, help_heading = "Training", alias = "learning-rate", allow_negative_numbers = true)]
    lr: Option<f64>,
    /// Weight of the squared embedding rows of the batch [default: 1e-6].
    #[arg(long, help_heading = "Training", allow_negative_numbers = true)]
    embed_l2: Option<f64>,
    /// Limit on gradient norms; 0: none [default: 2].
    #[arg(long, help_heading = "Training", allow_negative_numbers = true)]
    max_grad_norm: Option<f64>,
    /// Scope of the limit [default: per-tensor].
    #[arg(long, value_enum, help_heading = "Training")]
    clip: Option<ClipMode>,
    /// Update every embedding row at every step, not only the rows of the batch; `=false` switches
    /// it off and overrides --config.
    #[arg(long, help_heading = "Training", num_args = 0..=1, require_equals = true, default_missing_value = "true", value_name = "BOOL")]
    dense_embeddings: Option<bool>,
    /// Seconds between checkpoints within an epoch [default: 60].
    #[arg(long, help_heading = "Training")]
    checkpoint_seconds: Option<u64>,

    /// Longest history; older events are cut off [default: 100; synthetic set: 20].
    #[arg(long, help_heading = "Model")]
    max_length: Option<usize>,
    /// Windows of longer training histories begin at multiples of this; 1: always keep exactly
    /// max-length events; 0: a quarter of max-length, rounded up
    /// [default: 0].
    #[arg(long, help_heading = "Instances")]
    window_stride: Option<usize>,
    /// Model width [default: 32].
    #[arg(long, help_heading = "Model")]
    width: Option<usize>,
    /// Attention heads [default: 2].
    #[arg(long, help_heading = "Model")]
    heads: Option<usize>,
    /// Blocks in each encoder [default: 1].
    #[arg(long, help_heading = "Model")]
    blocks: Option<usize>,
    /// Softmax denominator under the label mask: `joint`, all key heads of all visible tokens; or
    /// `masked`, only the pairs that the mask keeps [default: joint].
    #[arg(long, help_heading = "Model", value_parser = normalization)]
    normalization: Option<Normalization>,
    /// Number of later events that halve the weight of an event in the means of a history and in
    /// target attention; 0, as in the paper: all events weigh alike [default: 0].
    #[arg(long, help_heading = "Model", value_name = "EVENTS", allow_negative_numbers = true)]
    half_life: Option<f64>,
    /// Standard deviation of the initial embeddings and MLP weights [default: scaled].
    #[arg(long, value_enum, help_heading = "Model")]
    init: Option<Initialization>,
    /// Ablation: plain multi-head attention instead of factorization heads; `=false` overrides
    /// --config.
    #[arg(long = "no-fha", help_heading = "Model", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", value_name = "BOOL", value_parser = negated)]
    fha: Option<bool>,
    /// Ablation: no label mask; `=false` overrides --config.
    #[arg(long = "no-label-mask", help_heading = "Model", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", value_name = "BOOL", value_parser = negated)]
    label_mask: Option<bool>,

    /// Weight of the interest-wise BPR loss; 0: the "w/o IBL" ablation [default: 0.1].
    #[arg(long, help_heading = "Loss", allow_negative_numbers = true)]
    bpr: Option<f64>,
    /// Weight of the disentangling loss; 0: the "w/o IDL" ablation [default: 0.001].
    #[arg(long, help_heading = "Loss", allow_negative_numbers = true)]
    idl: Option<f64>,

    /// Training events that are targets [default: positive].
    #[arg(long, value_enum, help_heading = "Instances")]
    train_targets: Option<TrainTargets>,
    /// Feedback that the model reads [default: mixed].
    #[arg(long, value_enum, help_heading = "Instances")]
    feedback: Option<Feedback>,
    /// Source of training negatives [default: in-batch].
    #[arg(long, value_enum, help_heading = "Instances")]
    train_negatives: Option<NegativeSource>,
    /// Negatives per training group [default: 9].
    #[arg(long, help_heading = "Instances")]
    negatives: Option<usize>,
    /// Distinct negatives shared by the groups of one history; 0: each group draws its own
    /// [default: 0].
    #[arg(long, help_heading = "Instances")]
    negative_pool: Option<usize>,
    /// Share of the training targets used per epoch [default: 1].
    #[arg(long, help_heading = "Instances", allow_negative_numbers = true)]
    sample_rate: Option<f64>,

    /// Users that count in GAUC [default: none].
    #[arg(long, value_enum, help_heading = "Evaluation")]
    gauc_compat: Option<GaucRule>,
    /// Upper edges of the history lengths by which metrics are reported: ascending numbers of events,
    /// each the last of its row [default: quartiles].
    #[arg(long, value_name = "EVENTS", value_delimiter = ',', help_heading = "Evaluation")]
    length_edges: Option<Vec<u32>>,
}

impl Flags {
    /// The given flags, as keys of a configuration.
    pub fn table(&self) -> Result<toml::Table, TrainError> {
        let mut table = toml::Table::try_from(self).map_err(|error| TrainError::Usage {
            argument: "flags",
            reason: format!("{error}: a number must be below 2^63, except --seed"),
        })?;
        if let Some(path) = &self.data {
            let path = Config::absolute_data(path)
                .map_err(|reason| TrainError::Usage { argument: "--data", reason })?;
            table.insert("data".to_owned(), path.into());
        }
        Ok(table)
    }
}

fn negated(text: &str) -> Result<bool, String> {
    text.parse().map(|flag: bool| !flag).map_err(|_| "possible values: true, false".to_owned())
}

fn normalization(text: &str) -> Result<Normalization, String> {
    match text {
        "joint" => Ok(Normalization::Joint),
        "masked" => Ok(Normalization::Masked),
        _ => Err("possible values: joint, masked".to_owned()),
    }
}
