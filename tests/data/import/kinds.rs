//! Irregular logs: read correctly, or refused with the reason.

use super::event;
use crate::bench::Bench;
use dfar::data::import::{Liked, LogFormat, Progress, TimeUnit, import};
use dfar::data::{DataError, Dataset};
use flate2::{Compression, write::GzEncoder};
use std::cell::RefCell;
use std::io::Write;

type Events = Vec<(String, String, i64, u8)>;

/// A CSV log with the usual column names.
fn csv(log: &[u8]) -> Bench {
    let mut bench = Bench::of_bytes(LogFormat::Csv, &[log]);
    columns(&mut bench, ["user", "item", "time", "label"]);
    bench.options.candidates.negatives = 0;
    bench
}

fn columns(bench: &mut Bench, [user, item, time, label]: [&str; 4]) {
    let columns = &mut bench.options.columns;
    columns.user = Some(user.to_owned());
    columns.item = Some(item.to_owned());
    columns.time = Some(time.to_owned());
    columns.label = Some(label.to_owned());
}

fn without_negatives(format: LogFormat, logs: &[&str]) -> Bench {
    let mut bench = Bench::new(format, logs);
    bench.options.candidates.negatives = 0;
    bench
}

/// Two users, three events, as CSV.
const LOG: &str = "user,item,label,time\nu1,a,1,1\nu1,b,0,2\nu2,a,0,1\n";

fn log_events() -> Events {
    vec![event("u1", "a", 1000, 1), event("u1", "b", 2000, 0), event("u2", "a", 1000, 0)]
}

#[track_caller]
fn refused(bench: &Bench, words: &str) -> DataError {
    let error = bench.run().expect_err("the log is refused");
    assert!(error.to_string().contains(words), "no {words:?} in: {error}");
    error
}

/// The lines of the bad rows, and the number of events read.
fn bad_lines(bench: &mut Bench) -> (Vec<u64>, u64) {
    #[derive(Default)]
    struct Lines(RefCell<Vec<u64>>);
    impl Progress for Lines {
        fn skipped(&self, row: &dfar::data::BadRow) {
            self.0.borrow_mut().push(row.line);
        }
    }
    bench.options.skip_bad_rows = u64::MAX;
    let lines = Lines::default();
    let made = import(&bench.options, &lines).unwrap();
    (lines.0.into_inner(), made.events)
}

/// Keeps the decisions of an import.
#[derive(Default)]
struct Notes(RefCell<Vec<String>>);

impl Progress for Notes {
    fn note(&self, decision: &str) {
        self.0.borrow_mut().push(decision.to_owned());
    }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn tar(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut archive = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        header.set_cksum();
        archive.append_data(&mut header, name, *bytes).unwrap();
    }
    archive.into_inner().unwrap()
}

// --- rows ---

#[test]
fn a_stray_quote_damages_only_its_line() {
    let text =
        "user,item,label,time\nu1,a,1,1\nu1,\"5in nail,1,2\nu2,b,1,3\n\"u3,c,0,4\nu3,\"d\"e,0,5\nu3,a,1,6\n";
    let mut bench = csv(text.as_bytes());
    let error = refused(&bench, ":3: row");
    assert!(error.to_string().contains("a quote is not closed on this line"), "{error}");
    assert_eq!(bad_lines(&mut bench), (vec![3, 5, 6], 3));
    // A quote that closes three lines later would be valid in other CSV readers.
    let text = "user,item,label,time\nu1,\"a,1,1\nu1,b,0,2\nu2,a\",0,1\nu2,c,1,9\n";
    assert_eq!(bad_lines(&mut csv(text.as_bytes())), (vec![2], 3));
    // The same in another format, and in a last line without a line end.
    let mut bench = without_negatives(LogFormat::MovieLens, &["1\t2\t3\t4\n1\t\"3\t3\t5\n1\t4\t\"4\t6"]);
    assert_eq!(bad_lines(&mut bench), (vec![2, 3], 1));
}

#[test]
fn quoted_fields_of_any_format_are_read() {
    let expected = [event("1", "11", 100_000, 1), event("1", "1\"2", 101_000, 0)];
    for text in [
        "\"1\",\"11\",\"5\",\"100\"\n\"1\",\"1\"\"2\",\"3\",\"101\"\n",
        "\"1\"\t\"11\"\t\"5\"\t\"100\"\n1\t\"1\"\"2\"\t3\t101\n",
        "\"1\"::\"11\"::5::100\n1::1\"2::3::101\n",
    ] {
        assert_eq!(without_negatives(LogFormat::MovieLens, &[text]).events(), expected, "{text}");
    }
    let inter = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t\"11\"\t5\t100\n1\t1\"2\t\"3\"\t101\n";
    assert_eq!(without_negatives(LogFormat::Inter, &[inter]).events(), expected);
}

