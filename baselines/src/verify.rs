//! Cases of kind `baseline`: a system's logits, losses and gradients on one batch, and the losses
//! of Adam steps on it. Tensors and errors: [`dfar_tools::verify`].
//!
//! A case has `cu_seqlens [B + 1]`, `history_item [N]`, `history_label [N]`: raw events, oldest
//! first; `group_offsets [B + 1]`, `group_length [G]`: prefixes of raw events; `candidate`, `target
//! [G, C]`; for DIEN `aux_negative [N]`; `param.*`, and the results `grad.*`, `logits [G * C]`,
//! `loss`, `loss.*`, `step_losses`. Its metadata has the fields of [`Settings`], the feedback and
//! the weights of the losses.

use crate::inputs::InputError;
use crate::loss::Ranking;
use crate::system::{Kind, Settings};
use crate::{Inputs, LossOptions, Model, Optimizer, SystemDevice};
use dfar::batch::{Cut, Feedback, History, Question, View};
use dfar::device::Clip;
use dfar::model::{AdamOptions, HostTensor, ModelError};
use dfar_tools::verify::{Case, Outcome, Report, TensorError, VerifyError, compare, compare_gradients};
use serde::Deserialize;
use std::path::Path;
use std::sync::Arc;

/// The metadata of a case, beside [`Settings`].
#[derive(Deserialize)]
struct Meta {
    system: Kind,
    feedback: Feedback,
    candidates: usize,
    embed_l2: f32,
    #[serde(default)]
    aux: f32,
    #[serde(default)]
    idl: f32,
    lr: f32,
    clip: f32,
    steps: usize,
}

/// Reads a case and compares what the system computes on a device with it. A system that the device
/// does not compute is skipped.
///
/// # Errors
/// A file that cannot be read or is not a case of this kind, and failures of the device.
pub fn verify<D: SystemDevice>(device: &Arc<D>, path: &Path) -> Result<Report, VerifyError> {
    let case = Case::read(path)?;
    if case.kind != "baseline" {
        return Err(VerifyError::Kind { path: path.to_owned(), kind: case.kind });
    }
    let outcome = match D::computes(case.options::<Meta>()?.system) {
        true => Outcome::Checked(compare_case(device, &case)?),
        false => Outcome::Skipped("there are no CUDA kernels for this system".into()),
    };
    Ok(Report { case: case.name, outcome, differs: None })
}

fn compare_case<D: SystemDevice>(device: &Arc<D>, case: &Case) -> Result<Vec<TensorError>, VerifyError> {
    let refused =
        |source: ModelError| VerifyError::Model { path: case.path.clone(), source: Box::new(source) };
    let meta: Meta = case.options()?;
    let settings: Settings = case.options()?;
    let tensors = case.parameters()?;
    let mut model = Model::from_tensors(device.clone(), meta.system, settings, &tensors).map_err(refused)?;
    let x = inputs(case, &meta, &model)?;
    let options = LossOptions {
        ranking: Ranking::Bce,
        embed_l2: meta.embed_l2,
        auxiliary: if meta.system.samples_items() { meta.aux } else { meta.idl },
    };

    let logits = model.score(&x).map_err(refused)?;
    let mut errors = vec![compare("logits", &logits, &case.f64s("logits", &[Some(x.batch.rows())])?)];
    let (found, gradients) = model.gradients(&x, &options).map_err(refused)?;
    let mut parts = vec![
        ("loss".to_owned(), found.loss),
        ("loss.bce".to_owned(), found.ranking),
        ("loss.l2".to_owned(), found.l2),
    ];
    if let Some((name, _)) = meta.system.auxiliary() {
        parts.push((format!("loss.{name}"), found.auxiliary));
    }
    for (name, value) in parts {
        errors.push(compare(&name, &[value as f32], &case.f64s(&name, &[Some(1)])?));
    }
    let reference = |t: &HostTensor| -> Result<(String, Vec<f64>), VerifyError> {
        let name = format!("grad.{}", t.name);
        let shape: Vec<Option<usize>> = t.shape.iter().copied().map(Some).collect();
        let values = case.f64s(&name, &shape)?;
        Ok((name, values))
    };
    let expected = gradients.iter().map(reference).collect::<Result<Vec<_>, _>>()?;
    let compared: Vec<_> =
        expected.iter().zip(&gradients).map(|((name, r), g)| (&name[..], &g.values[..], &r[..])).collect();
    errors.extend(compare_gradients(&compared));

    let adam = AdamOptions { lr: meta.lr, clip: Some(Clip::PerTensor(meta.clip)), dense_embeddings: false };
    let mut optimizer = Optimizer::new(&model).map_err(refused)?;
    let expected_losses = case.f64s("step_losses", &[Some(meta.steps)])?;
    let mut losses = Vec::with_capacity(expected_losses.len());
    for _ in 0..expected_losses.len() {
        let loss = model.train_step(&x, &options, &adam, &mut optimizer).map_err(refused)?;
        losses.push(loss.loss as f32);
    }
    errors.push(compare("step_losses", &losses, &expected_losses));
    Ok(errors)
}

