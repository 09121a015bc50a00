//! Importing logs: each format, and all refusals.

use crate::bench::Bench;
use dfar::data::import::{Liked, LogFormat, Progress, TimeUnit, import};
use dfar::data::{BadRow, CountedRecords, DataError, KCore, Part, PreparationStep, Split};
use flate2::{Compression, write::GzEncoder};
use std::io::Write;

mod kinds;
mod mangled;

fn event(user: &str, item: &str, time: i64, feedback: u8) -> (String, String, i64, u8) {
    (user.to_owned(), item.to_owned(), time, feedback)
}

/// The two events that most tests below import.
fn usual() -> Vec<(String, String, i64, u8)> {
    vec![event("196", "242", 881_250_949_000, 0), event("196", "302", 891_717_742_000, 1)]
}

#[test]
fn the_same_log_makes_the_same_bytes() {
    let text: String = (0..3000)
        .map(|row: u64| {
            let mixed = row.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            format!("{}\t{}\t{}\t{}\n", mixed % 40, mixed / 40 % 60, 1 + mixed % 5, 900_000_000 + mixed % 999)
        })
        .collect();
    let mut bench = Bench::new(LogFormat::MovieLens, &[&text]);
    bench.options.candidates.negatives = 9;
    let mut made = Vec::new();
    for memory in [1 << 20, 1 << 20, 4000] {
        bench.options.sort_memory = memory;
        let hash = import(&bench.options, &()).unwrap().protocol.candidates.hash;
        made.push((hash, std::fs::read(&bench.options.output).unwrap()));
    }
    assert!(made.windows(2).all(|pair| pair[0] == pair[1]));
    bench.options.candidates.seed = 2;
    assert_ne!(import(&bench.options, &()).unwrap().protocol.candidates.hash, made[0].0);
    // Only the log and the output are in the folder.
    assert_eq!(std::fs::read_dir(bench.folder.path()).unwrap().count(), 2);
}

/// Published metrics depend on the groups. A change, for example by a new version of a random
/// number crate, makes metrics incomparable, so this test must fail.
#[test]
fn groups_do_not_change_with_the_program() {
    let text: String = (0..60).map(|row| format!("{}\t{}\t4\t{row}\n", row % 6, row * 7 % 25)).collect();
    let mut bench = Bench::new(LogFormat::MovieLens, &[&text]);
    bench.options.candidates.negatives = 4;
    let hash = |bench: &Bench| import(&bench.options, &()).unwrap().protocol.candidates.hash;
    assert_eq!(hash(&bench), "8fe369ba340932f1");
    bench.options.candidates.exclude_seen = true;
    assert_eq!(hash(&bench), "da4b65fb941d728a");
    bench.options.split = Split::ByUser { train: 0.5, valid: 0.25 };
    assert_eq!(hash(&bench), "83ad5d99910af8f5");
}

#[test]
fn an_output_that_is_an_input_is_refused() {
    let mut bench = Bench::new(LogFormat::MovieLens, &["1\t2\t3\t4\n"]);
    bench.options.output = bench.options.inputs[0].clone();
    assert!(matches!(bench.run(), Err(DataError::InvalidOption { option: "output", .. })));
    assert_eq!(std::fs::read_to_string(&bench.options.output).unwrap(), "1\t2\t3\t4\n");
}

// --- format by format ---

#[test]
fn all_movielens_formats_are_read() {
    for text in [
        "196\t242\t3\t881250949\n196\t302\t3.5\t891717742\n",
        "196::242::3::881250949\r\n196::302::4::891717742",
        "userId,movieId,rating,timestamp\n196,242,3.0,881250949\n196,302,3.5,891717742\n",
        "\u{feff}timestamp,rating,movieId,userId\n881250949,0.5,242,196\n891717742,5,\"302\",196\n",
        "196\t242\t3\t881250949000\n\n196\t302\t4\t891717742000\n",
    ] {
        assert_eq!(Bench::new(LogFormat::MovieLens, &[text]).events(), usual(), "{text}");
    }
}

