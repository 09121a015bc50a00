//! A packed batch, as all systems read it.
//!
//! The histories hold *seen* events: [`dfar::batch::View`] has applied the feedback filter and the
//! cut. `N` tokens (seen events), `G` groups (prefixes), `R` rows (a prefix and a candidate), `C`
//! pairs (a history and a distinct candidate), as in [`Batch`].

use crate::{Indices, Result};
use dfar::batch::{Batch, BatchError, History, Touched, touched};
use dfar::device::cpu::Cpu;
use dfar::device::{Device, Prefixes};
use dfar::evaluate::EvaluateError;
use dfar::model::ModelError;
use dfar::model::indices::DeviceTouched;
use dfar::train::TrainError;

/// A batch and its indices as device buffers, which have the names of the fields of [`Batch`].
pub struct Inputs<D: Device = Cpu> {
    /// The batch.
    pub batch: Batch,
    pub(crate) item: Indices<D>,
    pub(crate) position: Indices<D>,
    pub(crate) label_row: Indices<D>,
    pub(crate) pair_item: Indices<D>,
    /// `[N]` a sampled item for each token, for the auxiliary loss of DIEN; else empty. That of the
    /// first token of a history is not used.
    pub(crate) negative_item: Indices<D>,
    pub(crate) cu_seqlens: Indices<D>,
    pub(crate) group_offsets: Indices<D>,
    pub(crate) group_length: Indices<D>,
    /// `[G]` ones.
    pub(crate) ones: Indices<D>,
    /// Places are tokens, then pairs (`N + c`), then the tokens' negatives (`N + C + n`).
    pub(crate) touched_item: DeviceTouched<D>,
    /// Places are tokens.
    pub(crate) touched_position: DeviceTouched<D>,
    /// Places are tokens.
    pub(crate) touched_label: DeviceTouched<D>,
}

/// A batch in a staging buffer. Any thread may make it; the thread of the model sends it.
pub struct StagedInputs<D: Device = Cpu> {
    inputs: Inputs<D>,
    staging: D::Staging,
}

/// What the tables of a model allow.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Rows of the item table.
    pub items: usize,
    /// Rows of the position table, if there is one.
    pub positions: Option<usize>,
}

impl<D: Device> StagedInputs<D> {
    /// Packs histories. `negatives` holds an item for each event of the histories (that of a
    /// history's first event is not used), or nothing.
    ///
    /// # Errors
    /// [`InputError`].
    pub fn new(
        device: &D,
        limits: Limits,
        histories: &[History],
        negatives: &[u32],
    ) -> std::result::Result<Self, InputError> {
        let batch = Batch::pack(histories)?;
        Ok(Self::from_batch(device, limits, batch, negatives)?)
    }

    fn from_batch(device: &D, limits: Limits, batch: Batch, negatives: &[u32]) -> Result<Self> {
        assert!(negatives.is_empty() || negatives.len() == batch.tokens(), "one negative for each event");
        let below = |what, found: Option<&u32>, limit: usize| match found {
            Some(&found) if found as usize >= limit => {
                Err(ModelError::Batch { what, found: found as usize, limit })
            }
            _ => Ok(()),
        };
        below("item", batch.item.iter().chain(negatives).max(), limits.items)?;
        below("candidate item", batch.pair_item.iter().max(), limits.items)?;
        below("history position", batch.position.iter().max(), limits.positions.unwrap_or(usize::MAX))?;
        let labels: Vec<u32> = batch.label.iter().map(|&label| label.into()).collect();
        // Both rows of the label table count as touched, as in DFAR.
        let [of_0, of_1] = batch.split.each_ref().map(|split| &split.token[..]);
        let mut of_label = Touched { row: vec![0, 1], ..Touched::default() };
        of_label.source.offsets = vec![0, of_0.len() as u32, batch.tokens() as u32];
        of_label.source.members = [of_0, of_1].concat();
        let mut staging = device.staging()?;
        let to = &mut staging;
        let inputs = Inputs {
            item: device.stage(to, &batch.item)?,
            position: device.stage(to, &batch.position)?,
            label_row: device.stage(to, &labels)?,
            pair_item: device.stage(to, &batch.pair_item)?,
            negative_item: device.stage(to, negatives)?,
            cu_seqlens: device.stage(to, &batch.cu_seqlens)?,
            group_offsets: device.stage(to, &batch.group_offsets)?,
            group_length: device.stage(to, &batch.group_length)?,
            ones: device.stage(to, &vec![1; batch.groups()])?,
            touched_item: DeviceTouched::stage(device, to, &touched_items(&batch, negatives))?,
            touched_position: DeviceTouched::stage(device, to, &batch.touched_position)?,
            touched_label: DeviceTouched::stage(device, to, &of_label)?,
            batch,
        };
        Ok(Self { inputs, staging })
    }

    /// Uploads the batch, for operations called later.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn send(self, device: &D) -> Result<Inputs<D>> {
        device.send(self.staging)?;
        Ok(self.inputs)
    }
}

impl<D: Device> Inputs<D> {
    /// The prefix of each group, for means.
    pub(crate) fn prefixes(&self) -> Prefixes<&Indices<D>> {
        Prefixes {
            cu_seqlens: &self.cu_seqlens,
            group_offsets: &self.group_offsets,
            count: &self.group_length,
            divisor: &self.group_length,
            recency: None,
        }
    }

    /// The prefix of each group, for sums.
    pub(crate) fn prefixes_summed(&self) -> Prefixes<&Indices<D>> {
        Prefixes { divisor: &self.ones, ..self.prefixes() }
    }

    /// `[G]` the last token of each group's prefix; `None` for an empty one. They ascend.
    pub(crate) fn last_tokens(&self) -> Vec<Option<u32>> {
        let batch = &self.batch;
        let of_history = |(b, bounds): (usize, &[u32])| {
            let first = batch.cu_seqlens[b];
            let lengths = &batch.group_length[bounds[0] as usize..bounds[1] as usize];
            lengths.iter().map(move |&length| length.checked_sub(1).map(|last| first + last))
        };
        batch.group_offsets.windows(2).enumerate().flat_map(of_history).collect()
    }
}

/// The item rows of tokens, pairs and used negatives.
fn touched_items(batch: &Batch, negatives: &[u32]) -> Touched {
    if negatives.is_empty() {
        return batch.touched_item.clone();
    }
    let used: Vec<usize> = (0..batch.tokens()).filter(|&token| batch.position[token] > 0).collect();
    let before = batch.tokens() + batch.pairs();
    let of_used = used.iter().map(|&token| &negatives[token]);
    let mut items = touched(batch.item.iter().chain(&batch.pair_item).chain(of_used).copied());
    for member in items.source.members.iter_mut().filter(|member| **member as usize >= before) {
        *member = (before + used[*member as usize - before]) as u32;
    }
    items
}

/// A batch that cannot be packed or does not fit the model.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// Not a batch.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// Beyond the limits of the model, or no memory.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl From<InputError> for TrainError {
    fn from(error: InputError) -> Self {
        match error {
            InputError::Batch(error) => error.into(),
            InputError::Model(error) => error.into(),
        }
    }
}

impl From<InputError> for EvaluateError {
    fn from(error: InputError) -> Self {
        match error {
            InputError::Batch(error) => error.into(),
            InputError::Model(error) => error.into(),
        }
    }
}
