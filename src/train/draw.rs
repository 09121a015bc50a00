//! Draws training batches.
//!
//! An epoch is a **plan**: all passes (a user's shared prefixes, or a window) in shuffled order,
//! divided into batches. A batch depends only on the plan and on random numbers keyed by (seed,
//! epoch, batch). Batch 17 of epoch 3 is therefore the same whether or not the 16 batches before it
//! were drawn, and a resumed run continues exactly.

use super::TrainError;
use super::negatives::{NegativeSampler, NegativeSource};
use crate::batch::History;
use crate::batch::{Cut, Feedback, Question, View};
use crate::data::Dataset;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The training events that are targets, and their rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TrainTargets {
    /// Every liked event is the positive of a group.
    #[default]
    Positive,
    /// Every event, liked or skipped, is the positive of a group (as the published code).
    All,
    /// Liked events as in `positive`; skipped events are single rows with target 0.
    Feedback,
}

/// Options for drawing batches.
#[derive(Clone, Debug, PartialEq)]
pub struct DrawOptions {
    /// Seed of all random numbers.
    pub seed: u64,
    /// The training events that are targets.
    pub targets: TrainTargets,
    /// The feedback that the model reads.
    pub feedback: Feedback,
    /// The cut of long histories.
    pub cut: Cut,
    /// Source of negatives.
    pub source: NegativeSource,
    /// Negatives per group.
    pub negatives: usize,
    /// Number of distinct negatives from which the groups of a pass draw theirs, so that a
    /// candidate is scored once for several groups; 0: every group draws its own.
    pub negative_pool: usize,
    /// Share of the targets used per epoch, drawn anew each epoch. At least one target is used.
    pub sample_rate: f64,
    /// Largest number of tokens in a batch (a single pass may exceed it).
    pub batch_tokens: usize,
    /// Largest number of rows in a batch (a single pass may exceed it).
    pub batch_rows: usize,
}

/// The batches of one epoch.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    passes: Vec<Pass>,
    /// Index into the passes of the end of each batch.
    ends: Vec<usize>,
    /// Targets with a key of at most this are used: [`DrawOptions::sample_rate`], or the smallest
    /// key.
    share: f64,
    /// Whether `sample_rate` drew no target, so that the target with the smallest key is used.
    pub topped_up: bool,
    /// Size of the plan.
    pub size: PlanSize,
}

/// The size of an epoch.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlanSize {
    /// Batches.
    pub batches: usize,
    /// Tokens encoded.
    pub tokens: usize,
    /// Instances: (history, candidate) rows that enter the loss.
    pub rows: usize,
    /// Target events.
    pub targets: usize,
    /// Passes shared by all prefixes of a user that fit the model.
    pub shared_passes: usize,
    /// Passes over later windows of histories longer than `max_length`.
    pub windows: usize,
}

/// One history to encode: the targets `first..end` among the events of `user`, whose histories
/// begin at the same event.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Pass {
    user: u32,
    first: u32,
    end: u32,
    tokens: u32,
    rows: u32,
}

/// Draws the batches of a data set's training events.
#[derive(Debug)]
pub struct Drawer<'a> {
    data: &'a Dataset,
    options: DrawOptions,
    sampler: NegativeSampler,
}

/// The purpose of a random number, part of its key.
enum Purpose {
    Shuffle = 1,
    Negatives = 2,
    EventNegatives = 3,
}

fn rng(seed: u64, purpose: Purpose, epoch: u64, batch: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    for (bytes, word) in key.chunks_exact_mut(8).zip([seed, purpose as u64, epoch, batch]) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    ChaCha8Rng::from_seed(key)
}

