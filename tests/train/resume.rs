//! A stopped and resumed run ends with the same bits as an uninterrupted one.

use dfar::batch::Batch;
use dfar::batch::{Feedback, without_sharing};
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::data::{Dataset, Part};
use dfar::device::cpu::Cpu;
use dfar::evaluate::{self, EvaluateError, Query, ScoreOptions};
use dfar::model::{Initialization, Model, ModelError};
use dfar::train::checkpoint::{Checkpoint, EpochSums, ModelFile, StepTime};
use dfar::train::draw::Drawer;
use dfar::train::run::Run;
use dfar::train::{Config, Event, Fit, Outcome, TrainError};
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

fn data() -> Dataset {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.dfar");
    let options =
        SyntheticOptions { users: 40, items: 40, events_per_user: 15.0, ..SyntheticOptions::default() };
    synthetic::write(&options, &path).unwrap();
    Dataset::from_bytes(&std::fs::read(&path).unwrap(), "x.dfar").unwrap()
}

fn config() -> Config {
    Config { epochs: 3, width: 8, max_length: 10, batch_tokens: 150, ..Config::default() }
}

/// Trains in `dir`, stopping after `stop` steps (of this session) if given.
fn session(dir: &Path, data: &Dataset, resume: bool, stop: Option<u64>) -> Result<Outcome, TrainError> {
    session_with(0, dir, data, resume, stop)
}

/// [`session`] with a number of workers.
fn session_with(
    workers: usize,
    dir: &Path,
    data: &Dataset,
    resume: bool,
    stop: Option<u64>,
) -> Result<Outcome, TrainError> {
    let device = Arc::new(Cpu::new());
    let run = if resume { Run::resume(dir)? } else { Run::create(dir)? };
    let mut fit = match resume {
        false => Fit::start(device, data, Config { workers, ..config() }, &run)?,
        true => {
            let checkpoint = Checkpoint::load(&run.checkpoint())?;
            let config = Config { workers, ..checkpoint.info.config.clone() };
            Fit::resume(device, data, config, &run, checkpoint)?
        }
    };
    let mut taken = 0;
    fit.run(&mut |event| {
        taken += u64::from(matches!(event, Event::Step { .. }));
        // An interrupt may also come during scoring.
        if stop.is_some_and(|stop| taken >= stop) {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })
}

fn model_bytes(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).unwrap()
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    let data = data();
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    assert_eq!(session(&whole, &data, false, None).unwrap(), Outcome::Finished);
    let expected = Checkpoint::load(&whole.join("checkpoint.safetensors")).unwrap();
    let batches = expected.info.state.records[0].size.batches as u64;
    assert!(batches >= 3, "the test should stop inside an epoch");

    // Inside an epoch, at its last batch (which interrupts validation), and several times.
    for stops in [vec![2], vec![batches], vec![1, 1, batches - 1, 3]] {
        let parts = dir.path().join(format!("{stops:?}"));
        for (i, stop) in stops.iter().enumerate() {
            assert_eq!(session(&parts, &data, i > 0, Some(*stop)).unwrap(), Outcome::Interrupted);
        }
        assert_eq!(session(&parts, &data, true, None).unwrap(), Outcome::Finished);
        assert!(model_bytes(&parts) == model_bytes(&whole), "stopped after {stops:?} steps");
        let found = Checkpoint::load(&parts.join("checkpoint.safetensors")).unwrap();
        assert_eq!(found.parameters, expected.parameters);
        assert_eq!(found.moments, expected.moments);
        let loss = |c: &Checkpoint| c.info.state.records.iter().map(|e| e.loss).collect::<Vec<_>>();
        assert_eq!(loss(&found), loss(&expected));
    }
}

