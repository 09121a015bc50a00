//! The end of a run: scores both parts with the best model, writes `metrics.json` and `curves.svg`.

use super::{CurvePoint, Evaluation, Reference, RunModel, RunReport, curves_svg};
use dfar::data::{Dataset, Part};
use dfar::device::Device;
use dfar::evaluate;
use dfar::model::Model;
use dfar::train::checkpoint::{DataInfo, ModelFile, State};
use dfar::train::run::Run;
use dfar::train::{Config, Event, TrainError, file, score_options};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

/// The metrics of the test and the validation groups.
pub fn evaluate_model<D: Device>(
    model: &Model<D>,
    data: &Dataset,
    config: &Config,
    observe: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<Evaluation, TrainError> {
    let options = score_options(config, &**model.device());
    let mut score = |part| {
        let groups = data.groups(part).len();
        evaluate::score_part(model, data, part, &options, &mut |done| {
            observe(Event::Scored { part, done, groups })
        })
    };
    let (test, valid) = (score(Part::Test)?, score(Part::Valid)?);
    Ok(Evaluation::new(data, &test, &valid, config.gauc_compat, &config.length_edges))
}

/// Evaluates the best model of a trained run and writes the results.
pub fn finish<D: Device>(
    device: Arc<D>,
    data: &Dataset,
    config: &Config,
    run: &Run,
    (state, info): (&State, &DataInfo),
    observe: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> Result<RunReport, TrainError> {
    let start = Instant::now();
    let file = ModelFile::load(&run.model())?;
    let best = state.best.as_ref().filter(|best| best.crc32 == file.crc32);
    let best = best.ok_or_else(|| TrainError::OtherModel { path: run.model() })?;
    let name = device.name();
    let model = Model::from_tensors(device, file.info.model, &file.parameters)?;
    let evaluation = evaluate_model(&model, data, config, observe)?;
    let described = RunModel { parameters: model.parameters(), feedback: config.feedback, device: name };
    let mut report = RunReport::new(evaluation, state, info, described);
    report.seconds += start.elapsed().as_secs_f64();

    let points: Vec<CurvePoint> = state
        .records
        .iter()
        .map(|e| CurvePoint { epoch: e.epoch, loss: e.loss, valid_auc: e.valid_auc })
        .collect();
    let Evaluation { popularity, ceiling, .. } = &report.evaluation;
    let references: Vec<Reference> = [("popularity", Some(popularity)), ("ceiling", ceiling.as_ref())]
        .into_iter()
        .filter_map(|(name, baseline)| Some(Reference { name, auc: baseline?.valid.as_ref()?.auc }))
        .collect();
    let title = run.dir().file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let svg = curves_svg(&title, &points, best.epoch, &references);
    file::replace_bytes(&run.curves(), svg.as_bytes())?;
    let json = serde_json::to_string_pretty(&report).expect("a report is plain numbers");
    // Written last: it marks the run as finished.
    file::replace_bytes(&run.metrics(), format!("{json}\n").as_bytes())?;
    Ok(report)
}
