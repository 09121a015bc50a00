//! The configuration of a run: all its parameters, in one flat TOML table.

use super::draw::{DrawOptions, TrainTargets};
use super::negatives::NegativeSource;
use crate::attention::Normalization;
use crate::batch::{Cut, Feedback};
use crate::device::Precision;
use crate::device::{Clip, Device};
use crate::evaluate::metrics::GaucRule;
use crate::model::{AdamOptions, Initialization, LossOptions, ModelConfig, SHORTEST_HALF_LIFE};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// How gradient norms are limited to `max_grad_norm`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ClipMode {
    /// The gradient of each tensor separately.
    #[default]
    PerTensor,
    /// All gradients as one vector.
    Global,
}

/// The device of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceChoice {
    /// A GPU if one is usable, else the CPU.
    Auto,
    /// The CPU.
    #[default]
    Cpu,
    /// The first NVIDIA GPU.
    Cuda,
}

/// The configuration of a run. Keys of the TOML file are the flags of `dfar-train` with `_` for
/// `-`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Data set file; `None`: the embedded synthetic set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub data: Option<PathBuf>,
    /// Seed of the initial values, the shuffles and the negatives. TOML integers have 63 bits; a
    /// larger seed is a string.
    #[serde(with = "seed")]
    pub seed: u64,
    /// Largest number of epochs.
    pub epochs: usize,
    /// Number of epochs without a better validation AUC after which training stops; 0: never.
    pub patience: usize,
    /// Largest number of tokens in a training batch.
    pub batch_tokens: usize,
    /// Largest number of rows (instances) in a training batch.
    pub batch_rows: usize,
    /// Longest history; older events are cut off. Default 100, for the synthetic set
    /// [`SYNTHETIC_MAX_LENGTH`].
    pub max_length: usize,
    /// Training windows of histories longer than `max_length` begin at multiples of this stride, so
    /// that neighbouring targets share a window; 1: every target has a window of exactly
    /// `max_length` events; 0: a quarter of `max_length`, rounded up.
    pub window_stride: usize,
    /// Model width `D`.
    pub width: usize,
    /// Attention heads.
    pub heads: usize,
    /// Blocks in the encoder and in each interest encoder.
    pub blocks: usize,
    /// Spread of the initial embeddings and MLP weights.
    pub init: Initialization,
    /// Factorization heads.
    pub fha: bool,
    /// Label mask of the encoder. Without a second head or without factorization heads there is
    /// none, whatever this says.
    pub label_mask: bool,
    /// Softmax denominator under the label mask.
    pub normalization: Normalization,
    /// Number of later events that halve the weight of an event in the means of a history and in
    /// target attention; 0, as in the paper: all events weigh alike.
    pub half_life: f64,
    /// Learning rate of Adam.
    pub lr: f64,
    /// Limit on gradient norms; 0: none.
    pub max_grad_norm: f64,
    /// The scope of that limit.
    pub clip: ClipMode,
    /// Update every embedding row at every step, not only the rows of the batch.
    pub dense_embeddings: bool,
    /// Weight of the interest-wise BPR loss.
    pub bpr: f64,
    /// Weight of the disentangling loss.
    pub idl: f64,
    /// Weight of the squared embedding rows of the batch.
    pub embed_l2: f64,
    /// The training events that are targets.
    pub train_targets: TrainTargets,
    /// The feedback that the model reads.
    pub feedback: Feedback,
    /// Source of training negatives.
    pub train_negatives: NegativeSource,
    /// Negatives per training group.
    pub negatives: usize,
    /// Number of distinct negatives shared by the groups of one pass; 0: every group draws its own.
    pub negative_pool: usize,
    /// Share of the training targets used per epoch.
    pub sample_rate: f64,
    /// Users that count in GAUC: `none`, those with both classes; `dfar`, as the published code.
    pub gauc_compat: GaucRule,
    /// Upper edges (in events) of the history lengths by which metrics are reported; empty:
    /// quartiles of the test groups.
    pub length_edges: Vec<u32>,
    /// Seconds between checkpoints inside an epoch.
    pub checkpoint_seconds: u64,
    /// Threads; 0: one per core. Results do not depend on it.
    pub threads: usize,
    /// Threads that draw and pack batches ahead of the device; 0: one for the CPU, several for a
    /// GPU. Results do not depend on it.
    pub workers: usize,
    /// Device.
    pub device: DeviceChoice,
    /// Precision of matrix products.
    pub precision: Precision,
    /// Launch steps as CUDA graphs, on a GPU.
    pub cuda_graphs: bool,
    /// Also write the numbers of the log as TensorBoard events.
    pub tensorboard: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            data: None,
            seed: 2020,
            epochs: 100,
            patience: 5,
            batch_tokens: 512,
            batch_rows: 16384,
            max_length: 100,
            window_stride: 0,
            width: 32,
            heads: 2,
            blocks: 1,
            init: Initialization::Scaled,
            fha: true,
            label_mask: true,
            normalization: Normalization::Joint,
            half_life: 0.0,
            lr: 3e-3,
            max_grad_norm: 2.0,
            clip: ClipMode::PerTensor,
            dense_embeddings: false,
            bpr: 0.1,
            idl: 1e-3,
            embed_l2: 1e-6,
            train_targets: TrainTargets::Positive,
            feedback: Feedback::Mixed,
            train_negatives: NegativeSource::InBatch,
            negatives: 9,
            negative_pool: 0,
            sample_rate: 1.0,
            gauc_compat: GaucRule::BothClasses,
            length_edges: Vec::new(),
            checkpoint_seconds: 60,
            threads: 0,
            workers: 0,
            device: DeviceChoice::Cpu,
            precision: Precision::F32,
            cuda_graphs: false,
            tensorboard: false,
        }
    }
}

