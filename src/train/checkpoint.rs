//! Everything a run needs to go on as if it had never stopped, in one file; and the model file it
//! produces.

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
/// Prefix of the optimiser's tensors.
const ADAM: &str = "adam.";
const ITEM_NAMES: &str = "vocabulary.items.names";
const ITEM_NAME_ENDS: &str = "vocabulary.items.ends";

/// Which data a run is about.
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
    /// How the data set was made; names its candidates by a hash.
    pub protocol: Protocol,
}

impl DataInfo {
    /// Reads all of the events once.
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

/// Where the time of training went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Seconds, each step's from the end of the one before.
    pub seconds: f64,
    /// Of these, seconds in which the next batch was waited for.
    #[serde(default)]
    pub input_wait: f64,
    /// Seconds the device took, each step's from the moment when its batch is sent to the end of
    /// its last operation.
    #[serde(default)]
    pub busy: f64,
}

impl StepTime {
    /// Share of the time in which the device was at a step; 0 where there was no time.
    pub fn utilisation(&self) -> f64 {
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

/// Running sums over the steps of an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EpochSums {
    /// Rows seen.
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

/// What an epoch came to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EpochRecord {
    /// From 1.
    pub epoch: usize,
    /// Mean loss over the rows, and its parts.
    pub loss: f64,
    /// Binary cross-entropy.
    pub bce: f64,
    /// Interest-wise BPR.
    pub ibl: f64,
    /// Disentangling.
    pub idl: f64,
    /// Validation AUC; none without liked validation events.
    pub valid_auc: Option<f64>,
    /// Validation GAUC.
    pub valid_gauc: Option<f64>,
    /// Rows per second of training.
    pub instances_per_second: f64,
    /// Seconds of training.
    pub train_seconds: f64,
    /// Of these, seconds in which the next batch was waited for; none in records of versions that
    /// did not measure it.
    #[serde(default)]
    pub input_wait: Option<f64>,
    /// Share of the training time in which the device was at a step; none as above.
    #[serde(default)]
    pub utilisation: Option<f64>,
    /// Seconds of validation.
    pub valid_seconds: f64,
    /// What the epoch amounted to.
    pub size: PlanSize,
}

/// The best epoch so far, whose parameters are in the model file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// From 1.
    pub epoch: usize,
    /// Validation AUC.
    pub valid_auc: Option<f64>,
    /// Checksum of the model file's tensors.
    pub crc32: u32,
}

/// Where a run stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Epochs completed.
    pub epoch: usize,
    /// Batches of the current epoch completed.
    pub batch: usize,
    /// Optimiser steps taken.
    pub steps: u64,
    /// Sums of the current epoch.
    pub sums: EpochSums,
    /// Best epoch.
    pub best: Option<Best>,
    /// Epochs since the best.
    pub stale: usize,
    /// Completed epochs.
    pub history: Vec<EpochRecord>,
    /// Seconds of all sessions of the run.
    pub seconds: f64,
    /// Length of the log at this point; what was written later is done again.
    pub log_bytes: u64,
}

/// Content of a checkpoint file, beside the tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointInfo {
    /// The run.
    pub config: Config,
    /// The network.
    pub model: ModelConfig,
    /// The data.
    pub data: DataInfo,
    /// Where it stands.
    pub state: State,
}

/// A checkpoint.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// What it says.
    pub info: CheckpointInfo,
    /// Parameters.
    pub parameters: Vec<HostTensor>,
    /// Adam's moments.
    pub moments: Vec<HostTensor>,
}

impl Checkpoint {
    /// Writes the file whole or not at all.
    pub fn save(self, path: &Path) -> Result<(), FileError> {
        let mut values = self.parameters;
        values.extend(self.moments);
        file::write(path, CHECKPOINT, &self.info, &Tensors { values, bytes: Vec::new() })?;
        Ok(())
    }

    /// Reads and checks the file. Shapes are checked where the tensors become a model.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        let (info, tensors, _) = file::read(path, CHECKPOINT)?;
        let (moments, parameters) = tensors.values.into_iter().partition(|t| t.name.starts_with(ADAM));
        Ok(Self { info, parameters, moments })
    }
}

/// Content of a model file, beside the tensors. Holds no time and no path: equal runs make equal
/// bytes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// The network.
    pub model: ModelConfig,
    /// What of the feedback it was trained to see.
    pub feedback: Feedback,
    /// What it was trained on.
    pub data: DataInfo,
    /// Epoch it comes from, from 1.
    pub epoch: usize,
    /// Validation AUC.
    pub valid_auc: Option<f64>,
}

/// A trained model with the names of its items: all that serving needs.
#[derive(Clone, Debug)]
pub struct ModelFile {
    /// What it says.
    pub info: ModelInfo,
    /// Parameters.
    pub parameters: Vec<HostTensor>,
    /// Original ids of the items.
    pub items: Vec<String>,
    /// Checksum of the tensors.
    pub crc32: u32,
}

impl ModelFile {
    /// Writes the file whole or not at all; returns the checksum of its tensors.
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
                reason: "its item names are missing or cut".into(),
            }
        })?;
        Ok(Self { info, parameters: tensors.values, items, crc32 })
    }
}

/// Splits the names; `None` where they are not `count` UTF-8 strings end to end.
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
