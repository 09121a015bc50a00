//! The checkpoint, from which a run continues as if never interrupted, and the model file.

use super::config::Config;
use super::draw::PlanSize;
use super::file::{self, FileError, Tensors};
use crate::batch::Feedback;
use crate::data::{Dataset, Protocol};
use crate::model::{HostTensor, ModelConfig, StepLoss};
use serde::{Deserialize, Serialize};
use std::path::Path;

const CHECKPOINT: &str = "checkpoint";
const MODEL: &str = "model";
/// Prefix of the optimizer's tensors.
const ADAM: &str = "adam.";
const ITEM_NAMES: &str = "vocabulary.items.names";
const ITEM_NAME_ENDS: &str = "vocabulary.items.ends";

/// Identifies the data of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DataInfo {
    /// Users.
    pub users: usize,
    /// Items.
    pub items: usize,
    /// Events.
    pub events: usize,
    /// CRC-32 (hexadecimal) of the original item ids in order.
    pub vocabulary: String,
    /// CRC-32 (hexadecimal) of all users' items, feedback and splits.
    pub content: String,
    /// How the data set was made; includes a hash of its candidates.
    pub protocol: Protocol,
}

impl DataInfo {
    /// Computes it in one pass over all events.
    pub fn of(data: &Dataset) -> Self {
        let mut content = crc32fast::Hasher::new();
        for user in 0..data.users() as u32 {
            let events = data.user(user);
            content.update(bytemuck::cast_slice(events.items));
            content.update(events.feedback);
            content.update(bytemuck::bytes_of(&[events.train_end as u64, events.valid_end as u64]));
        }
        let mut vocabulary = crc32fast::Hasher::new();
        for item in 0..data.items() as u32 {
            let name = data.item_name(item);
            vocabulary.update(&(name.len() as u64).to_le_bytes());
            vocabulary.update(name.as_bytes());
        }
        Self {
            users: data.users(),
            items: data.items(),
            events: data.events(),
            vocabulary: format!("{:08x}", vocabulary.finalize()),
            content: format!("{:08x}", content.finalize()),
            protocol: data.protocol().clone(),
        }
    }
}

/// Breakdown of training time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Seconds of all steps; a step counts from the end of the previous one.
    pub seconds: f64,
    /// Of these, seconds spent waiting for the next batch.
    #[serde(default)]
    pub input_wait: f64,
    /// Seconds of device work: from the moment a batch is sent to the end of the step's last
    /// operation.
    #[serde(default)]
    pub busy: f64,
}

impl StepTime {
    /// Share of the time in which the device worked on a step; 0 if no time has passed.
    pub fn utilization(&self) -> f64 {
        if self.seconds > 0.0 { self.busy / self.seconds } else { 0.0 }
    }
}

impl std::ops::AddAssign for StepTime {
    fn add_assign(&mut self, more: Self) {
        self.seconds += more.seconds;
        self.input_wait += more.input_wait;
        self.busy += more.busy;
    }
}

/// Sums over the steps of an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EpochSums {
    /// Number of rows.
    pub rows: u64,
    /// Loss and its parts, weighted by rows.
    pub loss: f64,
    /// Binary cross-entropy.
    pub bce: f64,
    /// Interest-wise BPR.
    pub ibl: f64,
    /// Disentangling.
    pub idl: f64,
    /// Time spent on steps.
    #[serde(flatten)]
    pub time: StepTime,
}

impl EpochSums {
    /// Adds a step over `rows` rows.
    pub fn add(&mut self, rows: usize, step: &StepLoss, time: StepTime) {
        self.rows += rows as u64;
        self.loss += step.loss * rows as f64;
        self.bce += step.bce * rows as f64;
        self.ibl += step.ibl * rows as f64;
        self.idl += step.idl * rows as f64;
        self.time += time;
    }
}

/// The results of an epoch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Number of the epoch, from 1.
    pub epoch: usize,
    /// Mean loss over the rows, and its parts.
    pub loss: f64,
    /// Binary cross-entropy.
    pub bce: f64,
    /// Interest-wise BPR.
    pub ibl: f64,
    /// Disentangling.
    pub idl: f64,
    /// Validation AUC; `None` without liked validation events.
    pub valid_auc: Option<f64>,
    /// Validation GAUC.
    pub valid_gauc: Option<f64>,
    /// Training instances (rows) per second.
    pub instances_per_second: f64,
    /// Seconds of training.
    pub train_seconds: f64,
    /// Of these, seconds spent waiting for the next batch; `None` in records of versions that did
    /// not measure it.
    #[serde(default)]
    pub input_wait: Option<f64>,
    /// Share of the training time in which the device worked on a step; `None` as above.
    #[serde(default)]
    pub utilization: Option<f64>,
    /// Seconds of validation.
    pub valid_seconds: f64,
    /// The size of the epoch.
    pub size: PlanSize,
}

