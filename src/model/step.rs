//! A training step that was asked for, until its losses are read.

use super::network::Report;
use super::tensors::Tensors;
use super::{LossOptions, ModelError, Optimizer, StepLoss};
use crate::device::Device;

/// A step that the device is at work on. Whoever began it may prepare and send the next batch before waiting for it. To be
/// finished in any case: until then it is not counted, though the device takes it. It holds the optimiser, as the next step
/// can only begin when this one is counted.
#[must_use = "a step counts when it is finished"]
pub struct PendingStep<'a, D: Device> {
    pub(super) optimizer: &'a mut Optimizer<D>,
    pub(super) loss: LossOptions,
    pub(super) report: Report<D>,
    /// In the order of the layout, those of embedding tables by touched row or whole: to be looked at if the norm is not finite.
    pub(super) gradients: Tensors<D>,
}

impl<D: Device> PendingStep<'_, D> {
    /// Waits for the step: the one place where training waits for the device.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] for a loss or gradient that is not finite: the parameters are as before the step then. What
    /// the device reports.
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
        Ok(ModelError::NonFinite { tensor: "the gradients' norm".into() })
    }
}