#[test]
fn rows_with_too_many_fields_are_bad() {
    let text = "user,title,item,label,time\nu1,Lamp,i1,1,100\nu1,Desk, oak,i2,0,101\nu2,Rug,i3,1,103\n";
    let mut bench = csv(text.as_bytes());
    refused(&bench, ":3: row `u1,Desk, oak,i2,0,101`: 6 fields, where line 1 has 5");
    assert_eq!(bad_lines(&mut bench), (vec![3], 2));
    // Two lines joined without a line end.
    let text = "user,item,label,time\nu1,a,1,1u1,b,0,2\nu2,a,0,1\n";
    assert_eq!(bad_lines(&mut csv(text.as_bytes())), (vec![2], 1));
    // Without a header, the most common number of fields is expected; here the first row differs.
    let mut bench = without_negatives(LogFormat::MovieLens, &["1\t2\t3\t4\t5\n1\t3\t3\t5\n1\t4\t4\t6\n"]);
    refused(&bench, ":1: row `1\t2\t3\t4\t5`: 5 fields, where line 2 has 4");
    assert_eq!(bad_lines(&mut bench), (vec![1], 2));
}

#[test]
fn empty_fields_at_the_end_may_be_more_or_fewer() {
    let text = "user,item,label,time,title\nu1,a,1,1,Lamp,,\nu1,b,0,2, , \nu2,a,0,1\n";
    assert_eq!(csv(text.as_bytes()).events(), log_events());
}

#[test]
fn line_ends_in_ids_are_bad() {
    let text = "{\"user_id\": \"A\\nB\", \"asin\": \"1\", \"rating\": 5, \"timestamp\": 1}\n\
                {\"user_id\": \"A\", \"asin\": \"1\", \"rating\": 5, \"timestamp\": 1}\n";
    let mut bench = without_negatives(LogFormat::Amazon, &[text]);
    refused(&bench, "a line end within an id");
    assert_eq!(bad_lines(&mut bench), (vec![1], 1));
}

#[test]
fn ids_are_the_same_bytes_in_every_format() {
    let ids = ["\u{a0}AU1", "007", "7", "7.0", "\u{ff11}", "\u{3000}x\u{3000}", "a b", "\u{200b}"];
    let csv_log: String = ids.iter().map(|id| format!(" {id}\t,{id},5,1\n")).collect();
    let json_log: String = ids
        .iter()
        .map(|id| {
            format!("{{\"user_id\":\" {id}\\t\",\"parent_asin\":\"{id}\",\"rating\":5,\"timestamp\":1}}\n")
        })
        .collect();
    let mut expected: Events = ids.iter().map(|id| event(id, id, 1000, 1)).collect();
    expected.sort();
    for log in [format!("user_id,parent_asin,rating,timestamp\n{csv_log}"), json_log] {
        let mut events = without_negatives(LogFormat::Amazon, &[&log]).events();
        events.sort();
        assert_eq!(events, expected, "{log}");
    }
}

#[test]
fn ids_of_any_length_are_read() {
    let long = "x".repeat(70_000);
    let text = format!("user,item,label,time\n{long},{long},1,1\n");
    assert_eq!(csv(text.as_bytes()).events(), [event(&long, &long, 1000, 1)]);
}

#[test]
fn carriage_returns_alone_end_lines_where_there_is_nothing_else() {
    assert_eq!(csv(LOG.replace('\n', "\r").as_bytes()).events(), log_events());
    let text = "1\t11\t5\t100\r1\t12\t3\t101\r";
    let expected = [event("1", "11", 100_000, 1), event("1", "12", 101_000, 0)];
    assert_eq!(without_negatives(LogFormat::MovieLens, &[text]).events(), expected);
    // Within a line they are blanks, and not part of an id.
    assert_eq!(csv(LOG.replace("u1", "u1\r").as_bytes()).events(), log_events());
    assert_eq!(csv(LOG.replace('\n', "\r\n").as_bytes()).events(), log_events());
}

// --- headers ---

