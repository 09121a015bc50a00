//! `dfar-data` on the command line: results on stdout, messages on stderr, exit codes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const LOG: &str = "\
user_id,video_id,time_ms,long_view,is_click
1,10,1000000000001,1,0
1,11,1000000000002,0,1
1,12,1000000000003,1,1
2,10,1000000000004,1,0
2,12,1000000000005,0,0
2,13,1000000000006,1,1
3,11,1000000000007,1,0
3,13,1000000000008,0,1
3,10,1000000000009,1,1
";

fn dfar_data(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dfar-data")).args(arguments).stdin(Stdio::null()).output().unwrap()
}

#[track_caller]
fn succeeds(arguments: &[&str]) -> (String, String) {
    let output = dfar_data(arguments);
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert_eq!(output.status.code(), Some(0), "{err}");
    (out, err)
}

#[track_caller]
fn fails(arguments: &[&str], code: i32) -> String {
    let output = dfar_data(arguments);
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{err}");
    assert!(output.stdout.is_empty());
    err
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Folder {
        let folder = Folder(tempfile::tempdir().unwrap());
        std::fs::write(folder.0.path().join("log.csv"), LOG).unwrap();
        folder
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }

    /// Writes a file, and returns its path.
    fn write(&self, name: &str, text: &str) -> String {
        std::fs::write(self.path(name), text).unwrap();
        self.path(name)
    }

    /// The arguments to import the log with these flags.
    fn import<'a>(&'a self, log: &'a str, output: &'a str, flags: &[&'a str]) -> Vec<&'a str> {
        let usual = ["import", "--format", "kuairand", "--input", log, "--output", output];
        usual.iter().chain(&["--k-core", "0", "--negatives", "1"]).chain(flags).copied().collect()
    }
}

#[test]
fn import_then_info() {
    let folder = Folder::new();
    let [log, output] = ["log.csv", "x.dfar"].map(|name| folder.path(name));
    let (out, err) = succeeds(&folder.import(&log, &output, &["--split", "leave-last"]));
    assert_eq!(out, "");
    assert!(err.contains("3 users, 4 items, 9 events of 9 rows"), "{err}");
    // stderr is not a terminal here, so there are no bars.
    assert!(!err.contains('\r') && !err.contains('\x1b'), "{err:?}");

    let (out, err) = succeeds(&["info", &output]);
    assert_eq!(err, "");
    for words in ["leave-last", "long_view = 1", "kuairand log.csv", "1 by training popularity"] {
        assert!(out.contains(words), "no {words:?} in {out}");
    }
    // Every user likes the first event, skips the second, and likes the third.
    let rows: Vec<Vec<&str>> = out.lines().map(|line| line.split_whitespace().collect()).collect();
    for row in
        [["liked", "0", "3", "0.0", "%"], ["skipped", "3", "0", "100.0", "%"], ["2-3", "3", "3", "50.0", "%"]]
    {
        assert!(rows.contains(&row.to_vec()), "no {row:?} in {out}");
    }

    let (out, _) = succeeds(&["info", "--json", &output]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    assert_eq!(json["users"], 3);
    assert_eq!(json["items"], 4);
    assert_eq!(json["positive"], 6);
    assert_eq!(json["negative"], 3);
    assert_eq!(json["mean_records_per_user"], 3.0);
    assert_eq!(json["train"], serde_json::json!({"liked": 3, "skipped": 0}));
    assert_eq!(json["valid"], serde_json::json!({"liked": 0, "skipped": 3}));
    assert_eq!(json["test"], serde_json::json!({"liked": 3, "skipped": 0}));
    assert_eq!(json["transitions"], serde_json::json!([[0, 3], [3, 0]]));
    assert_eq!(json["by_position"][1], serde_json::json!({"from": 2, "to": 3, "liked": 3, "skipped": 3}));
    assert_eq!(json["history_length"][0], serde_json::json!({"share": 0.0, "events": 3}));
    assert_eq!(json["times"], serde_json::json!([1_000_000_000_001_i64, 1_000_000_000_009_i64]));
    assert_eq!(json["protocol"]["split"]["kind"], "leave-last");
    assert_eq!(json["protocol"]["candidates"]["negatives"], 1);
    assert_eq!(json["ceiling_auc"], serde_json::Value::Null);
}

#[test]
fn shares_are_refused_for_a_split_without_shares() {
    let folder = Folder::new();
    let [log, output] = ["log.csv", "x.dfar"].map(|name| folder.path(name));
    for flags in [
        &["--split", "leave-last", "--train-share", "0.5"][..],
        &["--split", "leave-last", "--valid-share", "0.1"],
    ] {
        let error = fails(&folder.import(&log, &output, flags), 2);
        assert!(error.contains("this split is leave-last"), "{error}");
    }
}

#[test]
fn flags_reach_the_protocol() {
    let folder = Folder::new();
    let [log, output] = ["log.csv", "x.dfar"].map(|name| folder.path(name));
    let flags = [
        "--label-column",
        "is_click",
        "--positive-above",
        "-1",
        "--split",
        "temporal",
        "--train-share",
        "0.5",
        "--valid-share",
        "0.25",
        "--seed",
        "77",
        "--keep-repeats",
        "--skip-bad-rows",
        "3",
        "--quiet",
    ];
    let (_, err) = succeeds(&folder.import(&log, &output, &flags));
    assert_eq!(err, "");
    let (out, _) = succeeds(&["info", "--json", &output]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    let protocol = &json["protocol"];
    assert_eq!(protocol["positive"], "is_click > -1");
    assert_eq!(protocol["split"], serde_json::json!({"kind": "temporal", "train": 0.5, "valid": 0.25}));
    assert_eq!(protocol["repeats"], "keep");
    assert_eq!(protocol["k_core"], serde_json::Value::Null);
    assert_eq!(protocol["candidates"]["seed"], 77);
    assert_eq!((json["positive"].as_u64(), json["negative"].as_u64()), (Some(9), Some(0)));
}

#[test]
fn standard_input_is_a_log() {
    let folder = Folder::new();
    let [log, output] = ["log.csv", "x.dfar"].map(|name| folder.path(name));
    let status = Command::new(env!("CARGO_BIN_EXE_dfar-data"))
        .args(folder.import("-", &output, &["--quiet"]))
        .stdin(std::fs::File::open(log).unwrap())
        .status()
        .unwrap();
    assert!(status.success());
    assert!(succeeds(&["info", &output]).0.contains("9 rows"));
}

#[test]
fn bad_rows_exit_3_with_their_place() {
    let folder = Folder::new();
    let [log, output] = ["bad.csv", "x.dfar"].map(|name| folder.path(name));
    std::fs::write(&log, LOG.replacen("1000000000005", "later", 1)).unwrap();
    let err = fails(&folder.import(&log, &output, &[]), 3);
    assert!(err.contains(&format!("{log}:6: time_ms `later`: not a number")), "{err}");
    assert!(!Path::new(&output).exists());
    let (_, err) = succeeds(&folder.import(&log, &output, &["--skip-bad-rows", "1"]));
    assert!(err.contains("skipped: ") && err.contains("(1 bad, 0 repeated)"), "{err}");
}

#[test]
fn an_import_says_how_many_events_can_be_evaluated() {
    let folder = Folder::new();
    let [log, output] = ["short.csv", "x.dfar"].map(|name| folder.path(name));
    for (rows, validation, test, nothing) in [(2, 0, 0, true), (3, 1, 1, false)] {
        let events: String = (0..rows).map(|row| format!("u,i{row},1,{row}\n")).collect();
        std::fs::write(&log, format!("user,item,label,time\n{events}")).unwrap();
        let flags = ["--input", &log, "--output", &output, "--k-core", "0", "--negatives", "0"];
        let (_, err) = succeeds(&[&["import", "--format", "csv"][..], &flags].concat());
        assert!(err.contains(&format!("{validation} events for validation, {test} for the test")), "{err}");
        assert_eq!(err.contains("nothing can be evaluated"), nothing, "{err}");
    }
}

#[test]
fn exit_codes() {
    let folder = Folder::new();
    let [log, output, missing] = ["log.csv", "x.dfar", "missing"].map(|name| folder.path(name));
    fails(&["import"], 2);
    fails(&["import", "--format", "nothing", "--input", &log, "--output", &output], 2);
    fails(&folder.import(&log, &output, &["--delimiter", "ab"]), 2);
    assert!(fails(&folder.import(&log, "-", &[]), 2).contains("name a file"));
    fails(&folder.import(&missing, &output, &[]), 3);
    fails(&folder.import(&log, &output, &["--label-column", "nothing"]), 3);
    fails(&["info", &missing], 3);
    let err = fails(&["info", &log], 3);
    assert!(err.contains("not a dfar data set"), "{err}");
    let err = fails(&folder.import(&log, &output, &["--member", "*.csv"]), 3);
    assert!(err.contains("log.csv: it is not a tar archive"), "{err}");
    // The data are valid, but writing fails: exit code 1.
    let nowhere: PathBuf = Path::new(&missing).join("x.dfar");
    fails(&folder.import(&log, nowhere.to_str().unwrap(), &[]), 1);
    for arguments in [&["--help"][..], &["import", "--help"], &["--version"]] {
        succeeds(arguments);
    }
}

#[cfg(unix)]
#[test]
fn a_closed_pipe_is_no_error() {
    let folder = Folder::new();
    let [log, output] = ["log.csv", "x.dfar"].map(|name| folder.path(name));
    succeeds(&folder.import(&log, &output, &[]));
    let mut child = Command::new(env!("CARGO_BIN_EXE_dfar-data"))
        .args(["info", &output])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(output.stderr.is_empty());
}

#[cfg(unix)]
#[test]
fn an_import_goes_on_when_nobody_reads_its_messages() {
    let folder = Folder::new();
    let [log, output] = ["bad.csv", "x.dfar"].map(|name| folder.path(name));
    std::fs::write(&log, LOG.replacen("1000000000005", "later", 1)).unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_dfar-data"))
        .args(folder.import(&log, &output, &["--skip-bad-rows", "1"]))
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stderr.take());
    assert!(child.wait().unwrap().success());
    assert!(succeeds(&["info", &output]).0.contains("9 rows"));
}

#[test]
fn synth_prints_the_ceiling() {
    let folder = Folder::new();
    let output = folder.path("s.dfar");
    let arguments =
        ["synth", "--users", "200", "--items", "100", "--events", "6000", "--seed", "4", "--output", &output];
    let (out, err) = succeeds(&arguments);
    assert_eq!(out, "");
    assert!(err.contains("200 users, 100 items"), "{err}");
    let (out, _) = succeeds(&["info", "--json", &output]);
    let json: serde_json::Value = serde_json::from_str(&out).unwrap();
    let ceiling = json["ceiling_auc"].as_f64().unwrap();
    assert!((0.75..0.95).contains(&ceiling), "{ceiling}");
    let events = json["positive"].as_u64().unwrap() + json["negative"].as_u64().unwrap();
    assert!((4500..7500).contains(&events), "{events}");
    assert_eq!(json["protocol"]["synthetic"]["seed"], 4);
    assert!(succeeds(&["info", &output]).0.contains("ceiling"));
    assert!(fails(&["synth", "--output", "-"], 2).contains("name a file"));
    let err = fails(&["synth", "--users", "0", "--output", &output], 2);
    assert!(err.contains("users"), "{err}");
}

#[test]
fn export_and_import_again_give_the_same_events() {
    let folder = Folder::new();
    let [log, output, again, export] =
        ["nasty.csv", "x.dfar", "y.dfar", "events"].map(|name| folder.path(name));
    // Ids that need quotes or look like numbers, and a counter without a recognizable unit.
    let ids = ["\"a,b\"", "\"say \"\"hi\"\"\"", "\u{a0}x", "\"\u{feff}y\"", "007", "-1", "#c", "1e5"];
    let rows: String = (0..40)
        .map(|row| {
            format!("{},{},{},{}\n", ids[row % 8], ids[row / 8], row % 2, 99_999_999_990_u64 + row as u64)
        })
        .collect();
    std::fs::write(&log, format!("user_id,video_id,long_view,time_ms\n{rows}")).unwrap();
    let leave_last = ["--split", "leave-last", "--keep-repeats"];
    succeeds(&folder.import(&log, &output, &leave_last));
    let data = dfar::data::Dataset::open(&output).unwrap();

    let endings: &[&str] = if cfg!(feature = "parquet") { &["csv", "parquet"] } else { &["csv"] };
    for ending in endings {
        let export = format!("{export}.{ending}");
        succeeds(&["export", &output, "--output", &export]);
        let mut flags = vec!["import", "--format", "csv", "--input", &export, "--output", &again];
        flags.extend(["--time-unit", "ms", "--k-core", "0", "--negatives", "1"]);
        flags.extend(leave_last);
        succeeds(&flags);
        let copy = dfar::data::Dataset::open(&again).unwrap();
        assert_eq!((copy.users(), copy.events()), (data.users(), data.events()));
        for user in 0..data.users() as u32 {
            let twin = copy.find_user(data.user_name(user)).unwrap();
            let [own, other] = [(&data, user), (&copy, twin)].map(|(data, user)| {
                let events = data.user(user);
                let items =
                    events.items.iter().map(|&item| data.item_name(item).to_owned()).collect::<Vec<_>>();
                (items, events.feedback.to_vec(), events.times.to_vec())
            });
            assert_eq!(own, other, "{ending}");
        }
    }
    let (out, _) = succeeds(&["export", &output, "--output", "-"]);
    assert_eq!(out, std::fs::read_to_string(format!("{export}.csv")).unwrap());
    assert_eq!(out.lines().next(), Some("\"user\",\"item\",\"label\",\"time\",\"part\""));
    let other = format!("{export}.json");
    assert!(fails(&["export", &output, "--output", &other], 2).contains("give --to"));
    assert!(!Path::new(&other).exists());
}

#[cfg(unix)]
#[test]
fn an_interrupted_export_leaves_no_file() {
    let folder = Folder::new();
    let data = folder.path("x.dfar");
    succeeds(&["synth", "--users", "4000", "--events", "400000", "--output", &data]);
    for signal in ["INT", "TERM"] {
        let output = folder.path("out.csv");
        let mut command = Command::new(env!("CARGO_BIN_EXE_dfar-data"));
        let mut child = command.args(["export", &data, "--output", &output]).spawn().unwrap();
        let partial = || {
            let files = std::fs::read_dir(folder.0.path()).unwrap();
            files
                .filter(|file| file.as_ref().unwrap().path().extension().is_some_and(|e| e == "dfar-partial"))
                .count()
        };
        while partial() == 0 && child.try_wait().unwrap().is_none() {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let kill = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status();
        assert!(kill.unwrap().success());
        assert_eq!(child.wait().unwrap().code(), Some(130), "{signal}");
        assert!(partial() == 0 && !Path::new(&output).exists(), "{signal}");
    }
}

#[test]
fn a_file_that_is_no_data_set_is_not_replaced() {
    let folder = Folder::new();
    let log = folder.path("log.csv");
    let other = folder.write("other.csv", "keep me\n");
    for flags in [&folder.import(&log, &other, &[])[..], &["synth", "--output", &other]] {
        assert!(fails(flags, 2).contains("is a file, but not a data set"));
        assert_eq!(std::fs::read_to_string(&other).unwrap(), "keep me\n");
    }
    // Standard input may be the file of the output.
    let mut command = Command::new(env!("CARGO_BIN_EXE_dfar-data"));
    let command = command.args(folder.import("-", &log, &[])).stdin(std::fs::File::open(&log).unwrap());
    assert_eq!(command.output().unwrap().status.code(), Some(2));
    assert!(std::fs::read_to_string(&log).unwrap().starts_with("user"));
    // An empty file holds nothing.
    let empty = folder.write("empty", "");
    succeeds(&["synth", "--output", &empty]);
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let folder = Folder::new();
    let log = folder.write("bad.csv", "user,item,label,time\na,b,1,x\u{1b}[31m\u{7}\n");
    let error = fails(&["import", "--format", "csv", "--input", &log, "--output", &folder.path("x.dfar")], 3);
    assert!(error.contains("x\\u{1b}[31m\\u{7}") && !error.contains('\u{1b}'), "{error}");
}

#[test]
fn a_reader_may_stop_reading_an_export() {
    let folder = Folder::new();
    let output = folder.path("x.dfar");
    succeeds(&["synth", "--users", "500", "--events", "20000", "--output", &output]);
    let formats: &[&str] = if cfg!(feature = "parquet") { &["csv", "parquet"] } else { &["csv"] };
    for format in formats {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dfar-data"));
        let command = command.args(["export", &output, "--output", "-", "--to", format]);
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{format}: {output:?}");
    }
}

#[test]
fn an_export_does_not_replace_its_data_set() {
    let folder = Folder::new();
    let output = folder.path("x.dfar");
    succeeds(&["synth", "--users", "20", "--events", "200", "--output", &output]);
    let before = std::fs::read(&output).unwrap();
    // Also under another name.
    let link = folder.path("link.csv");
    std::fs::hard_link(&output, &link).unwrap();
    let same = format!("{}/./x.dfar", folder.path(""));
    let err = fails(&["export", &output, "--output", &same, "--to", "csv"], 2);
    assert!(err.contains("is the data set itself"), "{err}");
    assert_eq!(std::fs::read(&output).unwrap(), before);
    // A hard link is another name in the folder: only that name is replaced.
    succeeds(&["export", &output, "--output", &link]);
    assert_eq!(std::fs::read(&output).unwrap(), before);
}

#[test]
fn an_output_that_cannot_be_written_is_reported_before_the_log_is_read() {
    let folder = Folder::new();
    let output = folder.path("none/x.dfar");
    let err = fails(&folder.import(&folder.path("log.csv"), &output, &[]), 1);
    assert!(err.contains("none does not exist") && !err.contains("times:"), "{err}");
}

#[test]
fn decisions_are_printed_and_kept() {
    let folder = Folder::new();
    let [log, output] = ["names.csv", "x.dfar"].map(|name| folder.path(name));
    let rows = "u1,a,buy,2019-10-01\nu1,b,view,2019-10-02\nu1,c,drop,2019-10-03\nu1,d,buy,2019-10-04\n";
    std::fs::write(&log, rows).unwrap();
    let mut flags = vec!["import", "--format", "csv", "--input", &log, "--output", &output, "--k-core", "0"];
    flags.extend(["--user-column", "0", "--item-column", "1", "--label-column", "2", "--time-column", "3"]);
    flags.extend(["--negatives", "1", "--liked", "buy", "--skipped", "drop"]);
    let err = fails(&flags, 3);
    assert!(err.contains("neither --liked nor --skipped: view (1)"), "{err}");
    flags.push("--ignore-others");
    let (_, err) = succeeds(&flags);
    let (out, _) = succeeds(&["info", &output]);
    for words in [
        "names.csv: no header, user in column 0",
        "liked: label in buy",
        "times: dates",
        "1 other events (1 view)",
    ] {
        assert!(err.contains(words) && out.contains(words), "no {words:?} in {err} or {out}");
    }
    fails(&[&flags[..], &["--positive-above", "3"]].concat(), 2);
    fails(&["import", "--format", "csv", "--input", &log, "--output", &output, "--skipped", "x"], 2);
}