#[test]
fn amazon_files_of_all_years_are_read() {
    let [a, b] = ["A2SUAM1J3GNN3B", "AOEAD7DPLZE53X"];
    let expected = vec![
        event(a, "0439394058", 881_250_949_000, 0),
        event(a, "B000F83SZQ", 891_717_742_000, 1),
        event(b, "B000F83SZQ", 891_717_743_000, 1),
    ];
    let of_2014 =
        format!("{a},0439394058,3.0,881250949\n{a},B000F83SZQ,4.0,891717742\n{b},B000F83SZQ,5.0,891717743\n");
    let of_2018 =
        format!("0439394058,{a},3.0,881250949\nB000F83SZQ,{a},4.0,891717742\nB000F83SZQ,{b},5.0,891717743\n");
    let of_2023 = format!(
        "user_id,parent_asin,rating,timestamp\n{a},0439394058,3.0,881250949000\n{a},B000F83SZQ,4.0,891717742000\n\
         {b},B000F83SZQ,5.0,891717743000\n"
    );
    let json_2018 = format!(
        "{{\"overall\": 3.0, \"reviewerID\": \"{a}\", \"asin\": \"0439394058\", \"unixReviewTime\": 881250949}}\n\
         {{\"overall\": 4.0, \"reviewerID\": \"{a}\", \"asin\": \"B000F83SZQ\", \"unixReviewTime\": 891717742}}\n\
         {{\"overall\": 5.0, \"reviewerID\": \"{b}\", \"asin\": \"B000F83SZQ\", \"unixReviewTime\": 891717743}}\n"
    );
    let json_2023 = format!(
        "{{\"rating\": 3.0, \"title\": \"a \\\"b\\\"\", \"asin\": \"X\", \"parent_asin\": \"0439394058\", \
         \"user_id\": \"{a}\", \"timestamp\": 881250949000, \"images\": []}}\n\
         {{\"rating\": 4.0, \"parent_asin\": \"B000F83SZQ\", \"user_id\": \"{a}\", \"sortTimestamp\": 891717742000}}\n\n\
         {{\"rating\": 5.0, \"parent_asin\": \"B000F83SZQ\", \"user_id\": \"{b}\", \"timestamp\": 891717743000}}"
    );
    for text in [&of_2014, &of_2018, &of_2023, &json_2018, &json_2023] {
        assert_eq!(Bench::new(LogFormat::Amazon, &[text]).events(), expected, "{text}");
    }
}

#[test]
fn an_amazon_file_of_unknown_column_order_is_refused() {
    let mut bench = Bench::new(LogFormat::Amazon, &["1,2,5,100\n1,3,5,200\n"]);
    let error = bench.run().unwrap_err();
    assert!(error.to_string().contains("--user-column"), "{error}");
    bench.options.columns.user = Some("1".into());
    bench.options.columns.item = Some("0".into());
    assert_eq!(bench.events(), [event("2", "1", 100_000, 1), event("3", "1", 200_000, 1)]);
}

#[test]
fn kuairand_columns_are_found_by_name() {
    let full = "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_hate,long_view,tab\n\
                196,242,20220410,1700,881250949000,1,0,0,0,1\n\
                196,302,20220411,1600,891717742000,0,0,0,1,\"1\"\n";
    assert_eq!(Bench::new(LogFormat::KuaiRand, &[full]).events(), usual());
    let excerpt = "video_id\tuser_id\tlabel\ttime_ms\n242\t196\t0\t881250949000\n302\t196\t1\t891717742000\n";
    let mut bench = Bench::new(LogFormat::KuaiRand, &[excerpt]);
    match bench.run().unwrap_err() {
        DataError::MissingColumn { column, available, .. } => {
            assert_eq!(column, "long_view");
            assert_eq!(available, ["video_id", "user_id", "label", "time_ms"]);
        }
        other => panic!("{other}"),
    }
    bench.options.columns.label = Some("label".into());
    assert_eq!(bench.events(), usual());
    assert_eq!(bench.run().unwrap().protocol().positive, "label = 1");
}

#[test]
fn kuairec_labels_come_from_the_watch_ratio() {
    let text = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n\
                196,242,13838,10867,x,20200705,881250949.25,2.0\n\
                196,302,13665,10984,x,20200705,891717742.5,2.1\n";
    let expected = [event("196", "242", 881_250_949_250, 0), event("196", "302", 891_717_742_500, 1)];
    let mut bench = Bench::new(LogFormat::KuaiRec, &[text]);
    assert_eq!(bench.events(), expected);
    bench.options.liked = Liked::Above(2.5);
    assert!(bench.events().iter().all(|event| event.3 == 0));
    let without_time = format!("{text}196,303,1,1,,,,0.5\n");
    let row = Bench::new(LogFormat::KuaiRec, &[&without_time]).bad_row();
    assert_eq!((row.line, &row.field[..], &row.value[..]), (4, "timestamp", ""));
}

