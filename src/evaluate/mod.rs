//! Scores the candidate groups of a data set and computes their metrics.
//!
//! Every event of the validation and test parts has a group: its item, and the negatives sampled
//! when the data set was made. Every model is therefore scored on the same rows. The main metrics
//! are those of the groups of liked events; groups of skipped events are reported separately.

mod head_pairs;
pub mod metrics;
mod rank;

#[doc(hidden)]
pub use head_pairs::head_pairs;
pub use rank::{Query, probability, rank, top};

use crate::batch::ahead;
use crate::batch::{Batch, BatchError, History};
use crate::batch::{Cut, Feedback, Question, View};
use crate::data::{Dataset, EvaluationGroups, Part};
use crate::device::Device;
use crate::model::{Model, ModelError, StagedBatch};
use metrics::{GaucRule, Metrics, ScoredGroups, auc};
use serde::{Deserialize, Serialize};
use std::ops::{ControlFlow, Range};
use thiserror::Error;

/// An evaluation that failed or was interrupted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum EvaluateError {
    /// The histories could not be packed.
    #[error(transparent)]
    Batch(#[from] BatchError),
    /// The model failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The model returned a non-finite score for a candidate of a group.
    #[error(
        "the score of candidate {candidate} for event {event} of the user numbered {user} is {score}: the \
         parameters have diverged; a smaller learning rate may help"
    )]
    NonFinite {
        /// User.
        user: u32,
        /// Index of the event.
        event: u32,
        /// Index in the group; 0 is the target.
        candidate: usize,
        /// The score.
        score: f32,
    },
    /// The model returned a non-finite score for a candidate of a query.
    #[error(
        "the score of item {item} after history {query} is {score}: the parameters have diverged; a smaller \
         learning rate may help"
    )]
    NonFiniteScore {
        /// Index of the query.
        query: usize,
        /// The candidate.
        item: u32,
        /// The score.
        score: f32,
    },
    /// The caller stopped the evaluation.
    #[error("interrupted")]
    Interrupted,
}

/// Options of scoring.
#[derive(Clone, Copy, Debug)]
pub struct ScoreOptions {
    /// The feedback that the model reads; must be the same as in training.
    pub feedback: Feedback,
    /// Largest number of tokens in a batch (a single history may exceed it).
    pub batch_tokens: usize,
    /// Largest number of rows in a batch (a single history may exceed it).
    pub batch_rows: usize,
    /// Threads that pack batches ahead of the device; 0 counts as 1. Scores do not depend on it.
    pub workers: usize,
}

/// The model's logits of all groups of a part: `[G, 1 + negatives]`, in the order of the groups.
///
/// `progress` receives the number of groups done, and may stop the evaluation.
pub fn score_part<D: Device>(
    model: &Model<D>,
    data: &Dataset,
    part: Part,
    options: &ScoreOptions,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<f32>, EvaluateError> {
    let stager = model.stager();
    let make = |histories: &[History]| Ok(stager.stage(&Batch::pack(histories)?)?);
    let score = |staged: StagedBatch<D>| Ok(model.score_staged(staged)?);
    score_histories(data, part, model.config().max_length, options, make, score, progress)
}

/// [`score_part`] for any model: `make` prepares the histories of a batch on another thread,
/// `score` returns the score of each candidate, in order.
#[doc(hidden)]
pub fn score_histories<B: Send>(
    data: &Dataset,
    part: Part,
    max_length: usize,
    options: &ScoreOptions,
    make: impl Fn(&[History]) -> Result<B, EvaluateError> + Sync,
    mut score: impl FnMut(B) -> Result<Vec<f32>, EvaluateError>,
    progress: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<Vec<f32>, EvaluateError> {
    let groups = data.groups(part);
    let candidates = 1 + groups.negatives_per_group;
    let cut = Cut::exact(max_length);
    let batches = batches(data, &groups, cut, options);
    let make = |batch: usize| make(&histories(data, &groups, batches[batch].clone(), cut, options.feedback));
    let mut scores = Vec::with_capacity(groups.len() * candidates);
    ahead::ahead(0..batches.len(), options.workers, make, |made| {
        for batch in made {
            let first = scores.len();
            scores.extend(score(batch?)?);
            if let Some(at) = scores[first..].iter().position(|s| !s.is_finite()) {
                let (group, candidate) = ((first + at) / candidates, (first + at) % candidates);
                let (user, event) = (groups.user[group], groups.event[group]);
                return Err(EvaluateError::NonFinite { user, event, candidate, score: scores[first + at] });
            }
            if progress(scores.len() / candidates).is_break() {
                return Err(EvaluateError::Interrupted);
            }
        }
        Ok(())
    })?;
    Ok(scores)
}

/// The range of groups of each batch. All groups of a history are in one batch.
fn batches(data: &Dataset, groups: &EvaluationGroups, cut: Cut, options: &ScoreOptions) -> Vec<Range<usize>> {
    let candidates = 1 + groups.negatives_per_group;
    let mut batches = Vec::new();
    let (mut first, mut next, mut tokens, mut rows) = (0, 0, 0, 0);
    for of_user in groups.user.chunk_by(|a, b| a == b) {
        let events = data.user(of_user[0]);
        let view = View::new(events.items, events.feedback, options.feedback);
        let lengths: Vec<usize> =
            groups.event[next..][..of_user.len()].iter().map(|&event| view.length(event as usize)).collect();
        for of_history in lengths.chunk_by(|&a, &b| cut.start(a) == cut.start(b)) {
            let last = *of_history.last().expect("a chunk holds something");
            let more = (last - cut.start(last), of_history.len() * candidates);
            let is_full = tokens + more.0 > options.batch_tokens || rows + more.1 > options.batch_rows;
            if is_full && next > first {
                batches.push(first..next);
                (first, tokens, rows) = (next, 0, 0);
            }
            tokens += more.0;
            rows += more.1;
            next += of_history.len();
        }
    }
    if next > first {
        batches.push(first..next);
    }
    batches
}

/// The histories of a batch, in the order of its groups, so that scores have the order of the
/// groups too.
fn histories(
    data: &Dataset,
    groups: &EvaluationGroups,
    batch: Range<usize>,
    cut: Cut,
    feedback: Feedback,
) -> Vec<History> {
    let mut histories = Vec::new();
    let mut next = batch.start;
    for of_user in groups.user[batch].chunk_by(|a, b| a == b) {
        let events = data.user(of_user[0]);
        let view = View::new(events.items, events.feedback, feedback);
        let questions = (next..next + of_user.len())
            .map(|g| {
                let group = groups.get(g);
                let event = group.event as usize;
                let candidates = [&[events.items[event]], group.negatives].concat();
                Question { event, targets: vec![0.0; candidates.len()], candidates }
            })
            .collect();
        next += of_user.len();
        histories.extend(view.histories(questions, cut));
    }
    histories
}

/// The popularity baseline: the score of a candidate is its number of training events.
pub fn popularity_scores(data: &Dataset, part: Part) -> Vec<f32> {
    let popularity = data.train_popularity();
    let score = |item: u32| popularity[item as usize] as f32;
    let groups = data.groups(part).iter();
    groups
        .flat_map(|g| {
            let target = data.user(g.user).items[g.event as usize];
            std::iter::once(target).chain(g.negatives.iter().copied())
        })
        .map(score)
        .collect()
}

/// The metrics of a part.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PartReport {
    /// Groups whose target was liked: the main metrics.
    #[serde(flatten)]
    pub liked: Metrics,
    /// Groups whose target was skipped. Lower is better here: the skipped item takes the positive's
    /// place.
    pub skipped: Option<Metrics>,
    /// AUC of liked targets (positive) against skipped targets (negative), without sampled
    /// negatives.
    pub liked_above_skipped: Option<f64>,
    /// Liked groups by the number of events before the target.
    pub by_length: Vec<LengthBucket>,
}

/// Metrics of the groups whose history has `from..=to` events.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LengthBucket {
    /// Shortest history.
    pub from: u32,
    /// Longest history; `None` for the last bucket.
    pub to: Option<u32>,
    /// Metrics.
    #[serde(flatten)]
    pub metrics: Metrics,
}

