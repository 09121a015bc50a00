//! Cases of kind `dfar`: the network's loss, logits and gradients on one batch, and Adam steps on
//! it.

use super::{
    Case, FORWARD_TOLERANCE, GRADIENT_TOLERANCE, TensorError, VerifyError, compare, compare_gradients,
    largest,
};
use dfar::attention::Normalization;
use dfar::batch::{Batch, Group, History};
use dfar::device::{Clip, Device};
use dfar::model::{AdamOptions, HostTensor, LossOptions, Model, ModelConfig, ModelError, Optimizer};
use serde::Deserialize;
use std::sync::Arc;

/// The `dfar` part of a case's metadata.
#[derive(Deserialize)]
struct DfarCase {
    items: usize,
    max_length: usize,
    width: usize,
    heads: usize,
    candidates: usize,
    normalization: Normalization,
    attention: [usize; 2],
    tower: [usize; 2],
    bpr: f32,
    idl: f32,
    embed_l2: f32,
    lr: f32,
    clip: f32,
    steps: usize,
}

/// Runs the network on a `dfar` case, on `device`.
///
/// # Errors
/// An incomplete case, or one whose network cannot be built.
pub fn verify_dfar<D: Device>(case: &Case, device: Arc<D>) -> Result<Vec<TensorError>, VerifyError> {
    let meta: DfarCase = case.options()?;
    let refused =
        |source: ModelError| VerifyError::Model { path: case.path.clone(), source: Box::new(source) };
    let batch = batch(case, &meta)?;
    let config = ModelConfig {
        width: meta.width,
        heads: meta.heads,
        attention: meta.attention,
        tower: meta.tower,
        normalization: meta.normalization,
        ..ModelConfig::new(meta.items, meta.max_length)
    };
    let loss = LossOptions { bpr: meta.bpr, idl: meta.idl, embed_l2: meta.embed_l2 };
    let mut model = Model::from_tensors(device, config, &case.parameters()?).map_err(refused)?;

    let mut errors = Vec::new();
    let [negative, positive] = model.logits(&batch).map_err(refused)?;
    let logits: Vec<f32> = positive.iter().zip(&negative).flat_map(|(&p, &n)| [p, n]).collect();
    errors.push(compare("logits", &logits, &case.f64s("logits", &[Some(batch.rows()), Some(2)])?));
    let (found, gradients) = model.gradients(&batch, &loss).map_err(refused)?;
    let parts = [
        ("loss", found.loss),
        ("loss.bce", found.bce),
        ("loss.ibl", found.ibl),
        ("loss.idl", found.idl),
        ("loss.l2", found.l2),
    ];
    for (name, value) in parts {
        errors.push(compare(name, &[value as f32], &case.f64s(name, &[Some(1)])?));
    }

    let reference = |kind: &str| -> Result<Vec<(String, Vec<f64>)>, VerifyError> {
        let tensor = |t: &HostTensor| {
            let name = format!("{kind}.{}", t.name);
            let shape: Vec<Option<usize>> = t.shape.iter().copied().map(Some).collect();
            let values = case.f64s(&name, &shape)?;
            Ok((name, values))
        };
        gradients.iter().map(tensor).collect()
    };
    let expected = reference("grad")?;
    let compared: Vec<_> =
        expected.iter().zip(&gradients).map(|((name, r), g)| (&name[..], &g.values[..], &r[..])).collect();
    errors.extend(compare_gradients(&compared));

    let adam = AdamOptions { lr: meta.lr, clip: Some(Clip::PerTensor(meta.clip)), dense_embeddings: false };
    let mut optimizer = Optimizer::new(&model).map_err(refused)?;
    let expected_losses = case.f64s("step_losses", &[Some(meta.steps)])?;
    let mut losses = Vec::with_capacity(expected_losses.len());
    for _ in 0..expected_losses.len() {
        losses.push(model.train_step(&batch, &loss, &adam, &mut optimizer).map_err(refused)?.loss as f32);
    }
    errors.push(compare("step_losses", &losses, &expected_losses));
    let overall = expected.iter().map(|(_, r)| largest(r)).fold(0.0, f64::max);
    let after = model.tensors().map_err(refused)?;
    let travel = f64::from(meta.lr) * meta.steps as f64;
    for (((name, reference), (_, gradient)), found) in reference("after")?.iter().zip(&expected).zip(&after) {
        let delta = (GRADIENT_TOLERANCE * largest(gradient)).max(f64::from(f32::EPSILON) * overall);
        // An embedding that the batch does not read must stay.
        let embedding = ["item", "position", "label"].contains(&&found.name[..]).then(|| found.shape[1]);
        let stays = |i: usize| {
            embedding.is_some_and(|width| gradient[i / width * width..][..width].iter().all(|&g| g == 0.0))
        };
        let of_adam = |i: usize| if stays(i) { 0.0 } else { travel * adam_amplifies(delta, gradient[i]) };
        errors.push(compare_after_adam(name, &found.values, reference, of_adam));
    }
    Ok(errors)
}