#[test]
fn inter_files_with_a_typed_header_are_read() {
    let rating = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n\
                  196\t242\t3\t881250949\n196\t302\t4.0\t8.91717742e8\n";
    assert_eq!(Bench::new(LogFormat::Inter, &[rating]).events(), usual());
    let yelp = "review_id:token\tuser_id:token\tbusiness_id:token\tlabel:float\ttimestamp:float\n\
                r1\t196\t242\t0.0\t881250949.0\nr2\t196\t302\t1.0\t891717742.0\n";
    assert_eq!(Bench::new(LogFormat::Inter, &[yelp]).events(), usual());
    let error = Bench::new(LogFormat::Inter, &["196\t242\t3\t881250949\n"]).run().unwrap_err();
    assert!(matches!(error, DataError::UnknownLayout { format: "inter", .. }), "{error}");
}

#[test]
fn csv_columns_are_given_by_name_or_number() {
    let columns = |bench: &mut Bench, [user, item, time, label]: [&str; 4]| {
        bench.options.columns.user = Some(user.into());
        bench.options.columns.item = Some(item.into());
        bench.options.columns.time = Some(time.into());
        bench.options.columns.label = Some(label.into());
    };
    for text in [
        "who,what,when,liked\n196,242,881250949,0\n196,302,891717742,1\n",
        "when;liked;who;what\n881250949;0;196;242\n891717742;1;196;302\n",
        "x|who|what|when|liked\n,|196|242|881250949|0\n\"|\"|196|302|891717742|1\n",
    ] {
        let mut bench = Bench::new(LogFormat::Csv, &[text]);
        columns(&mut bench, ["who", "what", "when", "liked"]);
        assert_eq!(bench.events(), usual(), "{text}");
    }
    let mut bench = Bench::new(LogFormat::Csv, &["0 881250949 196 242\n1 891717742 196 302\n"]);
    columns(&mut bench, ["2", "3", "1", "0"]);
    assert!(bench.run().unwrap_err().to_string().contains("--delimiter"));
    bench.options.columns.delimiter = Some(b' ');
    assert_eq!(bench.events(), usual());

    for text in [
        "user,item,label,time\n196,242,0,881250949\n196,302,1,891717742\n",
        "timestamp;user_id;item_id;label\n881250949;196;242;0\n891717742;196;302;1\n",
        "{\"user\":196,\"itemId\":242,\"label\":0,\"time\":881250949}\n\
         {\"user\":196,\"itemId\":302,\"label\":1,\"time\":891717742}\n",
    ] {
        assert_eq!(Bench::new(LogFormat::Csv, &[text]).events(), usual(), "{text}");
    }

    let mut bench = Bench::new(LogFormat::Csv, &["a,b\n1,2\n"]);
    assert!(bench.run().unwrap_err().to_string().contains("--user-column"));
    // A log without header whose label is not given.
    let mut unlabelled = Bench::new(LogFormat::Csv, &["1,2,3\n"]);
    columns(&mut unlabelled, ["0", "1", "2", "label"]);
    unlabelled.options.columns.label = None;
    let error = unlabelled.run().unwrap_err().to_string();
    assert!(error.contains("no column label for the label: give --label-column or --all-liked"), "{error}");
    columns(&mut bench, ["a", "b", "c", "d"]);
    assert!(matches!(bench.run(), Err(DataError::MissingColumn { column, .. }) if column == "c"));
}

#[test]
fn gzip_is_recognized_by_its_content() {
    let text = "196\t242\t3\t881250949\n196\t302\t4\t891717742\n";
    let packed = |text: &str| {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap()
    };
    assert_eq!(Bench::of_bytes(LogFormat::MovieLens, &[&packed(text)]).events(), usual());
    // Two gzip members end to end, as parallel compressors write them.
    let (first, second) = text.split_at(22);
    let members = [packed(first), packed(second)].concat();
    assert_eq!(Bench::of_bytes(LogFormat::MovieLens, &[&members]).events(), usual());
    // A truncated download is an error, not a shorter log.
    let whole = packed(&text.repeat(1000));
    let error = Bench::of_bytes(LogFormat::MovieLens, &[&whole[..whole.len() - 20]]).run().unwrap_err();
    assert!(matches!(error, DataError::Read { .. }), "{error}");
    let error = Bench::of_bytes(LogFormat::MovieLens, &[b"PK\x03\x04 and so on"]).run().unwrap_err();
    assert!(error.to_string().contains("unpack"), "{error}");
}

