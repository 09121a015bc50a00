//! DFAR: parameters, layers with their backward passes, the network and its loss.

mod config;
pub use config::{AdamOptions, LossOptions, ModelConfig, ModelError};

use crate::batch::Batch;
use crate::device::Device;
use std::sync::Arc;

/// A named parameter (or optimiser moment) on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// E.g. `encoder.q.w`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f32>,
}

/// DFAR on a device.
pub struct Model<D: Device> {
    device: Arc<D>,
    config: ModelConfig,
}

/// Adam's moments and step count.
pub struct Optimizer<D: Device> {
    device: Arc<D>,
}

/// What one training step saw. The parts are unweighted means; `loss` is their weighted sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct StepLoss {
    /// Total.
    pub loss: f64,
    /// Binary cross-entropy of the positive logit.
    pub bce: f64,
    /// Interest-wise BPR.
    pub ibl: f64,
    /// Disentangling: mean cosine over histories plus mean cosine over instances.
    pub idl: f64,
    /// Half the squares of the touched embedding rows.
    pub l2: f64,
    /// Norm of all gradients before clipping.
    pub gradient_norm: f64,
}

impl<D: Device> Model<D> {
    /// Initial values of spec: truncated normal and Glorot, from `seed`.
    pub fn new(device: Arc<D>, config: ModelConfig, seed: u64) -> Result<Self, ModelError> {
        let _ = seed;
        Ok(Self { device, config })
    }
    /// From parameters by name (all of them, with the right shapes).
    pub fn from_tensors(
        device: Arc<D>,
        config: ModelConfig,
        tensors: &[HostTensor],
    ) -> Result<Self, ModelError> {
        let _ = tensors;
        Ok(Self { device, config })
    }
    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }
    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        todo!()
    }
    /// Positive logit of every row: `[R]`.
    pub fn score(&self, batch: &Batch) -> Result<Vec<f32>, ModelError> {
        let _ = (batch, &self.device);
        todo!()
    }
    /// One step: loss, gradients, clip, Adam. On a non-finite loss or gradient nothing is updated and
    /// [`ModelError::NonFinite`] says where.
    pub fn train_step(
        &mut self,
        batch: &Batch,
        loss: &LossOptions,
        adam: &AdamOptions,
        optimizer: &mut Optimizer<D>,
    ) -> Result<StepLoss, ModelError> {
        let _ = (batch, loss, adam, optimizer);
        todo!()
    }
    /// All parameters, in a fixed order.
    pub fn tensors(&self) -> Result<Vec<HostTensor>, ModelError> {
        todo!()
    }
}

impl<D: Device> Optimizer<D> {
    /// Zero moments for the parameters of `model`.
    pub fn new(model: &Model<D>) -> Result<Self, ModelError> {
        Ok(Self { device: model.device.clone() })
    }
    /// Steps taken.
    pub fn steps(&self) -> u64 {
        let _ = &self.device;
        todo!()
    }
    /// Moments by name (`adam.first.NAME`, `adam.second.NAME`), for a checkpoint.
    pub fn tensors(&self) -> Result<Vec<HostTensor>, ModelError> {
        todo!()
    }
    /// From a checkpoint's moments and step count.
    pub fn from_tensors(model: &Model<D>, tensors: &[HostTensor], steps: u64) -> Result<Self, ModelError> {
        let _ = (model, tensors, steps);
        todo!()
    }
}
