//! `import_log`: files, and tables through the Arrow C stream interface.

use crate::data::{Dataset, split};
use crate::errors::{DataError, named, python};
use crate::threads::{self, Link};
use arrow_array::RecordBatchReader;
use arrow_array::ffi_stream::{FFI_ArrowArrayStream, RecordBatchStreamReader};
use arrow_ipc::writer::StreamWriter;
use dfar::data::candidates::CandidateOptions;
use dfar::data::import::{self, ColumnOptions, ImportOptions, Liked, LogFormat, Progress, TimeUnit};
use dfar::data::{BadRow, CountedRecords, KCore, Repeats};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyCapsule;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;

/// Imports logs into the data set file `output` and opens it. `observe` is called with each
/// decision of the reader and each row that it skips.
#[pyfunction]
#[pyo3(signature = (
    source, output, *, format, user, item, time, date, label, delimiter, time_unit, positive_above,
    all_liked, liked, skipped, ignore_others, skip_bad_rows, keep_repeats, k_core, k_core_on,
    k_core_until_stable, split, train_share, valid_share, negatives, exclude_seen, seed, member,
    temp_dir, sort_memory, observe
))]
#[expect(clippy::too_many_arguments, reason = "the flags of the command")]
pub fn import_log(
    py: Python<'_>,
    source: &Bound<'_, PyAny>,
    output: PathBuf,
    format: &str,
    user: Option<String>,
    item: Option<String>,
    time: Option<String>,
    date: Option<String>,
    label: Option<String>,
    delimiter: Option<char>,
    time_unit: &str,
    positive_above: Option<f64>,
    all_liked: bool,
    liked: Vec<String>,
    skipped: Vec<String>,
    ignore_others: bool,
    skip_bad_rows: u64,
    keep_repeats: bool,
    k_core: u32,
    k_core_on: Option<&str>,
    k_core_until_stable: bool,
    split: Option<&str>,
    train_share: Option<f64>,
    valid_share: Option<f64>,
    negatives: usize,
    exclude_seen: bool,
    seed: u64,
    member: Option<String>,
    temp_dir: Option<PathBuf>,
    sort_memory: u32,
    observe: &Bound<'_, PyAny>,
) -> PyResult<Dataset> {
    let format = named("format", format, &FORMATS)?;
    // The columns of a table that are read, where all of them are named.
    let columns: Option<Vec<String>> = (label.is_some() || all_liked)
        .then(|| [&user, &item, &time].into_iter().cloned().collect::<Option<Vec<_>>>())
        .flatten()
        .map(|needed| needed.into_iter().chain(date.clone()).chain(label.clone()).collect());
    let mut options = ImportOptions::new(format, Vec::new(), output);
    options.columns = ColumnOptions { user, item, time, date, label, delimiter: byte(delimiter)? };
    options.member = member;
    options.liked = match positive_above {
        Some(threshold) => Liked::Above(threshold),
        None if all_liked => Liked::Every,
        None if !liked.is_empty() => Liked::Named { liked, skipped, ignore_others },
        None => Liked::ByFormat,
    };
    options.time_unit = named("time_unit", time_unit, &UNITS)?;
    options.skip_bad_rows = skip_bad_rows;
    options.repeats = if keep_repeats { Repeats::Keep } else { Repeats::First };
    let on = match k_core_on {
        Some(on) => {
            named("k_core_on", on, &[("all", CountedRecords::All), ("positive", CountedRecords::Positive)])?
        }
        None => format.counted_records(),
    };
    options.k_core = (k_core > 0).then_some(KCore { k: k_core, on, until_stable: k_core_until_stable });
    let split = split.map_or(Ok(options.split), self::split)?;
    options.split = split.with_shares(train_share, valid_share).ok_or_else(|| {
        PyValueError::new_err(
            "train_share and valid_share are for split='temporal' and 'by-user'; this split is \
             'leave-last'",
        )
    })?;
    options.candidates = CandidateOptions { negatives, exclude_seen, seed };
    if !(1..=1 << 20).contains(&sort_memory) {
        return Err(PyValueError::new_err(format!("sort_memory is {sort_memory}, but must be 1 to 1048576")));
    }
    options.sort_memory = (sort_memory as usize) << 20;
    options.temporary = temp_dir;

    // A table passes through a temporary file, because the importer reads a columnar log twice.
    let folder = options.folder();
    let table = match stream(source)? {
        Some(stream) => {
            let table = tempfile::Builder::new().prefix(".dfar-table").tempdir_in(folder);
            let table = table.map_err(|error| python(dfar::Error::io("write", folder)(error)))?;
            let path = table.path().join("table.arrow");
            copy(py, stream, &path, columns.as_deref())?;
            options.inputs = vec![path];
            Some(table)
        }
        None => {
            options.inputs = paths(source)?;
            None
        }
    };
    run(py, &options, observe).map_err(|error| match &table {
        Some(table) => rename(py, error, &format!("{}/", table.path().display())),
        None => error,
    })?;
    Dataset::read(py, options.output)
}

const FORMATS: [(&str, LogFormat); 6] = [
    ("movielens", LogFormat::MovieLens),
    ("amazon", LogFormat::Amazon),
    ("kuairand", LogFormat::KuaiRand),
    ("kuairec", LogFormat::KuaiRec),
    ("inter", LogFormat::Inter),
    ("csv", LogFormat::Csv),
];