// --- refusals ---

#[test]
fn bad_rows_are_named() {
    let movielens = |row: &str| {
        let text = format!("196\t242\t3\t881250949\n\n{row}\n");
        Bench::new(LogFormat::MovieLens, &[&text]).bad_row()
    };
    let long = "x".repeat(200);
    for (row, field, value, reason) in [
        ("\t302\t3\t1", "user", "", "empty"),
        ("196\t302\t3", "time", "", "only 3 fields"),
        ("196\t302\tgood\t1", "label", "good", "not a number"),
        ("196\t302\tNaN\t1", "label", "NaN", "not a number"),
        ("196\t302\t3\tnoon", "time", "noon", "not a number"),
        ("196\t302\t3\tinf", "time", "inf", "not a number"),
        ("196\t302\t3\t1e19", "time", "1e19", "too large"),
        (&format!("196\t302\t{long}\t1"), "label", &long[..80], "not a number"),
    ] {
        let bad = movielens(row);
        assert_eq!((bad.line, &bad.field[..], &bad.value[..]), (3, field, value), "{row}");
        assert!(bad.reason.contains(reason), "{row}: {}", bad.reason);
        assert!(bad.path.ends_with("log0"));
    }
    // The line number is correct with all line ends, and at the end of the file. A quoted field
    // ends on its line.
    for (text, line) in [
        ("1\t2\t3\t4\r\n\r\n1\t2\t3\tx\r\n1\t2\t3\t4\r\n", 3),
        ("1\t2\t3\t4\n1\t2\t3\tx", 2),
        ("1\t2\t3\tx", 1),
        ("userId,movieId,rating,timestamp\r\n\"a\nb\",2,3,4\n1,2,3,x\n", 2),
        ("userId,movieId,rating,timestamp\n\n\"a\",2,3,x\n", 3),
    ] {
        assert_eq!(Bench::new(LogFormat::MovieLens, &[text]).bad_row().line, line, "{text}");
    }
    let text: &[u8] = b"196\t242\t3\t881250949\n196\t\xff\xfe\t3\t1\n";
    let bad = Bench::of_bytes(LogFormat::MovieLens, &[text]).bad_row();
    assert_eq!((bad.line, &bad.field[..], &bad.reason[..]), (2, "item", "not UTF-8"));
    let bad = Bench::new(LogFormat::KuaiRand, &["user_id,video_id,time_ms,long_view\n1,2,3,4\n"]).bad_row();
    assert_eq!((bad.line, &bad.field[..], &bad.value[..]), (2, "long_view", "4"));
    let bad = Bench::new(LogFormat::Amazon, &["{\"rating\": 5, \"user_id\": \"A\"}\n"]).bad_row();
    assert_eq!((bad.line, &bad.field[..]), (1, "parent_asin or asin"));
    let bad = Bench::new(LogFormat::Amazon, &["{\"rating\": 5, \n"]).bad_row();
    assert_eq!((bad.line, &bad.field[..]), (1, "object"));
}

#[test]
fn times_that_do_not_fit_are_bad() {
    let mut bench = Bench::new(LogFormat::MovieLens, &["1\t2\t3\t9223372036854775807\n"]);
    bench.options.time_unit = TimeUnit::Seconds;
    assert!(bench.bad_row().reason.contains("too large"));
    bench.options.time_unit = TimeUnit::Milliseconds;
    assert_eq!(bench.events(), [event("1", "2", i64::MAX, 0)]);
}

#[test]
fn bad_rows_are_skipped_up_to_a_number() {
    #[derive(Default)]
    struct Told(std::cell::RefCell<Vec<u64>>);
    impl Progress for Told {
        fn skipped(&self, row: &BadRow) {
            self.0.borrow_mut().push(row.line);
        }
    }
    // The first line has no names in the columns of times and ratings, so it is a bad row.
    let text = "x\n196\t242\t3\t881250949\n196\t302\t4\tnever\n196\t302\t4\t891717742\n";
    let mut bench = Bench::new(LogFormat::MovieLens, &[text]);
    bench.options.columns.delimiter = Some(b'\t');
    bench.options.skip_bad_rows = 1;
    match bench.run().unwrap_err() {
        DataError::TooManyBadRows { allowed: 1, row } => assert_eq!(row.line, 3),
        other => panic!("{other}"),
    }
    bench.options.skip_bad_rows = 2;
    let told = Told::default();
    let protocol = import(&bench.options, &told).unwrap().protocol;
    assert_eq!(*told.0.borrow(), [1, 3]);
    assert_eq!((protocol.source.rows, protocol.source.bad_rows), (4, 2));
    assert_eq!(bench.events(), usual());
}

