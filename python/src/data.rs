//! Data sets: views of the memory map, names, and the synthetic log.

use crate::arrays::view;
use crate::errors::{named, python};
use crate::threads;
use crate::values::from_json;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::data::{Part, Split};
use numpy::ndarray::{ArrayView1, ArrayView2};
use numpy::{PyArray1, PyArray2};
use pyo3::exceptions::PyIndexError;
use pyo3::prelude::*;
use std::path::PathBuf;
use std::sync::Arc;

/// A validated data set, mapped from its file.
#[pyclass(frozen, module = "dfar._dfar")]
pub struct Dataset {
    data: Arc<dfar::data::Dataset>,
}

type Array1<'py, T> = Bound<'py, PyArray1<T>>;
type Array2<'py, T> = Bound<'py, PyArray2<T>>;
type Histories<'py> =
    (Array1<'py, u64>, Array1<'py, u32>, Array1<'py, u8>, Array1<'py, i64>, Array2<'py, u32>);
type Groups<'py> = (Array1<'py, u32>, Array1<'py, u32>, Array2<'py, u32>, Option<Array2<'py, f32>>);

impl Dataset {
    /// The engine's data set.
    pub fn engine(&self) -> &Arc<dfar::data::Dataset> {
        &self.data
    }

    /// Opens a file, without the GIL.
    pub fn read(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        let data = py.detach(|| threads::install(|| dfar::data::Dataset::open(&path)))?;
        Ok(Self { data: Arc::new(data.map_err(python)?) })
    }
}

#[pymethods]
impl Dataset {
    #[staticmethod]
    fn open(py: Python<'_>, path: PathBuf) -> PyResult<Self> {
        Self::read(py, path)
    }

    /// The path, and the numbers of users, items and events.
    fn counts(&self) -> (PathBuf, usize, usize, usize) {
        (self.data.path().to_owned(), self.data.users(), self.data.items(), self.data.events())
    }

    /// Offsets, items, labels, times, split.
    fn histories<'py>(this: &Bound<'py, Self>) -> Histories<'py> {
        (
            view(this, |data| ArrayView1::from(data.histories().offsets)),
            view(this, |data| ArrayView1::from(data.histories().items)),
            view(this, |data| ArrayView1::from(data.histories().feedback)),
            view(this, |data| ArrayView1::from(data.histories().times)),
            view(this, |data| ArrayView2::from(data.histories().split)),
        )
    }

    /// Users, events, negatives, ceiling of a part.
    fn groups<'py>(this: &Bound<'py, Self>, part: &str) -> PyResult<Groups<'py>> {
        let part = named("part", part, &[("valid", Part::Valid), ("test", Part::Test)])?;
        let groups = this.get().data.groups(part);
        let (count, negatives) = (groups.len(), groups.negatives_per_group);
        let ceiling = groups.ceiling.is_some().then(|| {
            view(this, |data| table(data.groups(part).ceiling.unwrap_or_default(), count, 1 + negatives))
        });
        Ok((
            view(this, |data| ArrayView1::from(data.groups(part).user)),
            view(this, |data| ArrayView1::from(data.groups(part).event)),
            view(this, |data| table(data.groups(part).negatives, count, negatives)),
            ceiling,
        ))
    }

    fn item_id(&self, item: usize) -> PyResult<&str> {
        Ok(self.data.item_name(index("item", item, self.data.items())?))
    }

    fn user_id(&self, user: usize) -> PyResult<&str> {
        Ok(self.data.user_name(index("user", user, self.data.users())?))
    }

    fn item_ids(&self) -> Vec<&str> {
        (0..self.data.items() as u32).map(|item| self.data.item_name(item)).collect()
    }

    fn user_ids(&self) -> Vec<&str> {
        (0..self.data.users() as u32).map(|user| self.data.user_name(user)).collect()
    }

    fn find_item(&self, id: &str) -> Option<u32> {
        self.data.find_item(id)
    }

    fn find_user(&self, id: &str) -> Option<u32> {
        self.data.find_user(id)
    }

    fn protocol(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let json = serde_json::to_value(self.data.protocol()).expect("a protocol is plain data");
        from_json(py, &json)
    }
}

fn table<T>(values: &[T], rows: usize, columns: usize) -> ArrayView2<'_, T> {
    ArrayView2::from_shape((rows, columns), values).expect("the file's lengths are validated")
}

fn index(name: &str, value: usize, count: usize) -> PyResult<u32> {
    if value < count {
        return Ok(value as u32);
    }
    Err(PyIndexError::new_err(format!("{name} is {value}, but there are {count}")))
}

/// The split of this name, with the usual shares.
pub fn split(name: &str) -> PyResult<Split> {
    let known =
        [("leave-last", Split::LeaveLast), ("temporal", Split::TEMPORAL), ("by-user", Split::BY_USER)];
    named("split", name, &known)
}

/// Writes a synthetic data set.
#[pyfunction]
#[pyo3(name = "synthetic", signature = (path, users, items, events_per_user, seed, negatives, split))]
#[expect(clippy::too_many_arguments, reason = "the arguments of the Python function")]
pub fn make_synthetic(
    py: Python<'_>,
    path: PathBuf,
    users: usize,
    items: usize,
    events_per_user: f64,
    seed: u64,
    negatives: usize,
    split: &str,
) -> PyResult<()> {
    let split = self::split(split)?;
    let options = SyntheticOptions { users, items, events_per_user, seed, negatives, split };
    py.detach(|| threads::install(|| synthetic::write(&options, &path)))?.map_err(python)?;
    Ok(())
}
