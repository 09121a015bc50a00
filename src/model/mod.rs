//! DFAR: parameters, forward and backward pass, loss and optimizer, for every device.

#[doc(hidden)]
pub mod block;
mod config;
#[doc(hidden)]
pub mod indices;
mod network;
mod optimizer;
#[doc(hidden)]
pub mod parameters;
mod parts;
mod staged;
mod step;
#[doc(hidden)]
pub mod tensors;

pub use config::{
    AdamOptions, Initialization, LARGEST_SIZE, LossOptions, MOST_BLOCKS, ModelConfig, ModelError,
    SHORTEST_HALF_LIFE, check_sizes,
};
pub use optimizer::Optimizer;
pub use parts::{PartSeconds, PartTimer, StepObserver, StepPart, StepTimer};
pub use staged::{SentBatch, StagedBatch, Stager};
pub use step::PendingStep;

use crate::attention::head_pairs::{HeadPairs, indicator};
use crate::batch::Batch;
use crate::device::{Device, SoftmaxState};
use indices::Indices;
use network::{Gradients, Network};
use parameters::{Layout, arrange, initial};
use std::sync::Arc;
use tensors::Tensors;

/// A named parameter, gradient or optimizer moment on the host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    /// E.g. `encoder.q.w`.
    pub name: String,
    /// Row-major shape.
    pub shape: Vec<usize>,
    /// Values.
    pub values: Vec<f32>,
}

