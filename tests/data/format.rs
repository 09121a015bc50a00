//! The data set file: a written file is read back; every other file is refused.

use crate::checksums::{change_header, entry, sign, sign_table};
use dfar::data::format::{ENTRY_LENGTH, Entry, HEADER_LENGTH, Section};
use dfar::data::import::{ImportOptions, LogFormat, import};
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::data::{DataError, Dataset, Part, Split};
use proptest::prelude::*;
use std::sync::OnceLock;

/// A small imported file: 7 users, 12 items, names beyond ASCII.
fn small() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    FILE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log.csv");
        let mut text = String::from("who,what,when,liked\n");
        for user in 0..7 {
            for event in 0..6 + user % 2 {
                let item = (user * 5 + event * event) % 12;
                text += &format!("Zoë{user},ítem{item},{},{}\n", 1000 + 7 * event + user, (event + user) % 2);
            }
        }
        std::fs::write(&log, text).unwrap();
        let mut options = ImportOptions::new(LogFormat::Csv, vec![log], folder.path().join("small.dfar"));
        options.columns.user = Some("who".into());
        options.columns.item = Some("what".into());
        options.columns.time = Some("when".into());
        options.columns.label = Some("liked".into());
        options.k_core = None;
        options.candidates.negatives = 3;
        import(&options, &()).unwrap();
        std::fs::read(&options.output).unwrap()
    })
}

/// A small synthetic file, whose groups have scores.
fn scored() -> &'static [u8] {
    static FILE: OnceLock<Vec<u8>> = OnceLock::new();
    FILE.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("scored.dfar");
        let options = SyntheticOptions {
            users: 6,
            items: 20,
            events_per_user: 8.0,
            negatives: 2,
            split: Split::LeaveLast,
            ..SyntheticOptions::default()
        };
        synthetic::write(&options, &path).unwrap();
        std::fs::read(&path).unwrap()
    })
}

fn open(bytes: &[u8]) -> Result<Dataset, DataError> {
    Dataset::from_bytes(bytes, "x.dfar")
}

fn refusal(bytes: &[u8]) -> DataError {
    open(bytes).expect_err("the file should be refused")
}

/// The file with the values of one section changed and all checksums corrected.
fn with<T: bytemuck::Pod>(file: &[u8], section: Section, change: impl FnOnce(&mut [T])) -> Vec<u8> {
    let mut bytes = file.to_vec();
    let entry = entry(&bytes, section);
    let own = entry.offset as usize..(entry.offset + entry.length) as usize;
    let mut values: Vec<T> =
        bytes[own.clone()].chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect();
    change(&mut values);
    bytes[own].copy_from_slice(bytemuck::cast_slice(&values));
    sign(&mut bytes);
    bytes
}

#[track_caller]
fn assert_value_refused(bytes: &[u8], section: Section, index: u64, part_of_reason: &str) {
    match refusal(bytes) {
        DataError::Value { section: found, index: at, reason, .. } => {
            assert_eq!((found, at), (section.name(), index), "{reason}");
            assert!(reason.contains(part_of_reason), "{reason}");
        }
        other => panic!("expected a bad value in {}, found: {other}", section.name()),
    }
}

#[test]
fn the_files_under_test_are_good() {
    for file in [small(), scored()] {
        open(file).unwrap();
        // Correcting the checksums changes nothing in a good file, so a refusal below is due to the
        // changed values.
        let mut signed = file.to_vec();
        sign(&mut signed);
        assert_eq!(signed, file);
    }
}

#[test]
fn no_flipped_bit_is_accepted() {
    for file in [small(), scored()] {
        let mut bytes = file.to_vec();
        for place in 0..bytes.len() {
            let bit = 1 << (place % 8);
            bytes[place] ^= bit;
            assert!(open(&bytes).is_err(), "bit {bit:#x} of byte {place} may be flipped");
            bytes[place] ^= bit;
        }
    }
}

#[test]
fn no_prefix_is_accepted() {
    let file = small();
    for length in 0..file.len() {
        match refusal(&file[..length]) {
            DataError::Truncated { actual, .. } => assert_eq!(actual, length as u64),
            other => panic!("{length} bytes: {other}"),
        }
    }
}

#[test]
fn invalid_values_never_panic() {
    // Changes every byte and corrects the checksums. Most files are refused, some are valid, none
    // panics.
    for file in [small(), scored()] {
        let mut accepted = 0;
        for place in HEADER_LENGTH..file.len() {
            for value in [0x00, 0x01, 0x7f, 0xff] {
                let mut bytes = file.to_vec();
                bytes[place] = value;
                sign(&mut bytes);
                if let Ok(data) = open(&bytes) {
                    accepted += 1;
                    walk(&data);
                }
            }
        }
        assert!(accepted > 0);
    }
}

