//! The state of Adam, and its step over all parameters: embedding tables by row of the batch, other
//! tensors whole.

use super::indices::Indices;
use super::network::Report;
use super::parameters::{Layout, arrange};
use super::tensors::{Tensors, adam_tensors};
use super::{AdamOptions, HostTensor, Model, ModelError};
use crate::device::{AdamRows, Device, DeviceError};
use std::sync::Arc;

/// Name prefixes of the moments in a checkpoint.
const FIRST: &str = "adam.first.";
const SECOND: &str = "adam.second.";

/// Moments and step count of Adam.
pub struct Optimizer<D: Device> {
    pub(super) device: Arc<D>,
    pub(super) layout: Layout,
    first: Tensors<D>,
    second: Tensors<D>,
    pub(super) steps: u64,
    /// Refused steps that the host knows of.
    pub(super) refusals: u64,
    /// Report of the previous step, which may still be in flight.
    pub(super) report: Option<Report<D>>,
}

impl<D: Device> Optimizer<D> {
    /// Zero moments for the parameters of `model`.
    pub fn new(model: &Model<D>) -> Result<Self, ModelError> {
        let (device, layout) = (model.device.clone(), model.layout.clone());
        let zeros = || Tensors::zeros(&*device, &layout.specs);
        let (first, second) = (zeros()?, zeros()?);
        Ok(Self { device, layout, first, second, steps: 0, refusals: 0, report: None })
    }

    /// From the moments and step count of a checkpoint.
    pub fn from_tensors(model: &Model<D>, tensors: &[HostTensor], steps: u64) -> Result<Self, ModelError> {
        let (device, layout) = (model.device.clone(), model.layout.clone());
        let first = Tensors::upload(&*device, arrange(&layout.specs, FIRST, tensors)?)?;
        let second = Tensors::upload(&*device, arrange(&layout.specs, SECOND, tensors)?)?;
        Ok(Self { device, layout, first, second, steps, refusals: 0, report: None })
    }

    /// Steps begun, without those found refused.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The device has refused a step and those behind it.
    pub(super) fn refuse(&mut self, step: u64) {
        self.steps = step - 1;
        self.refusals += 1;
        self.report = None;
    }

    /// Moments by name (`adam.first.NAME`, `adam.second.NAME`), for a checkpoint.
    pub fn tensors(&self) -> Result<Vec<HostTensor>, ModelError> {
        let mut tensors = self.first.download(&*self.device, &self.layout.specs, FIRST)?;
        tensors.extend(self.second.download(&*self.device, &self.layout.specs, SECOND)?);
        Ok(tensors)
    }

    /// Launches the step after [`Optimizer::steps`]: on whole tensors, or for the embedding tables
    /// on the rows of `touched` only. The device refuses it if a loss or the norm is non-finite, or
    /// if it has refused the step before.
    pub(super) fn launch(
        &mut self,
        options: &AdamOptions,
        parameters: &mut Tensors<D>,
        gradients: &Tensors<D>,
        touched: Option<&Indices<D>>,
        report: &mut Report<D>,
    ) -> Result<(), DeviceError> {
        let layout = &self.layout;
        let mut rows = vec![None; layout.specs.len()];
        if let Some(batch) = touched {
            for (id, touched) in [
                (layout.item, &batch.touched_item),
                (layout.position, &batch.touched_position),
                (layout.label, &batch.touched_label),
            ] {
                rows[id] = Some(AdamRows { index: &touched.row, width: layout.specs[id].shape[1] });
            }
        }
        let moments = [&mut self.first, &mut self.second];
        let mut tensors = adam_tensors(parameters, moments, gradients, rows);
        let previous = self.report.as_ref().map(Report::values);
        self.device.adam(&options.step(self.steps + 1), &mut tensors, report.norm(), previous)
    }
}
