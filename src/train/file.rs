//! Run files, complete or absent: written under a temporary name, forced to disk, renamed. They carry
//! a checksum of their content and tensors.

use crate::model::HostTensor;
use crate::replacement::sync_folder_of;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use thiserror::Error;

/// Version of the metadata. Version 1 had a checksum of names and values only.
const VERSION: u32 = 2;
/// Key of the safetensors metadata. A single key, because several would have no fixed order.
const KEY: &str = "dfar";

/// A run file that cannot be written or read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FileError {
    /// Reading failed.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Writing failed.
    #[error("cannot write {}: {source}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Not a safetensors file, or one written by another program.
    #[error("{} is not a dfar {kind} file: {reason}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// `checkpoint` or `model`.
        kind: &'static str,
        /// The reason.
        reason: String,
    },
    /// Written by another version of this program.
    #[error("{} has version {found}; this program reads version {VERSION}", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The content or the tensors do not match their checksum.
    #[error("{} is damaged: checksum {found:08x}, expected {expected:08x}", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// From the metadata.
        expected: u32,
        /// Computed from content and tensors.
        found: u32,
    },
}

/// The name of `path` while it is written. It is fixed, so that the next write replaces the
/// leftovers of a killed process.
pub(super) fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().expect("a run file has a name").to_string_lossy();
    path.with_file_name(format!(".{name}.partial"))
}

/// Replaces `path` by the bytes that `write` writes. After a crash or power loss, `path` is either
/// the old file or the complete new one. Two processes must not replace the same file at once.
pub fn replace(
    path: &Path,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), FileError> {
    let temporary = temporary(path);
    let replaced = (|| {
        let mut file = BufWriter::with_capacity(1 << 20, File::create(&temporary)?);
        write(&mut file)?;
        file.into_inner().map_err(|error| error.into_error())?.sync_all()?;
        rename(&temporary, path)
    })();
    replaced.map_err(|source| {
        let _ = std::fs::remove_file(&temporary);
        FileError::Write { path: path.to_owned(), source }
    })
}

/// [`replace`] with these bytes.
pub fn replace_bytes(path: &Path, bytes: &[u8]) -> Result<(), FileError> {
    replace(path, |file| file.write_all(bytes))
}

/// Renames a file, and forces the new name to disk.
pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    std::fs::rename(from, to)?;
    sync_folder_of(to)
}

/// The tensors of a file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tensors {
    /// f32 tensors.
    pub values: Vec<HostTensor>,
    /// Byte strings by name.
    pub bytes: Vec<(String, Vec<u8>)>,
}

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    kind: String,
    version: u32,
    crc32: u32,
    content: T,
}

/// Writes tensors, with `content` as metadata, and returns the checksum of both.
pub fn write<T: Serialize>(
    path: &Path,
    kind: &'static str,
    content: &T,
    tensors: &Tensors,
) -> Result<u32, FileError> {
    let mut parts: Vec<(&str, Dtype, Vec<usize>, &[u8])> = Vec::new();
    for tensor in &tensors.values {
        let data = bytemuck::cast_slice(&tensor.values);
        parts.push((&tensor.name, Dtype::F32, tensor.shape.clone(), data));
    }
    for (name, bytes) in &tensors.bytes {
        parts.push((name, Dtype::U8, vec![bytes.len()], bytes));
    }
    parts.sort_by_key(|&(name, ..)| name);
    let content = serde_json::to_value(content).expect("run metadata has string keys and finite numbers");
    let crc32 = checksum(&content, parts.iter().map(|(name, _, shape, data)| (*name, &shape[..], *data)));
    let envelope = Envelope { kind: kind.to_owned(), version: VERSION, crc32, content };
    let text = serde_json::to_string(&envelope).expect("a value has a text");

    // The order of the safetensors library: widest elements first, so that all are aligned; then by
    // name.
    parts.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    let mut end = 0;
    let infos = parts.iter().map(|(name, dtype, shape, data)| {
        let start = end;
        end += data.len();
        let info = TensorInfo { dtype: *dtype, shape: shape.clone(), data_offsets: (start, end) };
        ((*name).to_owned(), info)
    });
    let header = Metadata::new(Some(HashMap::from([(KEY.to_owned(), text)])), infos.collect())
        .expect("a tensor's shape and its values agree");
    let mut header = serde_json::to_vec(&header).expect("a header is plain data");
    header.resize(header.len().next_multiple_of(8), b' ');
    // The library's own writer uses a temporary file with a random name, which would remain after a
    // kill.
    replace(path, |file| {
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(&header)?;
        parts.iter().try_for_each(|(_, _, _, data)| file.write_all(data))
    })?;
    Ok(crc32)
}

