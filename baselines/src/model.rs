//! A system with its parameters: scores, gradients, training steps.

use crate::inputs::{InputError, Inputs, Limits, StagedInputs};
use crate::loss::Ranking;
use crate::system::{Built, Context, Encoded, Gradients, Kind, Settings, System, Tables};
use crate::system_device::SystemDevice;
use crate::tower::Tower;
use crate::{Floats, Indices, Result, Tensors};
use dfar::batch::History;
use dfar::device::cpu::Cpu;
use dfar::device::{AdamRows, Buffer, Device, Lookup, SegmentSum, Slot};
use dfar::model::parameters::{Id, Initial, Names, Spec, arrange, initial};
use dfar::model::tensors::adam_tensors;
use dfar::model::{AdamOptions, HostTensor, Initialization, ModelError};
use std::sync::Arc;

/// Weights of the loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossOptions {
    /// Ranking loss.
    pub ranking: Ranking,
    /// L2 penalty on the embedding rows of the batch.
    pub embed_l2: f32,
    /// Auxiliary loss of the system, if it has one.
    pub auxiliary: f32,
}

/// The losses of a step. The parts are without weights; `loss` is their weighted sum.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct StepLoss {
    /// Total.
    pub loss: f64,
    /// Ranking loss.
    pub ranking: f64,
    /// Half the sum of squares of the embedding rows of the batch.
    pub l2: f64,
    /// Auxiliary loss.
    pub auxiliary: f64,
}

/// A system with the values of its parameters.
pub struct Model<D: SystemDevice = Cpu> {
    device: Arc<D>,
    kind: Kind,
    settings: Settings,
    specs: Vec<Spec>,
    tables: Tables,
    system: Box<dyn System<D>>,
    tower: Tower,
    p: Tensors<D>,
}

/// Moments and step count of Adam.
pub struct Optimizer<D: Device = Cpu> {
    first: Tensors<D>,
    second: Tensors<D>,
    steps: u64,
}

/// Gradients of the rows of an embedding table.
struct TableGradient<'a, D: Device> {
    id: Id,
    row: &'a Indices<D>,
    values: Floats<D>,
}

impl<D: SystemDevice> Model<D> {
    /// Initial values from `seed`.
    ///
    /// # Errors
    /// Invalid settings, a system that the device does not compute, and failures of the device.
    pub fn initialized(
        device: Arc<D>,
        kind: Kind,
        settings: Settings,
        seed: u64,
        initialization: Initialization,
    ) -> Result<Self> {
        let values = |specs: &[Spec]| Ok(initial(specs, seed, initialization));
        Self::build(device, kind, settings, values)
    }

    /// From parameters by name.
    ///
    /// # Errors
    /// Invalid settings, a missing or unknown name or a wrong shape, and failures of the device.
    pub fn from_tensors(
        device: Arc<D>,
        kind: Kind,
        settings: Settings,
        tensors: &[HostTensor],
    ) -> Result<Self> {
        Self::build(device, kind, settings, |specs| {
            Ok(arrange(specs, "", tensors)?.into_iter().map(<[f32]>::to_vec).collect())
        })
    }

    fn build(
        device: Arc<D>,
        kind: Kind,
        settings: Settings,
        values: impl FnOnce(&[Spec]) -> Result<Vec<Vec<f32>>>,
    ) -> Result<Self> {
        settings.check()?;
        let mut names = Names::default();
        let mut table = |name, rows: usize| names.tensor(name, &[rows, settings.width], Initial::Embedding);
        let tables = Tables {
            item: table("item", settings.items),
            position: kind.has_positions().then(|| table("position", settings.max_length)),
            label: kind.has_labels().then(|| table("label", 2)),
        };
        let Built { system, parts } = D::build(kind, &mut names, &settings)?;
        let tower = Tower::new(&mut names, &settings, parts);
        let specs = names.specs;
        let values = values(&specs)?;
        let p = Tensors::upload(&*device, values.iter().map(|v| &v[..]))?;
        Ok(Self { device, kind, settings, specs, tables, system, tower, p })
    }