#[test]
fn a_row_is_not_taken_for_a_header() {
    let numbers = |bench: &mut Bench| columns(bench, ["0", "1", "3", "2"]);
    let expected =
        [event("u1", "i1", 100_000, 1), event("u1", "i2", 101_000, 0), event("u2", "i1", 102_000, 1)];
    let log = "u1\ti1\t5\t100\nu1\ti2\t3\t101\nu2\ti1\t4\t102\n";
    for format in [
        LogFormat::MovieLens,
        LogFormat::Amazon,
        LogFormat::KuaiRand,
        LogFormat::KuaiRec,
        LogFormat::Inter,
        LogFormat::Csv,
    ] {
        let mut bench = without_negatives(format, &[log]);
        numbers(&mut bench);
        bench.options.liked = Liked::Above(3.0);
        assert_eq!(bench.events(), expected, "{}", format.name());
        let decisions = bench.run().unwrap().protocol().source.decisions.clone();
        assert!(decisions[0].contains("no header"), "{decisions:?}");
        // The same with a header.
        for header in ["user\titem\trating\ttime\n", "who\twhat\tstars\twhen\n", "0\t1\t2\t3\n"] {
            let mut bench = without_negatives(format, &[&format!("{header}{log}")]);
            numbers(&mut bench);
            bench.options.liked = Liked::Above(3.0);
            assert_eq!(bench.events(), expected, "{} {header}", format.name());
            let decisions = bench.run().unwrap().protocol().source.decisions.clone();
            assert!(decisions[0].contains("line 1 names the columns"), "{decisions:?}");
        }
        // A bad first row is a bad row, not a header.
        for row in ["u0\ti0\t\t99\n", "u0\ti0\tNaN\t99\n", "u0\ti0\tgood\t99\n", "u0\ti0\t5\tnever\n", "u0\n"]
        {
            let mut bench = without_negatives(format, &[&format!("{row}{log}")]);
            numbers(&mut bench);
            bench.options.liked = Liked::Above(3.0);
            assert_eq!(bad_lines(&mut bench), (vec![1], 3), "{} {row}", format.name());
        }
    }
    let amazon = "AAAAAAAAAAAAA1,B000000001,,1600000000\nAAAAAAAAAAAAA1,B000000002,5.0,1600000001\n";
    let mut bench = without_negatives(LogFormat::Amazon, &[amazon]);
    assert_eq!(bad_lines(&mut bench), (vec![1], 1));
}

#[test]
fn integers_in_order_are_the_header_of_a_table_without_names() {
    for header in ["0,1,2,3\n", ",0,1,2,3\n"] {
        let index = if header.starts_with(',') { "9," } else { "" };
        let text = format!("{header}{index}7,11,5,964982224\n{index}7,12,2,964982225\n");
        let mut bench = without_negatives(LogFormat::MovieLens, &[&text]);
        if !index.is_empty() {
            columns(&mut bench, ["1", "2", "4", "3"]);
        }
        let expected = [event("7", "11", 964_982_224_000, 1), event("7", "12", 964_982_225_000, 0)];
        assert_eq!(bench.events(), expected, "{text}");
    }
}

#[test]
fn blank_lines_and_marks_before_a_header_are_skipped() {
    for before in ["\r\n", "   \n", "\u{feff}\r\n", "\u{feff}", "\n\n\t\n", "\u{feff}  \n\u{feff}"] {
        assert_eq!(csv(format!("{before}{LOG}").as_bytes()).events(), log_events(), "{before:?}");
    }
}

#[test]
fn a_long_header_is_read() {
    let names: Vec<String> = (0..20_000).map(|number| format!("column{number}")).collect();
    let text = LOG.replace("user,item,label,time", &format!("user,item,label,time,{}", names.join(",")));
    assert_eq!(csv(text.as_bytes()).events(), log_events());
}

#[test]
fn concatenated_files_are_one_log() {
    let (first, second) = (LOG, LOG.replace("u1", "u3").replace("u2", "u4"));
    let mut expected = log_events();
    expected.extend([event("u3", "a", 1000, 1), event("u3", "b", 2000, 0), event("u4", "a", 1000, 0)]);
    for glue in ["\u{feff}", ""] {
        let both = format!("\u{feff}{first}{glue}{second}");
        assert_eq!(csv(both.as_bytes()).events(), expected, "with its header again");
        let packed =
            [gzip(format!("\u{feff}{first}").as_bytes()), gzip(format!("{glue}{second}").as_bytes())]
                .concat();
        assert_eq!(csv(&packed).events(), expected);
        let rows = second.split_once('\n').unwrap().1;
        assert_eq!(csv(format!("{first}{glue}{rows}").as_bytes()).events(), expected, "without it");
    }
}

#[test]
fn two_columns_of_one_name_are_refused() {
    let text = "user,item,label,time,label\nu1,a,1,1,0\nu1,b,1,2,0\n";
    let mut bench = csv(text.as_bytes());
    refused(&bench, "number 2 and number 4: give --label-column 2 or 4");
    bench.options.columns.label = Some("4".to_owned());
    assert!(bench.events().iter().all(|event| event.3 == 0));
    // A column that is not needed may occur twice.
    let text = "user,item,label,time,x,x\nu1,a,1,1,0,1\n";
    assert_eq!(csv(text.as_bytes()).events(), [event("u1", "a", 1000, 1)]);
}

