//! Writes a data set file: all sections grow in parallel, then are joined under the final name.

use super::format::{
    self, ALIGNMENT, ENTRY_LENGTH, Entry, FLAG_CEILING, HEADER_LENGTH, Header, MAGIC, Section,
};
use super::names::Names;
use super::{DataError, Protocol};
use crate::replacement::Replacement;
use bytemuck::{Pod, Zeroable};
use rayon::prelude::*;
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use tempfile::SpooledTempFile;

/// A section up to this size stays in memory.
const SPOOL_BYTES: usize = 1 << 18;

/// Refuses standard output, and a file that is no data set: a log could be lost.
pub(super) fn check_output(path: &Path) -> Result<(), DataError> {
    let refuse = |reason| {
        Err(DataError::InvalidOption { option: "output", value: path.display().to_string(), reason })
    };
    if path == Path::new("-") {
        return refuse("is standard output, but a data set is mapped into memory: name a file");
    }
    // Anything but a regular file is refused when it would be replaced.
    if path.is_file() {
        let mut magic = Vec::new();
        let file = std::fs::File::open(path).map_err(DataError::read(path))?;
        file.take(MAGIC.len() as u64).read_to_end(&mut magic).map_err(DataError::read(path))?;
        if !MAGIC.starts_with(&magic) {
            return refuse("is a file, but not a data set: give another name, or remove it");
        }
    }
    Ok(())
}

/// The sections written so far.
#[derive(Debug)]
pub(super) struct Writer {
    sections: Vec<Spool>,
    folder: PathBuf,
}

#[derive(Debug)]
struct Spool {
    file: BufWriter<SpooledTempFile>,
    checksum: crc32fast::Hasher,
    length: u64,
}

/// The counts of the header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub users: usize,
    pub items: usize,
    pub events: u64,
    pub negatives: usize,
    pub ceiling: bool,
}

impl Writer {
    /// Sections go to nameless temporary files in `folder`.
    pub(super) fn new(folder: &Path) -> Writer {
        let spool = |_| Spool {
            file: BufWriter::new(tempfile::spooled_tempfile_in(SPOOL_BYTES, folder)),
            checksum: crc32fast::Hasher::new(),
            length: 0,
        };
        Writer { sections: Section::ALL.into_iter().map(spool).collect(), folder: folder.to_owned() }
    }

    /// Appends to a section.
    pub(super) fn put<T: Pod>(&mut self, section: Section, values: &[T]) -> Result<(), DataError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let spool = &mut self.sections[section as usize];
        spool.checksum.update(bytes);
        spool.length += bytes.len() as u64;
        spool.file.write_all(bytes).map_err(DataError::write(&self.folder))
    }

    /// Writes a vocabulary: offsets, text, and the ids in the order of their names.
    pub(super) fn put_names(
        &mut self,
        [offsets, text, order]: [Section; 3],
        names: &Names,
    ) -> Result<(), DataError> {
        self.put(offsets, &[0u64])?;
        let mut end = 0;
        for id in 0..names.len() as u32 {
            let name = names.get(id);
            end += name.len() as u64;
            self.put(offsets, &[end])?;
            self.put(text, name.as_bytes())?;
        }
        let mut ids: Vec<u32> = (0..names.len() as u32).collect();
        ids.par_sort_unstable_by(|&a, &b| names.get(a).cmp(names.get(b)));
        self.put(order, &ids)
    }

    /// Joins the sections in one file. It is written under a temporary name beside `path`, flushed
    /// to the disk and renamed, so `path` is either unchanged or complete.
    pub(super) fn finish(
        mut self,
        path: &Path,
        counts: Counts,
        protocol: &Protocol,
    ) -> Result<(), DataError> {
        let json = serde_json::to_vec(protocol).expect("a protocol is plain data");
        self.put(Section::Protocol, &json)?;

        let mut table = Vec::with_capacity(ENTRY_LENGTH * self.sections.len());
        let mut end = (HEADER_LENGTH + ENTRY_LENGTH * self.sections.len()) as u64;
        for (section, spool) in Section::ALL.into_iter().zip(&self.sections) {
            let entry = Entry {
                kind: section as u32,
                offset: end + format::padding(end),
                length: spool.length,
                checksum: spool.checksum.clone().finalize(),
                ..Entry::zeroed()
            };
            end = entry.offset + entry.length;
            table.extend_from_slice(bytemuck::bytes_of(&entry));
        }
        let mut header = Header {
            magic: format::MAGIC,
            version: format::VERSION,
            sections: self.sections.len() as u32,
            file_length: end,
            users: counts.users as u64,
            items: counts.items as u64,
            events: counts.events,
            negatives: counts.negatives as u32,
            flags: if counts.ceiling { FLAG_CEILING } else { 0 },
            table_checksum: crc32fast::hash(&table),
            header_checksum: 0,
        };
        header.header_checksum = crc32fast::hash(&bytemuck::bytes_of(&header)[..HEADER_LENGTH - 4]);

        self.assemble(path, bytemuck::bytes_of(&header), &table).map_err(DataError::write(path))
    }

    fn assemble(self, path: &Path, header: &[u8], table: &[u8]) -> std::io::Result<()> {
        let mut out = Replacement::new(path)?;
        out.write_all(header)?;
        out.write_all(table)?;
        let mut end = (header.len() + table.len()) as u64;
        for spool in self.sections {
            let padding = format::padding(end);
            out.write_all(&[0; ALIGNMENT as usize][..padding as usize])?;
            let mut section = spool.file.into_inner().map_err(|error| error.into_error())?;
            section.seek(SeekFrom::Start(0))?;
            std::io::copy(&mut section.take(spool.length), &mut out)?;
            end += padding + spool.length;
        }
        out.finish()
    }
}
