//! Training steps by part: the time of each part, and its lower bound.

use super::floor::{Floor, StepWork};
use crate::limits::gpu::Limits;
use dfar::Result;
use dfar::batch::ahead;
use dfar::batch::{Batch, BatchError, Group, History};
use dfar::data::Dataset;
use dfar::device::Device;
use dfar::device::Precision;
use dfar::model::{Model, ModelConfig, Optimizer, PartSeconds, PartTimer, StepPart};
use dfar::train::TrainError;
use dfar::train::config::Config;
use dfar::train::draw::{Drawer, Plan};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;
use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Items of the embedding table of uniform batches.
const ITEMS: usize = 10_000;

/// The source of the batches.
pub enum Batches<'a> {
    /// A data set's first epoch.
    Drawn {
        /// Draws the batches.
        drawer: Box<Drawer<'a>>,
        /// The epoch.
        plan: Plan,
        /// Items of the data set.
        items: usize,
    },
    /// Random histories of one length, each with one group of candidates.
    Uniform {
        /// Events of each history.
        events: usize,
        /// Histories of a batch.
        groups: usize,
        /// Candidates per history.
        candidates: usize,
    },
}

impl<'a> Batches<'a> {
    /// Batches of a data set, as training draws them.
    ///
    /// # Errors
    /// [`TrainError::NoTargets`].
    pub fn drawn(data: &'a Dataset, config: &Config) -> Result<Self, TrainError> {
        let drawer = Box::new(Drawer::new(data, config.draw()));
        let plan = drawer.training_plan(0)?;
        Ok(Self::Drawn { drawer, plan, items: data.items() })
    }

    /// Batches of `batch_rows` instances, in histories of exactly `max_length` events with one
    /// group of candidates each.
    pub fn uniform(config: &Config) -> Self {
        let candidates = 1 + config.negatives;
        Self::Uniform {
            events: config.max_length,
            groups: (config.batch_rows / candidates).max(1),
            candidates,
        }
    }

    /// Items that the model needs.
    pub fn items(&self) -> usize {
        match self {
            Self::Drawn { items, .. } => *items,
            Self::Uniform { .. } => ITEMS,
        }
    }

    /// Batch `index` of `count` that are spread evenly over the epoch.
    pub(super) fn make(&self, index: usize, count: usize) -> Result<Batch, BatchError> {
        match self {
            Self::Drawn { drawer, plan, .. } => {
                Batch::pack(&drawer.draw(plan, 0, index * plan.size.batches / count))
            }
            &Self::Uniform { events, groups, candidates } => {
                uniform(ITEMS, events, groups, candidates, index as u64)
            }
        }
    }

    /// The smaller of `asked` and the number of batches.
    fn count(&self, asked: usize) -> usize {
        match self {
            Self::Drawn { plan, .. } => asked.min(plan.size.batches),
            Self::Uniform { .. } => asked,
        }
    }
}

/// A batch of `groups` histories of `events` events each, with random items and labels, and one
/// group of `candidates` candidates after the last event of each.
///
/// # Errors
/// Sizes that exceed the index type.
pub fn uniform(
    items: usize,
    events: usize,
    groups: usize,
    candidates: usize,
    seed: u64,
) -> Result<Batch, BatchError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut draw =
        |count: usize| -> Vec<u32> { (0..count).map(|_| rng.random_range(0..items as u32)).collect() };
    let mut histories = Vec::with_capacity(groups);
    for _ in 0..groups {
        let (items, candidates) = (draw(events), draw(candidates));
        let labels = draw(events).into_iter().map(|x| (x % 2) as u8).collect();
        let targets = vec![0.0; candidates.len()];
        let groups = vec![Group { length: events as u32, candidates, targets }];
        histories.push(History { items, labels, groups });
    }
    Batch::pack(&histories)
}

/// The limits that lower bounds are computed from, and the precision of products.
#[derive(Clone, Debug, Serialize)]
pub struct Peak {
    /// Peak rates.
    pub limits: Limits,
    /// Precision of products.
    pub precision: Precision,
}

/// A part of the steps.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct PartRow {
    /// The part.
    pub part: StepPart,
    /// Seconds of all steps on the device; `None` in a prediction.
    pub seconds: Option<f64>,
    /// Lower bound of all steps; `None` without limits.
    pub floor: Option<Floor>,
}