#[test]
fn every_log_has_its_own_rule_in_the_protocol() {
    let header = |label: &str| format!("user_id:token\titem_id:token\t{label}:float\ttimestamp:float\n");
    let logs = [format!("{}1\ta\t5\t1\n", header("rating")), format!("{}1\tb\t1\t3\n", header("label"))];
    let bench = without_negatives(LogFormat::Inter, &[&logs[0], &logs[1]]);
    assert_eq!(bench.events(), [event("1", "a", 1000, 1), event("1", "b", 3000, 1)]);
    assert_eq!(bench.run().unwrap().protocol().positive, "rating > 3 (log0); label = 1 (log1)");
}

// --- times ---

/// Times of one user's events, in the order of the file.
fn times(texts: &[&str]) -> Bench {
    let rows: String = texts.iter().enumerate().map(|(row, time)| format!("u,i{row},1,{time}\n")).collect();
    csv(format!("user,item,label,time\n{rows}").as_bytes())
}

#[test]
fn the_unit_of_times_is_decided_once() {
    for (texts, expected) in [
        // Milliseconds of 1970 to 1973 among later ones, and counters beyond 10^11.
        (
            &["86400000", "99999999999", "100000000000", "1600000000000"][..],
            &[86_400_000, 99_999_999_999, 100_000_000_000, 1_600_000_000_000][..],
        ),
        (&["99999999998", "99999999999", "100000000000"], &[99_999_999_998, 99_999_999_999, 100_000_000_000]),
        (&["1600000000000000", "1600000000000501"], &[1_600_000_000_000, 1_600_000_000_001]),
        (&["1600000000000000000"], &[1_600_000_000_000]),
        (&["1600000000", "1600000000.5"], &[1_600_000_000_000, 1_600_000_000_500]),
        (&["2019-10-01 00:00:00 UTC", "2019-10-01T02:30:00+02:00"], &[1_569_888_000_000, 1_569_889_800_000]),
        (&["1", "2"], &[1000, 2000]),
    ] {
        let events = times(texts).events();
        assert_eq!(events.iter().map(|event| event.2).collect::<Vec<_>>(), expected, "{texts:?}");
    }
}

#[test]
fn times_in_two_units_are_refused() {
    for texts in [
        ["1600000000", "1600000000000"],
        ["1600000000000", "1600000000"],
        ["1600000000", "1600000000000000"],
        ["2019-10-01", "1600000000"],
    ] {
        let error = refused(&times(&texts), "times are mixed");
        let DataError::MixedTimes { sightings, .. } = error else { panic!("{error}") };
        let mut lines = sightings.map(|sighting| sighting.line);
        lines.sort_unstable();
        assert_eq!(lines, [2, 3]);
    }
    let mut bench = times(&["1600000000", "1600000000000"]);
    bench.options.time_unit = TimeUnit::Milliseconds;
    assert_eq!(bench.events()[0].2, 1_600_000_000);
}

#[test]
fn order_below_a_millisecond_is_kept() {
    let mut bench = times(&["1600000000000300", "1600000000000200", "1600000000000100"]);
    let items: Vec<String> = bench.events().into_iter().map(|event| event.1).collect();
    assert_eq!(items, ["i2", "i1", "i0"]);
    bench.options.time_unit = TimeUnit::Nanoseconds;
    assert_eq!(bench.events()[0].2, 1_600_000_000);
}

#[test]
fn dates_and_times_of_day_may_have_two_columns() {
    let text = "user,item,label,date,hourmin\nu1,a,1,20220408,400\nu1,b,0,2022-04-08,16:30:05\n";
    let mut bench = csv(text.as_bytes());
    bench.options.columns.time = Some("hourmin".to_owned());
    bench.options.columns.date = Some("date".to_owned());
    let midnight = 1_649_376_000_000;
    let expected =
        [event("u1", "a", midnight + 4 * 3_600_000, 1), event("u1", "b", midnight + 59_405_000, 0)];
    assert_eq!(bench.events(), expected);
    let mut bench = csv(text.replace("16:30:05", "late").as_bytes());
    bench.options.columns = csv(b"").options.columns;
    bench.options.columns.time = Some("hourmin".to_owned());
    bench.options.columns.date = Some("date".to_owned());
    let row = bench.bad_row();
    assert_eq!((row.line, &row.field[..], &row.value[..]), (3, "hourmin", "late"));
}

// --- feedback ---

