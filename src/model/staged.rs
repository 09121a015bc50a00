//! A batch on its way to the device: made on any thread, sent by one, used up by one step.

use super::indices::Indices;
use super::{ModelConfig, ModelError};
use crate::batch::Batch;
use crate::device::{Device, DeviceError};
use std::sync::Arc;

/// Stages batches for a model, on any thread, while the model works.
pub struct Stager<D: Device> {
    device: Arc<D>,
    config: ModelConfig,
}

/// A batch checked, with all that the device needs of it laid out to be sent in one copy.
pub struct StagedBatch<D: Device> {
    indices: Indices<D>,
    staging: D::Staging,
    device: Arc<D>,
    config: ModelConfig,
}

impl<D: Device> Stager<D> {
    pub(super) fn new(device: Arc<D>, config: ModelConfig) -> Self {
        Self { device, config }
    }

    /// Stages a batch.
    ///
    /// # Errors
    /// [`ModelError::Batch`] for one that does not fit the model; what the device reports.
    pub fn stage(&self, batch: &Batch) -> Result<StagedBatch<D>, ModelError> {
        let Self { device, config } = self;
        check(config, batch)?;
        let mut staging = device.staging()?;
        let indices = Indices::stage(&**device, &mut staging, config, batch)?;
        Ok(StagedBatch { indices, staging, device: device.clone(), config: config.clone() })
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

    /// Whether it was staged for a model like this on `device`.
    pub(super) fn fits(&self, device: &Arc<D>, config: &ModelConfig) -> bool {
        Arc::ptr_eq(&self.device, device) && self.config == *config
    }

    /// Sends it.
    pub(super) fn send(self) -> Result<SentBatch<D>, DeviceError> {
        let Self { indices, staging, device, config } = self;
        device.send(staging)?;
        Ok(SentBatch { indices, device, config })
    }
}

/// A batch on the device, or on its way there: what is asked for from now on finds it. Dropped, it is gone, and nothing else.
pub struct SentBatch<D: Device> {
    pub(super) indices: Indices<D>,
    device: Arc<D>,
    config: ModelConfig,
}

impl<D: Device> SentBatch<D> {
    /// Rows (instances).
    pub fn rows(&self) -> usize {
        self.indices.rows
    }

    /// Whether it was staged for a model like this on `device`.
    pub(super) fn fits(&self, device: &Arc<D>, config: &ModelConfig) -> bool {
        Arc::ptr_eq(&self.device, device) && self.config == *config
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
