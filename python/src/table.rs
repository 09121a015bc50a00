//! Scores as a table that other libraries read through Arrow's C stream interface.

use arrow_array::builder::{Float32Builder, StringBuilder, UInt64Builder};
use arrow_array::ffi_stream::FFI_ArrowArrayStream;
use arrow_array::{ArrayRef, RecordBatch, RecordBatchIterator};
use arrow_schema::ffi::FFI_ArrowSchema;
use arrow_schema::{ArrowError, DataType, Field, Schema, SchemaRef};
use dfar::evaluate::probability;
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use std::sync::Arc;

/// Rows in a record batch. Offsets of text have 32 bits, so a batch must not hold everything.
const BATCH: usize = 1 << 16;

/// Ranked items, with the columns of the Parquet files of `dfar-train score`.
///
/// `polars.DataFrame(table)`, `pyarrow.table(table)`, `pandas.DataFrame.from_arrow(table)`, DuckDB
/// and others read it without a copy, through `__arrow_c_stream__`.
#[pyclass(frozen, module = "dfar")]
pub struct Table {
    schema: SchemaRef,
    batches: Vec<RecordBatch>,
}

#[pymethods]
impl Table {
    /// A new stream over the same memory. A requested schema is ignored, as the interface allows.
    #[pyo3(signature = (requested_schema = None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        let _ = requested_schema;
        let batches = self.batches.clone().into_iter().map(Ok::<_, ArrowError>);
        let rows = RecordBatchIterator::new(batches, self.schema.clone());
        let stream = FFI_ArrowArrayStream::new(Box::new(rows));
        PyCapsule::new_with_value(py, stream, c"arrow_array_stream")
    }

    fn __arrow_c_schema__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        let schema = FFI_ArrowSchema::try_from(&*self.schema).map_err(broken)?;
        PyCapsule::new_with_value(py, schema, c"arrow_schema")
    }

    fn __len__(&self) -> usize {
        self.batches.iter().map(RecordBatch::num_rows).sum()
    }

    /// The names of the columns.
    #[getter]
    fn column_names(&self) -> Vec<String> {
        self.schema.fields().iter().map(|field| field.name().clone()).collect()
    }

    fn __repr__(&self) -> String {
        format!("dfar.Table({} rows: {})", self.__len__(), self.column_names().join(", "))
    }
}

/// The user or history that each row belongs to.
pub enum Owners {
    /// Users, by id.
    Users(StringBuilder),
    /// Histories of a call, by index.
    Histories(UInt64Builder),
}

/// A row without its owner.
pub struct Ranked<'a> {
    /// From 1.
    pub rank: u64,
    /// Original id.
    pub item: &'a str,
    pub logit: f32,
}

/// A table in the making.
pub struct Rows {
    owners: Owners,
    rank: UInt64Builder,
    item: StringBuilder,
    probability: Float32Builder,
    logit: Float32Builder,
    rows: usize,
    table: Table,
}

impl Rows {
    pub fn of_users() -> Self {
        Self::new(Owners::Users(StringBuilder::new()), Field::new("user", DataType::Utf8, false))
    }

    pub fn of_histories() -> Self {
        let index = Field::new("history", DataType::UInt64, false);
        Self::new(Owners::Histories(UInt64Builder::new()), index)
    }

    fn new(owners: Owners, first: Field) -> Self {
        let field = |name: &str, kind| Field::new(name, kind, false);
        let fields = vec![
            first,
            field("rank", DataType::UInt64),
            field("item", DataType::Utf8),
            field("probability", DataType::Float32),
            field("logit", DataType::Float32),
        ];
        Self {
            owners,
            rank: UInt64Builder::new(),
            item: StringBuilder::new(),
            probability: Float32Builder::new(),
            logit: Float32Builder::new(),
            rows: 0,
            table: Table { schema: Arc::new(Schema::new(fields)), batches: Vec::new() },
        }
    }

    /// Adds a row of owner `index`, which `user` names.
    pub fn push(&mut self, index: u64, user: &str, row: Ranked<'_>) {
        match &mut self.owners {
            Owners::Users(users) => users.append_value(user),
            Owners::Histories(histories) => histories.append_value(index),
        }
        self.rank.append_value(row.rank);
        self.item.append_value(row.item);
        self.probability.append_value(probability(row.logit));
        self.logit.append_value(row.logit);
        self.rows += 1;
        if self.rows == BATCH {
            self.cut();
        }
    }

    fn cut(&mut self) {
        let owners: ArrayRef = match &mut self.owners {
            Owners::Users(users) => Arc::new(users.finish()),
            Owners::Histories(histories) => Arc::new(histories.finish()),
        };
        let columns: Vec<ArrayRef> = vec![
            owners,
            Arc::new(self.rank.finish()),
            Arc::new(self.item.finish()),
            Arc::new(self.probability.finish()),
            Arc::new(self.logit.finish()),
        ];
        let batch = RecordBatch::try_new(self.table.schema.clone(), columns);
        self.table.batches.push(batch.expect("columns of equal length in the schema's types"));
        self.rows = 0;
    }

    pub fn finish(mut self) -> Table {
        if self.rows > 0 {
            self.cut();
        }
        self.table
    }
}

fn broken(error: ArrowError) -> PyErr {
    PyRuntimeError::new_err(error.to_string())
}