#[test]
fn logs_of_likes_need_no_label() {
    let mut bench = csv(b"user,item,time\nu1,a,1\nu1,b,2\n");
    bench.options.columns.label = None;
    bench.options.liked = Liked::Every;
    assert_eq!(bench.events(), [event("u1", "a", 1000, 1), event("u1", "b", 2000, 1)]);
    assert_eq!(bench.run().unwrap().protocol().positive, "every event");
}

#[test]
fn events_are_liked_by_name() {
    let log = LOG.replace(",1,", ",buy,").replace(",0,", ",dismiss,") + "u2,c,view,7\nu2,d,view,8\nu2,d,,9\n";
    let mut bench = csv(log.as_bytes());
    let named = |ignore_others| Liked::Named {
        liked: vec!["cart".to_owned(), " buy".to_owned()],
        skipped: vec!["dismiss".to_owned()],
        ignore_others,
    };
    bench.options.skip_bad_rows = 1;
    bench.options.liked = named(false);
    match bench.run().unwrap_err() {
        DataError::OtherEvents { count, names } => {
            assert_eq!((count, names), (2, vec![("view".to_owned(), 2)]))
        }
        other => panic!("{other}"),
    }
    bench.options.liked = named(true);
    assert_eq!(bench.events(), log_events());
    let source = bench.run().unwrap().protocol().source.clone();
    assert_eq!((source.rows, source.bad_rows, source.other_events), (6, 1, 2));
    for (liked, skipped, refused) in
        [("a", "a", "liked"), ("a ", " a", "liked"), (" ", "a", "liked"), ("a", "", "skipped")]
    {
        bench.options.liked =
            Liked::Named { liked: vec![liked.into()], skipped: vec![skipped.into()], ignore_others: true };
        assert!(matches!(bench.run(), Err(DataError::InvalidOption { option, .. }) if option == refused));
    }
}

#[test]
fn flags_may_be_words_for_true_and_false() {
    let text = LOG.replace(",1,", ",True,").replace(",0,", ",false,");
    assert_eq!(csv(text.as_bytes()).events(), log_events());
}

// --- JSON ---

#[test]
fn json_is_read_in_every_shape() {
    let object = |user: &str, item: &str, label: u8, time: i64| {
        format!(
            "{{\"user\":\"{user}\",\"item\":\"{item}\",\"label\":{label},\"time\":{time},\"more\":[{{\"user\":1}}]}}"
        )
    };
    let objects = [object("u1", "a", 1, 1), object("u1", "b", 0, 2), object("u2", "a", 0, 1)];
    for text in [
        objects.join("\n"),
        format!("\u{feff}[{}]\n", objects.join(",")),
        format!("[\n  {}\n]\n", objects.join(",\n  ")),
        format!("[{}]", objects.join("\n,\n").replace(",\"", ",\n\"")),
        format!("{}\r\n", objects.join("\r\n\r\n")),
    ] {
        assert_eq!(csv(text.as_bytes()).events(), log_events(), "{text}");
    }
    // A number is an id by its digits; a number in quotes is a number; NaN is accepted where the
    // value is not needed.
    let text = "{\"user\": 7, \"item\": 1.50, \"label\": \"1\", \"time\": \"2\", \"price\": NaN}\n";
    assert_eq!(csv(text.as_bytes()).events(), [event("7", "1.50", 2000, 1)]);
    // Python writes NaN for a missing value.
    for key in ["user", "item", "label", "time"] {
        let fields = ["user", "item", "label", "time"]
            .map(|name| format!("\"{name}\": {}", if name == key { "NaN" } else { "1" }));
        let row = csv(format!("{{{}}}\n", fields.join(", ")).as_bytes()).bad_row();
        assert!(row.field.starts_with(key) && row.reason.starts_with("missing"), "{row}");
    }
}

#[test]
fn newer_json_keys_win_and_repeated_keys_are_bad() {
    // Keys of two generations in one row: the newer ones count.
    let text = "{\"user_id\":\"A\",\"parent_asin\":\"B1\",\"asin\":\"B9\",\"rating\":5.0,\"overall\":5.0,\
                \"timestamp\":1600000000000,\"unixReviewTime\":1600000000}\n";
    let expected = [event("A", "B1", 1_600_000_000_000, 1)];
    assert_eq!(without_negatives(LogFormat::Amazon, &[text]).events(), expected);
    let nulls = text.replace("\"B1\"", "null").replace("B9", "B1");
    assert_eq!(without_negatives(LogFormat::Amazon, &[&nulls]).events(), expected);
    // A repeated key is a bad row.
    let bench = without_negatives(LogFormat::Amazon, &["{\"user_id\":\"A\",\"user_id\":\"B\"}\n"]);
    refused(&bench, "the key user_id occurs twice");
}