/// Reads all values of a data set.
fn walk(data: &Dataset) {
    for user in 0..data.users() as u32 {
        let events = data.user(user);
        assert!(events.train_end <= events.valid_end && events.valid_end <= events.items.len());
        assert!(events.items.iter().all(|&item| (item as usize) < data.items()));
        assert_eq!(data.find_user(data.user_name(user)), Some(user));
    }
    for item in 0..data.items() as u32 {
        assert_eq!(data.find_item(data.item_name(item)), Some(item));
    }
    for part in [Part::Valid, Part::Test] {
        for group in data.groups(part).iter() {
            let target = data.user(group.user).items[group.event as usize];
            assert!(!group.negatives.contains(&target));
        }
    }
    dfar::data::statistics::statistics(data);
}

#[test]
fn foreign_files_and_damaged_files_have_different_errors() {
    for foreign in [&b"user,item,rating\n"[..], b"PK\x03\x04", b"x", &[0; 200]] {
        assert!(matches!(refusal(foreign), DataError::NotADataset { .. }), "{foreign:?}");
    }
    assert!(matches!(refusal(b""), DataError::Truncated { expected: 64, actual: 0, .. }));
    // The magic reveals a transfer that changed line ends.
    let dos = small().iter().flat_map(|&byte| if byte == b'\n' { vec![b'\r', b'\n'] } else { vec![byte] });
    assert!(matches!(refusal(&dos.collect::<Vec<_>>()), DataError::NotADataset { .. }));
}

#[test]
fn future_versions_are_named() {
    let mut bytes = small().to_vec();
    change_header(&mut bytes, |header| header.version = 2);
    match refusal(&bytes) {
        DataError::UnsupportedVersion { found: 2, supported: 1, .. } => {}
        other => panic!("{other}"),
    }
}

#[test]
fn trailing_bytes_are_refused() {
    let mut bytes = small().to_vec();
    bytes.push(0);
    assert!(matches!(refusal(&bytes), DataError::TrailingBytes { .. }));
    // A header that includes them is refused too.
    let length = bytes.len() as u64;
    change_header(&mut bytes, |header| header.file_length = length);
    assert!(matches!(refusal(&bytes), DataError::SectionTable { section: "table", .. }));
}

#[test]
fn damage_is_located() {
    let mut bytes = small().to_vec();
    bytes[20] ^= 1;
    assert!(matches!(refusal(&bytes), DataError::HeaderChecksum { .. }));

    let mut bytes = small().to_vec();
    bytes[HEADER_LENGTH + 5] ^= 1;
    assert!(matches!(
        refusal(&bytes),
        DataError::SectionTable { section: "table", reason: "checksum mismatch", .. }
    ));

    for section in Section::ALL.into_iter().filter(|&section| entry(small(), section).length > 0) {
        let mut bytes = small().to_vec();
        bytes[entry(small(), section).offset as usize] ^= 1;
        match refusal(&bytes) {
            DataError::Checksum { section: found, .. } => assert_eq!(found, section.name()),
            other => panic!("{}: {other}", section.name()),
        }
    }
}

#[test]
fn invalid_tables_are_refused() {
    fn refuse(section: Section, change: impl FnOnce(&mut Entry)) -> (&'static str, &'static str) {
        let mut bytes = small().to_vec();
        let mut entry = entry(&bytes, section);
        change(&mut entry);
        let start = HEADER_LENGTH + ENTRY_LENGTH * section as usize;
        bytes[start..start + ENTRY_LENGTH].copy_from_slice(bytemuck::bytes_of(&entry));
        sign_table(&mut bytes);
        match refusal(&bytes) {
            DataError::SectionTable { section, reason, .. } => (section, reason),
            other => panic!("{other}"),
        }
    }
    assert_eq!(refuse(Section::Items, |entry| entry.kind = 4), ("items", "holds another kind of section"));
    assert_eq!(refuse(Section::Items, |entry| entry.reserved = 1), ("items", "reserved fields are not zero"));
    assert_eq!(
        refuse(Section::Items, |entry| entry.offset += 64),
        ("items", "does not start where the section before it ends")
    );
    assert_eq!(refuse(Section::Items, |entry| entry.offset = u64::MAX).0, "items");
    assert_eq!(
        refuse(Section::Items, |entry| entry.length = u64::MAX - 1000),
        ("items", "reaches past the end of the file")
    );
    let mut bytes = small().to_vec();
    change_header(&mut bytes, |header| header.sections = 19);
    assert!(matches!(refusal(&bytes), DataError::SectionTable { reason: "wrong number of sections", .. }));
    let mut bytes = small().to_vec();
    change_header(&mut bytes, |header| header.flags = 2);
    assert!(matches!(refusal(&bytes), DataError::SectionTable { reason: "unknown flags are set", .. }));
    let mut bytes = small().to_vec();
    let gap = entry(&bytes, Section::UserOffsets).offset as usize - 1;
    assert_eq!(bytes[gap], 0, "the protocol should leave padding");
    bytes[gap] = 1;
    assert!(matches!(
        refusal(&bytes),
        DataError::SectionTable { reason: "the padding before it is not zero", .. }
    ));
}