const UNITS: [(&str, TimeUnit); 5] = [
    ("auto", TimeUnit::Auto),
    ("s", TimeUnit::Seconds),
    ("ms", TimeUnit::Milliseconds),
    ("us", TimeUnit::Microseconds),
    ("ns", TimeUnit::Nanoseconds),
];

fn byte(delimiter: Option<char>) -> PyResult<Option<u8>> {
    match delimiter {
        Some('"' | '\n' | '\r') => {
            Err(PyValueError::new_err("delimiter: quotes and line ends cannot be delimiters"))
        }
        Some(character) if !character.is_ascii() => {
            Err(PyValueError::new_err("delimiter must be one ASCII character"))
        }
        character => Ok(character.map(|character| character as u8)),
    }
}

/// One path, or several.
fn paths(source: &Bound<'_, PyAny>) -> PyResult<Vec<PathBuf>> {
    if let Ok(path) = source.extract::<PathBuf>() {
        return Ok(vec![path]);
    }
    let paths: Vec<PathBuf> = source.extract().map_err(|_| {
        let kind = source.get_type().name().map_or_else(|_| "?".into(), |name| name.to_string());
        PyTypeError::new_err(format!(
            "table must be a path, a list of paths, or a table with __arrow_c_stream__ (pandas, \
             polars, pyarrow), not {kind}"
        ))
    })?;
    if paths.is_empty() {
        return Err(PyValueError::new_err("table: the list of paths is empty"));
    }
    Ok(paths)
}

/// The rows of a table; `None` if the object has no Arrow stream.
fn stream(source: &Bound<'_, PyAny>) -> PyResult<Option<RecordBatchStreamReader>> {
    if !source.hasattr("__arrow_c_stream__")? {
        return Ok(None);
    }
    let capsule = source.call_method0("__arrow_c_stream__")?;
    let capsule = capsule.cast::<PyCapsule>().map_err(|_| {
        PyTypeError::new_err("table: __arrow_c_stream__ returned something that is not a capsule")
    })?;
    let pointer = capsule.pointer_checked(Some(c"arrow_array_stream"))?;
    // SAFETY: a capsule of this name holds an ArrowArrayStream, by the Arrow PyCapsule interface.
    // `from_raw` moves it out and leaves a released stream, so that the capsule frees nothing.
    let reader =
        unsafe { RecordBatchStreamReader::from_raw(pointer.cast::<FFI_ArrowArrayStream>().as_ptr()) };
    reader.map(Some).map_err(|error| DataError::new_err(format!("table: {error}")))
}

/// Writes the rows to an Arrow stream file: only the wanted columns, if the table has all of them.
/// Otherwise the importer looks among all columns, by its own names or by number.
fn copy(
    py: Python<'_>,
    rows: RecordBatchStreamReader,
    path: &std::path::Path,
    wanted: Option<&[String]>,
) -> PyResult<()> {
    let schema = rows.schema();
    let wanted: Option<Vec<usize>> =
        wanted.and_then(|names| names.iter().map(|name| schema.index_of(name).ok()).collect());
    let kept: Vec<usize> = (0..schema.fields().len())
        .filter(|at| wanted.as_ref().is_none_or(|wanted| wanted.contains(at)))
        .collect();
    let write = move || -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let schema = schema.project(&kept)?;
        let mut writer = StreamWriter::try_new(BufWriter::new(File::create(path)?), &schema)?;
        for batch in rows {
            writer.write(&batch?.project(&kept)?)?;
        }
        writer.into_inner()?.flush()?;
        Ok(())
    };
    py.detach(write).map_err(|error| DataError::new_err(format!("table: {error}")))?;
    py.check_signals()
}

/// Runs the import. A Ctrl-C stops it at the next block of rows.
fn run(py: Python<'_>, options: &ImportOptions, observe: &Bound<'_, PyAny>) -> PyResult<()> {
    let work = |link| {
        let reports = Reports(link);
        // A stopped import unwinds from `Reports::bytes`; the temporary files are removed.
        catch_unwind(AssertUnwindSafe(|| import::import(options, &reports)))
            .map_err(|panic| (reports.0.stopped(), panic))
    };
    let tell = |_: Python<'_>, line: String| observe.call1((line,)).map(|_| true);
    let (result, raised) = threads::interruptible(py, 0, work, tell)?;
    match (result, raised) {
        (_, Some(raised)) => Err(raised),
        (Err((false, panic)), None) => resume_unwind(panic),
        (Err((true, _)), None) => Ok(()),
        (Ok(made), None) => made.map(|_| ()).map_err(python),
    }
}

/// Passes decisions and skipped rows on.
struct Reports(Link<String>);

/// Why an import unwound.
struct Stopped;

impl Progress for Reports {
    fn bytes(&self, _: u64) {
        if self.0.stopped() {
            resume_unwind(Box::new(Stopped));
        }
    }

    fn skipped(&self, row: &BadRow) {
        self.0.tell(format!("skipped: {row}"));
    }

    fn note(&self, decision: &str) {
        self.0.tell(decision.to_owned());
    }
}

/// Removes the folder of the temporary file from a message.
fn rename(py: Python<'_>, error: PyErr, folder: &str) -> PyErr {
    if !error.is_instance_of::<DataError>(py) {
        return error;
    }
    let message = error.value(py).to_string().replace(folder, "").replace("table.arrow", "table");
    DataError::new_err(message)
}