/// An invalid configuration.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not TOML, or a value has the wrong type.
    #[error("{origin}: {reason}")]
    Syntax {
        /// The file, or `flags`.
        origin: String,
        /// The parser's message.
        reason: String,
    },
    /// A key that does not exist.
    #[error("{origin}: unknown key `{key}`{}", did_you_mean(suggestion))]
    UnknownKey {
        /// The file.
        origin: String,
        /// The key.
        key: String,
        /// The nearest key that exists.
        suggestion: Option<String>,
    },
    /// A key that a resumed run cannot change.
    #[error("--{} cannot change when a run is resumed; start a new run", key.replace('_', "-"))]
    FixedKey {
        /// The key.
        key: String,
    },
    /// An invalid value.
    #[error("{key} = {value}: {reason}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// Why it is invalid.
        reason: &'static str,
    },
}

fn did_you_mean(suggestion: &Option<String>) -> String {
    suggestion.as_ref().map(|s| format!("; did you mean `{s}`?")).unwrap_or_default()
}

/// Spellings of other frameworks, accepted in files.
const ALIASES: [(&str, &str); 10] = [
    ("learning_rate", "lr"),
    ("stopping_step", "patience"),
    ("max_item_list_length", "max_length"),
    ("max_seq_length", "max_length"),
    ("hidden_size", "width"),
    ("embedding_size", "width"),
    ("n_heads", "heads"),
    ("n_layers", "blocks"),
    ("worker", "workers"),
    ("num_workers", "workers"),
];

/// Default `max_length` for the embedded synthetic set, where the next event depends mostly on the
/// last one.
pub const SYNTHETIC_MAX_LENGTH: i64 = 20;

/// Keys that may change when a run is resumed: its duration and its machine. Another device or
/// precision gives other last digits.
pub const RESUME_KEYS: [&str; 10] = [
    "epochs",
    "patience",
    "checkpoint_seconds",
    "threads",
    "workers",
    "device",
    "precision",
    "cuda_graphs",
    "tensorboard",
    "data",
];

/// Whether a step, which computes in f32, can use this weight: 0 or above, and it does not become
/// infinite or 0.
pub fn is_weight(value: f64) -> bool {
    let rounded = value as f32;
    rounded.is_finite() && value >= 0.0 && (rounded > 0.0 || value == 0.0)
}

impl Config {
    /// Defaults, then the keys of `file`, then those of `flags`.
    pub fn layered(file: Option<&Path>, flags: toml::Table) -> Result<Self, ConfigError> {
        let mut table = match file {
            None => toml::Table::new(),
            Some(path) => {
                let table = read_table(path)?;
                // Values of the wrong type are reported as those of the file.
                Self::from_table(table.clone(), &path.display().to_string())?;
                table
            }
        };
        table.extend(flags);
        if !table.contains_key("data") && !table.contains_key("max_length") {
            table.insert("max_length".to_owned(), SYNTHETIC_MAX_LENGTH.into());
        }
        let mut config = Self::from_table(table, "flags")?;
        config.make_data_absolute();
        config.check()?;
        Ok(config)
    }