#[test]
fn the_log_has_every_step_once_after_a_resume() {
    let data = data();
    let dir = tempfile::tempdir().unwrap();
    session(dir.path(), &data, false, Some(2)).unwrap();
    // A line after the checkpoint, as a killed process leaves it.
    let log = dir.path().join("log.jsonl");
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::write(&log, format!("{text}{{\"event\":\"step\",\"step\":999}}\n{{\"cut")).unwrap();
    session(dir.path(), &data, true, None).unwrap();
    let lines: Vec<serde_json::Value> = std::fs::read_to_string(&log)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).expect("every line is JSON"))
        .collect();
    assert!(lines.iter().all(|line| line["step"] != 999));
    let epochs: Vec<_> = lines.iter().filter(|l| l["event"] == "epoch").map(|l| l["epoch"].clone()).collect();
    assert_eq!(epochs, [1, 2, 3]);
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let data = data();
    let dir = tempfile::tempdir().unwrap();
    let bytes = [1, 3].map(|threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let dir = dir.path().join(threads.to_string());
        pool.install(|| session(&dir, &data, false, None)).unwrap();
        model_bytes(&dir)
    });
    assert!(bytes[0] == bytes[1]);
}

#[test]
fn the_number_of_workers_changes_nothing() {
    let data = data();
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole");
    session_with(1, &whole, &data, false, None).unwrap();
    // Also if a run is stopped with batches prepared ahead and resumed with another number of
    // workers.
    for (name, stops) in
        [("three", vec![(3, None)]), ("changing", vec![(4, Some(2)), (2, Some(1)), (7, None)])]
    {
        let parts = dir.path().join(name);
        for (i, &(workers, stop)) in stops.iter().enumerate() {
            session_with(workers, &parts, &data, i > 0, stop).unwrap();
        }
        assert!(model_bytes(&parts) == model_bytes(&whole), "{name}");
        let checkpoint = |dir: &Path| Checkpoint::load(&dir.join("checkpoint.safetensors")).unwrap();
        let [found, expected] = [&parts, &whole].map(|dir| checkpoint(dir));
        assert!(found.parameters == expected.parameters && found.moments == expected.moments, "{name}");
    }
}

#[test]
fn non_finite_scores_are_no_result() {
    let data = data();
    let (device, config) = (Arc::new(Cpu::new()), config().model(data.items()));
    let model = Model::initialized(device.clone(), config.clone(), 5, Initialization::Scaled).unwrap();
    for bad in [f32::NAN, f32::INFINITY] {
        let mut tensors = model.tensors().unwrap();
        let bias = tensors.iter_mut().find(|tensor| tensor.name == "tower_positive.2.b").unwrap();
        bias.values[0] = bad;
        let broken = Model::from_tensors(device.clone(), config.clone(), &tensors).unwrap();
        let options =
            ScoreOptions { feedback: Feedback::Mixed, batch_tokens: 100, batch_rows: 100, workers: 1 };
        let go_on = &mut |_| ControlFlow::Continue(());
        let error = evaluate::score_part(&broken, &data, Part::Test, &options, go_on).unwrap_err();
        assert!(matches!(error, EvaluateError::NonFinite { candidate: 0, .. }), "{error}");
        assert_eq!(TrainError::from(error).exit_code(), 5);
        let query = |item| Query { items: vec![0], labels: vec![1], candidates: vec![item] };
        let error = evaluate::rank(&broken, Feedback::Mixed, &[query(1), query(2)], 1).unwrap_err();
        assert!(matches!(error, EvaluateError::NonFiniteScore { query: 0, item: 1, .. }), "{error}");
        assert_eq!(TrainError::from(error).exit_code(), 5);
    }
}

#[test]
fn scores_depend_neither_on_workers_nor_on_batches() {
    let data = data();
    let device = Arc::new(Cpu::new());
    // Short enough that some histories are cut.
    let model = Model::initialized(device, config().model(data.items()), 5, Initialization::Scaled).unwrap();
    for feedback in [Feedback::Mixed, Feedback::PositiveOnly, Feedback::Ignored] {
        let score = |workers, batch_tokens, batch_rows| {
            let options = ScoreOptions { feedback, batch_tokens, batch_rows, workers };
            let mut done = Vec::new();
            let scores = evaluate::score_part(&model, &data, Part::Test, &options, &mut |groups| {
                done.push(groups);
                ControlFlow::Continue(())
            });
            (scores.unwrap(), done)
        };
        let (expected, done) = score(1, 100, 100);
        assert!(done.is_sorted() && done.len() > 3 && done.last() == Some(&data.groups(Part::Test).len()));
        assert_eq!(expected.len(), data.groups(Part::Test).len() * 10);
        for (workers, batch_tokens, batch_rows) in
            [(0, 100, 100), (3, 100, 100), (2, 1, 1), (2, 1 << 20, 1 << 20)]
        {
            assert!(
                score(workers, batch_tokens, batch_rows).0 == expected,
                "{workers} workers, {feedback:?}"
            );
        }
    }
}

