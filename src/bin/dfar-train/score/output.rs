//! Scores as a table, CSV, JSON lines or Parquet.

use crate::report;
use clap::ValueEnum;
use dfar::Error;
use dfar::replacement::Replacement;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
pub enum Format {
    /// Aligned columns.
    Table,
    /// CSV with a header; text is quoted.
    Csv,
    /// One JSON object per line.
    Jsonl,
    /// One JSON array.
    Json,
    /// Parquet.
    Parquet,
}

impl Format {
    /// The format by the ending of a file name.
    pub fn of(path: &Path) -> Option<Self> {
        match path.extension()?.to_str()? {
            "csv" => Some(Format::Csv),
            "jsonl" | "ndjson" => Some(Format::Jsonl),
            "json" => Some(Format::Json),
            "parquet" => Some(Format::Parquet),
            _ => None,
        }
    }
}

/// A value of a column.
#[derive(Clone, Debug)]
pub enum Value {
    Text(String),
    Count(u64),
    Real(f32),
}

/// A writer to a file or to stdout. The file appears under its name once it is complete.
pub struct Writer {
    columns: &'static [&'static str],
    format: Format,
    path: Option<PathBuf>,
    out: Out,
    /// Whether the header of CSV, or the bracket of JSON, is written: with the first row, so that
    /// input refused before it leaves no output.
    begun: bool,
    /// Rows of a table, which is written as a whole, or of a block of Parquet.
    rows: Vec<Vec<Value>>,
    #[cfg(feature = "parquet")]
    parquet: Option<parquet::arrow::ArrowWriter<Vec<u8>>>,
}

enum Out {
    Stdout(BufWriter<io::Stdout>),
    File(Replacement),
}

impl Write for Out {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Out::Stdout(out) => out.write(bytes),
            Out::File(out) => out.write(bytes),
        }
    }
    fn flush(&mut self) -> io::Result<()> {
        match self {
            Out::Stdout(out) => out.flush(),
            Out::File(out) => out.flush(),
        }
    }
}