    /// The table with the spellings of other frameworks replaced. `origin` is for messages.
    ///
    /// # Errors
    /// [`ConfigError::UnknownKey`], and [`ConfigError::Syntax`] for two spellings of one key.
    pub fn resolve_keys(table: toml::Table, origin: &str) -> Result<toml::Table, ConfigError> {
        let known = known_keys();
        let mut out = toml::Table::new();
        for (key, value) in table {
            let name = ALIASES.iter().find(|(alias, _)| *alias == key).map_or(key.as_str(), |(_, name)| name);
            if !known.iter().any(|k| k == name) {
                let suggestion = nearest(&key, &known);
                return Err(ConfigError::UnknownKey { origin: origin.to_owned(), suggestion, key });
            }
            if out.insert(name.to_owned(), value).is_some() {
                return Err(ConfigError::Syntax {
                    origin: origin.to_owned(),
                    reason: format!("`{name}` is given twice, under two spellings"),
                });
            }
        }
        Ok(out)
    }

    /// This configuration with the keys of `flags` replaced; only [`RESUME_KEYS`] may differ.
    pub fn resumed(&self, flags: toml::Table) -> Result<Self, ConfigError> {
        let mut table = self.to_table();
        for (key, value) in Self::resolve_keys(flags, "flags")? {
            if !RESUME_KEYS.contains(&key.as_str()) && table.get(&key) != Some(&value) {
                return Err(ConfigError::FixedKey { key });
            }
            table.insert(key, value);
        }
        let mut config = Self::from_table(table, "flags")?;
        config.make_data_absolute();
        config.check()?;
        Ok(config)
    }

    fn make_data_absolute(&mut self) {
        if let Some(Ok(path)) = self.data.as_deref().map(Self::absolute_data) {
            self.data = Some(path.into());
        }
    }

    /// A value of the key `data`: an absolute path, since a run may be repeated or continued from
    /// another working directory.
    ///
    /// # Errors
    /// Why the path cannot be written to `config.toml`, in words.
    pub fn absolute_data(path: &Path) -> Result<String, String> {
        let path = std::path::absolute(path).map_err(|error| error.to_string())?;
        path.into_os_string()
            .into_string()
            .map_err(|path| format!("{} is not UTF-8 and cannot be written to config.toml", path.display()))
    }

    /// The first key whose values differ.
    pub fn first_difference(&self, other: &Self) -> Option<String> {
        let (own, other) = (self.to_table(), other.to_table());
        own.keys().chain(other.keys()).find(|key| own.get(*key) != other.get(*key)).cloned()
    }

    /// Not checked. `origin` is for messages.
    fn from_table(table: toml::Table, origin: &str) -> Result<Self, ConfigError> {
        table.try_into().map_err(|error: toml::de::Error| ConfigError::Syntax {
            origin: origin.to_owned(),
            reason: wrong_value(&error),
        })
    }

    /// As a table of all keys.
    pub fn to_table(&self) -> toml::Table {
        toml::Table::try_from(self).expect("a config is a table")
    }

