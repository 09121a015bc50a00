//! The engine's errors as Python exceptions.
//!
//! | cause | exception |
//! |---|---|
//! | a bad argument, configuration or id | `ValueError` |
//! | a bad log or data set file | `DataError`, a `ValueError` |
//! | the operating system refused | `OSError`, with its usual subclasses |
//! | a run that exists, or does not | `FileExistsError`, `FileNotFoundError` |
//! | a failed run | `RuntimeError` |

use dfar::Error;
use dfar::data::DataError as BadData;
use dfar::evaluate::EvaluateError;
use dfar::model::ModelError;
use dfar::train::TrainError;
use dfar::train::file::FileError;
use dfar::train::run::RunError;
use pyo3::create_exception;
use pyo3::exceptions::{
    PyFileExistsError, PyFileNotFoundError, PyKeyboardInterrupt, PyOSError, PyRuntimeError, PyValueError,
};
use pyo3::prelude::*;
use std::io;
use std::path::Path;

create_exception!(
    dfar,
    DataError,
    PyValueError,
    "A log or a data set file is unusable, or an option cannot be met with this data."
);

/// The exception of an error.
pub fn python(error: impl Into<Error>) -> PyErr {
    let error = error.into();
    let message = keywords(&error.to_string());
    match &error {
        Error::Attention(_) | Error::Batch(_) => PyValueError::new_err(message),
        Error::Data(BadData::Read { path, source } | BadData::Write { path, source }) => {
            system(path, source).unwrap_or_else(|| DataError::new_err(message))
        }
        Error::Data(_) => DataError::new_err(message),
        Error::Read { path, source } | Error::Io { path, source, .. } => {
            system(path, source).unwrap_or_else(|| PyOSError::new_err(message))
        }
        Error::Model(ModelError::Config { .. }) => PyValueError::new_err(message),
        Error::Train(error) => train(error, message),
        _ => PyRuntimeError::new_err(message),
    }
}

/// The value of this name; `ValueError` for a name that is none of them.
pub fn named<T: Copy>(argument: &str, name: &str, values: &[(&str, T)]) -> PyResult<T> {
    values.iter().find(|(known, _)| *known == name).map(|(_, value)| *value).ok_or_else(|| {
        let known: Vec<String> = values.iter().map(|(known, _)| format!("'{known}'")).collect();
        let (last, others) = known.split_last().expect("an argument has values");
        let known = format!("{} or {last}", others.join(", "));
        PyValueError::new_err(format!("{argument} is '{name}', but must be {known}"))
    })
}

fn train(error: &TrainError, message: String) -> PyErr {
    match error {
        TrainError::Config(_)
        | TrainError::Usage { .. }
        | TrainError::UnknownItem { .. }
        | TrainError::UnknownUser { .. }
        | TrainError::Line { .. }
        | TrainError::NoTargets { .. }
        | TrainError::OtherData { .. }
        | TrainError::Model(ModelError::Config { .. }) => PyValueError::new_err(message),
        TrainError::Run(
            RunError::Exists { .. } | RunError::OtherConfig { .. } | RunError::OtherFile { .. },
        ) => PyFileExistsError::new_err(message),
        TrainError::Run(
            RunError::NoRun { .. } | RunError::NoModel { .. } | RunError::NoCheckpoint { .. },
        ) => PyFileNotFoundError::new_err(message),
        TrainError::Run(RunError::Io { dir, source }) => {
            system(dir, source).unwrap_or_else(|| PyOSError::new_err(message))
        }
        TrainError::File(FileError::Read { path, source } | FileError::Write { path, source }) => {
            system(path, source).unwrap_or_else(|| PyOSError::new_err(message))
        }
        TrainError::File(_) => DataError::new_err(message),
        TrainError::Interrupted | TrainError::Evaluate(EvaluateError::Interrupted) => {
            PyKeyboardInterrupt::new_err(message)
        }
        _ => PyRuntimeError::new_err(message),
    }
}

/// An `OSError`, which Python turns into the subclass of its number. `None` for an error of the
/// engine, which has no number.
fn system(path: &Path, source: &io::Error) -> Option<PyErr> {
    let number = source.raw_os_error()?;
    let words = source.to_string();
    let words = words.split(" (os error").next().unwrap_or(&words).to_owned();
    Some(PyOSError::new_err((number, words, path.display().to_string())))
}

/// The flags of the command line in a message, as the keyword arguments of the Python functions.
pub fn keywords(message: &str) -> String {
    let mut text = String::with_capacity(message.len());
    let mut rest = message;
    while let Some(start) = rest.find("--") {
        let after_letter = rest[..start].ends_with(|c: char| c.is_alphanumeric() || c == '-');
        let flag = &rest[start + 2..];
        let end = flag.find(|c: char| !(c.is_ascii_lowercase() || c == '-')).unwrap_or(flag.len());
        let flag = &flag[..end];
        text.push_str(&rest[..start]);
        rest = &rest[start + 2 + end..];
        if flag.is_empty() || flag.starts_with('-') || after_letter {
            text.push_str("--");
            text.push_str(flag);
            continue;
        }
        let column = ["user", "item", "time", "date", "label"]
            .into_iter()
            .find(|column| flag.strip_suffix("-column") == Some(column));
        text.push('`');
        text.push_str(&column.map_or_else(|| flag.replace('-', "_"), str::to_owned));
        text.push('`');
    }
    text.push_str(rest);
    text
}