impl Writer {
    pub fn new(columns: &'static [&'static str], format: Format, path: Option<&Path>) -> dfar::Result<Self> {
        if cfg!(not(feature = "parquet")) && format == Format::Parquet {
            let reason = "this program was built without the feature `parquet`".to_owned();
            return Err(dfar::train::TrainError::Usage { argument: "--output-format", reason }.into());
        }
        let out = match path {
            None => Out::Stdout(BufWriter::new(io::stdout())),
            Some(path) => Out::File(Replacement::new(path).map_err(Error::io("write", path))?),
        };
        Ok(Self {
            columns,
            format,
            path: path.map(Path::to_owned),
            out,
            begun: false,
            rows: Vec::new(),
            #[cfg(feature = "parquet")]
            parquet: None,
        })
    }

    fn begin(&mut self) -> io::Result<()> {
        if self.begun || self.format != Format::Csv {
            return Ok(());
        }
        self.begun = true;
        writeln!(self.out, "{}", self.columns.join(","))
    }

    pub fn row(&mut self, row: Vec<Value>) -> dfar::Result<()> {
        self.check(|w| match w.format {
            Format::Csv => {
                w.begin()?;
                w.out.write_all(csv_line(&row).as_bytes())
            }
            Format::Jsonl => writeln!(w.out, "{}", json(w.columns, &row)),
            Format::Json => {
                let before = if std::mem::replace(&mut w.begun, true) { ",\n" } else { "[\n" };
                write!(w.out, "{before}  {}", json(w.columns, &row))
            }
            Format::Table => {
                w.rows.push(row);
                Ok(())
            }
            Format::Parquet => {
                w.rows.push(row);
                if w.rows.len() < 1 << 16 { Ok(()) } else { w.write_parquet() }
            }
        })
    }

    pub fn finish(mut self) -> dfar::Result<()> {
        self.check(|w| {
            match w.format {
                Format::Csv => w.begin()?,
                Format::Jsonl => {}
                Format::Table => {
                    // The table is for people: rounded, without the logits.
                    let columns = w.columns.strip_suffix(&["logit"]).unwrap_or(w.columns);
                    let mut cells = vec![columns.iter().map(|name| (*name).to_owned()).collect()];
                    let rounded = |value: &Value| match value {
                        Value::Real(real) => format!("{real:.4}"),
                        value => cell(value),
                    };
                    cells.extend(w.rows.iter().map(|row| row[..columns.len()].iter().map(rounded).collect()));
                    w.out.write_all(report::table(&cells).as_bytes())?;
                }
                Format::Json => w.out.write_all(if w.begun { b"\n]\n" } else { b"[]\n" })?,
                Format::Parquet => w.finish_parquet()?,
            }
            w.out.flush()
        })?;
        let path = self.path.take();
        match self.out {
            Out::Stdout(_) => Ok(()),
            Out::File(file) => file.finish().map_err(Error::io("write", path.unwrap_or_default())),
        }
    }

    fn check<T>(&mut self, run: impl FnOnce(&mut Self) -> io::Result<T>) -> dfar::Result<T> {
        run(self).map_err(|source| {
            let path = self.path.clone().unwrap_or_else(|| "<stdout>".into());
            Error::io("write", path)(source)
        })
    }

    #[cfg(not(feature = "parquet"))]
    fn write_parquet(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    #[cfg(not(feature = "parquet"))]
    fn finish_parquet(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Writes the collected rows as one row group.
    #[cfg(feature = "parquet")]
    fn write_parquet(&mut self) -> io::Result<()> {
        use arrow_array::{ArrayRef, Float32Array, RecordBatch, StringArray, UInt64Array};
        use std::sync::Arc;

        let rows = std::mem::take(&mut self.rows);
        let column = |at: usize| -> ArrayRef {
            let values = || rows.iter().map(|row| &row[at]);
            match REAL.contains(&self.columns[at]) {
                true => Arc::new(Float32Array::from_iter_values(values().map(|value| match value {
                    Value::Real(real) => *real,
                    _ => f32::NAN,
                }))),
                false if TEXT.contains(&self.columns[at]) => {
                    Arc::new(StringArray::from_iter_values(values().map(cell)))
                }
                false => Arc::new(UInt64Array::from_iter_values(values().map(|value| match value {
                    Value::Count(count) => *count,
                    _ => 0,
                }))),
            }
        };
        let columns = self.columns.iter().enumerate().map(|(at, name)| (*name, column(at)));
        let batch = RecordBatch::try_from_iter(columns).map_err(io::Error::other)?;
        if self.parquet.is_none() {
            let writer = parquet::arrow::ArrowWriter::try_new(Vec::new(), batch.schema(), None);
            self.parquet = Some(writer.map_err(io::Error::other)?);
        }
        let writer = self.parquet.as_mut().expect("it was made above");
        writer.write(&batch).and_then(|()| writer.flush()).map_err(io::Error::other)?;
        // Encoded bytes go to the file at once, so the writer keeps only the footer in memory.
        let encoded = std::mem::take(writer.inner_mut());
        self.out.write_all(&encoded)
    }

    #[cfg(feature = "parquet")]
    fn finish_parquet(&mut self) -> io::Result<()> {
        self.write_parquet()?;
        let writer = self.parquet.take().expect("write_parquet makes it");
        let rest = writer.into_inner().map_err(io::Error::other)?;
        self.out.write_all(&rest)
    }
}

#[cfg(feature = "parquet")]
const REAL: [&str; 2] = ["probability", "logit"];
#[cfg(feature = "parquet")]
const TEXT: [&str; 2] = ["user", "item"];

fn cell(value: &Value) -> String {
    match value {
        Value::Text(text) => text.clone(),
        Value::Count(count) => count.to_string(),
        // The shortest digits that parse to the same number.
        Value::Real(real) => real.to_string(),
    }
}

fn csv_line(row: &[Value]) -> String {
    let cells = row.iter().map(|value| match value {
        // Always quoted, so that an id such as 007 stays text.
        Value::Text(text) => format!("\"{}\"", text.replace('"', "\"\"")),
        value => cell(value),
    });
    cells.collect::<Vec<_>>().join(",") + "\n"
}

fn json(columns: &[&str], row: &[Value]) -> serde_json::Value {
    let value = |value: &Value| -> serde_json::Value {
        match value {
            Value::Text(text) => text.as_str().into(),
            Value::Count(count) => (*count).into(),
            Value::Real(real) => (*real).into(),
        }
    };
    columns.iter().zip(row).map(|(name, cell)| ((*name).to_owned(), value(cell))).collect()
}