#[test]
fn json_columns_are_given_by_key() {
    let text = "{\"review_id\":\"r\",\"user_id\":\"u\",\"business_id\":\"b\",\"stars\":4.0,\"date\":\"2019-10-01 00:00:00\"}\n";
    let mut bench = without_negatives(LogFormat::Csv, &[text]);
    columns(&mut bench, ["user_id", "business_id", "date", "stars"]);
    bench.options.liked = Liked::Above(3.0);
    assert_eq!(bench.events(), [event("u", "b", 1_569_888_000_000, 1)]);
}

// --- containers ---

#[test]
fn containers_are_unpacked_or_named() {
    let zst = zstd::encode_all(LOG.as_bytes(), 3).unwrap();
    let mut padded = gzip(LOG.as_bytes());
    padded.extend([0; 1000]);
    // pzstd puts a skippable frame in front of each frame.
    let pzst = [&b"\x50\x2a\x4d\x18\x04\0\0\0\x10\0\0\0"[..], &zst].concat();
    for bytes in [
        &zst,
        &pzst,
        &padded,
        &gzip(&zst),
        &tar(&[("log.csv", LOG.as_bytes())]),
        &gzip(&tar(&[("d/log.csv", &gzip(LOG.as_bytes()))])),
    ] {
        assert_eq!(csv(bytes).events(), log_events());
    }
    let mut garbage = gzip(LOG.as_bytes());
    garbage.extend(b"and so on");
    refused(&csv(&garbage), "no gzip data follow");
    refused(&csv(&zst[..zst.len() - 4]), "cannot read");
    for (bytes, words) in [
        (&b"PK\x03\x04\0\0"[..], "zip"),
        (b"BZh91AY&SY\x01\x02", "bzip2"),
        (b"\xfd7zXZ\0\0", "xz"),
        (b"7z\xbc\xaf\x27\x1c\0", "7-Zip"),
        (b"\xff\xfeu\0s\0e\0r\0", "UTF-16"),
        (b"u\0s\0e\0r\0,\0", "UTF-16"),
        (b"PAR1 and no more", "Parquet"),
        (b"ARROW1\0\0", "Arrow"),
        (b"SQLite format 3\0", "SQLite"),
    ] {
        refused(&csv(bytes), words);
    }
    let mut bench = csv(b"");
    bench.options.inputs = vec![bench.folder.path().to_owned()];
    refused(&bench, "folder");
    bench.options.inputs = vec!["-".into(), "-".into()];
    refused(&bench, "only once");
}

#[test]
fn archives_hold_several_logs() {
    let header = "user_id,video_id,time_ms,long_view\n";
    let logs = [format!("{header}1,10,1,1\n1,11,2,0\n"), format!("{header}2,10,3,1\n")];
    let members: [(&str, &[u8]); 7] = [
        ("KuaiRand/.ipynb_checkpoints/log_standard_4_08.csv", logs[0].as_bytes()),
        ("KuaiRand/README.md", b"# about"),
        ("KuaiRand/data/log_standard_4_08.csv", logs[0].as_bytes()),
        ("KuaiRand/data/._log_standard_4_08.csv", b"\0\x05\x16\x07"),
        ("KuaiRand/data/log_random_4_22.csv", logs[1].as_bytes()),
        ("KuaiRand/data/user_features_1k.csv", b"user_id,is_lowactive\n1,0\n"),
        ("KuaiRand/load_data_1k.py", b"import pandas"),
    ];
    let archive = gzip(&tar(&members));
    let mut bench = Bench::of_bytes(LogFormat::KuaiRand, &[&archive]);
    bench.options.candidates.negatives = 0;
    let expected = [event("1", "10", 1000, 1), event("1", "11", 2000, 0), event("2", "10", 3000, 1)];
    assert_eq!(bench.events(), expected);
    bench.options.member = Some("*random*".to_owned());
    assert_eq!(bench.events(), [event("2", "10", 3000, 1)]);
    bench.options.member = Some("*nothing*".to_owned());
    refused(&bench, "--member");
    // A bad row is named with its member.
    let broken = tar(&[("data/log.csv", format!("{header}1,10,x,1\n").as_bytes())]);
    let row = Bench::of_bytes(LogFormat::KuaiRand, &[&broken]).bad_row();
    assert!(row.path.ends_with("log0/data/log.csv"), "{}", row.path.display());
}

#[test]
fn an_archive_without_an_end_mark_is_noted() {
    let whole = tar(&[("a.csv", LOG.as_bytes()), ("b.csv", LOG.as_bytes())]);
    // A member is a header and, here, one block.
    for (length, noted) in [(whole.len(), false), (4 * 512, true), (2 * 512, true)] {
        let notes = Notes::default();
        import(&csv(&whole[..length]).options, &notes).unwrap();
        assert_eq!(notes.0.borrow().iter().any(|note| note.contains("no end mark")), noted, "{length}");
    }
}

