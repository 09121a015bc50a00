//! DFAR: parameters, layers with their backward passes, the network and its loss. Written once, for every device.

mod block;
mod config;
mod indices;
mod network;
mod optimizer;
mod parameters;
mod parts;
mod staged;
mod step;
mod tensors;

pub use config::{AdamOptions, Initialization, LossOptions, ModelConfig, ModelError};
pub use optimizer::Optimizer;
pub use parts::{PartSeconds, PartTimer, StepObserver, StepPart, StepTimer};
pub use staged::{SentBatch, StagedBatch, Stager};
pub use step::PendingStep;

use crate::batch::Batch;
use crate::device::Device;
use indices::Indices;
use network::{Gradients, Network};
use parameters::Layout;
use std::sync::Arc;
use tensors::Tensors;

/// A named parameter, gradient or optimiser moment on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// E.g. `encoder.q.w`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f32>,
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
    /// Norm of all gradients before clipping; 0 where no gradients were asked for.
    pub gradient_norm: f64,
}

/// DFAR on a device.
pub struct Model<D: Device> {
    device: Arc<D>,
    config: ModelConfig,
    layout: Layout,
    parameters: Tensors<D>,
}

impl<D: Device> Model<D> {
    /// Initial values from `seed`: embeddings and MLPs truncated normal with standard deviation 0.01, the blocks'
    /// projections Glorot uniform, layer norms 1 and 0.
    pub fn new(device: Arc<D>, config: ModelConfig, seed: u64) -> Result<Self, ModelError> {
        Self::initialized(device, config, seed, Initialization::Small)
    }

    /// As [`Model::new`], with a choice of how wide the initial values spread.
    pub fn initialized(
        device: Arc<D>,
        config: ModelConfig,
        seed: u64,
        initialization: Initialization,
    ) -> Result<Self, ModelError> {
        config.check()?;
        let layout = Layout::new(&config);
        device.check_room(layout.parameters(), 1)?;
        let values = layout.initial(seed, initialization);
        let parameters = Tensors::upload(&*device, values.iter().map(|v| &v[..]))?;
        Ok(Self { device, config, layout, parameters })
    }

    /// From parameters by name: all of them, with the right shapes.
    pub fn from_tensors(
        device: Arc<D>,
        config: ModelConfig,
        tensors: &[HostTensor],
    ) -> Result<Self, ModelError> {
        config.check()?;
        let layout = Layout::new(&config);
        device.check_room(layout.parameters(), 1)?;
        let parameters = Tensors::upload(&*device, layout.arrange("", tensors)?)?;
        Ok(Self { device, config, layout, parameters })
    }

    /// Whether a device has the memory to train this network: values, Adam's moments, and with `dense_embeddings` whole
    /// gradients. (Activations come on top; they depend on the batch.)
    ///
    /// # Errors
    /// A configuration that makes no network; the device's error, with the numbers.
    pub fn check_room(device: &D, config: &ModelConfig, dense_embeddings: bool) -> Result<(), ModelError> {
        config.check()?;
        let copies = if dense_embeddings { 4 } else { 3 };
        Ok(device.check_room(Layout::new(config).parameters(), copies)?)
    }

    /// What the model is.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device it lives on.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// Number of trained values.
    pub fn parameters(&self) -> usize {
        self.layout.parameters()
    }

    /// All parameters, in a fixed order.
    pub fn tensors(&self) -> Result<Vec<HostTensor>, ModelError> {
        self.parameters.download(&*self.device, &self.layout, "")
    }

    /// Stages batches for this model, on any thread: for [`Model::train_staged`] and [`Model::score_staged`].
    pub fn stager(&self) -> Stager<D> {
        Stager::new(self.device.clone(), self.config.clone())
    }

    /// Positive logit of every row, `[R]`: the score of a candidate is its sigmoid.
    pub fn score(&self, batch: &Batch) -> Result<Vec<f32>, ModelError> {
        self.score_staged(self.stager().stage(batch)?)
    }

    /// [`Model::score`] of a batch that was staged for this model.
    pub fn score_staged(&self, batch: StagedBatch<D>) -> Result<Vec<f32>, ModelError> {
        self.with_network(batch, |network| Ok(self.device.download(&network.score()?)?))
    }

    /// Both logits of every row, `[R]` each: negative interest first.
    pub fn logits(&self, batch: &Batch) -> Result<[Vec<f32>; 2], ModelError> {
        self.with_network(self.stager().stage(batch)?, |network| {
            let [negative, positive] = network.logits()?;
            Ok([self.device.download(&negative)?, self.device.download(&positive)?])
        })
    }

