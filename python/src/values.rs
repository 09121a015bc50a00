//! JSON as Python objects, and Python dictionaries as TOML tables.

use pyo3::IntoPyObjectExt;
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBool, PyDict, PyFloat, PyInt, PyList, PyString, PyTuple};
use serde_json::Value as Json;

/// Dictionaries, lists, strings, numbers, `bool` and `None`.
pub fn from_json(py: Python<'_>, value: &Json) -> PyResult<Py<PyAny>> {
    match value {
        Json::Null => Ok(py.None()),
        Json::Bool(flag) => flag.into_py_any(py),
        Json::Number(number) => match (number.as_u64(), number.as_i64()) {
            (Some(number), _) => number.into_py_any(py),
            (None, Some(number)) => number.into_py_any(py),
            (None, None) => number.as_f64().into_py_any(py),
        },
        Json::String(text) => text.into_py_any(py),
        Json::Array(values) => {
            let values = values.iter().map(|value| from_json(py, value)).collect::<PyResult<Vec<_>>>()?;
            values.into_py_any(py)
        }
        Json::Object(fields) => {
            let dict = PyDict::new(py);
            for (name, value) in fields {
                dict.set_item(name, from_json(py, value)?)?;
            }
            dict.into_py_any(py)
        }
    }
}

/// A configuration: a flat dictionary of strings, numbers, `bool` and lists of numbers. A key with
/// `None` is left out.
pub fn table(config: &Bound<'_, PyDict>) -> PyResult<toml::Table> {
    let mut table = toml::Table::new();
    for (key, value) in config {
        let key: String =
            key.extract().map_err(|_| PyTypeError::new_err(format!("config: key {key} is not a string")))?;
        if !value.is_none() {
            let value = toml_value(&key, &value)?;
            table.insert(key, value);
        }
    }
    Ok(table)
}

fn toml_value(key: &str, value: &Bound<'_, PyAny>) -> PyResult<toml::Value> {
    if let Ok(flag) = value.cast::<PyBool>() {
        return Ok(flag.is_true().into());
    }
    if value.is_instance_of::<PyFloat>() {
        return Ok(value.extract::<f64>()?.into());
    }
    if value.is_instance_of::<PyString>() {
        return Ok(value.extract::<String>()?.into());
    }
    if value.is_instance_of::<PyList>() || value.is_instance_of::<PyTuple>() {
        let values = value.try_iter()?.map(|value| toml_value(key, &value?)).collect::<PyResult<Vec<_>>>()?;
        return Ok(values.into());
    }
    // Integers, NumPy's too.
    if value.is_instance_of::<PyInt>() || value.hasattr("__index__")? {
        if let Ok(number) = value.extract::<i64>() {
            return Ok(number.into());
        }
        // A seed above TOML's largest integer.
        return match value.extract::<u64>() {
            Ok(number) if key == "seed" => Ok(number.to_string().into()),
            _ => Err(PyValueError::new_err(format!("config: {key} is out of range: {value}"))),
        };
    }
    // NumPy's floats.
    if value.hasattr("__float__")? {
        return Ok(value.extract::<f64>()?.into());
    }
    if let Ok(path) = value.extract::<std::path::PathBuf>() {
        return match path.into_os_string().into_string() {
            Ok(path) => Ok(path.into()),
            Err(_) => Err(PyValueError::new_err(format!("config: {key} is not UTF-8"))),
        };
    }
    let kind = value.get_type().name()?;
    Err(PyTypeError::new_err(format!(
        "config: {key} must be a string, a number, a bool or a list of them, not {kind}"
    )))
}