/// The best epoch so far, whose parameters are in the model file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// Number of the epoch, from 1.
    pub epoch: usize,
    /// Validation AUC.
    pub valid_auc: Option<f64>,
    /// Checksum of the model file.
    pub crc32: u32,
}

/// Progress of a run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Epochs completed.
    pub epoch: usize,
    /// Batches of the current epoch completed.
    pub batch: usize,
    /// Optimizer steps taken.
    pub steps: u64,
    /// Sums of the current epoch.
    pub sums: EpochSums,
    /// Best epoch.
    pub best: Option<Best>,
    /// Epochs since the best.
    pub stale: usize,
    /// Completed epochs.
    #[serde(rename = "history")]
    pub records: Vec<EpochRecord>,
    /// Seconds of all sessions of the run.
    pub seconds: f64,
    /// Length of the log at this point; the steps logged after it are repeated.
    pub log_bytes: u64,
}

/// Metadata of a checkpoint file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// Configuration of the run.
    pub config: Config,
    /// Configuration of the network.
    pub model: ModelConfig,
    /// The data.
    pub data: DataInfo,
    /// Progress.
    pub state: State,
}

/// A checkpoint.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// Metadata.
    pub info: CheckpointInfo,
    /// Parameters.
    pub parameters: Vec<HostTensor>,
    /// Adam's moments.
    pub moments: Vec<HostTensor>,
}

impl Checkpoint {
    /// Writes the file, complete or not at all.
    pub fn save(self, path: &Path) -> Result<(), FileError> {
        let mut values = self.parameters;
        values.extend(self.moments);
        file::write(path, CHECKPOINT, &self.info, &Tensors { values, bytes: Vec::new() })?;
        Ok(())
    }

    /// Reads and checks the file. Shapes are checked later, by the model.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        let (info, tensors, _) = file::read(path, CHECKPOINT)?;
        let (moments, parameters) = tensors.values.into_iter().partition(|t| t.name.starts_with(ADAM));
        Ok(Self { info, parameters, moments })
    }
}

/// Metadata of a model file. It contains no time and no path, so equal runs write equal bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// The network.
    pub model: ModelConfig,
    /// The feedback that the model reads.
    pub feedback: Feedback,
    /// The training data.
    pub data: DataInfo,
    /// Epoch of the parameters, from 1.
    pub epoch: usize,
    /// Validation AUC.
    pub valid_auc: Option<f64>,
}

/// A trained model with the ids of its items: all that scoring needs.
#[derive(Clone, Debug)]
pub struct ModelFile {
    /// Metadata.
    pub info: ModelInfo,
    /// Parameters.
    pub parameters: Vec<HostTensor>,
    /// Original ids of the items.
    pub items: Vec<String>,
    /// Checksum of the file.
    pub crc32: u32,
}

impl ModelFile {
    /// Writes the file, complete or not at all; returns the checksum of its tensors.
    pub fn save(
        path: &Path,
        info: &ModelInfo,
        parameters: Vec<HostTensor>,
        data: &Dataset,
    ) -> Result<u32, FileError> {
        let (mut names, mut ends) = (Vec::new(), Vec::new());
        for item in 0..data.items() as u32 {
            names.extend_from_slice(data.item_name(item).as_bytes());
            ends.extend_from_slice(&(names.len() as u64).to_le_bytes());
        }
        let bytes = vec![(ITEM_NAMES.to_owned(), names), (ITEM_NAME_ENDS.to_owned(), ends)];
        file::write(path, MODEL, info, &Tensors { values: parameters, bytes })
    }

    /// Reads and checks the file.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        let (info, tensors, crc32): (ModelInfo, _, _) = file::read(path, MODEL)?;
        let bytes =
            |name: &str| tensors.bytes.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.as_slice());
        let items = names(bytes(ITEM_NAMES), bytes(ITEM_NAME_ENDS), info.model.items).ok_or_else(|| {
            FileError::Format {
                path: path.to_owned(),
                kind: MODEL,
                reason: "its item names are missing or truncated".into(),
            }
        })?;
        Ok(Self { info, parameters: tensors.values, items, crc32 })
    }
}

/// Splits the names; `None` if they are not `count` UTF-8 strings, end to end.
fn names(bytes: Option<&[u8]>, ends: Option<&[u8]>, count: usize) -> Option<Vec<String>> {
    let (bytes, ends) = (bytes?, ends?);
    let mut start = 0;
    let mut names = Vec::new();
    for end in ends.chunks(8) {
        let end = usize::try_from(u64::from_le_bytes(end.try_into().ok()?)).ok()?;
        names.push(std::str::from_utf8(bytes.get(start..end)?).ok()?.to_owned());
        start = end;
    }
    (names.len() == count && start == bytes.len()).then_some(names)
}