    /// Loss and the gradient of every parameter, embedding tables filled with zeros where the batch does not touch them.
    pub fn gradients(
        &self,
        batch: &Batch,
        loss: &LossOptions,
    ) -> Result<(StepLoss, Vec<HostTensor>), ModelError> {
        self.with_network(self.stager().stage(batch)?, |network| {
            let (report, gradients) = network.gradients(loss, &mut ())?;
            let loss = report.read(&*self.device, loss)?;
            let gradients = self.fill_tables(gradients, network.batch)?;
            Ok((loss, gradients.download(&*self.device, &self.layout, "")?))
        })
    }

    /// One step: loss, gradients, clip, Adam. On a non-finite loss or gradient nothing is updated and
    /// [`ModelError::NonFinite`] says where it was found.
    pub fn train_step(
        &mut self,
        batch: &Batch,
        loss: &LossOptions,
        adam: &AdamOptions,
        optimizer: &mut Optimizer<D>,
    ) -> Result<StepLoss, ModelError> {
        let batch = self.stager().stage(batch)?;
        self.train_staged(batch, loss, adam, optimizer, &mut ())
    }

    /// [`Model::train_step`] on a batch that was staged for this model. `observer` is told of the step's parts.
    pub fn train_staged(
        &mut self,
        batch: StagedBatch<D>,
        loss: &LossOptions,
        adam: &AdamOptions,
        optimizer: &mut Optimizer<D>,
        observer: &mut dyn StepObserver,
    ) -> Result<StepLoss, ModelError> {
        observer.enter(StepPart::Input)?;
        let batch = self.send(batch)?;
        self.ask(batch.indices, loss, adam, optimizer, observer)?.finish()
    }

    /// Sends a batch that was staged for this model, for [`Model::begin_step`]. While a step is under way the batch after it
    /// is best sent before [`PendingStep::finish`]: the copy and the step then overlap where the device can do both.
    ///
    /// # Errors
    /// [`ModelError::OtherModel`], and what the device reports.
    pub fn send(&self, batch: StagedBatch<D>) -> Result<SentBatch<D>, ModelError> {
        batch.send(self)
    }

    /// Asks the device for a step on a batch that was sent, and does not wait for it: [`Model::train_staged`] in two pieces.
    /// What `observer` is told of as the input does not have the copy in it.
    ///
    /// # Errors
    /// [`ModelError::OtherModel`], and what the device reports.
    pub fn begin_step<'a>(
        &mut self,
        batch: SentBatch<D>,
        loss: &LossOptions,
        adam: &AdamOptions,
        optimizer: &'a mut Optimizer<D>,
        observer: &mut dyn StepObserver,
    ) -> Result<PendingStep<'a, D>, ModelError> {
        let indices = batch.indices_for(self)?;
        observer.enter(StepPart::Input)?;
        self.ask(indices, loss, adam, optimizer, observer)
    }

    /// Asks for a step. Gives the batch back when all is asked for, before anything waits: so its memory is free for another
    /// as soon as the losses are here.
    fn ask<'a>(
        &mut self,
        indices: Indices<D>,
        loss: &LossOptions,
        adam: &AdamOptions,
        optimizer: &'a mut Optimizer<D>,
        observer: &mut dyn StepObserver,
    ) -> Result<PendingStep<'a, D>, ModelError> {
        let network = self.network(&indices);
        let (mut report, gradients) = self.device.captured(|| network.gradients(loss, observer))?;
        observer.enter(StepPart::Optimizer)?;
        let (gradients, touched) = if adam.dense_embeddings {
            (self.fill_tables(gradients, &indices)?, None)
        } else {
            (gradients.by_row(&self.layout), Some(&indices))
        };
        optimizer.ask(adam, &mut self.parameters, &gradients, touched, &mut report)?;
        observer.end()?;
        Ok(PendingStep { optimizer, loss: *loss, report, gradients })
    }

    fn with_network<T>(
        &self,
        batch: StagedBatch<D>,
        run: impl FnOnce(Network<D>) -> Result<T, ModelError>,
    ) -> Result<T, ModelError> {
        let batch = self.send(batch)?;
        run(self.network(&batch.indices))
    }

    fn network<'a>(&'a self, batch: &'a Indices<D>) -> Network<'a, D> {
        Network {
            device: &*self.device,
            config: &self.config,
            layout: &self.layout,
            p: &self.parameters,
            batch,
        }
    }

    /// Puts the rows of the embedding gradients into whole tables.
    fn fill_tables(&self, gradients: Gradients<D>, batch: &Indices<D>) -> Result<Tensors<D>, ModelError> {
        let Gradients { mut dense, item, position, label } = gradients;
        let tables = [
            (self.layout.item, item, &batch.touched_item),
            (self.layout.position, position, &batch.touched_position),
            (self.layout.label, label, &batch.touched_label),
        ];
        for (id, rows, touched) in tables {
            dense[id] = self.device.zeros(self.layout.specs[id].len())?;
            self.device.scatter_add(self.config.width, &rows, &touched.row, &mut dense[id])?;
        }
        Ok(dense)
    }
}