/// The time of steps, by part.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// Steps taken.
    pub steps: usize,
    /// Instances in them.
    pub instances: usize,
    /// Tokens encoded.
    pub tokens: usize,
    /// (candidate, event) scores of target attention.
    pub scores: usize,
    /// Wall-clock seconds; `None` in a prediction.
    pub seconds: Option<f64>,
    /// Of these, seconds of waiting for the next batch.
    pub input_wait: f64,
    /// Parts, in the order of a step.
    pub parts: Vec<PartRow>,
    /// Time without part timers, by steps in flight. Empty where the device keeps one step in
    /// flight.
    pub overlapped: Vec<Overlapped>,
}

/// The time of steps that overlap.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Overlapped {
    /// Steps launched before the losses of the first are read.
    pub in_flight: usize,
    /// Wall-clock seconds per step.
    pub seconds_per_step: f64,
}

/// The counts that a batch adds to a profile.
struct Counts {
    instances: usize,
    tokens: usize,
    scores: usize,
    floors: Option<[Floor; StepPart::ALL.len()]>,
}

impl Counts {
    fn new(batch: &Batch, network: &ModelConfig, config: &Config, peak: Option<&Peak>) -> Self {
        let floors = peak.map(|Peak { limits, precision }| {
            StepWork::new(network, batch, config.dense_embeddings).floors(limits, *precision)
        });
        let scores = batch.score_offsets.last().map_or(0, |&scores| scores as usize);
        Self { instances: batch.rows(), tokens: batch.tokens(), scores, floors }
    }
}

impl Profile {
    fn new() -> Self {
        let parts = StepPart::ALL.map(|part| PartRow { part, seconds: None, floor: None }).to_vec();
        Self {
            steps: 0,
            instances: 0,
            tokens: 0,
            scores: 0,
            seconds: None,
            input_wait: 0.0,
            parts,
            overlapped: Vec::new(),
        }
    }

    fn add(&mut self, counts: &Counts) {
        self.steps += 1;
        self.instances += counts.instances;
        self.tokens += counts.tokens;
        self.scores += counts.scores;
        for (row, &floor) in self.parts.iter_mut().zip(counts.floors.iter().flatten()) {
            *row.floor.get_or_insert_default() += floor;
        }
    }
}

/// Trains a fresh model on `batches` batches on `device` and times the parts of each step. With
/// `peak`, adds lower bounds.
///
/// # Errors
/// A model that cannot be built, or a failing step.
pub fn measure<D: Device>(
    device: &Arc<D>,
    source: &Batches,
    config: &Config,
    batches: usize,
    peak: Option<&Peak>,
) -> Result<Profile> {
    let network = config.model(source.items());
    let mut model = Model::initialized(device.clone(), network.clone(), config.seed, config.init)?;
    let mut optimizer = Optimizer::new(&model)?;
    let (loss, adam, stager) = (config.loss(), config.adam(), model.stager());
    let count = source.count(batches);
    let make = |index| -> Result<_> {
        let batch = source.make(index, count)?;
        Ok((Counts::new(&batch, &network, config, peak), stager.stage(&batch)?))
    };
    let (mut profile, mut parts) = (Profile::new(), PartSeconds::default());
    let mut timer = PartTimer::new(device.clone());
    ahead::ahead(0..count, config.workers_for(&**device), make, |made| -> Result<()> {
        let (mut start, mut waited) = (Instant::now(), Duration::ZERO);
        for index in 0..count {
            let Some(batch) = made.next() else { break };
            let (counts, batch) = batch?;
            model.train_staged(batch, &loss, &adam, &mut optimizer, &mut timer)?;
            let seconds = timer.take()?;
            // The first step warms up (it fills the memory pools) and is not timed.
            if index == 0 && count > 1 {
                (start, waited) = (Instant::now(), made.waited());
                continue;
            }
            profile.add(&counts);
            parts += seconds;
        }
        profile.seconds = Some(start.elapsed().as_secs_f64());
        profile.input_wait = (made.waited() - waited).as_secs_f64();
        Ok(())
    })?;
    for row in &mut profile.parts {
        row.seconds = Some(parts.of(row.part));
    }
    let most = device.steps_in_flight();
    if most > 1 {
        let counts = [1, most].into_iter();
        profile.overlapped =
            counts.map(|n| overlapped(device, source, config, count, n)).collect::<Result<_>>()?;
    }
    Ok(profile)
}

