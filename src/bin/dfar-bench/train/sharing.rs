//! Training steps with and without the sharing of `batch`: instances per second on real histories.

use dfar::Result;
use dfar::batch::without_sharing;
use dfar::batch::{Batch, History};
use dfar::data::Dataset;
use dfar::device::Device;
use dfar::model::{Model, Optimizer};
use dfar::train::config::Config;
use dfar::train::draw::{Drawer, Plan};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The degree of sharing of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// Prefixes share an encoder pass, groups share their history, and equal candidates of a
    /// history share their scores.
    Everything,
    /// The candidates of a group share its history; every prefix has its own encoder pass.
    Candidates,
    /// Every (prefix, candidate) is an instance with its own history, as in the published code.
    Nothing,
}

impl Sharing {
    /// From the most sharing to the least.
    pub const ALL: [Self; 3] = [Self::Everything, Self::Candidates, Self::Nothing];

    /// The name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Everything => "prefixes and candidates",
            Self::Candidates => "candidates only",
            Self::Nothing => "nothing",
        }
    }

    fn apply(self, histories: Vec<History>) -> Vec<History> {
        match self {
            Self::Everything => histories,
            Self::Candidates => histories.iter().flat_map(one_group_each).collect(),
            Self::Nothing => without_sharing(&histories),
        }
    }
}

/// One history for each group of `history`.
fn one_group_each(history: &History) -> impl Iterator<Item = History> {
    history.groups.iter().map(|group| {
        let events = ..group.length as usize;
        let (items, labels) = (history.items[events].to_vec(), history.labels[events].to_vec());
        History { items, labels, groups: vec![group.clone()] }
    })
}

/// The speed of one degree of sharing.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Degree of sharing.
    pub sharing: Sharing,
    /// Timed batches, spread evenly over the epoch; the same for every degree of sharing.
    pub batches: usize,
    /// Instances in them.
    pub instances: usize,
    /// Tokens encoded.
    pub tokens: usize,
    /// Seconds of drawing, packing and training.
    pub seconds: f64,
    /// Instances per second.
    pub instances_per_second: f64,
    /// Mean loss: up to rounding, equal for every degree of sharing.
    pub loss: f64,
}

impl Row {
    fn new(sharing: Sharing) -> Self {
        let (seconds, instances_per_second, loss) = (0.0, 0.0, 0.0);
        Self { sharing, batches: 0, instances: 0, tokens: 0, seconds, instances_per_second, loss }
    }
}

/// A model trained on the batches of an epoch, with one degree of sharing.
pub struct Steps<'a, D: Device> {
    drawer: Drawer<'a>,
    plan: Plan,
    config: &'a Config,
    sharing: Sharing,
    model: Model<D>,
    optimizer: Optimizer<D>,
}

/// Sizes and loss of a step.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// Instances in its batch.
    pub instances: usize,
    /// Tokens encoded.
    pub tokens: usize,
    /// Loss before the step.
    pub loss: f64,
}

impl<'a, D: Device> Steps<'a, D> {
    /// A fresh model on `device`.
    ///
    /// # Errors
    /// A data set without training targets, or a model that cannot be built.
    pub fn new(device: Arc<D>, data: &'a Dataset, config: &'a Config, sharing: Sharing) -> Result<Self> {
        let drawer = Drawer::new(data, config.draw());
        let plan = drawer.training_plan(0)?;
        let network = config.model(data.items());
        let model = Model::initialized(device, network, config.seed, config.init)?;
        let optimizer = Optimizer::new(&model)?;
        Ok(Self { drawer, plan, config, sharing, model, optimizer })
    }

    /// Batches of the epoch.
    pub fn batches(&self) -> usize {
        self.plan.size.batches
    }

    /// Draws and packs a batch and trains on it.
    ///
    /// # Errors
    /// A step that failed.
    ///
    /// # Panics
    /// If the epoch has no such batch.
    pub fn run(&mut self, batch: usize) -> Result<Step> {
        let histories = self.sharing.apply(self.drawer.draw(&self.plan, 0, batch));
        let batch = match self.sharing {
            Sharing::Everything => Batch::pack(&histories)?,
            _ => Batch::pack_without_pair_sharing(&histories)?,
        };
        let (loss, adam) = (self.config.loss(), self.config.adam());
        let loss = self.model.train_step(&batch, &loss, &adam, &mut self.optimizer)?.loss;
        Ok(Step { instances: batch.rows(), tokens: batch.tokens(), loss })
    }
}

/// Trains on `batches` batches of an epoch with each degree of sharing, from the same parameters.
///
/// # Errors
/// As [`Steps::new`] and [`Steps::run`].
pub fn measure<D: Device>(
    device: &Arc<D>,
    data: &Dataset,
    config: &Config,
    batches: usize,
) -> Result<Vec<Row>> {
    let way = |sharing: Sharing| -> Result<Row> {
        let mut steps = Steps::new(device.clone(), data, config, sharing)?;
        let total = steps.batches();
        let picked = batches.min(total);
        let (mut time, mut row) = (Duration::ZERO, Row::new(sharing));
        for i in 0..picked {
            let start = Instant::now();
            let step = steps.run(i * total / picked)?;
            // The first step warms up (it fills the memory pool) and is not timed.
            if i > 0 || picked == 1 {
                time += start.elapsed();
                row.batches += 1;
                row.instances += step.instances;
                row.tokens += step.tokens;
                row.loss += step.loss;
            }
        }
        row.seconds = time.as_secs_f64();
        row.instances_per_second = row.instances as f64 / row.seconds;
        row.loss /= row.batches.max(1) as f64;
        Ok(row)
    };
    Sharing::ALL.into_iter().map(way).collect()
}
