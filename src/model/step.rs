//! A training step in flight.

use super::network::Report;
use super::tensors::Tensors;
use super::{LossOptions, ModelError, Optimizer, StepLoss};
use crate::device::Device;

/// A training step in flight. The caller may stage and send the next batch before
/// [`PendingStep::finish`]. The device updates the parameters in any case, but only `finish` counts
/// the step. The optimiser is borrowed until then, so steps cannot overlap.
#[must_use = "call `finish` to count the step"]
pub struct PendingStep<'a, D: Device> {
    pub(super) optimizer: &'a mut Optimizer<D>,
    pub(super) loss: LossOptions,
    pub(super) report: Report<D>,
    /// In the order of the layout, embedding tables by row or whole. Searched if the norm is
    /// non-finite.
    pub(super) gradients: Tensors<D>,
}

impl<D: Device> PendingStep<'_, D> {
    /// Waits for the step. This is the only synchronisation of training with the device.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] names a non-finite loss or gradient; the parameters are unchanged
    /// then. Failures of the device.
    pub fn finish(self) -> Result<StepLoss, ModelError> {
        let loss = self.report.read(&*self.optimizer.device, &self.loss)?;
        if !loss.gradient_norm.is_finite() {
            return Err(self.first_non_finite()?);
        }
        self.optimizer.steps += 1;
        Ok(loss)
    }

    fn first_non_finite(&self) -> Result<ModelError, ModelError> {
        let Optimizer { device, layout, .. } = &*self.optimizer;
        for (spec, gradient) in layout.specs.iter().zip(self.gradients.iter()) {
            if device.download(gradient)?.iter().any(|x| !x.is_finite()) {
                return Ok(ModelError::NonFinite { tensor: format!("gradient of {}", spec.name) });
            }
        }
        Ok(ModelError::NonFinite { tensor: "norm of the gradients".into() })
    }
}