#[test]
fn counts_must_fit_the_sections() {
    for change in [
        (|header| header.users += 1) as fn(&mut dfar::data::format::Header),
        |header| header.items += 1,
        |header| header.events -= 1,
        |header| header.events = u64::MAX,
        |header| header.negatives += 1,
        |header| header.negatives = u32::MAX,
        |header| header.flags = 1,
    ] {
        let mut bytes = small().to_vec();
        change_header(&mut bytes, change);
        let error = refusal(&bytes);
        assert!(matches!(error, DataError::SectionLength { .. }), "{error}");
    }
    let mut bytes = small().to_vec();
    change_header(&mut bytes, |header| header.users = 1 << 32);
    assert!(matches!(refusal(&bytes), DataError::SectionTable { section: "header", .. }));
}

#[test]
fn invalid_histories_are_refused() {
    let file = small();
    let users = open(file).unwrap().users() as u64;
    let change = |index: usize, to: u64| with(file, Section::UserOffsets, |v: &mut [u64]| v[index] = to);
    assert_value_refused(&change(0, 1), Section::UserOffsets, 0, "first offset");
    assert_value_refused(&change(2, 1), Section::UserOffsets, 2, "decrease");
    assert_value_refused(&change(users as usize, 100), Section::UserOffsets, users, "last offset");

    let split = |v: [u32; 2]| with(file, Section::Split, |all: &mut [u32]| all[2..4].copy_from_slice(&v));
    assert_value_refused(&split([3, 2]), Section::Split, 2, "follow");
    assert_value_refused(&split([0, 100]), Section::Split, 2, "follow");

    assert_value_refused(
        &with(file, Section::Items, |v: &mut [u32]| v[5] = 12),
        Section::Items,
        5,
        "no such",
    );
    assert_value_refused(
        &with(file, Section::Feedback, |v: &mut [u8]| v[4] = 2),
        Section::Feedback,
        4,
        "neither",
    );
    assert_value_refused(&with(file, Section::Times, |v: &mut [i64]| v[3] = 0), Section::Times, 3, "earlier");
}

#[test]
fn invalid_names_are_refused() {
    let file = small();
    assert_value_refused(
        &with(file, Section::ItemNames, |v: &mut [u8]| v[1] = 0xff),
        Section::ItemNames,
        0,
        "UTF-8",
    );
    // The first byte of the í of the second name moves to the first name.
    assert_value_refused(
        &with(file, Section::ItemNameOffsets, |v: &mut [u64]| v[1] += 1),
        Section::ItemNames,
        7,
        "within a character",
    );
    assert_value_refused(
        &with(file, Section::ItemNameOffsets, |v: &mut [u64]| v[1] = 1000),
        Section::ItemNameOffsets,
        2,
        "decrease",
    );
    assert_value_refused(
        &with(file, Section::UserOrder, |v: &mut [u32]| v[2] = 7),
        Section::UserOrder,
        2,
        "no such name",
    );
    assert_value_refused(
        &with(file, Section::UserOrder, |v: &mut [u32]| v.swap(2, 3)),
        Section::UserOrder,
        3,
        "increase",
    );
    assert_value_refused(
        &with(file, Section::UserOrder, |v: &mut [u32]| v[3] = v[2]),
        Section::UserOrder,
        3,
        "increase",
    );
    // Two equal names: the last letter of one is changed to that of the other.
    let twins = with(file, Section::UserNames, |v: &mut [u8]| v[4] = b'1');
    assert_value_refused(&twins, Section::UserOrder, 1, "increase");
}