/// The losses of a training step. The parts are unweighted means; `loss` is their weighted sum.
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
    /// Half the sum of squares of the embedding rows of the batch.
    pub l2: f64,
    /// Norm of all gradients before clipping; 0 if the optimizer did not run.
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
    /// Initializes from `seed`: truncated normal embeddings and MLPs with the standard deviation of
    /// `initialization`, Glorot uniform projections in the blocks, layer norms with scale 1 and
    /// offset 0.
    pub fn initialized(
        device: Arc<D>,
        config: ModelConfig,
        seed: u64,
        initialization: Initialization,
    ) -> Result<Self, ModelError> {
        config.check()?;
        let layout = Layout::new(&config);
        device.check_room(layout.parameters(), 1)?;
        let values = initial(&layout.specs, seed, initialization);
        let parameters = Tensors::upload(&*device, values.iter().map(|v| &v[..]))?;
        Ok(Self { device, config, layout, parameters })
    }

    /// From parameters by name.
    ///
    /// # Errors
    /// [`ModelError::Tensor`] for a missing or unknown name or a wrong shape.
    pub fn from_tensors(
        device: Arc<D>,
        config: ModelConfig,
        tensors: &[HostTensor],
    ) -> Result<Self, ModelError> {
        config.check()?;
        let layout = Layout::new(&config);
        device.check_room(layout.parameters(), 1)?;
        let parameters = Tensors::upload(&*device, arrange(&layout.specs, "", tensors)?)?;
        Ok(Self { device, config, layout, parameters })
    }

    /// Checks that the device has the memory to train this network: values, the moments of Adam,
    /// and with `dense_embeddings` whole gradients of each step in flight. Activations, which depend
    /// on the batch, come on top.
    ///
    /// # Errors
    /// An invalid configuration, or too little memory.
    pub fn check_room(device: &D, config: &ModelConfig, dense_embeddings: bool) -> Result<(), ModelError> {
        config.check()?;
        let copies = 3 + if dense_embeddings { device.steps_in_flight() } else { 0 };
        Ok(device.check_room(Layout::new(config).parameters(), copies)?)
    }

    /// The configuration.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The device of the parameters.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// Number of trainable values.
    pub fn parameters(&self) -> usize {
        self.layout.parameters()
    }

    /// All parameters, in a fixed order.
    pub fn tensors(&self) -> Result<Vec<HostTensor>, ModelError> {
        self.parameters.download(&*self.device, &self.layout.specs, "")
    }

    /// Stages batches for [`Model::train_staged`] and [`Model::score_staged`], on any thread.
    pub fn stager(&self) -> Stager<D> {
        Stager::new(self.device.clone(), self.config.clone())
    }

    /// Positive logit of each row, `[R]`. The score of a candidate is its sigmoid.
    pub fn score(&self, batch: &Batch) -> Result<Vec<f32>, ModelError> {
        self.score_staged(self.stager().stage(batch)?)
    }

    /// [`Model::score`] of a staged batch.
    pub fn score_staged(&self, batch: StagedBatch<D>) -> Result<Vec<f32>, ModelError> {
        self.with_network(batch, |network| Ok(self.device.download(&network.score()?)?))
    }

    /// Both logits of each row, `[R]` each, negative interest first.
    pub fn logits(&self, batch: &Batch) -> Result<[Vec<f32>; 2], ModelError> {
        self.with_network(self.stager().stage(batch)?, |network| {
            let [negative, positive] = network.logits()?;
            Ok([self.device.download(&negative)?, self.device.download(&positive)?])
        })
    }

    /// Loss, and the gradient of each parameter. Embedding rows outside the batch have gradient 0.
    pub fn gradients(
        &self,
        batch: &Batch,
        loss: &LossOptions,
    ) -> Result<(StepLoss, Vec<HostTensor>), ModelError> {
        self.with_network(self.stager().stage(batch)?, |network| {
            let (report, gradients) = network.gradients(loss, &mut ())?;
            let loss = report.read(&*self.device, loss)?;
            let gradients = self.fill_tables(gradients, network.batch)?;
            Ok((loss, gradients.download(&*self.device, &self.layout.specs, "")?))
        })
    }

    /// One training step: loss, gradients, clipping, Adam.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] names a non-finite loss or gradient. The parameters are unchanged
    /// then.
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

    /// [`Model::train_step`] on a staged batch. `observer` follows the parts of the step.
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
        self.launch(batch.indices, loss, adam, optimizer, observer)?.finish(optimizer)
    }

    /// Uploads a staged batch for [`Model::begin_step`]. To overlap the copy with a step in flight,
    /// send the next batch before [`PendingStep::finish`].
    ///
    /// # Errors
    /// [`ModelError::OtherModel`], and failures of the device.
    pub fn send(&self, batch: StagedBatch<D>) -> Result<SentBatch<D>, ModelError> {
        batch.send(self)
    }

    /// Launches a step on a batch from [`Model::send`] without waiting for it: the first half of
    /// [`Model::train_staged`]. Earlier steps may be in flight. The input part that `observer`
    /// measures excludes the copy.
    ///
    /// # Errors
    /// [`ModelError::OtherModel`], and failures of the device.
    pub fn begin_step(
        &mut self,
        batch: SentBatch<D>,
        loss: &LossOptions,
        adam: &AdamOptions,
        optimizer: &mut Optimizer<D>,
        observer: &mut dyn StepObserver,
    ) -> Result<PendingStep<D>, ModelError> {
        let indices = batch.indices_for(self)?;
        observer.enter(StepPart::Input)?;
        self.launch(indices, loss, adam, optimizer, observer)
    }

    /// Launches a step. Drops the batch before the losses are fetched, so that its memory is known to
    /// be free when they arrive.
    fn launch(
        &mut self,
        indices: Indices<D>,
        loss: &LossOptions,
        adam: &AdamOptions,
        optimizer: &mut Optimizer<D>,
        observer: &mut dyn StepObserver,
    ) -> Result<PendingStep<D>, ModelError> {
        let network = self.network(&indices);
        let (mut report, gradients) = self.device.captured(|| network.gradients(loss, observer))?;
        observer.enter(StepPart::Optimizer)?;
        let (gradients, touched) = if adam.dense_embeddings {
            (self.fill_tables(gradients, &indices)?, None)
        } else {
            (gradients.by_row(&self.layout), Some(&indices))
        };
        optimizer.launch(adam, &mut self.parameters, &gradients, touched, &mut report)?;
        observer.end()?;
        drop(indices);
        Ok(PendingStep::new(optimizer, *loss, report, gradients)?)
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

    /// Scatters the rows of the embedding gradients to whole tables.
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

    /// Attention weight of the history encoder by feedback, all blocks together.
    #[doc(hidden)]
    pub fn head_pairs(&self, batch: &Batch) -> Result<HeadPairs, ModelError> {
        let (options, label) = (self.config.encoder_attention(), &batch.label[..]);
        let device = &*self.device;
        self.with_network(self.stager().stage(batch)?, |network| {
            let mut o = device.alloc(options.output_len(label.len()))?;
            let mut lse = device.alloc(options.lse_len(label.len()))?;
            let indicator = |key| device.upload(&indicator(&options, label, key));
            let indicators = [indicator(0)?, indicator(1)?];
            let pairs = HeadPairs::count(options.causal, &batch.cu_seqlens, label);
            let mut sum = HeadPairs::default();
            for state in network.encoder_states()? {
                sum += pairs;
                for (key, v) in indicators.iter().enumerate() {
                    network.attend(&state, v, SoftmaxState { o: &mut o, lse: &mut lse })?;
                    sum.add_output(&options, key, label, &device.download(&o)?);
                }
            }
            Ok(sum)
        })
    }
}
