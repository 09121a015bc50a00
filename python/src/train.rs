//! `train` and `resume`: what `dfar-train` does, with events for callbacks.

use crate::data::Dataset;
use crate::device::{self, on_device};
use crate::errors::python;
use crate::report;
use crate::threads::{self, Link};
use crate::values::{from_json, table};
use dfar::data::Part;
use dfar::device::Device;
use dfar::train::checkpoint::Checkpoint;
use dfar::train::config::{Config, ConfigError};
use dfar::train::run::Run;
use dfar::train::{Event, Fit, Outcome, TrainError, draw};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use serde_json::{Value as Json, json};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

/// Starts a run. `config` is a file, a dictionary, or both, where the dictionary has precedence.
/// Returns its directory, and whether it is finished.
#[pyfunction]
#[pyo3(signature = (data, config_file, config, out, observe, steps))]
pub fn train(
    py: Python<'_>,
    data: &Bound<'_, Dataset>,
    config_file: Option<PathBuf>,
    config: &Bound<'_, PyDict>,
    out: Option<PathBuf>,
    observe: Option<Bound<'_, PyAny>>,
    steps: bool,
) -> PyResult<(PathBuf, bool)> {
    let data = data.get().engine().clone();
    let config = configuration(config_file.as_deref(), config, data.path())?;
    // Checked, and the device opened, before the directory is created: an error leaves no files.
    draw::require_targets(&data, config.train_targets).map_err(python)?;
    config.model(data.items()).check().map_err(python)?;
    let name = data.path().file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let text = config.to_toml();
    let create = move || {
        let run = match &out {
            Some(dir) => Run::create(dir)?,
            None => Run::create_numbered(Path::new("runs"), &name)?,
        };
        run.write_config(&text)?;
        Ok(run)
    };
    go(py, Start { data, config, checkpoint: None }, create, observe, steps)
}

/// Continues a run; only some keys may differ from its configuration.
#[pyfunction]
#[pyo3(signature = (dir, config, observe, steps))]
pub fn resume(
    py: Python<'_>,
    dir: PathBuf,
    config: &Bound<'_, PyDict>,
    observe: Option<Bound<'_, PyAny>>,
    steps: bool,
) -> PyResult<(PathBuf, bool)> {
    let run = Run::resume(&dir).map_err(TrainError::from).map_err(python)?;
    let (saved, checkpoint) = if run.checkpoint().exists() {
        let checkpoint = Checkpoint::load(&run.checkpoint()).map_err(TrainError::from).map_err(python)?;
        (checkpoint.info.config.clone(), Some(checkpoint))
    } else {
        let saved = Config::layered(Some(&run.config()), toml::Table::new());
        (saved.map_err(TrainError::from).map_err(python)?, None)
    };
    let config = saved.resumed(table(config)?).map_err(TrainError::from).map_err(python)?;
    let path = config.data.clone().unwrap_or_else(|| run.synthetic_data());
    let data = Dataset::read(py, path)?.engine().clone();
    go(py, Start { data, config, checkpoint }, || Ok(run), observe, steps)
}

/// Defaults, then the file, then the dictionary; the data set is that of the call.
fn configuration(file: Option<&Path>, config: &Bound<'_, PyDict>, data: &Path) -> PyResult<Config> {
    let flags = table(config)?;
    if flags.contains_key("data") {
        return Err(PyValueError::new_err("config: data is the first argument of dfar.train"));
    }
    let data = Config::absolute_data(data).map_err(PyValueError::new_err)?;
    let layered = |flags| Config::layered(file, flags).map_err(TrainError::from);
    if file.is_some() {
        // Alone first, so that an error names the file.
        layered(toml::Table::new()).map_err(python)?;
    }
    let mut flags = Config::resolve_keys(flags, "config").map_err(TrainError::from).map_err(python)?;
    flags.insert("data".to_owned(), data.into());
    layered(flags).map_err(|error| {
        python(match error {
            TrainError::Config(ConfigError::Syntax { reason, .. }) => {
                TrainError::Config(ConfigError::Syntax { origin: "config".into(), reason })
            }
            other => other,
        })
    })
}