    /// As TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a flat table of plain values is TOML")
    }

    /// Checks that each value is one that training accepts. [`Config::layered`] does so too.
    ///
    /// # Errors
    /// [`ConfigError::Value`] for the first that is not.
    pub fn check(&self) -> Result<(), ConfigError> {
        let refuse = |key, value: String, reason| Err(ConfigError::Value { key, value, reason });
        for (key, value) in [
            ("batch_tokens", self.batch_tokens),
            ("batch_rows", self.batch_rows),
            ("max_length", self.max_length),
            ("width", self.width),
            ("heads", self.heads),
            ("blocks", self.blocks),
            ("negatives", self.negatives),
            ("epochs", self.epochs),
        ] {
            if value == 0 {
                return refuse(key, value.to_string(), "must be at least 1");
            }
        }
        for (key, value) in [
            ("lr", self.lr),
            ("max_grad_norm", self.max_grad_norm),
            ("embed_l2", self.embed_l2),
            ("bpr", self.bpr),
        ] {
            if !is_weight(value) {
                let reason = "must be 0, or a positive number that 32-bit floating point can hold";
                return refuse(key, value.to_string(), reason);
            }
        }
        if !(self.idl as f32).is_finite() {
            return refuse("idl", self.idl.to_string(), "must be a 32-bit floating-point number");
        }
        // In f32, as the step computes: 0.1 in f64 is a little less.
        if self.half_life != 0.0 && !(SHORTEST_HALF_LIFE..=f32::MAX).contains(&(self.half_life as f32)) {
            let reason = "must be 0 (no half-life) or a number of events, at least 0.1";
            return refuse("half_life", self.half_life.to_string(), reason);
        }
        if !(self.sample_rate > 0.0 && self.sample_rate <= 1.0) {
            return refuse("sample_rate", self.sample_rate.to_string(), "must be above 0 and at most 1");
        }
        if self.window_stride > self.max_length {
            return refuse("window_stride", self.window_stride.to_string(), "must be at most max_length");
        }
        self.check_length_edges()?;
        if self.feedback != Feedback::Mixed && self.train_targets == TrainTargets::Feedback {
            return refuse(
                "train_targets",
                "feedback".into(),
                "a feedback-blind model is not trained on skipped events; use `positive` or `all`",
            );
        }
        Ok(())
    }

    /// Checks `length_edges`.
    ///
    /// # Errors
    /// [`ConfigError::Value`] if they do not ascend.
    pub fn check_length_edges(&self) -> Result<(), ConfigError> {
        if self.length_edges.is_sorted_by(|a, b| a < b) {
            return Ok(());
        }
        let value = format!("{:?}", self.length_edges);
        Err(ConfigError::Value { key: "length_edges", value, reason: "must ascend" })
    }

    /// The configuration of the network, for this number of items.
    pub fn model(&self, items: usize) -> ModelConfig {
        ModelConfig {
            width: self.width,
            heads: self.heads,
            blocks: self.blocks,
            normalization: self.normalization,
            fha: self.fha,
            label_mask: self.label_mask,
            half_life: (self.half_life > 0.0).then_some(self.half_life as f32),
            ..ModelConfig::new(items, self.max_length)
        }
    }

    /// The weights of the loss.
    pub fn loss(&self) -> LossOptions {
        LossOptions { bpr: self.bpr as f32, idl: self.idl as f32, embed_l2: self.embed_l2 as f32 }
    }

    /// Threads that draw and pack batches for `device`.
    pub fn workers_for(&self, device: &impl Device) -> usize {
        if self.workers == 0 { device.default_workers() } else { self.workers }
    }

    /// The options of the optimizer.
    pub fn adam(&self) -> AdamOptions {
        let norm = self.max_grad_norm as f32;
        let clip = match self.clip {
            _ if norm == 0.0 => None,
            ClipMode::PerTensor => Some(Clip::PerTensor(norm)),
            ClipMode::Global => Some(Clip::Global(norm)),
        };
        AdamOptions { lr: self.lr as f32, clip, dense_embeddings: self.dense_embeddings }
    }

    /// The cut of long training histories.
    fn cut(&self) -> Cut {
        let stride = if self.window_stride == 0 { self.max_length.div_ceil(4) } else { self.window_stride };
        Cut { max_length: self.max_length, stride }
    }

    /// The options for drawing batches.
    pub fn draw(&self) -> DrawOptions {
        DrawOptions {
            seed: self.seed,
            targets: self.train_targets,
            feedback: self.feedback,
            cut: self.cut(),
            source: self.train_negatives,
            negatives: self.negatives,
            negative_pool: self.negative_pool,
            sample_rate: self.sample_rate,
            batch_tokens: self.batch_tokens,
            batch_rows: self.batch_rows,
        }
    }
}

/// `seed` in files and flags: an integer, or a string of digits above TOML's largest integer.
pub mod seed {
    use serde::de::{Deserializer, Error, Visitor};
    use serde::ser::Serializer;
    use std::fmt;

    /// See the module.
    pub fn serialize<S: Serializer>(seed: &u64, serializer: S) -> Result<S::Ok, S::Error> {
        match i64::try_from(*seed) {
            Ok(seed) => serializer.serialize_i64(seed),
            Err(_) => serializer.serialize_str(&seed.to_string()),
        }
    }

