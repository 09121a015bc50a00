//! Training steps with and without what `batch` and `history` share: instances a second on real histories.

use crate::batch::{Batch, History};
use crate::data::Dataset;
use crate::device::cpu::Cpu;
use crate::history::without_sharing;
use crate::model::{Model, Optimizer};
use crate::train::config::Config;
use crate::train::draw::Drawer;
use crate::{Error, Result};
use serde::Serialize;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a way of training shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sharing {
    /// Prefixes share an encoder pass, groups share their history, equal candidates of a history their scores.
    Everything,
    /// The candidates of a group share its history; every prefix is encoded anew.
    Candidates,
    /// Every (prefix, candidate) is an instance with a history of its own, as in the published code.
    Nothing,
}

impl Sharing {
    /// From the fastest to the slowest.
    pub const ALL: [Self; 3] = [Self::Everything, Self::Candidates, Self::Nothing];

    /// In words, for tables.
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

/// A history for each group of `history`.
fn one_group_each(history: &History) -> impl Iterator<Item = History> {
    history.groups.iter().map(|group| {
        let events = ..group.length as usize;
        let (items, labels) = (history.items[events].to_vec(), history.labels[events].to_vec());
        History { items, labels, groups: vec![group.clone()] }
    })
}

/// How fast one way trains.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What is shared.
    pub sharing: Sharing,
    /// Batches of the epoch timed, spread evenly over it; the same for every way.
    pub batches: usize,
    /// Instances in them.
    pub instances: usize,
    /// Tokens encoded.
    pub tokens: usize,
    /// Drawing, packing, and the training steps.
    pub seconds: f64,
    /// Instances a second.
    pub instances_per_second: f64,
    /// Mean loss: the same for every way, up to rounding.
    pub loss: f64,
}

/// Trains on `batches` batches of an epoch, each way, from the same initial values.
///
/// # Errors
/// A data set without training targets, or a failing step.
pub fn measure(data: &Dataset, config: &Config, batches: usize) -> Result<Vec<Row>> {
    let drawer = Drawer::new(data, config.draw());
    let plan = drawer.plan(0);
    let total = plan.size.batches;
    let picked: Vec<usize> = (0..batches.min(total)).map(|i| i * total / batches.min(total)).collect();
    let way = |sharing: Sharing| -> Result<Row> {
        let device = Arc::new(Cpu::new());
        let mut model = Model::initialized(device, config.model(data.items()), config.seed, config.init)
            .map_err(Error::from)?;
        let mut optimizer = Optimizer::new(&model)?;
        let mut row = Row {
            sharing,
            batches: 0,
            instances: 0,
            tokens: 0,
            seconds: 0.0,
            instances_per_second: 0.0,
            loss: 0.0,
        };
        let mut time = Duration::ZERO;
        for (i, &batch) in picked.iter().enumerate() {
            let start = Instant::now();
            let histories = sharing.apply(drawer.draw(&plan, 0, batch));
            let batch = match sharing {
                Sharing::Everything => Batch::pack(&histories)?,
                _ => Batch::pack_without_pair_sharing(&histories)?,
            };
            let loss = model.train_step(&batch, &config.loss(), &config.adam(), &mut optimizer)?.loss;
            // The first step also fills the memory pool; it is taken, not timed.
            if i > 0 || picked.len() == 1 {
                time += start.elapsed();
                row.batches += 1;
                row.instances += batch.rows();
                row.tokens += batch.tokens();
                row.loss += loss;
            }
        }
        row.seconds = time.as_secs_f64();
        row.instances_per_second = row.instances as f64 / row.seconds;
        row.loss /= row.batches.max(1) as f64;
        Ok(row)
    };
    Sharing::ALL.into_iter().map(way).collect()
}
