//! Adam's state and its step over all parameters: embedding tables by touched row, everything else whole.

use super::indices::Indices;
use super::network::{Gradients, Report};
use super::parameters::Layout;
use super::tensors::Tensors;
use super::{AdamOptions, HostTensor, LossOptions, Model, ModelError, StepLoss, StepObserver};
use crate::device::{AdamStep, AdamTensor, Device};
use std::sync::Arc;

/// Names of the moments in a checkpoint.
const FIRST: &str = "adam.first.";
const SECOND: &str = "adam.second.";

/// Adam's moments and step count.
pub struct Optimizer<D: Device> {
    device: Arc<D>,
    layout: Layout,
    first: Tensors<D>,
    second: Tensors<D>,
    steps: u64,
}

impl<D: Device> Optimizer<D> {
    /// Zero moments for the parameters of `model`.
    pub fn new(model: &Model<D>) -> Result<Self, ModelError> {
        let (device, layout) = (model.device.clone(), model.layout.clone());
        let (first, second) = (Tensors::zeros(&*device, &layout)?, Tensors::zeros(&*device, &layout)?);
        Ok(Self { device, layout, first, second, steps: 0 })
    }

    /// From a checkpoint's moments and step count.
    pub fn from_tensors(model: &Model<D>, tensors: &[HostTensor], steps: u64) -> Result<Self, ModelError> {
        let (device, layout) = (model.device.clone(), model.layout.clone());
        let first = Tensors::upload(&*device, layout.arrange(FIRST, tensors)?)?;
        let second = Tensors::upload(&*device, layout.arrange(SECOND, tensors)?)?;
        Ok(Self { device, layout, first, second, steps })
    }

    /// Steps taken.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Moments by name (`adam.first.NAME`, `adam.second.NAME`), for a checkpoint.
    pub fn tensors(&self) -> Result<Vec<HostTensor>, ModelError> {
        let mut tensors = self.first.download(&*self.device, &self.layout, FIRST)?;
        tensors.extend(self.second.download(&*self.device, &self.layout, SECOND)?);
        Ok(tensors)
    }

    /// A step on whole tensors.
    pub(super) fn step_dense(
        &mut self,
        options: &AdamOptions,
        loss: &LossOptions,
        parameters: &mut Tensors<D>,
        gradients: &Tensors<D>,
        report: Report<D>,
        observer: &mut dyn StepObserver,
    ) -> Result<StepLoss, ModelError> {
        let gradients = gradients.iter().map(|g| (g, None)).collect();
        self.step(options, loss, parameters, gradients, report, observer)
    }

    /// A step on whole tensors and on the touched rows of the embedding tables.
    pub(super) fn step_sparse(
        &mut self,
        options: &AdamOptions,
        loss: &LossOptions,
        parameters: &mut Tensors<D>,
        gradients: &Gradients<D>,
        batch: &Indices<D>,
        report: Report<D>,
        observer: &mut dyn StepObserver,
    ) -> Result<StepLoss, ModelError> {
        let layout = &self.layout;
        let mut list: Vec<_> = gradients.dense.iter().map(|g| (g, None)).collect();
        let width = |id: usize| layout.specs[id].shape[1];
        list[layout.item] = (&gradients.item, Some((&batch.touched_item.row, width(layout.item))));
        list[layout.position] =
            (&gradients.position, Some((&batch.touched_position.row, width(layout.position))));
        list[layout.label] = (&gradients.label, Some((&batch.touched_label.row, width(layout.label))));
        self.step(options, loss, parameters, list, report, observer)
    }

    fn step(
        &mut self,
        options: &AdamOptions,
        loss: &LossOptions,
        parameters: &mut Tensors<D>,
        gradients: Vec<(&D::Buffer<f32>, Option<(&D::Buffer<u32>, usize)>)>,
        mut report: Report<D>,
        observer: &mut dyn StepObserver,
    ) -> Result<StepLoss, ModelError> {
        let step = AdamStep {
            lr: options.lr,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            step: self.steps + 1,
            clip: options.clip,
        };
        let state = parameters.iter_mut().zip(self.first.iter_mut().zip(self.second.iter_mut()));
        let mut tensors: Vec<_> = state
            .zip(&gradients)
            .map(|((value, (first, second)), &(gradient, rows))| AdamTensor {
                value,
                first,
                second,
                gradient,
                rows,
            })
            .collect();
        self.device.adam(&step, &mut tensors, report.norm())?;
        observer.end()?;
        // The one place where a step waits for the device.
        let loss = report.read(&*self.device, loss)?;
        if !loss.gradient_norm.is_finite() {
            return Err(first_non_finite(&*self.device, &self.layout, &gradients)?);
        }
        self.steps += 1;
        Ok(loss)
    }
}

fn first_non_finite<D: Device>(
    device: &D,
    layout: &Layout,
    gradients: &[(&D::Buffer<f32>, Option<(&D::Buffer<u32>, usize)>)],
) -> Result<ModelError, ModelError> {
    for (spec, (gradient, _)) in layout.specs.iter().zip(gradients) {
        if device.download(gradient)?.iter().any(|x| !x.is_finite()) {
            return Ok(ModelError::NonFinite { tensor: format!("gradient of {}", spec.name) });
        }
    }
    Ok(ModelError::NonFinite { tensor: "the gradients' norm".into() })
}