/// The seen events of each history, and its groups.
fn inputs<D: SystemDevice>(case: &Case, meta: &Meta, model: &Model<D>) -> Result<Inputs<D>, VerifyError> {
    let cu_seqlens = offsets(case, "cu_seqlens", None)?;
    let histories = cu_seqlens.len() - 1;
    let group_offsets = offsets(case, "group_offsets", Some(histories + 1))?;
    let (tokens, groups) = (cu_seqlens[histories] as usize, group_offsets[histories] as usize);
    let (items, labels) =
        (case.u32s("history_item", &[Some(tokens)])?, case.u8s("history_label", &[Some(tokens)])?);
    let lengths = case.u32s("group_length", &[Some(groups)])?;
    let shape = [Some(groups), Some(meta.candidates)];
    let (candidates, targets) = (case.u32s("candidate", &shape)?, case.f32s("target", &shape)?);
    let negatives = match meta.system.samples_items() {
        true => case.u32s("aux_negative", &[Some(tokens)])?,
        false => Vec::new(),
    };
    let mut packed: Vec<History> = Vec::new();
    let mut seen_negatives = Vec::new();
    for (events, own) in cu_seqlens.windows(2).zip(group_offsets.windows(2)) {
        let events = events[0] as usize..events[1] as usize;
        let own = own[0] as usize..own[1] as usize;
        let of_history = &lengths[own.clone()];
        if !of_history.is_sorted() || of_history.last().is_some_and(|&last| last as usize > events.len()) {
            let reason = "prefixes must ascend within a history and be no longer than it";
            return Err(case.invalid("group_length", reason));
        }
        let question = |group: usize| {
            let rows = group * meta.candidates..(group + 1) * meta.candidates;
            Question {
                event: lengths[group] as usize,
                candidates: candidates[rows.clone()].to_vec(),
                targets: targets[rows].to_vec(),
            }
        };
        let view = View::new(&items[events.clone()], &labels[events.clone()], meta.feedback);
        // One window: its position table bounds the length of a history.
        let history = view.histories(own.map(question).collect(), Cut::exact(usize::MAX)).pop();
        let history = history.unwrap_or_default();
        if !negatives.is_empty() {
            let is_seen = |&event: &usize| meta.feedback != Feedback::PositiveOnly || labels[event] == 1;
            let seen = events.filter(is_seen).take(history.items.len());
            seen_negatives.extend(seen.map(|event| negatives[event]));
        }
        packed.push(history);
    }
    model.inputs(&packed, &seen_negatives).map_err(|error| match error {
        InputError::Batch(error) => case.invalid("history_label", error.to_string()),
        InputError::Model(source) => VerifyError::Model { path: case.path.clone(), source: Box::new(source) },
    })
}

/// Prefix sums, of which there is at least one.
fn offsets(case: &Case, tensor: &'static str, len: Option<usize>) -> Result<Vec<u32>, VerifyError> {
    let offsets = case.u32s(tensor, &[len])?;
    if offsets.first() != Some(&0) || !offsets.is_sorted() {
        return Err(case.invalid(tensor, "prefix sums start at 0 and never decrease"));
    }
    Ok(offsets)
}
