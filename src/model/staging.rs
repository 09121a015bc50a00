//! Batches on their way to the device. Staging one is all that the host has to do for a step, and any thread can do it while
//! the device works on another.

use super::indices::Indices;
use super::{ModelConfig, ModelError};
use crate::batch::Batch;
use crate::device::{Device, DeviceError};
use std::sync::Arc;

/// Stages batches for a model, on any thread.
pub struct Stager<D: Device> {
    pub(super) device: Arc<D>,
    pub(super) config: ModelConfig,
}

/// A batch that is ready to be sent to the device.
pub struct StagedBatch<D: Device> {
    indices: Indices<D>,
    staging: D::Staging,
}

impl<D: Device> StagedBatch<D> {
    /// Number of rows (instances).
    pub fn rows(&self) -> usize {
        self.indices.rows
    }

    /// Sends it, in one copy.
    pub(super) fn send(self, device: &D) -> Result<Indices<D>, DeviceError> {
        let Self { indices, staging } = self;
        device.send(staging)?;
        Ok(indices)
    }
}

impl<D: Device> Stager<D> {
    /// Checks a batch, and lays out all that the device needs of it.
    ///
    /// # Errors
    /// [`ModelError::Batch`] for indices that the model has no rows for; the device's.
    pub fn stage(&self, batch: &Batch) -> Result<StagedBatch<D>, ModelError> {
        self.check(batch)?;
        let mut staging = self.device.staging()?;
        let indices = Indices::stage(&*self.device, &mut staging, &self.config, batch)?;
        Ok(StagedBatch { indices, staging })
    }

    /// Everything an index could get wrong, before a device sees it.
    fn check(&self, batch: &Batch) -> Result<(), ModelError> {
        let check = |what, found: Option<&u32>, limit: usize| match found {
            Some(&found) if found as usize >= limit => {
                Err(ModelError::Batch { what, found: found as usize, limit })
            }
            _ => Ok(()),
        };
        check("item", batch.item.iter().max(), self.config.items)?;
        check("candidate item", batch.pair_item.iter().max(), self.config.items)?;
        check("history position", batch.position.iter().max(), self.config.max_length)
    }
}
