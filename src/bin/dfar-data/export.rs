//! `dfar-data export`: writes the events of a data set for other programs.

use clap::{Args, ValueEnum};
use dfar::Error;
use dfar::data::{DataError, Dataset};
use dfar::replacement::{Replacement, replaced};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

#[derive(Args)]
pub struct Export {
    /// Data set file.
    file: PathBuf,
    /// File to write; `-` is standard output.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
    /// Format of the output [default: by its ending, .csv or .parquet; csv if it has none].
    #[arg(long, value_enum)]
    to: Option<To>,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum To {
    Csv,
    Parquet,
}

/// The columns: ids of the log, label (0 or 1), milliseconds since 1970, and train, valid or test.
const COLUMNS: [&str; 5] = ["user", "item", "label", "time", "part"];

pub fn export(args: &Export) -> dfar::Result<()> {
    let data = Dataset::open(&args.file)?;
    if replaced(&args.output, [args.file.as_path()]).is_some() {
        let value = args.output.display().to_string();
        return Err(
            DataError::InvalidOption { option: "output", value, reason: "is the data set itself" }.into()
        );
    }
    let parquet = match (args.to, args.output.extension().and_then(|ending| ending.to_str())) {
        (Some(to), _) => to == To::Parquet,
        (None, Some("parquet")) => true,
        (None, None | Some("csv")) => false,
        (None, Some(_)) => {
            let value = args.output.display().to_string();
            let reason = "ends in neither .csv nor .parquet: give --to";
            return Err(DataError::InvalidOption { option: "output", value, reason }.into());
        }
    };
    let failed = |source: std::io::Error| Error::io("write", &args.output)(source);
    if args.output == Path::new("-") {
        let mut out = BufWriter::new(std::io::stdout());
        return write(&data, &mut out, parquet)
            .and_then(|()| out.flush())
            .map_err(Error::io("write", "<stdout>"));
    }
    let mut out = Replacement::new(&args.output).map_err(failed)?;
    write(&data, &mut out, parquet).map_err(failed)?;
    out.finish().map_err(failed)
}

fn write(data: &Dataset, out: &mut (impl Write + Send), parquet: bool) -> std::io::Result<()> {
    if parquet { write_parquet(data, out) } else { write_csv(data, out) }
}

/// One event.
struct Event<'a> {
    user: &'a str,
    item: &'a str,
    label: u8,
    time: i64,
    part: &'static str,
}

/// All events, by user and time.
fn events(data: &Dataset) -> impl Iterator<Item = Event<'_>> {
    (0..data.users() as u32).flat_map(move |user| {
        let events = data.user(user);
        (0..events.items.len()).map(move |at| Event {
            user: data.user_name(user),
            item: data.item_name(events.items[at]),
            label: events.feedback[at],
            time: events.times[at],
            part: match at {
                at if at < events.train_end => "train",
                at if at < events.valid_end => "valid",
                _ => "test",
            },
        })
    })
}

/// Texts are quoted and numbers are not. Ids are always texts: they may begin with a byte order
/// mark, and "007" must not become a number.
fn write_csv(data: &Dataset, out: &mut impl Write) -> std::io::Result<()> {
    let names = COLUMNS.map(|name| format!("\"{name}\"")).join(",");
    writeln!(out, "{names}")?;
    for Event { user, item, label, time, part } in events(data) {
        writeln!(out, "{},{},{label},{time},\"{part}\"", Quoted(user), Quoted(item))?;
    }
    Ok(())
}

/// A quoted field of a CSV file.
struct Quoted<'a>(&'a str);

impl std::fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        let mut parts = self.0.split('"');
        write!(f, "\"{}", parts.next().unwrap_or_default())?;
        parts.try_for_each(|part| write!(f, "\"\"{part}"))?;
        f.write_str("\"")
    }
}

#[cfg(not(feature = "parquet"))]
fn write_parquet(_: &Dataset, _: &mut impl Write) -> std::io::Result<()> {
    let reason = "this program was built without the feature `parquet`";
    Err(std::io::Error::new(std::io::ErrorKind::Unsupported, reason))
}

#[cfg(feature = "parquet")]
fn write_parquet(data: &Dataset, out: &mut (impl Write + Send)) -> std::io::Result<()> {
    use arrow_array::{ArrayRef, Int8Array, RecordBatch, StringArray, TimestampMillisecondArray};
    use parquet::arrow::ArrowWriter;
    use parquet::basic::{Compression, ZstdLevel};
    use parquet::errors::ParquetError;
    use parquet::file::properties::WriterProperties;
    use std::io::Error;
    use std::sync::Arc;

    const BATCH_ROWS: usize = 1 << 16;
    // The kind of an error of the output is kept: a closed pipe is not a failure.
    let failed = |error: ParquetError| match error {
        ParquetError::External(source) => source.downcast().map_or_else(Error::other, |error| *error),
        error => Error::other(error),
    };
    let batch = |events: &[Event]| {
        let texts = |column: fn(&Event) -> String| {
            Arc::new(StringArray::from_iter_values(events.iter().map(column))) as ArrayRef
        };
        let labels = Int8Array::from_iter_values(events.iter().map(|event| event.label as i8));
        let times = TimestampMillisecondArray::from_iter_values(events.iter().map(|event| event.time));
        let columns = [
            texts(|event| event.user.to_owned()),
            texts(|event| event.item.to_owned()),
            Arc::new(labels) as ArrayRef,
            Arc::new(times.with_timezone("UTC")) as ArrayRef,
            texts(|event| event.part.to_owned()),
        ];
        RecordBatch::try_from_iter(COLUMNS.into_iter().zip(columns)).expect("the columns are of one length")
    };
    let options =
        WriterProperties::builder().set_compression(Compression::ZSTD(ZstdLevel::default())).build();
    let mut writer = ArrowWriter::try_new(out, batch(&[]).schema(), Some(options)).map_err(failed)?;
    let mut all = events(data);
    loop {
        let some: Vec<Event> = all.by_ref().take(BATCH_ROWS).collect();
        if some.is_empty() {
            break;
        }
        writer.write(&batch(&some)).map_err(failed)?;
    }
    writer.close().map_err(failed)?;
    Ok(())
}