/// A worker finds an unusable batch before its turn. The run ends at that batch, with the last
/// checkpoint.
#[test]
fn an_error_of_a_worker_ends_the_run_and_keeps_the_checkpoint() {
    let data = data();
    for workers in [1, 3] {
        let dir = tempfile::tempdir().unwrap();
        session_with(workers, dir.path(), &data, false, Some(1)).unwrap();
        let run = Run::resume(dir.path()).unwrap();
        // A model with too few items for the data, which only the batches reveal.
        let mut checkpoint = Checkpoint::load(&run.checkpoint()).unwrap();
        let config = checkpoint.info.config.clone();
        checkpoint.info.model.items -= 10;
        for tensor in checkpoint.parameters.iter_mut().chain(&mut checkpoint.moments) {
            if tensor.name.ends_with("item") {
                tensor.shape[0] -= 10;
                tensor.values.truncate(tensor.shape.iter().product());
            }
        }
        checkpoint.save(&run.checkpoint()).unwrap();
        let checkpoint = Checkpoint::load(&run.checkpoint()).unwrap();
        let before = checkpoint.clone();
        let mut fit = Fit::resume(Arc::new(Cpu::new()), &data, config, &run, checkpoint).unwrap();
        let error = fit.run(&mut |_| ControlFlow::Continue(())).unwrap_err();
        assert!(matches!(error, TrainError::Model(ModelError::Batch { limit: 30, .. })), "{error}");
        let kept = Checkpoint::load(&run.checkpoint()).unwrap();
        assert_eq!((&kept.info.state, kept.parameters), (&before.info.state, before.parameters));
    }
}

#[test]
fn the_log_has_the_utilization_of_the_device() {
    let data = data();
    let dir = tempfile::tempdir().unwrap();
    let run = Run::create(dir.path()).unwrap();
    let config = Config { batch_tokens: 40, ..config() };
    let mut fit = Fit::start(Arc::new(Cpu::new()), &data, config, &run).unwrap();
    fit.run(&mut |_| ControlFlow::Continue(())).unwrap();
    let log = std::fs::read_to_string(dir.path().join("log.jsonl")).unwrap();
    let mut seen = [0u64, 0];
    for line in log.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap()) {
        let kind = match line["event"].as_str() {
            Some("step") => 0,
            Some("epoch") => 1,
            _ => continue,
        };
        seen[kind] += 1;
        let figure = |name: &str| line[name].as_f64().unwrap_or_else(|| panic!("{name} in {line}"));
        let utilization = figure("utilization");
        assert!(utilization > 0.0 && utilization <= 1.0 && figure("input_wait") >= 0.0, "{line}");
        if kind == 1 {
            // Waiting and device work are different parts of the time of the same epoch.
            let (seconds, wait) = (figure("train_seconds"), figure("input_wait"));
            assert!(wait + utilization * seconds <= seconds * (1.0 + 1e-9), "{line}");
        }
    }
    assert_eq!(seen, [fit.state().steps / 20, 3]);
    assert!(seen[0] >= 1);
}

/// Checkpoints of versions that did not record the waiting time.
#[test]
fn older_checkpoints_can_be_resumed() {
    let sums: EpochSums =
        serde_json::from_str(r#"{"rows":4,"loss":1.0,"bce":0.5,"ibl":0.25,"idl":0.25,"seconds":2.0}"#)
            .unwrap();
    assert_eq!((sums.rows, sums.time), (4, StepTime { seconds: 2.0, ..StepTime::default() }));
    let json = serde_json::to_value(sums).unwrap();
    assert_eq!((&json["seconds"], &json["busy"]), (&2.0.into(), &0.0.into()), "one flat object");
}

#[test]
fn another_data_set_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    session(dir.path(), &data(), false, Some(1)).unwrap();
    let path = dir.path().join("other.dfar");
    let options = SyntheticOptions { users: 41, items: 40, ..SyntheticOptions::default() };
    synthetic::write(&options, &path).unwrap();
    let error = session(dir.path(), &Dataset::open(&path).unwrap(), true, None).unwrap_err();
    assert!(matches!(error, TrainError::OtherData { .. }), "{error}");
    assert_eq!(error.exit_code(), 3);
}

