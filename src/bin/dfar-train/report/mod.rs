//! The results of a run as JSON, as a table, and as curves.

mod curves;
mod finish;
mod head_pairs;
mod table;

pub use curves::{CurvePoint, Reference, curves_svg};
pub use finish::{evaluate_model, finish};
pub use head_pairs::HeadPairsReport;
pub use table::{count, evaluation_text, table};

use dfar::batch::Feedback;
use dfar::data::{Dataset, Part};
use dfar::evaluate::metrics::{GaucRule, Metrics};
use dfar::evaluate::{self, PartReport};
use dfar::train::checkpoint::{DataInfo, State};
use dfar::train::draw::PlanSize;
use serde::{Deserialize, Serialize};

/// Metrics of the validation and test groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// Test groups; `None` if no test event was liked.
    pub test: Option<PartReport>,
    /// Validation groups; `None` if no validation event was liked.
    pub valid: Option<PartReport>,
    /// The same groups scored by the number of training events of each candidate.
    pub popularity: Baseline,
    /// The same groups scored by the true probabilities; synthetic data only.
    pub ceiling: Option<Baseline>,
}

/// Metrics of a reference.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Baseline {
    /// On the test groups.
    pub test: Option<Metrics>,
    /// On the validation groups.
    pub valid: Option<Metrics>,
}

impl Evaluation {
    /// Metrics from the scores of both parts. Empty `edges`: quartiles of the test groups.
    pub fn new(data: &Dataset, test: &[f32], valid: &[f32], rule: GaucRule, edges: &[u32]) -> Self {
        let edges = evaluate::length_edges(data, edges);
        let liked =
            |part, scores: &[f32]| evaluate::part_report(data, part, scores, rule, &[]).map(|r| r.liked);
        let popularity = |part| liked(part, &evaluate::popularity_scores(data, part));
        let ceiling = |part| data.groups(part).ceiling.and_then(|scores| liked(part, scores));
        Self {
            test: evaluate::part_report(data, Part::Test, test, rule, &edges),
            valid: evaluate::part_report(data, Part::Valid, valid, rule, &edges),
            popularity: Baseline { test: popularity(Part::Test), valid: popularity(Part::Valid) },
            ceiling: data
                .groups(Part::Test)
                .ceiling
                .map(|_| Baseline { test: ceiling(Part::Test), valid: ceiling(Part::Valid) }),
        }
    }
}

/// `metrics.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RunReport {
    /// Metrics of the best epoch's model and of the references.
    #[serde(flatten)]
    pub evaluation: Evaluation,
    /// Epoch with the best validation AUC, from 1.
    pub best_epoch: usize,
    /// Number of epochs.
    pub epochs: usize,
    /// Number of optimizer steps.
    pub steps: u64,
    /// Wall-clock seconds of all sessions, evaluation included.
    pub seconds: f64,
    /// Training rows per second, over all epochs, evaluation excluded.
    pub instances_per_second: f64,
    /// Number of trainable values.
    pub parameters: usize,
    /// The feedback that the model reads.
    pub feedback: Feedback,
    /// Size of the last epoch; windows are the passes that could not be shared.
    pub epoch_size: PlanSize,
    /// The data set and its protocol.
    pub data: DataInfo,
    /// Device of the training.
    pub device: String,
    /// Version of the program.
    pub version: String,
}

impl RunReport {
    /// The report of a finished run.
    pub fn new(evaluation: Evaluation, state: &State, data: &DataInfo, model: RunModel) -> Self {
        let train_seconds: f64 = state.records.iter().map(|e| e.train_seconds).sum();
        let rows: usize = state.records.iter().map(|e| e.size.rows).sum();
        Self {
            evaluation,
            best_epoch: state.best.as_ref().map_or(0, |best| best.epoch),
            epochs: state.epoch,
            steps: state.steps,
            seconds: state.seconds,
            instances_per_second: if rows == 0 { 0.0 } else { rows as f64 / train_seconds },
            parameters: model.parameters,
            feedback: model.feedback,
            epoch_size: state.records.last().map(|e| e.size).unwrap_or_default(),
            data: data.clone(),
            device: model.device,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// The properties of the model in a report.
#[derive(Clone, Debug)]
pub struct RunModel {
    /// Number of trainable values.
    pub parameters: usize,
    /// The feedback that the model reads.
    pub feedback: Feedback,
    /// Device of the training.
    pub device: String,
}