/// The largest effect of a gradient difference of `delta` on one Adam step, in learning rates. Adam
/// divides a gradient by the size of this and earlier gradients, so if they are small relative to
/// `delta`, the two steps may have opposite directions.
pub fn adam_amplifies(delta: f64, size: f64) -> f64 {
    (delta / (size.abs() + 1e-8)).min(2.0)
}

/// Compares parameters after Adam. A tolerable error of a gradient can move a parameter by up to
/// the learning rate, so element `i` may differ by `of_adam(i)` plus [`FORWARD_TOLERANCE`] of the
/// largest parameter. Returns the largest excess of an element over `of_adam(i)`, relative to the
/// largest parameter.
///
/// # Panics
/// For a tensor and a reference of different lengths.
pub fn compare_after_adam(
    tensor: &str,
    x: &[f32],
    reference: &[f64],
    of_adam: impl Fn(usize) -> f64,
) -> TensorError {
    assert_eq!(x.len(), reference.len(), "a tensor and its reference have the same shape");
    let excess = x.iter().zip(reference).enumerate().map(|(i, (&x, &r))| {
        let difference = (f64::from(x) - r).abs();
        if difference.is_finite() { (difference - of_adam(i)).max(0.0) } else { f64::INFINITY }
    });
    let error = excess.fold(0.0, f64::max) / largest(reference).max(f64::MIN_POSITIVE);
    TensorError::new(tensor, x, error, FORWARD_TOLERANCE)
}

/// One group per history, over all of it.
fn batch(case: &Case, meta: &DfarCase) -> Result<Batch, VerifyError> {
    let cu_seqlens = case.u32s("cu_seqlens", &[None])?;
    let tokens = cu_seqlens.last().map_or(0, |&n| n as usize);
    if cu_seqlens.first() != Some(&0) || !cu_seqlens.is_sorted() {
        return Err(case.invalid("cu_seqlens", "prefix sums start at 0 and never decrease"));
    }
    let histories = cu_seqlens.len() - 1;
    let per_candidate = [Some(histories), Some(meta.candidates)];
    let (items, labels) =
        (case.u32s("history_item", &[Some(tokens)])?, case.u8s("history_label", &[Some(tokens)])?);
    let (candidates, targets) =
        (case.u32s("candidate", &per_candidate)?, case.f32s("target", &per_candidate)?);
    let history = |(b, bounds): (usize, &[u32])| {
        let events = bounds[0] as usize..bounds[1] as usize;
        let rows = b * meta.candidates..(b + 1) * meta.candidates;
        let group = Group {
            length: events.len() as u32,
            candidates: candidates[rows.clone()].to_vec(),
            targets: targets[rows].to_vec(),
        };
        History {
            items: items[events.clone()].to_vec(),
            labels: labels[events].to_vec(),
            groups: vec![group],
        }
    };
    let histories: Vec<History> = cu_seqlens.windows(2).enumerate().map(history).collect();
    Batch::pack(&histories).map_err(|e| case.invalid("history_label", e.to_string()))
}