#[test]
fn bad_bytes_in_a_first_line_are_refused_or_bad() {
    refused(&csv(b"us\xffer,item,label,time\nu1,a,1,1\n"), "not UTF-8");
    let mut bench = Bench::of_bytes(LogFormat::MovieLens, &[b"1\t\xff\t3\t4\n1\t2\t3\t4\n"]);
    bench.options.candidates.negatives = 0;
    assert_eq!(bad_lines(&mut bench), (vec![1], 1));
}

// --- columnar files ---

#[cfg(feature = "parquet")]
mod columnar {
    use super::*;
    use arrow_array::types::Int32Type;
    use arrow_array::*;
    use parquet::arrow::ArrowWriter;
    use std::sync::Arc;

    fn parquet(batch: &RecordBatch) -> Vec<u8> {
        let mut writer = ArrowWriter::try_new(Vec::new(), batch.schema(), None).unwrap();
        writer.write(batch).unwrap();
        writer.into_inner().unwrap()
    }

    fn arrow_file(batch: &RecordBatch) -> Vec<u8> {
        let mut writer = arrow_ipc::writer::FileWriter::try_new(Vec::new(), &batch.schema()).unwrap();
        writer.write(batch).unwrap();
        writer.into_inner().unwrap()
    }

    fn arrow_stream(batch: &RecordBatch) -> Vec<u8> {
        let mut writer = arrow_ipc::writer::StreamWriter::try_new(Vec::new(), &batch.schema()).unwrap();
        writer.write(batch).unwrap();
        writer.into_inner().unwrap()
    }

    fn batch(columns: [(&str, ArrayRef); 4]) -> RecordBatch {
        // An additional first column, so that column numbers differ from the order of the needed
        // columns.
        let filler: ArrayRef = Arc::new(StringArray::from(vec!["x"; columns[0].1.len()]));
        RecordBatch::try_from_iter([("filler", filler)].into_iter().chain(columns)).unwrap()
    }

    #[test]
    fn columns_of_every_type_are_read() {
        let users: [ArrayRef; 4] = [
            Arc::new(StringArray::from(vec!["1", "1", "2"])),
            Arc::new(LargeStringArray::from(vec![" 1", "1 ", "2"])),
            Arc::new(["1", "1", "2"].into_iter().collect::<DictionaryArray<Int32Type>>()),
            Arc::new(Int64Array::from(vec![1, 1, 2])),
        ];
        let items: [ArrayRef; 4] = [
            Arc::new(UInt64Array::from(vec![7, u64::MAX, 7])),
            Arc::new(StringViewArray::from(vec!["7", "18446744073709551615", "7"])),
            Arc::new(BinaryArray::from(vec![&b"7"[..], b"18446744073709551615", b"7"])),
            Arc::new(StringArray::from(vec!["7", "18446744073709551615", "7"])),
        ];
        let labels: [ArrayRef; 4] = [
            Arc::new(BooleanArray::from(vec![true, false, false])),
            Arc::new(Int8Array::from(vec![1, 0, 0])),
            Arc::new(Float64Array::from(vec![1.0, 0.0, 0.0])),
            Arc::new(StringArray::from(vec!["1", "0", "0"])),
        ];
        let seconds = [1_600_000_000, 1_600_000_001, 1_600_000_000];
        let times: [ArrayRef; 4] = [
            Arc::new(Int64Array::from(seconds.to_vec())),
            Arc::new(
                TimestampMicrosecondArray::from(seconds.map(|s| s * 1_000_000).to_vec()).with_timezone("UTC"),
            ),
            Arc::new(TimestampNanosecondArray::from(seconds.map(|s| s * 1_000_000_000).to_vec())),
            Arc::new(StringArray::from(vec![
                "2020-09-13 12:26:40",
                "2020-09-13T12:26:41Z",
                "2020-09-13 12:26:40",
            ])),
        ];
        let big = "18446744073709551615";
        let expected = [
            event("1", "7", 1_600_000_000_000, 1),
            event("1", big, 1_600_000_001_000, 0),
            event("2", "7", 1_600_000_000_000, 0),
        ];
        for (((user, item), label), time) in users.into_iter().zip(items).zip(labels).zip(times) {
            let batch = batch([("user", user), ("item", item), ("time", time), ("label", label)]);
            for bytes in [parquet(&batch), gzip(&parquet(&batch)), arrow_file(&batch), arrow_stream(&batch)] {
                assert_eq!(csv(&bytes).events(), expected, "{:?}", batch.schema());
            }
            let mut by_number = csv(&parquet(&batch));
            columns(&mut by_number, ["1", "2", "3", "4"]);
            assert_eq!(by_number.events(), expected);
        }
    }

