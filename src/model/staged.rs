//! Upload of a batch: staged on any thread, sent by the training thread, consumed by one step.

use super::indices::Indices;
use super::{Model, ModelConfig, ModelError};
use crate::batch::Batch;
use crate::device::Device;
use std::sync::Arc;

/// Stages batches for a model on any thread, while the device computes.
pub struct Stager<D: Device> {
    made_for: MadeFor<D>,
}

/// The device and configuration that a batch was staged for.
struct MadeFor<D: Device> {
    device: Arc<D>,
    config: ModelConfig,
}

impl<D: Device> MadeFor<D> {
    fn check(&self, model: &Model<D>) -> Result<(), ModelError> {
        let fits = Arc::ptr_eq(&self.device, &model.device) && self.config == model.config;
        if fits { Ok(()) } else { Err(ModelError::OtherModel) }
    }
}

/// A valid batch in a staging buffer, ready for upload in one copy.
pub struct StagedBatch<D: Device> {
    indices: Indices<D>,
    staging: D::Staging,
    made_for: MadeFor<D>,
}

impl<D: Device> Stager<D> {
    pub(super) fn new(device: Arc<D>, config: ModelConfig) -> Self {
        Self { made_for: MadeFor { device, config } }
    }

    /// Stages a batch.
    ///
    /// # Errors
    /// [`ModelError::Batch`] for an index beyond the limits of the model, and failures of the
    /// device.
    pub fn stage(&self, batch: &Batch) -> Result<StagedBatch<D>, ModelError> {
        let MadeFor { device, config } = &self.made_for;
        check(config, batch)?;
        let mut staging = device.staging()?;
        let indices = Indices::stage(&**device, &mut staging, config, batch)?;
        let made_for = MadeFor { device: device.clone(), config: config.clone() };
        Ok(StagedBatch { indices, staging, made_for })
    }
}

impl<D: Device> StagedBatch<D> {
    /// Rows (instances).
    pub fn rows(&self) -> usize {
        self.indices.rows
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.indices.tokens
    }

    /// Uploads the batch if it was staged for the device and configuration of `model`.
    pub(super) fn send(self, model: &Model<D>) -> Result<SentBatch<D>, ModelError> {
        let Self { indices, staging, made_for } = self;
        made_for.check(model)?;
        model.device.send(staging)?;
        Ok(SentBatch { indices, made_for })
    }
}

/// A batch on the device, or a copy in flight. Later launches wait for the copy. Dropping the batch
/// has no other effect.
pub struct SentBatch<D: Device> {
    pub(super) indices: Indices<D>,
    made_for: MadeFor<D>,
}

impl<D: Device> SentBatch<D> {
    /// Rows (instances).
    pub fn rows(&self) -> usize {
        self.indices.rows
    }

    /// The indices, if the batch was staged for the device and configuration of `model`.
    pub(super) fn indices_for(self, model: &Model<D>) -> Result<Indices<D>, ModelError> {
        self.made_for.check(model)?;
        Ok(self.indices)
    }
}

/// Checks the largest indices, so that no operation reads out of bounds.
fn check(config: &ModelConfig, batch: &Batch) -> Result<(), ModelError> {
    let check = |what, found: Option<&u32>, limit: usize| match found {
        Some(&found) if found as usize >= limit => {
            Err(ModelError::Batch { what, found: found as usize, limit })
        }
        _ => Ok(()),
    };
    check("item", batch.item.iter().max(), config.items)?;
    check("candidate item", batch.pair_item.iter().max(), config.items)?;
    check("history position", batch.position.iter().max(), config.max_length)
}