    /// Which system.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Its sizes.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Names, shapes and initial distributions of the parameters.
    pub fn specs(&self) -> &[Spec] {
        &self.specs
    }

    /// All parameters.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn tensors(&self) -> Result<Vec<HostTensor>> {
        self.p.download(&*self.device, &self.specs, "")
    }

    /// What its tables allow.
    pub fn limits(&self) -> Limits {
        let positions = self.tables.position.map(|_| self.settings.max_length);
        Limits { items: self.settings.items, positions }
    }

    /// Packs and uploads histories for this model, see [`StagedInputs::new`].
    ///
    /// # Errors
    /// [`InputError`].
    pub fn inputs(
        &self,
        histories: &[History],
        negatives: &[u32],
    ) -> std::result::Result<Inputs<D>, InputError> {
        let staged = StagedInputs::new(&*self.device, self.limits(), histories, negatives)?;
        Ok(staged.send(&self.device)?)
    }

    /// The device of the parameters.
    pub fn device(&self) -> &Arc<D> {
        &self.device
    }

    /// Number of trainable values.
    pub fn parameters(&self) -> usize {
        self.specs.iter().map(Spec::len).sum()
    }

    /// Logit of each row, `[R]`.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn score(&self, x: &Inputs<D>) -> Result<Vec<f32>> {
        let cx = self.context(x, None);
        let Encoded { parts, .. } = self.system.encode(cx)?;
        Ok(self.device.download(&self.tower.forward(cx, &parts)?.logits)?)
    }

    /// Losses, and the gradient of each parameter. Embedding rows outside the batch have gradient
    /// 0.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn gradients(&self, x: &Inputs<D>, options: &LossOptions) -> Result<(StepLoss, Vec<HostTensor>)> {
        let (loss, mut dense, tables) = self.backward(x, options)?;
        for TableGradient { id, row, values } in tables {
            dense[id] = self.device.zeros(self.specs[id].len())?;
            self.device.scatter_add(self.settings.width, &values, row, &mut dense[id])?;
        }
        Ok((loss, dense.download(&*self.device, &self.specs, "")?))
    }

    /// One step of Adam.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] names a non-finite loss or gradient; the parameters are unchanged
    /// then. Failures of the device.
    pub fn train_step(
        &mut self,
        x: &Inputs<D>,
        options: &LossOptions,
        adam: &AdamOptions,
        optimizer: &mut Optimizer<D>,
    ) -> Result<StepLoss> {
        let (loss, mut gradients, tables) = self.backward(x, options)?;
        let mut rows = vec![None; self.specs.len()];
        for TableGradient { id, row, values } in tables {
            let width = self.settings.width;
            if adam.dense_embeddings {
                gradients[id] = self.device.zeros(self.specs[id].len())?;
                self.device.scatter_add(width, &values, row, &mut gradients[id])?;
            } else {
                gradients[id] = values;
                rows[id] = Some(AdamRows { index: row, width });
            }
        }
        let step = adam.step(optimizer.steps + 1);
        let moments = [&mut optimizer.first, &mut optimizer.second];
        let mut tensors = adam_tensors(&mut self.p, moments, &gradients, rows);
        // The loss stands in front of the norm: where it is non-finite, nothing changes.
        let mut report = self.device.upload(&[loss.loss, 0.0])?;
        self.device.adam(&step, &mut tensors, Slot { values: &mut report, index: 1 }, None)?;
        if self.device.download(&report)?.iter().all(|x| x.is_finite()) {
            optimizer.steps += 1;
            return Ok(loss);
        }
        for (spec, gradient) in self.specs.iter().zip(gradients.iter()) {
            if self.device.download(gradient)?.iter().any(|x| !x.is_finite()) {
                return Err(ModelError::NonFinite { tensor: format!("gradient of {}", spec.name) });
            }
        }
        Err(ModelError::NonFinite { tensor: "loss".into() })
    }

    /// With the options of the losses if the backward pass follows.
    fn context<'a>(&'a self, x: &'a Inputs<D>, options: Option<&LossOptions>) -> Context<'a, D> {
        let (device, p, tables) = (&*self.device, &self.p, &self.tables);
        let auxiliary = options.map_or(0.0, |options| options.auxiliary);
        let gradients = options.is_some();
        Context { device, p, tables, x, width: self.settings.width, auxiliary, gradients }
    }

    /// Losses, gradients of whole tensors, and those of the embedding tables by row.
    fn backward<'a>(
        &self,
        x: &'a Inputs<D>,
        options: &LossOptions,
    ) -> Result<(StepLoss, Tensors<D>, Vec<TableGradient<'a, D>>)> {
        let (device, width) = (&*self.device, self.settings.width);
        let cx = self.context(x, Some(options));
        let Encoded { parts, backward } = self.system.encode(cx)?;
        let tower = self.tower.forward(cx, &parts)?;
        let logits = device.download(&tower.logits)?;
        let mut d_logits = vec![0.0; logits.len()];
        let ranking = options.ranking.loss(&x.batch, &logits, &mut d_logits);
        let d_logits = device.upload(&d_logits)?;

        let mut grads = Gradients {
            dense: self.zero_gradients()?,
            tokens: device.zeros(x.batch.tokens() * width)?,
            candidates: device.zeros(x.batch.pairs() * width)?,
            negatives: device.zeros(x.negative_item.len() * width)?,
        };
        let d_parts = self.tower.backward(cx, &parts, tower, d_logits, &mut grads)?;
        let auxiliary = backward(&parts, d_parts, &mut grads)?;

        let sources = [&grads.tokens, &grads.candidates, &grads.negatives];
        let tables = [
            (Some(self.tables.item), &x.touched_item, &sources[..]),
            (self.tables.position, &x.touched_position, &sources[..1]),
            (self.tables.label, &x.touched_label, &sources[..1]),
        ];
        let mut squares = device.zeros(tables.len())?;
        let mut by_row = Vec::with_capacity(tables.len());
        for (index, (id, touched, sources)) in tables.into_iter().enumerate() {
            let Some(id) = id else { continue };
            let mut values = device.alloc(touched.row.len() * width)?;
            let rows = Lookup { table: &self.p[id], index: &touched.row };
            let sum = SegmentSum { sources, segments: touched.source.segments(), l2: options.embed_l2, rows };
            device.segment_sum(width, sum, &mut values)?;
            device.half_square_sum(width, rows, Slot { values: &mut squares, index })?;
            by_row.push(TableGradient { id, row: &touched.row, values });
        }
        let l2 = device.download(&squares)?.iter().sum();
        let loss = ranking + f64::from(options.embed_l2) * l2 + f64::from(options.auxiliary) * auxiliary;
        Ok((StepLoss { loss, ranking, l2, auxiliary }, grads.dense, by_row))
    }

    /// Zeros for each parameter but the embedding tables: a system whose part has no events leaves
    /// them.
    fn zero_gradients(&self) -> Result<Tensors<D>> {
        let Tables { item, position, label } = self.tables;
        let is_table = |id| id == item || Some(id) == position || Some(id) == label;
        let len = |id: Id| if is_table(id) { 0 } else { self.specs[id].len() };
        let zeros = (0..self.specs.len()).map(|id| self.device.zeros(len(id)));
        Ok(Tensors::new(zeros.collect::<std::result::Result<_, _>>()?))
    }
}

impl<D: Device> Optimizer<D> {
    /// Zero moments for the parameters of `model`.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn new(model: &Model<D>) -> Result<Self>
    where
        D: SystemDevice,
    {
        let zeros = || Tensors::zeros(&*model.device, &model.specs);
        Ok(Self { first: zeros()?, second: zeros()?, steps: 0 })
    }

    /// Completed steps.
    pub fn steps(&self) -> u64 {
        self.steps
    }
}