    fn of_three(time: ArrayRef, label: ArrayRef) -> RecordBatch {
        let texts = |values: [&str; 3]| Arc::new(StringArray::from(values.to_vec())) as ArrayRef;
        batch([("user", texts(["u"; 3])), ("item", texts(["a", "b", "c"])), ("time", time), ("label", label)])
    }

    #[test]
    fn labels_of_narrow_types_mean_what_they_print() {
        let times = || Arc::new(Int64Array::from(vec![1, 2, 3])) as ArrayRef;
        let feedback = |bench: &Bench| bench.events().iter().map(|event| event.3).collect::<Vec<_>>();
        let flags = Arc::new(BooleanArray::from(vec![true, false, true]));
        for names in [["true", "false"], ["1", "0"]] {
            let mut bench = csv(&parquet(&of_three(times(), flags.clone())));
            let [liked, skipped] = names.map(|name| vec![name.to_owned()]);
            bench.options.liked = Liked::Named { liked, skipped, ignore_others: false };
            assert_eq!(feedback(&bench), [1, 0, 1], "{names:?}");
        }
        let ratings = Arc::new(Float32Array::from(vec![0.1, 0.2, 5.0]));
        let mut bench = csv(&parquet(&of_three(times(), ratings)));
        bench.options.liked = Liked::Above(0.1);
        assert_eq!(feedback(&bench), [0, 1, 1]);
    }

    #[test]
    fn decimal_times_keep_their_order() {
        let labels = Arc::new(Int8Array::from(vec![1, 1, 1]));
        let nanoseconds = 1_600_000_000_000_000_000;
        let times = [3, 2, 1].map(|i| (nanoseconds + i) * 100);
        let times = Decimal128Array::from(times.to_vec()).with_precision_and_scale(38, 2).unwrap();
        let events = csv(&parquet(&of_three(Arc::new(times), labels))).events();
        assert_eq!(events.iter().map(|event| &event.1[..]).collect::<Vec<_>>(), ["c", "b", "a"]);
    }

    #[test]
    fn two_parquet_files_end_to_end_are_refused() {
        let labels = || Arc::new(Int8Array::from(vec![1, 0, 1])) as ArrayRef;
        let one = parquet(&of_three(Arc::new(Int64Array::from(vec![1, 2, 3])), labels()));
        let other = parquet(&of_three(Arc::new(Int64Array::from(vec![4, 5, 6])), labels()));
        refused(&csv(&[one, other].concat()), "another Parquet file is in front of it");
    }

    #[test]
    fn nulls_are_bad_rows_and_other_types_are_refused() {
        let text = |values: Vec<Option<&str>>| Arc::new(StringArray::from(values)) as ArrayRef;
        let flags = || Arc::new(Int8Array::from(vec![1, 0])) as ArrayRef;
        let times = || Arc::new(Int32Array::from(vec![1, 2])) as ArrayRef;
        let users = text(vec![None, Some("u")]);
        let log = batch([
            ("user", users),
            ("item", text(vec![Some("a"), Some("b")])),
            ("time", times()),
            ("label", flags()),
        ]);
        let mut bench = csv(&parquet(&log));
        let row = bench.bad_row();
        assert_eq!((row.line, &row.field[..], &row.reason[..]), (1, "user", "null"));
        assert_eq!(bad_lines(&mut bench), (vec![1], 1));
        let users = Arc::new(Float64Array::from(vec![1.0, 2.0])) as ArrayRef;
        let log = batch([
            ("user", users),
            ("item", text(vec![Some("a"), Some("b")])),
            ("time", times()),
            ("label", flags()),
        ]);
        refused(&csv(&parquet(&log)), "column user is Float64");
        let whole = parquet(&log);
        for length in [4, 50, whole.len() - 1] {
            refused(&csv(&whole[..length]), "begins as Parquet");
        }
    }
}

// --- reported decisions ---

#[test]
fn decisions_are_reported_and_stored() {
    let bench = csv(LOG.replace(",1,", ",0,").as_bytes());
    let notes = Notes::default();
    import(&bench.options, &notes).unwrap();
    let notes = notes.0.into_inner();
    assert_eq!(notes.len(), 3);
    for (note, words) in
        notes.iter().zip(["line 1 names the columns", "times: a counter", "no event is liked"])
    {
        assert!(note.contains(words), "{note}");
    }
    let data = Dataset::open(&bench.options.output).unwrap();
    assert_eq!(data.protocol().source.decisions, notes);
}
