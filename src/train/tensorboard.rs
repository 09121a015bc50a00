//! TensorBoard event files: the numbers of the log as scalars.
//!
//! A file is a sequence of records: length (u64), masked CRC-32C of the length, a protobuf message
//! `Event`, masked CRC-32C of the message; integers are little-endian (TensorFlow's `TFRecord`).
//! Of `Event` this file writes
//!
//! ```text
//! Event   { 1: wall_time f64, 2: step i64, 3: file_version string, 5: Summary, 7: SessionLog }
//! Summary { 1: repeated Value { 1: tag string, 2: simple_value f32 } }
//! SessionLog { 1: status enum, START = 1 }
//! ```

use super::file::FileError;
use serde_json::Value;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Protobuf wire types.
const VARINT: u8 = 0;
const FIXED_64: u8 = 1;
const BYTES: u8 = 2;
const FIXED_32: u8 = 5;

/// The events of one session of a run. TensorBoard reads all sessions in a directory as one run.
pub struct EventFile {
    path: PathBuf,
    file: File,
}

impl EventFile {
    /// Begins the next file in `folder`. `step` is the first step to come: TensorBoard discards
    /// what an earlier session wrote from there on.
    pub fn begin(folder: &Path, step: u64) -> Result<Self, FileError> {
        let name = |session: u32| folder.join(format!("events.out.tfevents.{session:04}.dfar"));
        let mut session = 1;
        let (path, file) = loop {
            let path = name(session);
            match File::create_new(&path) {
                Ok(file) => break (path, file),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => session += 1,
                Err(source) => return Err(FileError::Write { path, source }),
            }
        };
        let mut events = Self { path, file };
        let now = seconds_since_1970();
        let mut version = event(now, 0);
        bytes(&mut version, 3, b"brain.Event:2");
        events.append(&version)?;
        let mut start = event(now, step);
        bytes(&mut start, 7, &[tag(1, VARINT), 1]);
        events.append(&start)?;
        Ok(events)
    }

    /// Appends the numbers of a line of the log, named `event/key`. Lines without a step have no
    /// place on the axis and are skipped.
    pub fn line(&mut self, line: &Value) -> Result<(), FileError> {
        let Some((step, summary)) = summary(line) else { return Ok(()) };
        let mut message = event(seconds_since_1970(), step);
        bytes(&mut message, 5, &summary);
        self.append(&message)
    }

    fn append(&mut self, message: &[u8]) -> Result<(), FileError> {
        self.file
            .write_all(&record(message))
            .map_err(|source| FileError::Write { path: self.path.clone(), source })
    }
}

/// The step and the encoded `Summary` of a line of the log.
fn summary(line: &Value) -> Option<(u64, Vec<u8>)> {
    let kind = line["event"].as_str()?;
    let step = line["step"].as_u64()?;
    let mut values = Vec::new();
    scalars(kind, line, &mut values);
    Some((step, values))
}

/// Encodes the numbers below `prefix`, each as a `Value` of a `Summary`.
fn scalars(prefix: &str, value: &Value, out: &mut Vec<u8>) {
    let Value::Object(fields) = value else { return };
    for (key, value) in fields {
        if ["step", "epoch", "batch"].contains(&key.as_str()) {
            continue; // the axis
        }
        let name = format!("{prefix}/{key}");
        match value.as_f64() {
            Some(number) => {
                let mut scalar = Vec::new();
                bytes(&mut scalar, 1, name.as_bytes());
                scalar.push(tag(2, FIXED_32));
                scalar.extend((number as f32).to_le_bytes());
                bytes(out, 1, &scalar);
            }
            None => scalars(&name, value, out),
        }
    }
}

/// An `Event` without contents.
fn event(wall_time: f64, step: u64) -> Vec<u8> {
    let mut out = vec![tag(1, FIXED_64)];
    out.extend(wall_time.to_le_bytes());
    out.push(tag(2, VARINT));
    varint(&mut out, step);
    out
}

fn tag(field: u8, wire_type: u8) -> u8 {
    field << 3 | wire_type
}

/// A field of bytes, a string or a message.
fn bytes(out: &mut Vec<u8>, field: u8, value: &[u8]) {
    out.push(tag(field, BYTES));
    varint(out, value.len() as u64);
    out.extend(value);
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 1 << 7 {
        out.push(value as u8 | 1 << 7);
        value >>= 7;
    }
    out.push(value as u8);
}

fn record(message: &[u8]) -> Vec<u8> {
    let length = (message.len() as u64).to_le_bytes();
    let crc = |bytes| crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes();
    [&length[..], &crc(&length), message, &crc(message)].concat()
}

fn seconds_since_1970() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_have_the_bytes_of_tensorboards_own_writer() {
        let line = serde_json::json!({
            "event": "step", "epoch": 4, "batch": 2, "step": 300, "best": true,
            "loss": { "bce": 0.25 }, "rows": 2000,
        });
        let (step, values) = summary(&line).expect("it has a step");
        let mut message = event(1.5, step);
        bytes(&mut message, 5, &values);
        // tensorboard.summary.writer.record_writer of tensorboard 2.21
        let expected = "36000000000000004f578cef09000000000000f83f10ac022a280a140a0d737465702f6c6f7373\
                        2f626365150000803e0a100a09737465702f726f7773150000fa4488c72988";
        let found: String = record(&message).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(found, expected);
    }

    #[test]
    fn lines_without_a_place_on_the_axis_are_skipped() {
        for line in [
            serde_json::json!({ "event": "start", "parameters": 7 }),
            serde_json::json!({ "event": "resume", "epoch": 2, "batch": 5 }),
        ] {
            assert!(summary(&line).is_none(), "{line}");
        }
    }

    #[test]
    fn a_session_does_not_touch_the_files_of_an_earlier_one() {
        let folder = tempfile::tempdir().unwrap();
        for session in 1..=3 {
            EventFile::begin(folder.path(), session).unwrap();
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 3);
    }
}
