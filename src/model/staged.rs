//! A batch on its way to the device: made on any thread, sent by one, used up by one step.

use super::indices::Indices;
use super::{Model, ModelConfig, ModelError};
use crate::batch::Batch;
use crate::device::Device;
use std::sync::Arc;

/// Stages batches for a model, on any thread, while the model works.
pub struct Stager<D: Device> {
    made_for: MadeFor<D>,
}

/// The models that a batch is made for: those like this on `device`.
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

/// A batch checked, with all that the device needs of it laid out to be sent in one copy.
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
    /// [`ModelError::Batch`] for one that does not fit the model; what the device reports.
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

    /// Tokens encoded.
    pub fn tokens(&self) -> usize {
        self.indices.tokens
    }

    /// Sends it, if it was staged for a model like this.
    pub(super) fn send(self, model: &Model<D>) -> Result<SentBatch<D>, ModelError> {
        let Self { indices, staging, made_for } = self;
        made_for.check(model)?;
        model.device.send(staging)?;
        Ok(SentBatch { indices, made_for })
    }
}

/// A batch on the device, or on its way there: what is asked for from now on finds it. Dropped, it is gone, and nothing else.
pub struct SentBatch<D: Device> {
    pub(super) indices: Indices<D>,
    made_for: MadeFor<D>,
}

impl<D: Device> SentBatch<D> {
    /// Rows (instances).
    pub fn rows(&self) -> usize {
        self.indices.rows
    }

    /// What it holds, if it was staged for a model like this.
    pub(super) fn indices_for(self, model: &Model<D>) -> Result<Indices<D>, ModelError> {
        self.made_for.check(model)?;
        Ok(self.indices)
    }
}

/// Everything an index could get wrong, before a device sees it.
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
