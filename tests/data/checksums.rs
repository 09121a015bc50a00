//! Corrects the checksums of a changed data set file; shared with the fuzz targets.

use dfar::data::format::{ENTRY_LENGTH, Entry, HEADER_LENGTH, Header, Section};

/// A section's entry in the table.
pub fn entry(bytes: &[u8], section: Section) -> Entry {
    let start = HEADER_LENGTH + ENTRY_LENGTH * section as usize;
    bytemuck::pod_read_unaligned(&bytes[start..start + ENTRY_LENGTH])
}

/// Corrects all checksums, as a faulty program or an attacker would.
pub fn sign(bytes: &mut [u8]) {
    for section in Section::ALL {
        let mut entry = entry(bytes, section);
        let own = entry.offset as usize..entry.offset.saturating_add(entry.length) as usize;
        if let Some(own) = bytes.get(own) {
            entry.checksum = crc32fast::hash(own);
        }
        let start = HEADER_LENGTH + ENTRY_LENGTH * section as usize;
        bytes[start..start + ENTRY_LENGTH].copy_from_slice(bytemuck::bytes_of(&entry));
    }
    sign_table(bytes);
}

/// The same for a table that was changed on purpose.
pub fn sign_table(bytes: &mut [u8]) {
    let table = crc32fast::hash(&bytes[HEADER_LENGTH..HEADER_LENGTH + ENTRY_LENGTH * Section::ALL.len()]);
    change_header(bytes, |header| header.table_checksum = table);
}

/// Changes the header and corrects its checksum.
pub fn change_header(bytes: &mut [u8], change: impl FnOnce(&mut Header)) {
    let mut header: Header = bytemuck::pod_read_unaligned(&bytes[..HEADER_LENGTH]);
    change(&mut header);
    header.header_checksum = crc32fast::hash(&bytemuck::bytes_of(&header)[..HEADER_LENGTH - 4]);
    bytes[..HEADER_LENGTH].copy_from_slice(bytemuck::bytes_of(&header));
}
