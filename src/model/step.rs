//! A training step in flight.

use super::network::{Report, losses};
use super::tensors::Tensors;
use super::{LossOptions, ModelError, Optimizer, StepLoss};
use crate::device::{Device, DeviceError};

/// A training step in flight. The caller may send the next batch, and begin the next step, before
/// [`PendingStep::finish`].
///
/// If the device refuses a step (a loss or a gradient is non-finite), it also refuses the steps in
/// flight behind it, so the parameters remain those before the refused step.
#[must_use = "call `finish` to learn the losses, and whether the step was refused"]
pub struct PendingStep<D: Device> {
    /// Number of the step, from 1.
    step: u64,
    /// [`Optimizer::refusals`] at its start.
    refusals: u64,
    loss: LossOptions,
    losses: D::Download<f64>,
    /// In the order of the layout, embedding tables by row or whole. Searched if the norm is
    /// non-finite.
    gradients: Tensors<D>,
}

impl<D: Device> PendingStep<D> {
    /// A step that `optimizer` has launched, with its report.
    pub(super) fn new(
        optimizer: &mut Optimizer<D>,
        loss: LossOptions,
        report: Report<D>,
        gradients: Tensors<D>,
    ) -> Result<Self, DeviceError> {
        let losses = optimizer.device.begin_download(report.values())?;
        optimizer.report = Some(report);
        optimizer.steps += 1;
        Ok(Self { step: optimizer.steps, refusals: optimizer.refusals, loss, losses, gradients })
    }

    /// Waits for the step, not for later ones. This is the only synchronisation of training with
    /// the device. `optimizer` is that of the step. Steps are finished in the order of their begin.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] names a non-finite loss or gradient: the device has refused the
    /// step, and the optimizer no longer counts it. [`ModelError::Refused`] for a step in flight
    /// behind it. Failures of the device.
    pub fn finish(self, optimizer: &mut Optimizer<D>) -> Result<StepLoss, ModelError> {
        if self.refusals != optimizer.refusals {
            return Err(ModelError::Refused);
        }
        let values = optimizer.device.finish_download(self.losses)?;
        let error = match losses(&values, &self.loss) {
            Ok(loss) if loss.gradient_norm.is_finite() => return Ok(loss),
            Ok(_) => first_non_finite(&self.gradients, optimizer)?,
            Err(error) => error,
        };
        optimizer.refuse(self.step);
        Err(error)
    }
}

fn first_non_finite<D: Device>(
    gradients: &Tensors<D>,
    optimizer: &Optimizer<D>,
) -> Result<ModelError, ModelError> {
    for (spec, gradient) in optimizer.layout.specs.iter().zip(gradients.iter()) {
        if optimizer.device.download(gradient)?.iter().any(|x| !x.is_finite()) {
            return Ok(ModelError::NonFinite { tensor: format!("gradient of {}", spec.name) });
        }
    }
    Ok(ModelError::NonFinite { tensor: "norm of the gradients".into() })
}