/// Reads and checks a file of [`write()`]; also returns the checksum.
pub fn read<T: DeserializeOwned>(path: &Path, kind: &'static str) -> Result<(T, Tensors, u32), FileError> {
    let bytes = std::fs::read(path).map_err(|source| FileError::Read { path: path.to_owned(), source })?;
    let refuse = |reason: String| FileError::Format { path: path.to_owned(), kind, reason };
    let (_, header) = SafeTensors::read_metadata(&bytes)
        .map_err(|e| refuse(format!("it is damaged, cut short, or no safetensors file ({e})")))?;
    let text = header.metadata().as_ref().and_then(|m| m.get(KEY));
    let text = text.ok_or_else(|| refuse(format!("no `{KEY}` entry in its metadata")))?;
    // The version first: later versions may have other content.
    let envelope: Envelope<serde_json::Value> =
        serde_json::from_str(text).map_err(|e| refuse(e.to_string()))?;
    if envelope.kind != kind {
        return Err(refuse(format!("it is a {} file", envelope.kind)));
    }
    if envelope.version != VERSION {
        return Err(FileError::Version { path: path.to_owned(), found: envelope.version });
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| refuse(e.to_string()))?;
    let mut views = file.tensors();
    views.sort_by(|a, b| a.0.cmp(&b.0));
    let parts = views.iter().map(|(name, view)| (name.as_str(), view.shape(), view.data()));
    let found = checksum(&envelope.content, parts);
    if found != envelope.crc32 {
        return Err(FileError::Checksum { path: path.to_owned(), expected: envelope.crc32, found });
    }
    let content = serde_json::from_value(envelope.content).map_err(|e| refuse(e.to_string()))?;
    let mut tensors = Tensors::default();
    for (name, view) in views {
        match view.dtype() {
            Dtype::F32 => tensors.values.push(HostTensor {
                shape: view.shape().to_vec(),
                values: f32s(view.data()),
                name,
            }),
            Dtype::U8 => tensors.bytes.push((name, view.data().to_vec())),
            other => return Err(refuse(format!("tensor {name} is {other:?}"))),
        }
    }
    Ok((content, tensors, found))
}

/// The data in the file need not be aligned for f32.
fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().expect("chunks of 4"))).collect()
}

/// `tensors`: names, shapes and bytes.
fn checksum<'a>(
    content: &serde_json::Value,
    tensors: impl Iterator<Item = (&'a str, &'a [usize], &'a [u8])>,
) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    // The text of a value is the same before and after it is written and read: keys are sorted, and
    // numbers keep their value.
    hasher.update(content.to_string().as_bytes());
    for (name, shape, data) in tensors {
        hasher.update(format!("{name}{shape:?}").as_bytes());
        hasher.update(&(data.len() as u64).to_le_bytes());
        hasher.update(data);
    }
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Tensors {
        Tensors {
            values: vec![
                HostTensor {
                    name: "b".into(),
                    shape: vec![2, 2],
                    values: vec![1.0, -0.0, f32::MIN_POSITIVE, 4.0],
                },
                HostTensor { name: "c".into(), shape: vec![1], values: vec![5.0] },
            ],
            bytes: vec![("a".into(), vec![1, 2, 3])],
        }
    }

    #[test]
    fn a_file_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        let crc = write(&path, "model", &(0.1f64 + 0.2, "text"), &sample()).unwrap();
        let (content, tensors, found): ((f64, String), _, _) = read(&path, "model").unwrap();
        assert_eq!((content.0.to_bits(), content.1.as_str()), ((0.1f64 + 0.2).to_bits(), "text"));
        assert_eq!((tensors, found), (sample(), crc));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file stays");
    }

    /// Other users of the library can read the file, and would write the same bytes.
    #[test]
    fn the_bytes_are_those_of_the_safetensors_library() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        write(&path, "model", &7, &sample()).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(safetensors::serialize(file.tensors(), header.metadata().clone()).unwrap(), bytes);
    }

    #[test]
    fn every_damaged_file_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        write(&path, "model", &7, &sample()).unwrap();
        let good = std::fs::read(&path).unwrap();
        let reads = |bytes: &[u8]| {
            std::fs::write(&path, bytes).unwrap();
            read::<i32>(&path, "model")
        };
        for length in 0..good.len() {
            assert!(reads(&good[..length]).is_err(), "cut to {length} bytes");
        }
        for at in 0..good.len() {
            for bit in [1, 16] {
                let mut bad = good.clone();
                bad[at] ^= bit;
                assert!(reads(&bad).is_err(), "byte {at} altered");
            }
        }
        assert!(reads(&good).is_ok());
        assert!(matches!(read::<i32>(&path, "checkpoint"), Err(FileError::Format { .. })));
    }
}
