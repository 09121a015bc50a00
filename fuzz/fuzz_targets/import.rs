//! A log of any bytes imports into a file that opens, or is refused. The first byte chooses the format.
#![no_main]

use dfar::data::import::{ImportOptions, LogFormat, import};
use dfar::data::{DataError, Dataset};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    use LogFormat::*;
    let Some((&choice, log)) = bytes.split_first() else { return };
    let format = [MovieLens, Amazon, KuaiRand, KuaiRec, Inter, Csv][usize::from(choice) % 6];
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("log");
    std::fs::write(&path, log).unwrap();
    let mut options = ImportOptions::new(format, vec![path], folder.path().join("out.dfar"));
    options.k_core = None;
    options.candidates.negatives = 1;
    options.skip_bad_rows = 10;
    if format == Csv {
        for (column, number) in [
            (&mut options.columns.user, "0"),
            (&mut options.columns.item, "1"),
            (&mut options.columns.time, "2"),
            (&mut options.columns.label, "3"),
        ] {
            *column = Some(number.to_owned());
        }
    }
    match import(&options, &()) {
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
});
