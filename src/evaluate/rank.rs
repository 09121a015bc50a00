//! Scores any candidates after any histories.

use super::EvaluateError;
use crate::batch::{Batch, Feedback, Group, History, View, ahead};
use crate::device::Device;
use crate::model::{Model, StagedBatch};
use std::ops::Range;

/// Largest number of candidates of a history in one batch. A history with more candidates is
/// encoded once per block: for 100 events less than 1 % of the multiplications on the block.
const BLOCK: usize = 4096;
/// Most rows and tokens of a batch, unless a single block exceeds them.
const BATCH_ROWS: usize = 4 * BLOCK;
const BATCH_TOKENS: usize = 8192;

/// A history and the candidates to score after it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Query {
    /// Items of the history, oldest first.
    pub items: Vec<u32>,
    /// 1 for a liked item, 0 for a skipped one.
    pub labels: Vec<u8>,
    /// Items to score.
    pub candidates: Vec<u32>,
}

/// The logits of the candidates of each query, in their order. The model reads the most recent
/// events that fit, with their labels as `feedback` says. The probability of a like is the sigmoid
/// of the logit. A score depends neither on the other queries nor on the number of `workers`
/// (threads that pack batches).
///
/// # Errors
/// [`EvaluateError::NonFiniteScore`], and errors of the batch and the model.
pub fn rank<D: Device>(
    model: &Model<D>,
    feedback: Feedback,
    queries: &[Query],
    workers: usize,
) -> Result<Vec<Vec<f32>>, EvaluateError> {
    let blocks: Vec<(usize, Range<usize>)> = queries
        .iter()
        .enumerate()
        .flat_map(|(query, Query { candidates, .. })| {
            let end = candidates.len();
            (0..end).step_by(BLOCK).map(move |start| (query, start..end.min(start + BLOCK)))
        })
        .collect();
    let max_length = model.config().max_length;
    let mut batches: Vec<Range<usize>> = Vec::new();
    let (mut rows, mut tokens) = (0, 0);
    for (at, (query, range)) in blocks.iter().enumerate() {
        let length = queries[*query].items.len().min(max_length);
        (rows, tokens) = (rows + range.len(), tokens + length);
        match batches.last_mut() {
            Some(batch) if rows <= BATCH_ROWS && tokens <= BATCH_TOKENS => batch.end = at + 1,
            _ => {
                batches.push(at..at + 1);
                (rows, tokens) = (range.len(), length);
            }
        }
    }

    let stager = model.stager();
    let make = |batch: usize| -> Result<StagedBatch<D>, EvaluateError> {
        let history = |(query, range): &(usize, Range<usize>)| {
            let Query { items, labels, candidates } = &queries[*query];
            let view = View::new(items, labels, feedback);
            let (items, labels) = view.recent(max_length);
            let candidates = candidates[range.clone()].to_vec();
            let targets = vec![0.0; candidates.len()];
            let group = Group { length: items.len() as u32, candidates, targets };
            History { items: items.to_vec(), labels: labels.to_vec(), groups: vec![group] }
        };
        let histories: Vec<History> = blocks[batches[batch].clone()].iter().map(history).collect();
        Ok(stager.stage(&Batch::pack(&histories)?)?)
    };
    let mut scores: Vec<Vec<f32>> = queries.iter().map(|q| Vec::with_capacity(q.candidates.len())).collect();
    ahead::ahead(0..batches.len(), workers, make, |staged| {
        for (batch, staged) in batches.iter().zip(staged) {
            let found = model.score_staged(staged?)?;
            let mut rest = &found[..];
            for (query, range) in &blocks[batch.clone()] {
                let (own, others) = rest.split_at(range.len());
                if let Some(at) = own.iter().position(|score| !score.is_finite()) {
                    let item = queries[*query].candidates[range.start + at];
                    return Err(EvaluateError::NonFiniteScore { query: *query, item, score: own[at] });
                }
                scores[*query].extend_from_slice(own);
                rest = others;
            }
        }
        Ok(())
    })?;
    Ok(scores)
}

/// The probability that an item is liked, from its logit: `1 / (1 + exp(-logit))`.
pub fn probability(logit: f32) -> f32 {
    1.0 / (1.0 + (-logit).exp())
}

/// Indices of the `n` largest scores, largest first; equal scores keep their order.
pub fn top(scores: &[f32], n: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let best_first = |&a: &usize, &b: &usize| scores[b].total_cmp(&scores[a]).then(a.cmp(&b));
    if n < order.len() {
        // Linear in the number of candidates; only the top `n` are sorted.
        order.select_nth_unstable_by(n, best_first);
        order.truncate(n);
    }
    order.sort_unstable_by(best_first);
    order
}

#[cfg(test)]
mod tests {
    use super::top;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_top_is_the_head_of_a_stable_sort(
            scores in prop::collection::vec((-3i8..4).prop_map(f32::from), 0..40), n in 0usize..45,
        ) {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
            order.truncate(n);
            prop_assert_eq!(top(&scores, n), order);
        }
    }
}