#[test]
fn an_open_quote_ends_with_its_line() {
    let row = "1,2,3,1\n";
    let text =
        format!("user_id,video_id,time_ms,long_view\n\"1,2,3,1\n{}", row.repeat((1 << 25) / row.len()));
    let bad = Bench::new(LogFormat::KuaiRand, &[&text]).bad_row();
    assert_eq!((bad.line, &bad.field[..]), (2, "row"));
    assert!(bad.reason.contains("quote"));
}

#[test]
fn empty_logs_are_refused() {
    for (text, words) in [("", "empty"), ("\n\n", "empty")] {
        let error = Bench::new(LogFormat::MovieLens, &[text]).run().unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
    let header = "user_id,video_id,time_ms,long_view\n";
    let error = Bench::new(LogFormat::KuaiRand, &[header]).run().unwrap_err();
    assert!(matches!(error, DataError::NothingLeft { before: 0, .. }), "{error}");
    assert!(error.to_string().contains("the log has no events"), "{error}");
}

#[test]
fn filters_that_leave_nothing_are_refused() {
    let text = "196\t242\t3\t881250949\n196\t302\t4\t891717742\n";
    let mut bench = Bench::new(LogFormat::MovieLens, &[text]);
    bench.options.k_core = Some(KCore { k: 2, on: CountedRecords::All, until_stable: false });
    match bench.run().unwrap_err() {
        DataError::NothingLeft { step: PreparationStep::KCore, before: 2 } => {}
        other => panic!("{other}"),
    }
    let mut bench = Bench::new(LogFormat::MovieLens, &["1\t2\t3\t5\n1\t3\t3\t5\n"]);
    bench.options.split = Split::Temporal { train: 0.8, valid: 0.1 };
    // Both events are at the cut, so none is before it.
    match bench.run().unwrap_err() {
        DataError::NothingLeft { step: PreparationStep::Split, before: 2 } => {}
        other => panic!("{other}"),
    }
}

#[test]
fn too_few_items_for_the_negatives_are_refused() {
    let text = "1\t1\t3\t1\n1\t2\t3\t2\n1\t3\t3\t3\n1\t4\t3\t4\n7\t1\t3\t1\n7\t9\t3\t1\n";
    let mut bench = Bench::new(LogFormat::MovieLens, &[text]);
    bench.options.candidates.negatives = 3;
    // Items 1, 2 and 9 occur in training; 3 and 4 are the targets.
    assert_eq!(bench.run().unwrap().groups(Part::Test).negatives.len(), 3);
    bench.options.candidates.negatives = 4;
    match bench.run().unwrap_err() {
        DataError::NotEnoughItems { user, needed: 4, available: 3 } => assert_eq!(user, "1"),
        other => panic!("{other}"),
    }
    bench.options.candidates.negatives = 2;
    bench.options.candidates.exclude_seen = true;
    match bench.run().unwrap_err() {
        DataError::NotEnoughItems { needed: 2, available: 1, .. } => {}
        other => panic!("{other}"),
    }
}

#[test]
fn shares_outside_their_range_are_refused() {
    for (train, valid) in [(0.0, 0.1), (1.1, 0.0), (0.8, 0.3), (0.8, -0.1), (f64::NAN, 0.1), (0.8, f64::NAN)]
    {
        let mut bench = Bench::new(LogFormat::MovieLens, &["1\t2\t3\t4\n"]);
        bench.options.split = Split::Temporal { train, valid };
        let error = bench.run().unwrap_err();
        assert!(matches!(error, DataError::InvalidOption { .. }), "{train} {valid}: {error}");
    }
}

#[test]
fn a_nan_threshold_is_refused() {
    let mut bench = Bench::new(LogFormat::MovieLens, &["1\t2\t3\t4\n"]);
    bench.options.liked = Liked::Above(f64::NAN);
    assert!(matches!(bench.run(), Err(DataError::InvalidOption { option: "positive-above", .. })));
}

#[test]
fn missing_logs_are_named() {
    let mut bench = Bench::new(LogFormat::MovieLens, &[]);
    let missing = bench.folder.path().join("missing.csv");
    bench.options.inputs = vec![missing.clone()];
    assert!(matches!(bench.run(), Err(DataError::Read { path, .. }) if path == missing));
}
