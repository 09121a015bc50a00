//! Attention weight by feedback over the histories of a part (Figure 4 of the paper).

use super::{EvaluateError, ScoreOptions, batches, histories};
use crate::attention::head_pairs::HeadPairs;
use crate::batch::{Batch, Cut};
use crate::data::{Dataset, Part};
use crate::device::Device;
use crate::model::Model;
use std::ops::ControlFlow;

/// The weights of the history encoder, all of its blocks together, over the histories before the
/// events of a part. A history that several events share counts once. `observe` receives the number
/// of groups done, and stops by returning [`ControlFlow::Break`].
///
/// # Errors
/// As [`score_part`](super::score_part).
pub fn head_pairs<D: Device>(
    model: &Model<D>,
    data: &Dataset,
    part: Part,
    options: &ScoreOptions,
    observe: &mut dyn FnMut(usize) -> ControlFlow<()>,
) -> Result<HeadPairs, EvaluateError> {
    let groups = data.groups(part);
    let cut = Cut::exact(model.config().max_length);
    let mut sum = HeadPairs::default();
    for batch in batches(data, &groups, cut, options) {
        let done = batch.end;
        let batch = Batch::pack(&histories(data, &groups, batch, cut, options.feedback))?;
        sum += model.head_pairs(&batch)?;
        if observe(done).is_break() {
            return Err(EvaluateError::Interrupted);
        }
    }
    Ok(sum)
}