#[test]
fn invalid_groups_are_refused() {
    let file = small();
    let data = open(file).unwrap();
    let target = data.user(1).items[data.groups(Part::Test).event[1] as usize];
    let negatives =
        |change: fn(&mut [u32], u32)| with(file, Section::TestNegatives, |v: &mut [u32]| change(v, target));
    assert_value_refused(&negatives(|v, _| v[4] = 12), Section::TestNegatives, 4, "no such item");
    assert_value_refused(&negatives(|v, target| v[4] = target), Section::TestNegatives, 3, "target");
    assert_value_refused(&negatives(|v, _| v[4] = v[3]), Section::TestNegatives, 3, "twice");
    assert_value_refused(
        &with(file, Section::TestUsers, |v: &mut [u32]| v[2] = 900),
        Section::TestUsers,
        2,
        "not the events",
    );
    assert_value_refused(
        &with(file, Section::ValidEvents, |v: &mut [u32]| v[1] = 0),
        Section::ValidUsers,
        1,
        "not the events",
    );
    assert_value_refused(
        &with(scored(), Section::TestCeiling, |v: &mut [f32]| v[3] = f32::NAN),
        Section::TestCeiling,
        3,
        "finite",
    );
}

#[test]
fn protocols_of_another_shape_are_refused() {
    let fewer = |v: &mut [u8]| {
        let place = v.windows(14).position(|words| words == b"\"negatives\":3,").unwrap();
        v[place + 12] = b'2';
    };
    let changes: [fn(&mut [u8]); 4] = [|v| v[0] = b'[', |v| v[2] = b'x', |v| v[v.len() - 1] = b' ', fewer];
    for change in changes {
        let error = refusal(&with(small(), Section::Protocol, change));
        assert!(matches!(error, DataError::Protocol { .. }), "{error}");
    }
}

#[test]
fn unreadable_paths_are_named() {
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().join("missing.dfar"), folder.path().to_owned()] {
        match Dataset::open(&path) {
            Err(DataError::Read { path: named, .. }) => assert_eq!(named, path),
            other => panic!("{other:?}"),
        }
    }
    let empty = folder.path().join("empty.dfar");
    std::fs::write(&empty, b"").unwrap();
    assert!(matches!(Dataset::open(&empty), Err(DataError::Truncated { actual: 0, .. })));
}

#[test]
fn a_failed_write_leaves_the_old_file_and_no_other() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kept.dfar");
    let options = SyntheticOptions { users: 3, items: 16, negatives: 2, ..SyntheticOptions::default() };
    synthetic::write(&options, &path).unwrap();
    let old = std::fs::read(&path).unwrap();
    let error = synthetic::write(&SyntheticOptions { negatives: 16, ..options }, &path).unwrap_err();
    assert!(matches!(error, DataError::NotEnoughItems { needed: 16, .. }), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), old);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}

#[test]
fn open_and_from_bytes_give_the_same_data_set() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.dfar");
    std::fs::write(&path, scored()).unwrap();
    let mapped = Dataset::open(&path).unwrap();
    let copied = open(scored()).unwrap();
    assert_eq!(mapped.path(), path);
    assert_eq!(mapped.protocol(), copied.protocol());
    for user in 0..mapped.users() as u32 {
        assert_eq!(mapped.user(user), copied.user(user));
    }
    for part in [Part::Valid, Part::Test] {
        assert_eq!(mapped.groups(part), copied.groups(part));
    }
    walk(&mapped);
}

#[test]
fn sections_are_aligned() {
    for section in Section::ALL {
        assert_eq!(entry(small(), section).offset % 64, 0, "{}", section.name());
    }
}

proptest! {
    #[test]
    fn noise_is_refused(bytes in prop::collection::vec(any::<u8>(), 0..400), start in 0usize..64) {
        // Starts with a valid prefix, so that the noise is read beyond the magic.
        let mut file = small()[..start].to_vec();
        file.extend(bytes);
        prop_assert!(open(&file).is_err());
    }

    #[test]
    fn synthetic_sets_round_trip(users in 1usize..12, items in 16usize..40, seed in any::<u64>(), split in 0..3) {
        let folder = tempfile::tempdir().unwrap();
        let split = match split {
            0 => Split::LeaveLast,
            1 => Split::Temporal { train: 0.7, valid: 0.2 },
            _ => Split::ByUser { train: 0.6, valid: 0.2 },
        };
        let options = SyntheticOptions { users, items, events_per_user: 9.0, seed, negatives: 1, split };
        let [first, second] = ["a", "b"].map(|name| folder.path().join(name));
        match synthetic::write(&options, &first) {
            Ok(made) => {
                let data = Dataset::open(&first).unwrap();
                prop_assert_eq!(data.protocol(), &made.protocol);
                prop_assert_eq!((data.users(), data.items()), (users, items));
                walk(&data);
                synthetic::write(&options, &second).unwrap();
                prop_assert_eq!(std::fs::read(&first).unwrap(), std::fs::read(&second).unwrap());
            }
            Err(DataError::NothingLeft { .. } | DataError::NotEnoughItems { .. }) => {}
            Err(other) => return Err(TestCaseError::fail(other.to_string())),
        }
    }
}
