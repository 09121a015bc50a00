//! Serving in the small: the scores of any candidates after any history.

use super::EvaluateError;
use crate::batch::{Batch, Group, History};
use crate::batch::{Feedback, View};
use crate::device::Device;
use crate::model::Model;

/// Candidates scored in one batch.
const CHUNK: usize = 4096;

/// Logits of `candidates` after the events `items` with `labels` (oldest first), of which the model sees what
/// `feedback` says and the most recent that fit. The probability of a like is their sigmoid.
pub fn rank<D: Device>(
    model: &Model<D>,
    items: &[u32],
    labels: &[u8],
    feedback: Feedback,
    candidates: &[u32],
) -> Result<Vec<f32>, EvaluateError> {
    let view = View::new(items, labels, feedback);
    let (items, labels) = view.recent(model.config().max_length);
    let mut scores = Vec::with_capacity(candidates.len());
    for chunk in candidates.chunks(CHUNK) {
        let group =
            Group { length: items.len() as u32, candidates: chunk.to_vec(), targets: vec![0.0; chunk.len()] };
        let history = History { items: items.to_vec(), labels: labels.to_vec(), groups: vec![group] };
        scores.extend(model.score(&Batch::pack(&[history])?)?);
    }
    Ok(scores)
}
