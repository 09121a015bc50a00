//! A data set file of any bytes opens or is refused; what opens can be walked through. Checksums are put
//! right first, or the fuzzer would never get past them. Good seeds: `dfar-data synth --users 6 --items 20
//! --events 48`.
#![no_main]

use dfar::data::format::{ENTRY_LENGTH, HEADER_LENGTH, Section};
use dfar::data::{Dataset, Part, statistics::statistics};
use libfuzzer_sys::fuzz_target;

#[path = "../../tests/data_support/checksums.rs"]
mod checksums;

fuzz_target!(|bytes: &[u8]| {
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
});