/// Trains a fresh model on `count` batches with `in_flight` steps in flight, as training does.
fn overlapped<D: Device>(
    device: &Arc<D>,
    source: &Batches,
    config: &Config,
    count: usize,
    in_flight: usize,
) -> Result<Overlapped> {
    let network = config.model(source.items());
    let mut model = Model::initialized(device.clone(), network, config.seed, config.init)?;
    let mut optimizer = Optimizer::new(&model)?;
    let (loss, adam, stager) = (config.loss(), config.adam(), model.stager());
    let make = |index| -> Result<_> { Ok(stager.stage(&source.make(index, count)?)?) };
    ahead::ahead(0..count, config.workers_for(&**device), make, |made| {
        let (mut start, mut timed, mut pending) = (Instant::now(), 0, VecDeque::new());
        for index in 0..count {
            let Some(batch) = made.next() else { break };
            let sent = model.send(batch?)?;
            pending.push_back(model.begin_step(sent, &loss, &adam, &mut optimizer, &mut ())?);
            // The first step warms up, as above.
            let warms_up = index == 0 && count > 1;
            let later = if warms_up || index + 1 == count { 0 } else { in_flight - 1 };
            while pending.len() > later {
                let Some(step) = pending.pop_front() else { break };
                step.finish(&mut optimizer)?;
            }
            if warms_up {
                start = Instant::now();
            } else {
                timed += 1;
            }
        }
        Ok(Overlapped { in_flight, seconds_per_step: start.elapsed().as_secs_f64() / timed.max(1) as f64 })
    })
}

/// The lower bounds of steps on `batches` batches, without running any.
///
/// # Errors
/// A network that cannot be built, or a batch that cannot be packed.
pub fn predict(source: &Batches, config: &Config, batches: usize, peak: &Peak) -> Result<Profile> {
    let network = config.model(source.items());
    network.check()?;
    let mut profile = Profile::new();
    let count = source.count(batches);
    for index in 0..count {
        profile.add(&Counts::new(&source.make(index, count)?, &network, config, Some(peak)));
    }
    Ok(profile)
}

/// A table of averages per step.
impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let steps = self.steps.max(1) as f64;
        let [instances, tokens, scores] =
            [self.instances, self.tokens, self.scores].map(|n| (n as f64 / steps).round());
        write!(f, "a step by part; {} steps of {instances} instances, {tokens} tokens", self.steps)?;
        writeln!(f, " and {scores} scores of target attention on average")?;
        write!(f, "{:<18}", "part")?;
        if self.seconds.is_some() {
            write!(f, "{:>10}{:>8}", "ms", "share")?;
        }
        if self.parts.iter().any(|row| row.floor.is_some()) {
            write!(f, "{:>11}{:>13}{:>12}", "by bytes us", "by products", "by exp")?;
            write!(f, "{:>10}  {:<13}", "floor us", "bound")?;
            if self.seconds.is_some() {
                write!(f, "{:>9}{:>15}", "x floor", "share of peak")?;
            }
        }
        writeln!(f)?;
        let inside: f64 = self.parts.iter().filter_map(|row| row.seconds).sum();
        let rows = self.parts.iter().map(|row| (row.part.name(), row.seconds, row.floor));
        let mut floor = None;
        for row in &self.parts {
            if let Some(part) = row.floor {
                *floor.get_or_insert_with(Floor::default) += part;
            }
        }
        let between = self.seconds.map(|all| ("between steps", Some(all - inside), None));
        let all = ("all", self.seconds, floor);
        for (name, seconds, floor) in rows.chain(between).chain([all]) {
            write!(f, "{name:<18}")?;
            if let (Some(seconds), Some(all)) = (seconds, self.seconds) {
                write!(f, "{:>10.3}{:>6.1} %", seconds / steps * 1e3, 100.0 * seconds / all)?;
            }
            if let Some(floor) = floor {
                let [bytes, products, exponentials] = floor.bounds.map(|bound| bound / steps * 1e6);
                write!(f, "{bytes:>11.2}{products:>13.2}{exponentials:>12.2}")?;
                let bound = if name == "all" { "" } else { floor.bound() };
                write!(f, "{:>10.2}  {bound:<13}", floor.seconds / steps * 1e6)?;
                if let Some(seconds) = seconds {
                    write!(f, "{:>9.1}{:>13.1} %", seconds / floor.seconds, 100.0 * floor.seconds / seconds)?;
                }
            }
            writeln!(f)?;
        }
        if let Some(seconds) = self.seconds {
            let (rate, busy) = (self.instances as f64 / seconds, 100.0 * inside / seconds);
            let wait = self.input_wait / steps * 1e3;
            write!(
                f,
                "{rate:.0} instances/s; device busy {busy:.1} %; waited {wait:.3} ms a step for input"
            )?;
        }
        for Overlapped { in_flight, seconds_per_step } in &self.overlapped {
            let milliseconds = seconds_per_step * 1e3;
            write!(f, "\nwithout timers of parts, {in_flight} in flight: {milliseconds:.3} ms a step")?;
        }
        Ok(())
    }
}
