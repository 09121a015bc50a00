//! A model to train: a compared system, or DFAR itself.

use crate::inputs::{InputError, Limits, StagedInputs};
use crate::system_device::SystemDevice;
use crate::{LossOptions, Model, Optimizer};
use dfar::batch::{Batch, History};
use dfar::device::Device;
use dfar::model::{self, AdamOptions, HostTensor, ModelError, StagedBatch, Stager};
use std::sync::Arc;

/// A model with its optimizer.
pub trait Learner {
    /// Packs batches on other threads.
    type Packer: Sync;
    /// A packed batch.
    type Packed: Send;

    /// Longest history.
    fn max_length(&self) -> usize;
    /// Number of trainable values.
    fn parameters(&self) -> usize;
    /// Whether its loss needs a sampled item for each event.
    fn samples_items(&self) -> bool;
    /// A packer for this model.
    fn packer(&self) -> Self::Packer;
    /// Packs histories, with an item for each event if the loss needs them.
    ///
    /// # Errors
    /// A batch beyond the limits of the model.
    fn pack(
        packer: &Self::Packer,
        histories: &[History],
        negatives: &[u32],
    ) -> Result<Self::Packed, InputError>;
    /// One training step. Returns the number of rows and the loss.
    ///
    /// # Errors
    /// A non-finite value, and failures of the device.
    fn step(&mut self, batch: Self::Packed) -> Result<(usize, f64), ModelError>;
    /// The score of each row.
    ///
    /// # Errors
    /// Failures of the device.
    fn score(&self, batch: Self::Packed) -> Result<Vec<f32>, ModelError>;
    /// All parameters.
    ///
    /// # Errors
    /// Failures of the device.
    fn tensors(&self) -> Result<Vec<HostTensor>, ModelError>;
    /// Takes over parameters from [`Learner::tensors`].
    ///
    /// # Errors
    /// Failures of the device.
    fn restore(&mut self, tensors: &[HostTensor]) -> Result<(), ModelError>;
}

/// A compared system.
pub struct Baseline<D: SystemDevice> {
    model: Model<D>,
    optimizer: Optimizer<D>,
    loss: LossOptions,
    adam: AdamOptions,
}

impl<D: SystemDevice> Baseline<D> {
    /// A model that has not been trained.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn new(model: Model<D>, loss: LossOptions, adam: AdamOptions) -> Result<Self, ModelError> {
        let optimizer = Optimizer::new(&model)?;
        Ok(Self { model, optimizer, loss, adam })
    }
}

impl<D: SystemDevice> Learner for Baseline<D> {
    type Packer = (Arc<D>, Limits);
    type Packed = StagedInputs<D>;

    fn max_length(&self) -> usize {
        self.model.settings().max_length
    }
    fn parameters(&self) -> usize {
        self.model.parameters()
    }
    fn samples_items(&self) -> bool {
        self.model.kind().samples_items()
    }
    fn packer(&self) -> Self::Packer {
        (self.model.device().clone(), self.model.limits())
    }
    fn pack(
        (device, limits): &Self::Packer,
        histories: &[History],
        negatives: &[u32],
    ) -> Result<StagedInputs<D>, InputError> {
        StagedInputs::new(&**device, *limits, histories, negatives)
    }
    fn step(&mut self, x: StagedInputs<D>) -> Result<(usize, f64), ModelError> {
        let x = x.send(self.model.device())?;
        let step = self.model.train_step(&x, &self.loss, &self.adam, &mut self.optimizer)?;
        Ok((x.batch.rows(), step.loss))
    }
    fn score(&self, x: StagedInputs<D>) -> Result<Vec<f32>, ModelError> {
        self.model.score(&x.send(self.model.device())?)
    }
    fn tensors(&self) -> Result<Vec<HostTensor>, ModelError> {
        self.model.tensors()
    }
    fn restore(&mut self, tensors: &[HostTensor]) -> Result<(), ModelError> {
        let (device, settings) = (self.model.device().clone(), self.model.settings().clone());
        self.model = Model::from_tensors(device, self.model.kind(), settings, tensors)?;
        Ok(())
    }
}

/// DFAR.
pub struct Dfar<D: Device> {
    model: model::Model<D>,
    optimizer: model::Optimizer<D>,
    loss: model::LossOptions,
    adam: AdamOptions,
}

impl<D: Device> Dfar<D> {
    /// A model that has not been trained.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn new(
        model: model::Model<D>,
        loss: model::LossOptions,
        adam: AdamOptions,
    ) -> Result<Self, ModelError> {
        let optimizer = model::Optimizer::new(&model)?;
        Ok(Self { model, optimizer, loss, adam })
    }
}

impl<D: Device> Learner for Dfar<D> {
    type Packer = Stager<D>;
    type Packed = StagedBatch<D>;

    fn max_length(&self) -> usize {
        self.model.config().max_length
    }
    fn parameters(&self) -> usize {
        self.model.parameters()
    }
    fn samples_items(&self) -> bool {
        false
    }
    fn packer(&self) -> Stager<D> {
        self.model.stager()
    }
    fn pack(stager: &Stager<D>, histories: &[History], _: &[u32]) -> Result<StagedBatch<D>, InputError> {
        Ok(stager.stage(&Batch::pack(histories)?)?)
    }
    fn step(&mut self, batch: StagedBatch<D>) -> Result<(usize, f64), ModelError> {
        let rows = batch.rows();
        let step = self.model.train_staged(batch, &self.loss, &self.adam, &mut self.optimizer, &mut ())?;
        Ok((rows, step.loss))
    }
    fn score(&self, batch: StagedBatch<D>) -> Result<Vec<f32>, ModelError> {
        self.model.score_staged(batch)
    }
    fn tensors(&self) -> Result<Vec<HostTensor>, ModelError> {
        self.model.tensors()
    }
    fn restore(&mut self, tensors: &[HostTensor]) -> Result<(), ModelError> {
        let (device, config) = (self.model.device().clone(), self.model.config().clone());
        self.model = model::Model::from_tensors(device, config, tensors)?;
        Ok(())
    }
}