/// A run to start or to continue.
struct Start {
    data: Arc<dfar::data::Dataset>,
    config: Config,
    checkpoint: Option<Checkpoint>,
}

/// Opens the device, then the run, and trains.
fn go(
    py: Python<'_>,
    start: Start,
    open: impl FnOnce() -> Result<Run, TrainError> + Send,
    observe: Option<Bound<'_, PyAny>>,
    steps: bool,
) -> PyResult<(PathBuf, bool)> {
    let dir = OnceLock::new();
    let (events, threads) = (observe.is_some(), start.config.threads);
    let work = |link: Link<Json>| {
        let config = &start.config;
        let note = |line: &str| link.tell(json!({ "event": "note", "text": line }));
        let chosen = device::open(config, &note)?;
        let run = open()?;
        let _ = dir.set(run.dir().to_owned());
        let mut observe = |event: Event<'_>| {
            if events && let Some(event) = describe(event, steps) {
                link.tell(event);
            }
            if link.stopped() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        on_device!(chosen, |device| fit(device, start, &run, &mut observe))
    };
    let deal = |py: Python<'_>, event: Json| match &observe {
        Some(observe) => observe.call1((from_json(py, &event)?,))?.extract(),
        None => Ok(true),
    };
    let (result, raised) = threads::interruptible(py, threads, work, deal)?;
    let dir = dir.into_inner().unwrap_or_default();
    match (result, raised) {
        // The checkpoint is saved.
        (_, Some(raised)) => Err(raised),
        (Ok(()), None) => Ok((dir, true)),
        (Err(error), None) if error.exit_code() == 130 => Ok((dir, false)),
        (Err(error), None) => Err(python(error)),
    }
}

/// Trains to the end, evaluates, and writes the report.
fn fit<D: Device>(
    device: Arc<D>,
    start: Start,
    run: &Run,
    observe: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
) -> dfar::Result<()> {
    let Start { data, config, checkpoint } = start;
    let mut fit = match checkpoint {
        None => Fit::start(device.clone(), &data, config.clone(), run)?,
        Some(checkpoint) => Fit::resume(device.clone(), &data, config.clone(), run, checkpoint)?,
    };
    match fit.run(observe)? {
        Outcome::Finished => {
            report::finish(device, &data, &config, run, (fit.state(), fit.data_info()), observe)?;
            Ok(())
        }
        Outcome::Interrupted => Err(TrainError::Interrupted.into()),
    }
}

/// An event as callbacks receive it; `None` for those of steps and groups, unless `steps`.
fn describe(event: Event<'_>, steps: bool) -> Option<Json> {
    match event {
        Event::Epoch { epoch, epochs, size, done, .. } => Some(json!({
            "event": "epoch", "epoch": epoch, "epochs": epochs, "batches": size.batches, "done": done,
            "size": size,
        })),
        Event::Step { done, steps: step, loss, sums } if steps => Some(json!({
            "event": "step", "done": done, "step": step, "loss": loss.loss, "bce": loss.bce,
            "ibl": loss.ibl, "idl": loss.idl, "gradient_norm": loss.gradient_norm,
            "mean_loss": sums.loss / sums.rows as f64,
        })),
        Event::Scored { part, done, groups } if steps => {
            let part = if part == Part::Valid { "valid" } else { "test" };
            Some(json!({ "event": "scored", "part": part, "done": done, "groups": groups }))
        }
        Event::EpochEnd { record, best } => {
            let mut json = serde_json::to_value(record).expect("a record is plain numbers");
            json["event"] = "epoch_end".into();
            json["best"] = best.into();
            Some(json)
        }
        _ => None,
    }
}