    /// [`serialize`] for an optional seed; `None` is skipped.
    pub fn serialize_option<S: Serializer>(seed: &Option<u64>, serializer: S) -> Result<S::Ok, S::Error> {
        match seed {
            Some(seed) => serialize(seed, serializer),
            None => serializer.serialize_none(),
        }
    }

    /// See the module.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
        struct Seed;
        impl Visitor<'_> for Seed {
            type Value = u64;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a seed from 0 to 18446744073709551615")
            }
            fn visit_u64<E: Error>(self, seed: u64) -> Result<u64, E> {
                Ok(seed)
            }
            fn visit_i64<E: Error>(self, seed: i64) -> Result<u64, E> {
                u64::try_from(seed).map_err(|_| E::invalid_value(serde::de::Unexpected::Signed(seed), &self))
            }
            fn visit_str<E: Error>(self, seed: &str) -> Result<u64, E> {
                seed.parse().map_err(|_| E::invalid_value(serde::de::Unexpected::Str(seed), &self))
            }
        }
        deserializer.deserialize_any(Seed)
    }
}

fn read_table(path: &Path) -> Result<toml::Table, ConfigError> {
    let origin = path.display().to_string();
    let text = std::fs::read_to_string(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let table: toml::Table = text.parse().map_err(|e: toml::de::Error| ConfigError::Syntax {
        origin: origin.clone(),
        reason: e.to_string(),
    })?;
    Config::resolve_keys(table, &origin)
}

/// What is wrong with a value, and its key.
fn wrong_value(error: &toml::de::Error) -> String {
    error.to_string().trim_end().replace('\n', " ")
}

fn known_keys() -> Vec<String> {
    let all = Config { data: Some(PathBuf::new()), ..Config::default() };
    toml::Table::try_from(all).expect("a config is a table").into_iter().map(|(key, _)| key).collect()
}

/// The known key at the smallest edit distance, if that is small relative to its length.
fn nearest(key: &str, known: &[String]) -> Option<String> {
    let key = key.replace('-', "_").to_lowercase();
    known
        .iter()
        .map(|k| (edit_distance(&key, k), k))
        .min()
        .filter(|(distance, k)| *distance <= 1 + k.len() / 4)
        .map(|(_, k)| k.clone())
}

fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, &y) in b.iter().enumerate() {
            let substitute = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substitute.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::LabelMask;
    use std::io::Write;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = file("lr = 0.5\nheads = 4\n");
        let flags = toml::Table::from_iter([("heads".to_owned(), toml::Value::Integer(8))]);
        let config = Config::layered(Some(file.path()), flags).unwrap();
        assert_eq!((config.lr, config.heads, config.width), (0.5, 8, Config::default().width));
        let length = |flags| Config::layered(None, flags).unwrap().max_length;
        assert_eq!(length(toml::Table::new()), 20);
        assert_eq!(length(toml::Table::from_iter([("data".to_owned(), "x.dfar".into())])), 100);
        assert_eq!(length(toml::Table::from_iter([("max_length".to_owned(), 7.into())])), 7);
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_with_its_key() {
        for text in ["width = \"wide\"\n", "train_negatives = 2\n", "lr = true\n"] {
            let file = file(text);
            let error = Config::layered(Some(file.path()), toml::Table::new()).unwrap_err().to_string();
            let key = text.split(' ').next().expect("a key");
            assert!(error.contains(&format!("in `{key}`")), "{error}");
        }
    }

    #[test]
    fn bad_values_are_reported_with_their_key_and_origin() {
        let error = |text: &str, flags: &[(&str, f64)]| {
            let file = file(text);
            let flags = flags.iter().map(|&(key, value)| (key.to_owned(), value.into()));
            let error = Config::layered(Some(file.path()), flags.collect()).unwrap_err().to_string();
            error.replace(&file.path().display().to_string(), "FILE")
        };
        let found = error("lr = 0.1\nlearning_rate = 0.2\n", &[]);
        assert_eq!(found, "FILE: `lr` is given twice, under two spellings");
        let found = error("lr = \"fast\"\n", &[]);
        assert!(found.starts_with("FILE: ") && found.contains("`lr`"), "{found}");
        let found = error("lr = 0.1\n", &[("width", 0.5)]);
        assert!(found.starts_with("flags: ") && found.contains("`width`"), "{found}");
        // Values that f32 cannot hold.
        for (key, value) in [("lr", 1e39), ("max_grad_norm", 1e-46), ("idl", -1e39), ("bpr", -1.0)] {
            let found = error("", &[(key, value)]);
            assert!(found.contains(key) && found.contains("32-bit"), "{found}");
        }
    }

    #[test]
    fn what_is_saved_is_what_is_read() {
        let config = Config {
            data: Some("/a b.dfar".into()),
            length_edges: vec![5, 9],
            lr: 0.1 + 0.2,
            feedback: Feedback::PositiveOnly,
            ..Config::default()
        };
        let file = file(&config.to_toml());
        assert_eq!(Config::layered(Some(file.path()), toml::Table::new()).unwrap(), config);
    }

    #[test]
    fn a_seed_has_64_bits() {
        for seed in [0, i64::MAX as u64, i64::MAX as u64 + 1, u64::MAX] {
            let config = Config { seed, max_length: 7, ..Config::default() };
            let file = file(&config.to_toml());
            assert_eq!(Config::layered(Some(file.path()), toml::Table::new()).unwrap().seed, seed);
            let json = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<Config>(&json).unwrap().seed, seed);
            assert_eq!(config.resumed(toml::Table::new()).unwrap(), config);
        }
        assert!(Config::layered(Some(file("seed = -1").path()), toml::Table::new()).is_err());
    }

    #[test]
    fn the_label_mask_comes_back_with_a_second_head() {
        let one_head = Config::layered(Some(file("heads = 1").path()), toml::Table::new()).unwrap();
        assert_eq!(one_head.model(1).encoder_attention().label_mask, LabelMask::None);
        let saved = file(&one_head.to_toml());
        let two = toml::Table::from_iter([("heads".to_owned(), 2.into())]);
        let two = Config::layered(Some(saved.path()), two).unwrap();
        assert_eq!(two.model(1).encoder_attention().label_mask, LabelMask::Feedback);
    }

    #[test]
    fn a_misspelt_key_names_its_neighbour() {
        let error =
            |text| Config::layered(Some(file(text).path()), toml::Table::new()).unwrap_err().to_string();
        assert!(
            error("batch-tokens = 3").ends_with("unknown key `batch-tokens`; did you mean `batch_tokens`?")
        );
        assert!(error("pateince = 3").ends_with("did you mean `patience`?"));
        assert!(error("zzz = 3").ends_with("unknown key `zzz`"));
    }

    #[test]
    fn other_frameworks_spellings_are_understood() {
        let file = file("learning_rate = 0.25\nstopping_step = 3\n");
        let config = Config::layered(Some(file.path()), toml::Table::new()).unwrap();
        assert_eq!((config.lr, config.patience), (0.25, 3));
    }

    #[test]
    fn the_shortest_half_life_is_accepted() {
        let config = Config::layered(Some(file("half_life = 0.1").path()), toml::Table::new()).unwrap();
        assert_eq!(config.model(1).half_life, Some(SHORTEST_HALF_LIFE));
    }

    #[test]
    fn values_that_make_no_run_are_refused() {
        for (text, key) in [
            ("heads = 0", "heads"),
            ("half_life = -1.0", "half_life"),
            ("half_life = 0.01", "half_life"),
            ("half_life = inf", "half_life"),
            ("half_life = nan", "half_life"),
            ("lr = -1.0", "lr"),
            ("lr = nan", "lr"),
            ("sample_rate = 0.0", "sample_rate"),
            ("length_edges = [3, 3]", "length_edges"),
            ("window_stride = 9\nmax_length = 8", "window_stride"),
            ("feedback = 'ignored'\ntrain_targets = 'feedback'", "train_targets"),
            ("lr = 'x'", "lr"),
        ] {
            let error = Config::layered(Some(file(text).path()), toml::Table::new()).unwrap_err();
            assert!(!matches!(error, ConfigError::UnknownKey { .. }), "{text}: {error}");
            let message = error.to_string().replace('-', "_");
            assert!(message.contains(key), "{text}: {message}");
        }
    }
}