#[test]
fn a_run_is_used_by_one_process_and_never_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let data = data();
    session(dir.path(), &data, false, Some(1)).unwrap();
    let error = session(dir.path(), &data, false, None).unwrap_err();
    assert!(error.to_string().contains("--resume"), "{error}");
    let held = Run::resume(dir.path()).unwrap();
    assert!(session(dir.path(), &data, true, None).unwrap_err().to_string().contains("in use"));
    drop(held);
    session(dir.path(), &data, true, None).unwrap();
}

#[test]
fn a_model_file_names_the_items() {
    let data = data();
    let dir = tempfile::tempdir().unwrap();
    session(dir.path(), &data, false, None).unwrap();
    let file = ModelFile::load(&dir.path().join("model.safetensors")).unwrap();
    let names: Vec<&str> = (0..data.items() as u32).map(|item| data.item_name(item)).collect();
    assert_eq!(file.items, names);
}

#[test]
fn divergence_names_its_place_and_keeps_the_checkpoint() {
    let data = data();
    let dir = tempfile::tempdir().unwrap();
    let run = Run::create(dir.path()).unwrap();
    let config = Config { lr: 1e30, max_grad_norm: 0.0, ..config() };
    let mut fit = Fit::start(Arc::new(Cpu::new()), &data, config, &run).unwrap();
    let error = fit.run(&mut |_| ControlFlow::Continue(())).unwrap_err();
    assert_eq!(error.exit_code(), 5);
    match &error {
        TrainError::NonFinite { epoch: 1, batch, step, tensor } => {
            assert!(*batch >= 1 && *step == *batch as u64 && !tensor.is_empty(), "{error}");
        }
        other => panic!("{other}"),
    }
    let kept = Checkpoint::load(&run.checkpoint()).unwrap();
    assert!(kept.parameters.iter().all(|t| t.values.iter().all(|v| v.is_finite())));
}

/// Drawn batches, with windows, give the same loss and gradients without sharing. (Groups have
/// equal size: the disentangling loss is a mean over histories, and without sharing there is one
/// per row.)
#[test]
fn sharing_changes_neither_loss_nor_gradients_of_drawn_batches() {
    let data = data();
    let config = config();
    let drawer = Drawer::new(&data, config.draw());
    let plan = drawer.plan(0);
    let device = Arc::new(Cpu::new());
    let model = Model::initialized(device, config.model(data.items()), 5, Initialization::Scaled).unwrap();
    for batch in 0..plan.size.batches {
        let histories = drawer.draw(&plan, 0, batch);
        let run = |histories: &[_]| {
            let batch = Batch::pack(histories).unwrap();
            model.gradients(&batch, &config.loss()).unwrap()
        };
        let (loss, gradients) = run(&histories);
        let (long_loss, long_gradients) = run(&without_sharing(&histories));
        assert!((loss.loss - long_loss.loss).abs() < 1e-5 * loss.loss.abs(), "{loss:?}\n{long_loss:?}");
        for (a, b) in gradients.iter().zip(&long_gradients) {
            assert_eq!((&a.name, &a.shape), (&b.name, &b.shape));
            let norm = |v: &[f32]| v.iter().map(|x| f64::from(x * x)).sum::<f64>().sqrt();
            let difference: Vec<f32> = a.values.iter().zip(&b.values).map(|(x, y)| x - y).collect();
            let bound = 1e-4 * norm(&a.values) + 1e-7;
            assert!(norm(&difference) < bound, "{}: {} > {bound}", a.name, norm(&difference));
        }
    }
}