/// Upper edges that split the liked groups of a part into four buckets of about equal size.
pub fn quartile_edges(data: &Dataset, part: Part) -> Vec<u32> {
    let mut lengths: Vec<u32> =
        data.groups(part).iter().filter(|g| is_liked(data, g.user, g.event)).map(|g| g.event).collect();
    lengths.sort_unstable();
    let mut edges: Vec<u32> =
        (1..4).filter_map(|quarter| lengths.get(lengths.len() * quarter / 4).copied()).collect();
    edges.dedup();
    edges
}

/// The given edges, or the quartiles of the test groups where none are given.
pub fn length_edges(data: &Dataset, given: &[u32]) -> Vec<u32> {
    if given.is_empty() { quartile_edges(data, Part::Test) } else { given.to_vec() }
}

/// Why neither part of a data set with this number of negatives per group has metrics, in words.
pub fn no_metrics(negatives: usize) -> &'static str {
    match negatives {
        0 => "the evaluation groups have no negatives (the data set was made with --negatives 0)",
        _ => "no event of the validation and test parts is liked",
    }
}

/// The metrics of a part from its scores `[G, 1 + negatives]`; `None` if no target of the part was
/// liked. `edges` are the upper edges of the length buckets, ascending.
pub fn part_report(
    data: &Dataset,
    part: Part,
    scores: &[f32],
    rule: GaucRule,
    edges: &[u32],
) -> Option<PartReport> {
    let groups = data.groups(part);
    let candidates = 1 + groups.negatives_per_group;
    let metrics_of = |keep: &dyn Fn(u32, u32) -> bool| {
        let (mut user, mut kept) = (Vec::new(), Vec::new());
        for (group, of_group) in groups.iter().zip(scores.chunks_exact(candidates)) {
            if keep(group.user, group.event) {
                user.push(group.user);
                kept.extend_from_slice(of_group);
            }
        }
        ScoredGroups { user: &user, scores: &kept, candidates }.metrics(rule)
    };
    let liked = metrics_of(&|user, event| is_liked(data, user, event))?;
    let mut targets: Vec<(f32, bool)> = groups
        .iter()
        .zip(scores.chunks_exact(candidates))
        .map(|(group, of_group)| (of_group[0], is_liked(data, group.user, group.event)))
        .collect();
    let mut by_length = Vec::new();
    let mut from = 0;
    for to in edges.iter().copied().map(Some).chain([None]) {
        let inside =
            |user, event| event >= from && to.is_none_or(|to| event <= to) && is_liked(data, user, event);
        if let Some(metrics) = metrics_of(&inside) {
            by_length.push(LengthBucket { from, to, metrics });
        }
        match to.and_then(|to| to.checked_add(1)) {
            Some(next) => from = next,
            None => break, // no history is longer
        }
    }
    Some(PartReport {
        liked,
        skipped: metrics_of(&|user, event| !is_liked(data, user, event)),
        liked_above_skipped: auc(&mut targets),
        by_length,
    })
}

fn is_liked(data: &Dataset, user: u32, event: u32) -> bool {
    data.user(user).feedback[event as usize] == 1
}
