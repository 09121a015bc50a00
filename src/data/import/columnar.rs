//! Parquet and Arrow IPC: columns by name, rows by number.

use super::DataError;
use super::layout::Context;
use super::rows::{Each, Rows};
use std::fs::File;
use std::io::{self, Read};

/// A columnar format, by the first bytes of a log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Parquet,
    /// An Arrow IPC file (Feather version 2).
    ArrowFile,
    /// An Arrow IPC stream.
    ArrowStream,
}

impl Kind {
    pub(super) fn of(magic: &[u8]) -> Option<Kind> {
        match magic {
            [b'P', b'A', b'R', b'1', ..] => Some(Kind::Parquet),
            [b'A', b'R', b'R', b'O', b'W', b'1', ..] => Some(Kind::ArrowFile),
            [0xff, 0xff, 0xff, 0xff, _, _, 0, 0, ..] => Some(Kind::ArrowStream),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Kind::Parquet => "Parquet",
            Kind::ArrowFile => "an Arrow file",
            Kind::ArrowStream => "an Arrow stream",
        }
    }
}

#[cfg(not(feature = "parquet"))]
pub(super) fn read(
    _: &mut Rows,
    context: &Context,
    kind: Kind,
    _: Box<dyn Read + '_>,
    _: Option<File>,
    _: Each,
) -> Result<(), DataError> {
    let reason = format!("it is {}, and this program was built without the feature `parquet`", kind.name());
    Err(DataError::read(context.name)(io::Error::new(io::ErrorKind::Unsupported, reason)))
}

#[cfg(feature = "parquet")]
pub(super) use with_arrow::read;

#[cfg(feature = "parquet")]
mod with_arrow {
    use super::super::arrow_claims;
    use super::super::fields::SLOTS;
    use super::super::layout::{Columns, Role, label_name};
    use super::super::rows::{Cell, Reading};
    use super::super::time::RawTime;
    use super::*;
    use arrow_array::cast::AsArray;
    use arrow_array::types::*;
    use arrow_array::{Array, ArrayRef, RecordBatch};
    use arrow_schema::{DataType, Schema, TimeUnit};
    use parquet::arrow::ProjectionMask;
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
    use parquet::file::metadata::ParquetMetaData;
    use std::borrow::Cow;
    use std::collections::BTreeSet;
    use std::io::{BufReader, Seek, SeekFrom};
    use std::sync::Once;

    /// Rows decoded at a time.
    const BATCH_ROWS: usize = 8192;

