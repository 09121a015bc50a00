//! The bodies of the fuzz targets, for `cargo fuzz` and `tests/fuzz.rs`.

use dfar::data::format::{ENTRY_LENGTH, HEADER_LENGTH, Section};
use dfar::data::import::{ColumnOptions, ImportOptions, LogFormat, import as import_log};
use dfar::data::statistics::statistics;
use dfar::data::{DataError, Dataset, Part};

#[path = "../tests/data/checksums.rs"]
#[allow(dead_code)]
mod checksums;

/// A data set file of any bytes is refused, or opens and can be read completely. The checksums are
/// corrected first, so that mutations reach the later checks.
pub fn dataset(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    if bytes.len() >= HEADER_LENGTH + ENTRY_LENGTH * Section::ALL.len() {
        checksums::sign(&mut bytes);
    }
    let Ok(data) = Dataset::from_bytes(&bytes, "fuzz") else { return };
    statistics(&data);
    for user in 0..data.users() as u32 {
        assert_eq!(data.find_user(data.user_name(user)), Some(user));
    }
    for item in 0..data.items() as u32 {
        assert_eq!(data.find_item(data.item_name(item)), Some(item));
    }
    for part in [Part::Valid, Part::Test] {
        assert!(
            data.groups(part)
                .iter()
                .all(|group| group.negatives.len() == data.groups(part).negatives_per_group)
        );
    }
}

/// A log of any bytes is refused, or imported into a file that opens. The first byte selects the
/// format and the names of the columns; JSON, archives and columnar files are recognized by their
/// content, and are targets only because their seeds are.
pub fn import(bytes: &[u8]) {
    use LogFormat::*;
    let Some((&choice, log)) = bytes.split_first() else { return };
    let format = [MovieLens, Amazon, KuaiRand, KuaiRec, Inter, Csv, Csv][usize::from(choice) % 7];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    std::fs::write(&path, log).unwrap();
    let mut options = ImportOptions::new(format, vec![path], folder.path().join("out.dfar"));
    options.k_core = None;
    options.candidates.negatives = 1;
    options.skip_bad_rows = 10;
    let columns = match choice % 7 {
        5 => Some(["0", "1", "2", "3"]),
        6 => Some(["user", "item", "time", "label"]),
        _ => None,
    };
    if let Some(columns) = columns {
        let [user, item, time, label] = columns.map(|column| Some(column.to_owned()));
        options.columns = ColumnOptions { user, item, time, label, ..ColumnOptions::default() };
    }
    match import_log(&options, &()) {
        Ok(made) => {
            let data = Dataset::open(&options.output).expect("what import writes opens");
            assert_eq!(
                (data.users(), data.items(), data.events() as u64),
                (made.users, made.items, made.events)
            );
        }
        Err(error @ DataError::Write { .. }) => panic!("{error}"),
        Err(_) => {}
    }
}
