//! A training step by its parts, and what they take.

use super::ModelError;
use crate::device::{Device, DeviceError};
use serde::Serialize;
use std::ops::AddAssign;
use std::sync::Arc;

/// A part of a training step, forward and backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StepPart {
    /// The batch on its way to the device.
    Input,
    /// Embeddings, the encoder and the means of its prefixes.
    Encoder,
    /// The dual interests: their encoders and means.
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

    /// In words, for tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Input => "input",
            Self::Encoder => "encoder",
            Self::Dual => "dual",
            Self::TargetAttention => "target attention",
            Self::Towers => "towers",
            Self::Optimizer => "optimiser",
        }
    }
}

/// Told of the parts of a training step as their operations are asked for. Parts alternate: backward comes back to them.
pub trait StepObserver {
    /// What follows belongs to `part`.
    ///
    /// # Errors
    /// What the device reports. The step ends with it.
    fn enter(&mut self, part: StepPart) -> Result<(), DeviceError>;

    /// All of the step has been asked for; the host is about to wait for it.
    ///
    /// # Errors
    /// As [`StepObserver::enter`].
    fn end(&mut self) -> Result<(), DeviceError>;
}

/// Nobody.
impl StepObserver for () {
    fn enter(&mut self, _: StepPart) -> Result<(), DeviceError> {
        Ok(())
    }
    fn end(&mut self) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Times steps on the device: from the moment when a batch is sent, or with [`Model::begin_step`](super::Model::begin_step) from
/// there, to the end of the last operation.
pub struct StepTimer<D: Device> {
    device: Arc<D>,
    start: Option<D::Event>,
    end: Option<D::Event>,
}

impl<D: Device> StepTimer<D> {
    /// For steps on `device`.
    pub fn new(device: Arc<D>) -> Self {
        Self { device, start: None, end: None }
    }

    /// Seconds of the step just taken; 0 where there was none. Waits for it.
    ///
    /// # Errors
    /// What the device reports.
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

    /// Seconds of all.
    pub fn total(&self) -> f64 {
        self.0.iter().sum()
    }
}

impl AddAssign for PartSeconds {
    fn add_assign(&mut self, other: Self) {
        self.0.iter_mut().zip(other.0).for_each(|(sum, more)| *sum += more);
    }
}

/// Times the parts of steps on the device.
pub struct PartTimer<D: Device> {
    device: Arc<D>,
    /// Beginnings, in order.
    marks: Vec<(StepPart, D::Event)>,
    end: Option<D::Event>,
}

impl<D: Device> PartTimer<D> {
    /// For steps on `device`.
    pub fn new(device: Arc<D>) -> Self {
        Self { device, marks: Vec::new(), end: None }
    }

    /// Seconds of each part of the step just taken. Waits for it.
    ///
    /// # Errors
    /// What the device reports.
    pub fn take(&mut self) -> Result<PartSeconds, ModelError> {
        let mut seconds = PartSeconds::default();
        let (marks, end) = (std::mem::take(&mut self.marks), self.end.take());
        let ends = marks.iter().skip(1).map(|(_, mark)| mark).chain(&end);
        for ((part, start), end) in marks.iter().zip(ends) {
            seconds.0[*part as usize] += self.device.seconds_between(start, end)?;
        }
        Ok(seconds)
    }
}

impl<D: Device> StepObserver for PartTimer<D> {
    fn enter(&mut self, part: StepPart) -> Result<(), DeviceError> {
        self.marks.push((part, self.device.record_event()?));
        Ok(())
    }
    fn end(&mut self) -> Result<(), DeviceError> {
        self.end = Some(self.device.record_event()?);
        Ok(())
    }
}