    /// Reads all rows. A compressed log is first unpacked to a temporary file, because it is read
    /// twice, a Parquet or Arrow file from its end.
    pub(in super::super) fn read(
        rows: &mut Rows,
        context: &Context,
        kind: Kind,
        bytes: Box<dyn Read + '_>,
        file: Option<File>,
        each: Each,
    ) -> Result<(), DataError> {
        let damaged = |error: String| {
            let reason = format!("it begins as {}, but {error}", kind.name());
            DataError::read(context.name)(io::Error::new(io::ErrorKind::InvalidData, reason))
        };
        let seekable = |mut bytes: Box<dyn Read + '_>, file: Option<File>| match file {
            Some(file) if file.metadata().is_ok_and(|data| data.is_file()) => Ok(file),
            _ => {
                let folder = rows.options.folder();
                let mut copy = tempfile::tempfile_in(folder).map_err(DataError::write(folder))?;
                io::copy(&mut bytes, &mut copy).map_err(DataError::read(context.name))?;
                copy.rewind().map_err(DataError::read(folder))?;
                Ok(copy)
            }
        };
        let (columns, mut batches): (Columns, Batches) = match kind {
            Kind::Parquet => {
                let mut file = seekable(bytes, file)?;
                let copy = file.try_clone().map_err(DataError::read(context.name))?;
                let builder = decode(|| ParquetRecordBatchReaderBuilder::try_new(copy)).map_err(damaged)?;
                let joined = || Ok::<_, String>(follows_another(&mut file, builder.metadata()));
                if decode(joined).map_err(damaged)? {
                    let reason = "another Parquet file is in front of it: import them as two files";
                    return Err(damaged(reason.to_owned()));
                }
                let columns = columns(context, builder.schema())?;
                // Only the needed columns are decoded.
                let indices = columns.iter().flatten().map(|column| column.index);
                let mask = ProjectionMask::roots(builder.parquet_schema(), indices);
                let builder = builder.with_projection(mask).with_batch_size(BATCH_ROWS);
                let mut reader = decode(|| builder.build()).map_err(damaged)?;
                (columns, Box::new(move || decode(|| reader.next().transpose())))
            }
            Kind::ArrowFile => {
                let mut file = BufReader::new(seekable(bytes, file)?);
                decode(|| arrow_claims::check_file(&mut file)).map_err(damaged)?;
                let mut reader =
                    decode(|| arrow_ipc::reader::FileReader::try_new(file, None)).map_err(damaged)?;
                let columns = columns(context, &reader.schema())?;
                (columns, Box::new(move || decode(|| reader.next().transpose())))
            }
            Kind::ArrowStream => {
                let mut file = BufReader::new(seekable(bytes, file)?);
                decode(|| arrow_claims::check_stream(&mut file)).map_err(damaged)?;
                file.rewind().map_err(DataError::read(context.name))?;
                let mut reader =
                    decode(|| arrow_ipc::reader::StreamReader::try_new(file, None)).map_err(damaged)?;
                let columns = columns(context, &reader.schema())?;
                (columns, Box::new(move || decode(|| reader.next().transpose())))
            }
        };
        read_batches(rows, context, kind, &columns, || batches().map_err(damaged), each)
    }

    /// Whether the file is two Parquet files end to end, of which the decoder would read the values
    /// of the first by the footer of the second.
    fn follows_another(file: &mut File, metadata: &ParquetMetaData) -> bool {
        let chunks = metadata.row_groups().iter().flat_map(|group| group.columns());
        let parts = chunks.flat_map(|chunk| {
            let (start, length) = chunk.byte_range();
            let bloom = chunk.bloom_filter_offset().zip(chunk.bloom_filter_length());
            // Negative numbers, of a damaged file, count as none.
            let bloom = bloom.and_then(|(start, length)| {
                Some(u64::try_from(start).ok()?.saturating_add(u64::try_from(length).ok()?))
            });
            let indices = [chunk.column_index_range(), chunk.offset_index_range()];
            let indices = indices.map(|range| range.map(|range| range.end));
            [Some(start.saturating_add(length)), bloom, indices[0], indices[1]]
        });
        // By its own offsets, the file ends here; the rest of it is footer, length and magic.
        let Some(end) = parts.flatten().max() else { return false };
        let mut eight_bytes = |at| {
            let mut bytes = [0; 8];
            file.seek(at).and_then(|_| file.read_exact(&mut bytes)).ok()?;
            Some((file.stream_position().ok()?, bytes))
        };
        let Some((whole, tail)) = eight_bytes(SeekFrom::End(-8)) else { return false };
        let footer = u32::from_le_bytes(tail[..4].try_into().expect("4 bytes"));
        let border = whole
            .checked_sub(end.saturating_add(u64::from(footer) + 8))
            .and_then(|first| first.checked_sub(4));
        border
            .and_then(|border| eight_bytes(SeekFrom::Start(border)))
            .is_some_and(|(_, bytes)| bytes == *b"PAR1PAR1")
    }

    /// Returns the next batch of rows, or why the file is damaged.
    type Batches<'a> = Box<dyn FnMut() -> Result<Option<RecordBatch>, String> + 'a>;

    thread_local! {
        /// Whether this thread is in [`decode`].
        static DECODING: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }

    /// Calls a decoder. Some decoders panic on damaged files (arrow 60: a buffer beyond the end of
    /// a message); the panic becomes an error of the file, without a message of its own. A decoder
    /// that failed is not used again.
    fn decode<T, E: ToString>(call: impl FnOnce() -> Result<T, E>) -> Result<T, String> {
        static QUIET: Once = Once::new();
        QUIET.call_once(|| {
            let hook = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |panic| {
                if !DECODING.get() {
                    hook(panic);
                }
            }));
        });
        DECODING.set(true);
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call));
        DECODING.set(false);
        match result {
            Ok(result) => result.map_err(|error| error.to_string()),
            Err(_) => Err("its content contradicts itself".to_owned()),
        }
    }

    /// The needed columns. Their types must leave only one meaning to each value.
    fn columns(context: &Context, schema: &Schema) -> Result<Columns, DataError> {
        let names: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
        let columns = context.by_names(&names)?;
        for role in Role::ALL {
            let Some(column) = &columns[role as usize] else { continue };
            let kind = schema.field(column.index).data_type();
            let fits = match role {
                Role::User | Role::Item => is_text(kind) || is_whole(kind),
                Role::Time => is_text(kind) || is_whole(kind) || is_real(kind) || is_instant(kind),
                Role::Label => is_text(kind) || is_whole(kind) || is_real(kind) || *kind == DataType::Boolean,
                Role::Date => is_text(kind) || is_whole(kind),
            };
            if !fits {
                let words = match role {
                    Role::User | Role::Item => "text or whole numbers",
                    Role::Time => "numbers, timestamps, dates or text",
                    Role::Label => "numbers, booleans or text",
                    Role::Date => "text or whole numbers (a date of its own type is a time column)",
                };
                return Err(context.unknown(format!(
                    "its column {} is {kind}, and a {} column must be {words}",
                    column.name,
                    role.name()
                )));
            }
        }
        Ok(columns)
    }

    fn is_text(kind: &DataType) -> bool {
        match kind {
            DataType::Dictionary(_, value) => is_text(value),
            DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View => true,
            DataType::Binary | DataType::LargeBinary | DataType::BinaryView => true,
            _ => false,
        }
    }

    fn is_whole(kind: &DataType) -> bool {
        match kind {
            DataType::Dictionary(_, value) => is_whole(value),
            kind => kind.is_integer(),
        }
    }

    fn is_real(kind: &DataType) -> bool {
        matches!(kind, DataType::Float32 | DataType::Float64 | DataType::Decimal128(..))
    }

    fn is_instant(kind: &DataType) -> bool {
        matches!(kind, DataType::Timestamp(..) | DataType::Date32 | DataType::Date64)
    }

    fn read_batches(
        rows: &mut Rows,
        context: &Context,
        kind: Kind,
        columns: &Columns,
        mut batches: impl FnMut() -> Result<Option<RecordBatch>, DataError>,
        each: Each,
    ) -> Result<(), DataError> {
        let rule = context.rule(label_name(columns));
        let reading = Reading { name: context.name, columns, rule: &rule };
        rows.decided(&reading, kind.name());
        let needed: BTreeSet<usize> = columns.iter().flatten().map(|column| column.index).collect();
        let mut number = 0;
        while let Some(batch) = batches()? {
            let arrays = columns.each_ref().map(|column| {
                let index = column.as_ref()?.index;
                let index = match kind {
                    // A projected batch has only the needed columns, in the order of the file.
                    Kind::Parquet => needed.iter().take_while(|&&other| other < index).count(),
                    _ => index,
                };
                Some(Values::new(batch.column(index)))
            });
            for row in 0..batch.num_rows() {
                number += 1;
                rows.read += 1;
                let cells: [Cell; SLOTS] = arrays
                    .each_ref()
                    .map(|values| values.as_ref().map_or(Cell::Absent, |values| values.cell(row)));
                rows.row(&reading, number, cells, || "null".into(), each)?;
            }
        }
        Ok(())
    }

    /// A column of a batch.
    struct Values<'a> {
        array: &'a ArrayRef,
        /// For a dictionary: the index of each row's value.
        keys: Option<Vec<usize>>,
        values: &'a ArrayRef,
    }

    impl<'a> Values<'a> {
        fn new(array: &'a ArrayRef) -> Values<'a> {
            match array.as_any_dictionary_opt() {
                Some(dictionary) if !dictionary.values().is_empty() => {
                    Values { array, keys: Some(dictionary.normalized_keys()), values: dictionary.values() }
                }
                _ => Values { array, keys: None, values: array },
            }
        }

        fn cell(&self, row: usize) -> Cell<'a> {
            if self.array.is_null(row) {
                return Cell::Absent;
            }
            let at = self.keys.as_ref().map_or(row, |keys| keys[row]);
            if self.values.is_null(at) {
                return Cell::Absent;
            }
            cell(self.values, at)
        }
    }

    /// The number with the same shortest decimal form.
    fn shortest(x: f32) -> f64 {
        match x.fract() == 0.0 {
            true => x.into(),
            false => x.to_string().parse().unwrap_or(f64::NAN),
        }
    }

    fn cell(array: &ArrayRef, row: usize) -> Cell<'_> {
        macro_rules! value {
            ($kind:ty) => {
                array.as_primitive::<$kind>().value(row)
            };
        }
        // Trims the same blanks as the text formats.
        fn text(bytes: &[u8]) -> Cell<'_> {
            Cell::Text(Cow::Borrowed(bytes.trim_ascii()))
        }
        let days = |days: i64| Cell::Instant(RawTime { whole: days * 86_400, billionths: 0 });
        match array.data_type() {
            DataType::Utf8 => text(array.as_string::<i32>().value(row).as_bytes()),
            DataType::LargeUtf8 => text(array.as_string::<i64>().value(row).as_bytes()),
            DataType::Utf8View => text(array.as_string_view().value(row).as_bytes()),
            DataType::Binary => text(array.as_binary::<i32>().value(row)),
            DataType::LargeBinary => text(array.as_binary::<i64>().value(row)),
            DataType::BinaryView => text(array.as_binary_view().value(row)),
            DataType::Int8 => Cell::Whole(value!(Int8Type).into()),
            DataType::Int16 => Cell::Whole(value!(Int16Type).into()),
            DataType::Int32 => Cell::Whole(value!(Int32Type).into()),
            DataType::Int64 => Cell::Whole(value!(Int64Type)),
            DataType::UInt8 => Cell::Whole(value!(UInt8Type).into()),
            DataType::UInt16 => Cell::Whole(value!(UInt16Type).into()),
            DataType::UInt32 => Cell::Whole(value!(UInt32Type).into()),
            DataType::UInt64 => {
                let number = value!(UInt64Type);
                i64::try_from(number).map_or(Cell::Natural(number), Cell::Whole)
            }
            // 0.1, not the 0.10000000149 that it is in f64.
            DataType::Float32 => Cell::Real(shortest(value!(Float32Type))),
            DataType::Float64 => Cell::Real(value!(Float64Type)),
            DataType::Decimal128(_, scale) => Cell::Decimal { number: value!(Decimal128Type), scale: *scale },
            DataType::Boolean => Cell::Flag(array.as_boolean().value(row)),
            DataType::Date32 => days(value!(Date32Type).into()),
            DataType::Date64 => Cell::Instant(RawTime::seconds(value!(Date64Type), 1000)),
            DataType::Timestamp(unit, _) => Cell::Instant(match unit {
                TimeUnit::Second => RawTime::seconds(value!(TimestampSecondType), 1),
                TimeUnit::Millisecond => RawTime::seconds(value!(TimestampMillisecondType), 1000),
                TimeUnit::Microsecond => RawTime::seconds(value!(TimestampMicrosecondType), 1_000_000),
                TimeUnit::Nanosecond => RawTime::seconds(value!(TimestampNanosecondType), 1_000_000_000),
            }),
            _ => Cell::Absent,
        }
    }
}