/// A number in `0..1` from a key: the finaliser of splitmix64 over its words.
fn keyed_uniform(words: [u64; 4]) -> f64 {
    let mut hash = 0u64;
    for word in words {
        hash = (hash ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        hash ^= hash >> 31;
    }
    (hash >> 11) as f64 / (1u64 << 53) as f64
}

/// Checks that a data set has at least one training target.
///
/// # Errors
/// [`TrainError::NoTargets`], with the reason.
pub fn require_targets(data: &Dataset, targets: TrainTargets) -> Result<(), TrainError> {
    let (mut first, mut later) = (false, false);
    for user in 0..data.users() as u32 {
        let events = data.user(user);
        let asked = events.feedback[..events.train_end].get(1..).unwrap_or_default();
        first |= events.train_end > 0;
        later |= !asked.is_empty();
        if asked.iter().any(|&liked| liked == 1 || targets != TrainTargets::Positive) {
            return Ok(());
        }
    }
    let reason = match (first, later) {
        (false, _) => "its training part is empty",
        (true, false) => "no user has two training events",
        (true, true) => {
            "no training event after a user's first is liked; --train-targets feedback or all uses skipped events"
        }
    };
    Err(TrainError::NoTargets { path: data.path().to_owned(), reason })
}

impl<'a> Drawer<'a> {
    /// Draws from the training events of `data`.
    pub fn new(data: &'a Dataset, options: DrawOptions) -> Self {
        Self { data, sampler: NegativeSampler::new(data, options.source), options }
    }

    /// The batches of an epoch to train on: at least one.
    ///
    /// # Errors
    /// [`TrainError::NoTargets`].
    pub fn training_plan(&self, epoch: u64) -> Result<Plan, TrainError> {
        let plan = self.plan(epoch);
        if plan.size.batches == 0 {
            require_targets(self.data, self.options.targets)?;
        }
        Ok(plan)
    }

    /// The batches of an epoch.
    pub fn plan(&self, epoch: u64) -> Plan {
        let rate = self.options.sample_rate;
        let plan = self.plan_of_share(epoch, rate);
        if plan.size.batches > 0 || rate >= 1.0 {
            return plan;
        }
        let users = 0..self.data.users() as u32;
        let keys = users.flat_map(|user| {
            let train_end = self.data.user(user).train_end;
            let all = self.targets(1.0, epoch, user, 0..train_end);
            all.map(move |event| self.key(epoch, user, event))
        });
        match keys.min_by(f64::total_cmp) {
            Some(smallest) => Plan { topped_up: true, ..self.plan_of_share(epoch, smallest) },
            None => plan,
        }
    }

    /// The batches of the targets whose key is at most `share`.
    fn plan_of_share(&self, epoch: u64, share: f64) -> Plan {
        let mut plan = Plan { share, ..Plan::default() };
        for user in 0..self.data.users() as u32 {
            let events = self.data.user(user);
            let view = View::new(events.items, events.feedback, self.options.feedback);
            let mut last_start = None;
            for event in self.targets(share, epoch, user, 0..events.train_end) {
                let length = view.length(event);
                let start = self.options.cut.start(length);
                plan.size.targets += 1;
                if last_start.replace(start) != Some(start) {
                    plan.passes.push(Pass { user, first: event as u32, end: 0, tokens: 0, rows: 0 });
                    *(if start == 0 { &mut plan.size.shared_passes } else { &mut plan.size.windows }) += 1;
                }
                let pass = plan.passes.last_mut().expect("the first target began one");
                pass.end = event as u32 + 1;
                pass.tokens = (length - start) as u32;
                pass.rows = pass.rows.saturating_add(self.rows_of(events.feedback[event]));
            }
        }
        plan.passes.shuffle(&mut rng(self.options.seed, Purpose::Shuffle, epoch, 0));

        let (mut tokens, mut rows) = (0, 0);
        for (i, pass) in plan.passes.iter().enumerate() {
            tokens += pass.tokens as usize;
            rows += pass.rows as usize;
            let full = tokens > self.options.batch_tokens || rows > self.options.batch_rows;
            if full && i > plan.ends.last().copied().unwrap_or(0) {
                plan.ends.push(i);
                (tokens, rows) = (pass.tokens as usize, pass.rows as usize);
            }
            plan.size.tokens += pass.tokens as usize;
            plan.size.rows += pass.rows as usize;
        }
        if !plan.passes.is_empty() {
            plan.ends.push(plan.passes.len());
        }
        plan.size.batches = plan.ends.len();
        plan
    }

    /// The histories and groups of batch `batch` of an epoch's plan.
    ///
    /// # Panics
    /// If there is no such batch.
    pub fn draw(&self, plan: &Plan, epoch: u64, batch: usize) -> Vec<History> {
        let passes = &plan.passes[plan.range(batch)];
        let (asked, in_batch) = self.targets_of(plan, epoch, passes);
        let mut rng = rng(self.options.seed, Purpose::Negatives, epoch, batch as u64);
        let mut histories = Vec::with_capacity(passes.len());
        for (pass, asked) in passes.iter().zip(asked) {
            let events = self.data.user(pass.user);
            let view = View::new(events.items, events.feedback, self.options.feedback);
            let pool = match self.options.negative_pool {
                0 => None,
                // One more than a group needs, because its positive may be among them.
                size if asked.len() > 1 => {
                    let size = size.max(self.options.negatives + 1);
                    Some(self.sampler.draw(&mut rng, &in_batch, pass.user, None, size))
                }
                _ => None,
            };
            let mut questions = Vec::with_capacity(asked.len());
            for event in asked {
                let item = events.items[event];
                let mut candidates = vec![item];
                let target = self.target_of(events.feedback[event]);
                if target == 1.0 {
                    candidates.extend(match &pool {
                        None => self.sampler.draw(
                            &mut rng,
                            &in_batch,
                            pass.user,
                            Some(item),
                            self.options.negatives,
                        ),
                        Some(pool) => choose(&mut rng, pool, item, self.options.negatives),
                    });
                }
                let mut targets = vec![0.0; candidates.len()];
                targets[0] = target;
                questions.push(Question { event, candidates, targets });
            }
            histories.extend(view.histories(questions, self.options.cut));
        }
        histories
    }

    /// An item for each event of the histories of [`Drawer::draw`], drawn as the negatives of a
    /// candidate: never the item of the event, unless there is no other.
    ///
    /// # Panics
    /// If there is no such batch, or if its histories are not `histories`.
    #[doc(hidden)]
    pub fn event_negatives(&self, plan: &Plan, epoch: u64, batch: usize, histories: &[History]) -> Vec<u32> {
        let passes = &plan.passes[plan.range(batch)];
        assert_eq!(passes.len(), histories.len(), "a pass is a history");
        let (_, in_batch) = self.targets_of(plan, epoch, passes);
        let mut rng = rng(self.options.seed, Purpose::EventNegatives, epoch, batch as u64);
        let mut negatives = Vec::with_capacity(histories.iter().map(|h| h.items.len()).sum());
        for (pass, history) in passes.iter().zip(histories) {
            for &item in &history.items {
                let drawn = self.sampler.draw(&mut rng, &in_batch, pass.user, Some(item), 1);
                negatives.push(drawn.first().copied().unwrap_or(item));
            }
        }
        negatives
    }

    /// The events that each pass asks about, and the (user, item) of all of them.
    fn targets_of(&self, plan: &Plan, epoch: u64, passes: &[Pass]) -> (Vec<Vec<usize>>, Vec<(u32, u32)>) {
        let asked: Vec<Vec<usize>> = passes.iter().map(|pass| self.asked(plan.share, epoch, pass)).collect();
        let mut in_batch = Vec::new();
        for (pass, asked) in passes.iter().zip(&asked) {
            let items = self.data.user(pass.user).items;
            in_batch.extend(asked.iter().map(|&event| (pass.user, items[event])));
        }
        (asked, in_batch)
    }

    /// The targets of an epoch among the training events `range` of a user, ascending. Event 0 has
    /// no history and is not a target.
    fn targets(&self, share: f64, epoch: u64, user: u32, range: Range<usize>) -> impl Iterator<Item = usize> {
        let feedback = self.data.user(user).feedback;
        (range.start.max(1)..range.end).filter(move |&event| {
            (feedback[event] == 1 || self.options.targets != TrainTargets::Positive)
                && (share >= 1.0 || self.key(epoch, user, event) <= share)
        })
    }

    /// Uniform in `0..1`. The targets with the smallest keys are the sample of an epoch.
    fn key(&self, epoch: u64, user: u32, event: usize) -> f64 {
        keyed_uniform([self.options.seed, epoch, user.into(), event as u64])
    }

    /// The targets of a pass.
    fn asked(&self, share: f64, epoch: u64, pass: &Pass) -> Vec<usize> {
        self.targets(share, epoch, pass.user, pass.first as usize..pass.end as usize).collect()
    }

    /// The label of a target event.
    fn target_of(&self, feedback: u8) -> f32 {
        if feedback == 1 || self.options.targets == TrainTargets::All { 1.0 } else { 0.0 }
    }

    /// The number of rows of a target event.
    fn rows_of(&self, feedback: u8) -> u32 {
        let negatives = self.options.negatives.min(self.data.items() - 1);
        if self.target_of(feedback) == 1.0 { 1 + negatives as u32 } else { 1 }
    }
}

impl Plan {
    fn range(&self, batch: usize) -> Range<usize> {
        let start = if batch == 0 { 0 } else { self.ends[batch - 1] };
        start..self.ends[batch]
    }
}

/// `count` distinct members of `pool` other than `positive`; all of them if there are fewer.
fn choose(rng: &mut ChaCha8Rng, pool: &[u32], positive: u32, count: usize) -> Vec<u32> {
    let mut rest: Vec<u32> = pool.iter().copied().filter(|&item| item != positive).collect();
    let count = count.min(rest.len());
    for i in 0..count {
        let j = rng.random_range(i..rest.len());
        rest.swap(i, j);
    }
    rest.truncate(count);
    rest
}
