//! The parts of a training step, and their timers.

use super::ModelError;
use crate::device::{Device, DeviceError};
use serde::Serialize;
use std::ops::AddAssign;
use std::sync::Arc;

/// A part of a training step, forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StepPart {
    /// Upload of the batch.
    Input,
    /// Embeddings, encoder and prefix means.
    Encoder,
    /// Encoders and prefix means of the two interests.
    Dual,
    /// Target attention of both interests.
    TargetAttention,
    /// Both towers and the losses.
    Towers,
    /// Clipping and Adam.
    Optimizer,
}

impl StepPart {
    /// In the order of a step.
    pub const ALL: [Self; 6] =
        [Self::Input, Self::Encoder, Self::Dual, Self::TargetAttention, Self::Towers, Self::Optimizer];

    /// Name for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Encoder => "encoder",
            Self::Dual => "dual",
            Self::TargetAttention => "target attention",
            Self::Towers => "towers",
            Self::Optimizer => "optimizer",
        }
    }
}

/// Follows the launches of a training step by part. The backward pass enters parts again.
pub trait StepObserver {
    /// The following launches belong to `part`.
    ///
    /// # Errors
    /// Failures of the device, which end the step.
    fn enter(&mut self, part: StepPart) -> Result<(), DeviceError>;

    /// The launches of the step are complete; the host waits for the device next.
    ///
    /// # Errors
    /// As [`StepObserver::enter`].
    fn end(&mut self) -> Result<(), DeviceError>;
}

/// Observes nothing.
impl StepObserver for () {
    fn enter(&mut self, _: StepPart) -> Result<(), DeviceError> {
        Ok(())
    }
    fn end(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Times steps with events on the device. A step begins before the upload of the batch, or in
/// [`Model::begin_step`](super::Model::begin_step) after it, and ends with the last operation.
pub struct StepTimer<D: Device> {
    device: Arc<D>,
    start: Option<D::Event>,
    end: Option<D::Event>,
}

impl<D: Device> StepTimer<D> {
    /// A timer for steps on `device`.
    pub fn new(device: Arc<D>) -> Self {
        Self { device, start: None, end: None }
    }

    /// Seconds of the last step, or 0 without one. Waits for the step.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn take(&mut self) -> Result<f64, ModelError> {
        match (self.start.take(), self.end.take()) {
            (Some(start), Some(end)) => Ok(self.device.seconds_between(&start, &end)?),
            _ => Ok(0.0),
        }
    }
}

impl<D: Device> StepObserver for StepTimer<D> {
    fn enter(&mut self, _: StepPart) -> Result<(), DeviceError> {
        if self.start.is_none() {
            self.start = Some(self.device.record_event()?);
        }
        Ok(())
    }
    fn end(&mut self) -> Result<(), DeviceError> {
        self.end = Some(self.device.record_event()?);
        Ok(())
    }
}

/// Seconds of each part, in the order of [`StepPart::ALL`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PartSeconds(pub [f64; StepPart::ALL.len()]);

impl PartSeconds {
    /// Seconds of one part.
    pub fn of(&self, part: StepPart) -> f64 {
        self.0[part as usize]
    }

    /// Seconds of all parts.
    pub fn total(&self) -> f64 {
        self.0.iter().sum()
    }
}

impl AddAssign for PartSeconds {
    fn add_assign(&mut self, other: Self) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, more)| *sum += more);
    }
}

/// Times the parts of steps with events on the device.
pub struct PartTimer<D: Device> {
    device: Arc<D>,
    /// Start of each part, in order.
    starts: Vec<(StepPart, D::Event)>,
    end: Option<D::Event>,
}

impl<D: Device> PartTimer<D> {
    /// A timer for steps on `device`.
    pub fn new(device: Arc<D>) -> Self {
        Self { device, starts: Vec::new(), end: None }
    }

    /// Seconds of each part of the last step. Waits for the step.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn take(&mut self) -> Result<PartSeconds, ModelError> {
        let mut seconds = PartSeconds::default();
        let (starts, end) = (std::mem::take(&mut self.starts), self.end.take());
        let ends = starts.iter().skip(1).map(|(_, event)| event).chain(&end);
        for ((part, start), end) in starts.iter().zip(ends) {
            seconds.0[*part as usize] += self.device.seconds_between(start, end)?;
        }
        Ok(seconds)
    }
}

impl<D: Device> StepObserver for PartTimer<D> {
    fn enter(&mut self, part: StepPart) -> Result<(), DeviceError> {
        self.starts.push((part, self.device.record_event()?));
        Ok(())
    }
    fn end(&mut self) -> Result<(), DeviceError> {
        self.end = Some(self.device.record_event()?);
        Ok(())
    }
}
