//! NumPy arguments, checked by name, and views of a data set's memory map.
//!
//! Large arrays of floats are read in place. Index arrays (`cu_seqlens`, `label`) are copied before
//! they are checked: another Python thread may write to them during the call, and the engine trusts
//! checked indices. They take at most a few bytes a token.

use crate::data::Dataset;
use numpy::ndarray::{ArrayView, Dimension};
use numpy::{
    Element, PyArray, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArray1, PyReadonlyArrayDyn,
    PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

/// A C-contiguous f32 array that is read in place.
pub struct Floats<'py>(PyReadonlyArrayDyn<'py, f32>);

impl<'py> Floats<'py> {
    /// Checks an argument. `shape` has one letter or product a dimension, e.g. `["N", "H", "d"]`.
    pub fn new(value: &Bound<'py, PyAny>, name: &str, shape: &[&str]) -> PyResult<Self> {
        let untyped = untyped(value, name)?;
        let array = value.cast::<PyArrayDyn<f32>>().map_err(|_| {
            PyTypeError::new_err(format!("{name} has dtype {}, but must be float32", dtype(untyped)))
        })?;
        if untyped.ndim() != shape.len() {
            return Err(PyValueError::new_err(format!(
                "{name} has shape {}, but must be [{}]",
                words(untyped.shape()),
                shape.join(", ")
            )));
        }
        if !untyped.is_c_contiguous() {
            return Err(PyValueError::new_err(format!(
                "{name} is not C-contiguous; pass numpy.ascontiguousarray({name})"
            )));
        }
        let array = array.try_readonly().map_err(|_| in_use(name))?;
        if array.as_slice().is_err() {
            return Err(PyValueError::new_err(format!(
                "{name} is not aligned for float32; pass a copy of it"
            )));
        }
        Ok(Self(array))
    }

    /// Checks that the array has the shape of another argument.
    pub fn require_shape(&self, name: &str, expected: &[usize], of: &str) -> PyResult<()> {
        if self.shape() == expected {
            return Ok(());
        }
        let (found, expected) = (words(self.shape()), words(expected));
        Err(PyValueError::new_err(format!("{name} has shape {found}, but {of} needs {expected}")))
    }

    /// The dimensions.
    pub fn shape(&self) -> &[usize] {
        self.0.shape()
    }

    /// The values.
    pub fn values(&self) -> &[f32] {
        self.0.as_slice().expect("contiguity and alignment are checked in `new`")
    }
}

/// Copies a contiguous one-dimensional array of this type; `None` for any other object.
pub fn exact<T: Element + Copy>(value: &Bound<'_, PyAny>) -> Option<Vec<T>> {
    let array = value.cast::<PyArray<T, numpy::Ix1>>().ok()?.try_readonly().ok()?;
    Some(array.as_slice().ok()?.to_vec())
}

/// Copies a one-dimensional array of integers. `convert` returns `None` for a value out of range.
pub fn integers<T>(
    value: &Bound<'_, PyAny>,
    name: &str,
    range: &str,
    convert: impl Fn(i64) -> Option<T>,
) -> PyResult<Vec<T>> {
    let untyped = untyped(value, name)?;
    // As bytes: those of an array of booleans can hold any value, a Rust `bool` only two.
    let bytes = match value.cast::<PyArrayDyn<bool>>() {
        Ok(booleans) => Some(booleans.call_method1("view", ("uint8",))?),
        Err(_) => None,
    };
    let value = bytes.as_ref().unwrap_or(value);
    let copied = copy_as::<u32, T>(value, name, &convert)
        .or_else(|| copy_as::<i64, T>(value, name, &convert))
        .or_else(|| copy_as::<i32, T>(value, name, &convert))
        .or_else(|| copy_as::<u8, T>(value, name, &convert))
        .or_else(|| copy_as::<i8, T>(value, name, &convert))
        .or_else(|| copy_as::<u64, T>(value, name, &convert));
    match copied {
        Some(Ok(Ok(values))) => Ok(values),
        Some(Ok(Err((place, found)))) => {
            Err(PyValueError::new_err(format!("{name}[{place}] is {found}, but must be {range}")))
        }
        Some(Err(error)) => Err(error),
        None if untyped.ndim() != 1 => Err(PyValueError::new_err(format!(
            "{name} has shape {}, but must have one dimension",
            words(untyped.shape())
        ))),
        None => Err(PyTypeError::new_err(format!(
            "{name} has dtype {}, but must be an integer type (uint32, int32, int64, uint8, bool)",
            dtype(untyped)
        ))),
    }
}

/// The converted values, or the place and the text of the first bad one.
type Converted<T> = Result<Vec<T>, (usize, String)>;

/// `None` if the array has another dtype or not one dimension.
fn copy_as<S: Element + Copy + ToString + TryInto<i64>, T>(
    value: &Bound<'_, PyAny>,
    name: &str,
    convert: &impl Fn(i64) -> Option<T>,
) -> Option<PyResult<Converted<T>>> {
    let array = value.cast::<PyArray<S, numpy::Ix1>>().ok()?;
    // A field of packed records: a Rust view of it would be misaligned, or have the wrong stride.
    let packed = array.strides().iter().any(|stride| stride.unsigned_abs() % size_of::<S>() != 0);
    if packed || !array.data().is_aligned() {
        let message = format!("{name} is not aligned for its dtype; pass a copy of it");
        return Some(Err(PyValueError::new_err(message)));
    }
    let copy = |array: PyReadonlyArray1<S>| {
        let convert = |(place, &found): (usize, &S)| {
            found.try_into().ok().and_then(convert).ok_or_else(|| (place, found.to_string()))
        };
        array.as_array().iter().enumerate().map(convert).collect()
    };
    Some(array.try_readonly().map_err(|_| in_use(name)).map(copy))
}

fn untyped<'a, 'py>(value: &'a Bound<'py, PyAny>, name: &str) -> PyResult<&'a Bound<'py, PyUntypedArray>> {
    value.cast::<PyUntypedArray>().map_err(|_| {
        let kind = value.get_type().name().map_or_else(|_| "?".into(), |name| name.to_string());
        PyTypeError::new_err(format!("{name} must be a NumPy array, not {kind}"))
    })
}

fn dtype(array: &Bound<'_, PyUntypedArray>) -> String {
    let dtype = array.dtype();
    let order = if dtype.is_native_byteorder() == Some(false) { " (of the other byte order)" } else { "" };
    format!("{dtype}{order}")
}

fn in_use(name: &str) -> PyErr {
    PyValueError::new_err(format!("{name} is being written by another call"))
}

/// A shape as Python writes it.
fn words(shape: &[usize]) -> String {
    let sizes: Vec<String> = shape.iter().map(usize::to_string).collect();
    let comma = if shape.len() == 1 { "," } else { "" };
    format!("({}{comma})", sizes.join(", "))
}

/// A read-only array over a part of a data set, which it keeps alive.
pub fn view<'py, T: Element, D: Dimension>(
    owner: &Bound<'py, Dataset>,
    part: impl for<'a> FnOnce(&'a dfar::data::Dataset) -> ArrayView<'a, T, D>,
) -> Bound<'py, PyArray<T, D>> {
    let values = part(owner.get().engine());
    // SAFETY: `part` can only return memory of the data set. The data set never moves its map, and
    // unmaps it when the last `Dataset` is dropped; the array holds a reference to `owner`. The
    // array is made read-only before Python sees it.
    let array = unsafe { PyArray::borrow_from_array(&values, owner.clone().into_any()) };
    array.readwrite().make_nonwriteable();
    array
}
