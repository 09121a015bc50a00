//! `dfar-train score` on the command line.

use crate::{command, short_run, write_set};
use dfar::data::{Dataset, Part};
use dfar::evaluate;
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};

fn dfar(dir: &Path, program: &str, args: &[&str], stdin: &str) -> Output {
    let mut child = command(program, dir, args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that does not read its input closes the pipe, which is not an error here.
    let _ = child.stdin.take().unwrap().write_all(stdin.as_bytes());
    child.wait_with_output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn success(output: Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

struct Fixture {
    dir: tempfile::TempDir,
}

impl Fixture {
    /// A run on the small synthetic set.
    fn synthetic() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_set(dir.path());
        Self::trained(dir)
    }

    /// A run on a log of JSON lines, whose ids may contain any character.
    fn with_ids(ids: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut log = String::new();
        for user in 0..8 {
            for (time, id) in ids.iter().enumerate() {
                let row = serde_json::json!({"user": format!("u{user}"), "item": id, "rating": 5, "time": time + 1});
                log += &format!("{row}\n");
            }
        }
        std::fs::write(dir.path().join("log.jsonl"), log).unwrap();
        let args = [
            "import",
            "--format",
            "amazon",
            "--input",
            "log.jsonl",
            "--output",
            "x.dfar",
            "--k-core",
            "0",
            "--negatives",
            "1",
            "--user-column",
            "user",
            "--item-column",
            "item",
            "--label-column",
            "rating",
            "--time-column",
            "time",
            "--quiet",
        ];
        success(dfar(dir.path(), env!("CARGO_BIN_EXE_dfar-data"), &args, ""));
        Self::trained(dir)
    }

    fn trained(dir: tempfile::TempDir) -> Self {
        success(dfar(dir.path(), env!("CARGO_BIN_EXE_dfar-train"), &short_run(), ""));
        Self { dir }
    }

    fn score_with(&self, args: &[&str], stdin: &str) -> Output {
        let args = [&["score", "--run", "run"], args].concat();
        dfar(self.dir.path(), env!("CARGO_BIN_EXE_dfar-train"), &args, stdin)
    }

    fn score(&self, args: &[&str]) -> String {
        success(self.score_with(args, ""))
    }

    fn json(&self, args: &[&str]) -> Vec<Value> {
        serde_json::from_str(&self.score(&[args, &["--json"]].concat())).unwrap()
    }
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn items(rows: &[Value]) -> Vec<&str> {
    rows.iter().map(|row| row["item"].as_str().unwrap()).collect()
}

#[test]
fn every_id_can_be_given_on_the_command_line() {
    let ids = ["a,b", "c:1", "-x", "\u{a0}y", "say \"hi\"", "plain", "007"];
    let fixture = Fixture::with_ids(&ids);
    let all = fixture.json(&["--history", "plain:1", "--top", "20"]);
    assert_eq!(all.len(), ids.len());
    for id in ids {
        let quoted = format!("\"{}\"", id.replace('"', "\"\""));
        let event = format!("{quoted}:1");
        let asked = [&["--history", &event[..], "--candidates", &quoted[..]][..], &[]].concat();
        assert_eq!(items(&fixture.json(&asked)), [id]);
    }
    // Unquoted ids, where the syntax is unambiguous; blanks after a comma are ignored.
    for (history, candidates, expected) in [
        ("-x:1", "-x", vec!["-x"]),
        ("c:1:0", "c:1", vec!["c:1"]),
        ("007:1, plain:0", "\u{a0}y, 007", vec!["\u{a0}y", "007"]),
    ] {
        let mut found: Vec<String> = fixture
            .json(&["--history", history, "--candidates", candidates])
            .iter()
            .map(|row| row["item"].as_str().unwrap().to_owned())
            .collect();
        found.sort_by_key(|item| expected.iter().position(|e| e == item));
        assert_eq!(found, expected);
    }
    // An id is compared byte for byte: a no-break space is part of it.
    let output = fixture.score_with(&["--history", "y:1"], "");
    assert_eq!(output.status.code(), Some(3));
    assert!(stderr(&output).contains("unknown item `y` in --history"), "{}", stderr(&output));
}

#[test]
fn a_long_id_is_printed_and_refused_without_a_panic() {
    let long = "x".repeat(70_000);
    let fixture = Fixture::with_ids(&["a", "b", &long, "c"]);
    assert!(fixture.score(&["--history", "a:1"]).contains(&long));
    let unknown = format!("{long}y:1");
    assert_eq!(fixture.score_with(&["--history", &unknown], "").status.code(), Some(3));
}

#[test]
fn a_user_is_scored_by_the_whole_history_of_the_data_set() {
    let fixture = Fixture::synthetic();
    let data = Dataset::open(fixture.dir.path().join("x.dfar")).unwrap();
    let user = data.find_user("7").unwrap();
    let events = data.user(user);
    let history = events.items.iter().zip(events.feedback);
    let history: Vec<String> =
        history.map(|(&item, label)| format!("{}:{label}", data.item_name(item))).collect();
    let expected = fixture.json(&["--history", &history.join(",")]);
    assert_eq!(fixture.json(&["--user", "7"]), expected);
    assert_eq!(expected.len(), 10);

    // All other inputs give the same scores, also for one user among many.
    let with_user = |mut row: Value| {
        row["user"] = "7".into();
        row
    };
    let expected: Vec<Value> = expected.into_iter().map(with_user).collect();
    let of_user = |text: &str| lines(text).into_iter().filter(|row| row["user"] == "7").collect::<Vec<_>>();
    let all = fixture.score(&["--all-users", "--json"]);
    assert_eq!(of_user(&all), expected);
    assert_eq!(lines(&all).len(), 40 * 10);
    let some = success(fixture.score_with(&["--users", "-", "--json"], "\u{feff}3\r\n\"7\"\n"));
    assert_eq!((of_user(&some), lines(&some).len()), (expected.clone(), 20));
    let events: Vec<(&str, u8)> = events
        .items
        .iter()
        .zip(events.feedback)
        .map(|(&item, &label)| (data.item_name(item), label))
        .collect();
    let line = serde_json::json!({"user": "7", "history": events});
    let found = success(fixture.score_with(&["--histories", "-", "--json"], &format!("\n{line}\n")));
    assert_eq!(lines(&found), expected);
    let rows: String = events.iter().map(|(item, label)| format!("{label},\"{item}\",7\n")).collect();
    let found = success(
        fixture.score_with(&["--histories", "-", "--json"], &format!("label,item,user\n1,3,6\n{rows}")),
    );
    assert_eq!((of_user(&found), lines(&found).len()), (expected, 20));
}

#[test]
fn seen_and_unknown_items_are_left_out_on_request() {
    let fixture = Fixture::synthetic();
    let rows = fixture.json(&["--history", "1:1,2:0", "--candidates", "1,2,3", "--exclude-seen"]);
    assert_eq!(items(&rows), ["3"]);
    let rows = fixture.json(&["--history", "1:1,2:0", "--candidates", "3,2,3,3,2"]);
    assert_eq!(rows.len(), 2, "an item listed twice is ranked once");
    let output = fixture.score_with(&["--all-users", "--json", "--output", "x.csv"], "");
    assert_eq!(output.status.code(), Some(2), "--json is for stdout");
    // As from an unset variable of a shell.
    let output = fixture.score_with(&["--history", "1:1", "--candidates", ""], "");
    assert_eq!(output.status.code(), Some(2), "no candidate");
    let output = fixture.score_with(&["--history", "1:1,nope:0,nix:1", "--skip-unknown"], "");
    assert!(stderr(&output).contains("left out 2 unknown items"), "{}", stderr(&output));
    assert_eq!(success(output), fixture.score(&["--history", "1:1"]));
    for (args, stdin, message) in [
        (&["--user", "nobody"][..], "", "unknown user `nobody` in --user"),
        (&["--users", "-"], "3\nnobody\n", "unknown user `nobody` in <stdin>:2"),
        (
            &["--histories", "-"],
            "{\"history\": [[\"1\", 1], [\"nope\", 0]]}\n",
            "unknown item `nope` in <stdin>:1",
        ),
        (&["--histories", "-"], "{\"history\": [[\"1\", 2]]}\n", "<stdin>:1: label 2"),
        (&["--histories", "-"], "{\"history\": [[\"1\", true]]}\n", "label true; labels are 1"),
        (&["--histories", "-"], "{\"history\": [[1.5, 1]]}\n", "ids are strings or integers"),
        (&["--histories", "-"], "user,item\n", "<stdin>:1: no column `label`"),
        (&["--histories", "-"], "user,item,label\nu,1,1\nu,2\n", "<stdin>:3"),
    ] {
        let output = fixture.score_with(args, stdin);
        assert_eq!(output.status.code(), Some(3), "{}", stderr(&output));
        assert!(stderr(&output).contains(message), "{}", stderr(&output));
    }
    let output = fixture.score_with(&["--user", "1", "--all-users"], "");
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn the_scores_of_the_stored_groups_are_those_that_evaluate_measures() {
    let fixture = Fixture::synthetic();
    let data = Dataset::open(fixture.dir.path().join("x.dfar")).unwrap();
    let measured = dfar(
        fixture.dir.path(),
        env!("CARGO_BIN_EXE_dfar-train"),
        &["evaluate", "--run", "run", "--json"],
        "",
    );
    let measured: Value = serde_json::from_str(&success(measured)).unwrap();
    for (name, part) in [("test", Part::Test), ("valid", Part::Valid)] {
        let text = fixture.score(&["--groups", name]);
        let mut reader = csv::Reader::from_reader(text.as_bytes());
        let column = reader.headers().unwrap().iter().position(|column| column == "logit").unwrap();
        let scores: Vec<f32> = reader.records().map(|row| row.unwrap()[column].parse().unwrap()).collect();
        let report = evaluate::part_report(&data, part, &scores, Default::default(), &[]).unwrap();
        for (metric, found) in
            [("auc", report.liked.auc), ("mrr", report.liked.mrr), ("ndcg", report.liked.ndcg)]
        {
            assert_eq!(measured[name][metric].as_f64(), Some(found), "{name} {metric}");
        }
    }
}

#[test]
fn outputs_agree_and_are_complete_or_absent() {
    let fixture = Fixture::synthetic();
    let path = |name: &str| fixture.dir.path().join(name);
    for name in ["top.csv", "top.jsonl", "top.json"] {
        assert_eq!(fixture.score(&["--all-users", "--top", "3", "--output", name]), "");
    }
    let text = std::fs::read_to_string(path("top.jsonl")).unwrap();
    let rows = lines(&text);
    assert_eq!(rows.len(), 40 * 3);
    let array: Vec<Value> = serde_json::from_slice(&std::fs::read(path("top.json")).unwrap()).unwrap();
    assert_eq!(array, rows);
    let mut reader = csv::Reader::from_path(path("top.csv")).unwrap();
    assert_eq!(reader.headers().unwrap(), vec!["user", "rank", "item", "probability", "logit"]);
    for (csv, json) in reader.records().zip(&rows) {
        let csv = csv.unwrap();
        assert_eq!((&csv[0], &csv[2]), (json["user"].as_str().unwrap(), json["item"].as_str().unwrap()));
        assert_eq!(csv[4].parse::<f32>().unwrap(), json["logit"].as_f64().unwrap() as f32);
    }
    // The number of threads changes no byte.
    fixture.score(&["--all-users", "--top", "3", "--output", "again.csv", "--threads", "3"]);
    assert!(std::fs::read(path("again.csv")).unwrap() == std::fs::read(path("top.csv")).unwrap());

    // A failure leaves the old file, and no temporary file.
    let before: Vec<_> =
        std::fs::read_dir(fixture.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    let bad = "{\"history\": []}\n{\"history\": [[\"nope\", 1]]}\n";
    let output = fixture.score_with(&["--histories", "-", "--output", "top.jsonl"], bad);
    assert_eq!(output.status.code(), Some(3));
    assert_eq!(std::fs::read_to_string(path("top.jsonl")).unwrap(), text);
    let after: Vec<_> =
        std::fs::read_dir(fixture.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(before.len(), after.len(), "{after:?}");
    let output = fixture.score_with(&["--all-users", "--output", "top.xyz"], "");
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
}

#[cfg(feature = "parquet")]
#[test]
fn parquet_holds_the_same_rows() {
    use arrow_array::cast::AsArray;
    use arrow_array::types::{Float32Type, UInt64Type};
    let fixture = Fixture::synthetic();
    fixture.score(&["--all-users", "--top", "3", "--output", "top.parquet"]);
    let expected = lines(&fixture.score(&["--all-users", "--top", "3", "--json"]));
    let file = std::fs::File::open(fixture.dir.path().join("top.parquet")).unwrap();
    let reader = parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder::try_new(file)
        .unwrap()
        .build()
        .unwrap();
    let mut rows = Vec::new();
    for batch in reader.map(Result::unwrap) {
        let column = |name| batch.column_by_name(name).unwrap();
        for row in 0..batch.num_rows() {
            rows.push((
                column("user").as_string::<i32>().value(row).to_owned(),
                column("rank").as_primitive::<UInt64Type>().value(row),
                column("item").as_string::<i32>().value(row).to_owned(),
                column("logit").as_primitive::<Float32Type>().value(row),
            ));
        }
    }
    let expected: Vec<_> = expected
        .iter()
        .map(|row| {
            let text = |name: &str| row[name].as_str().unwrap().to_owned();
            (text("user"), row["rank"].as_u64().unwrap(), text("item"), row["logit"].as_f64().unwrap() as f32)
        })
        .collect();
    assert_eq!(rows, expected);
}

/// An output never replaces a file that `score` reads, nor one of the run.
#[test]
fn an_output_does_not_replace_an_input() {
    let fixture = Fixture::synthetic();
    let dir = fixture.dir.path();
    std::fs::write(dir.join("users.csv"), "1\n2\n").unwrap();
    std::fs::write(dir.join("h.csv"), "user,item,label\nu,1,1\n").unwrap();
    let all_users = ["--all-users", "--output-format", "csv", "--output"];
    for (args, output) in [
        (&all_users[..], "x.dfar"),
        (&all_users, "run/../x.dfar"),
        (&all_users, "run/model.safetensors"),
        (&all_users, "run/config.toml"),
        (&["--users", "users.csv", "--output"], "users.csv"),
        (&["--histories", "h.csv", "--output"], "./h.csv"),
    ] {
        let before = std::fs::read(dir.join(output)).unwrap();
        let found = fixture.score_with(&[args, &[output]].concat(), "");
        assert_eq!(found.status.code(), Some(2), "{output}: {}", stderr(&found));
        assert!(stderr(&found).contains("is read by this command or belongs to the run"), "{output}");
        assert!(std::fs::read(dir.join(output)).unwrap() == before, "{output}");
    }
    success(fixture.score_with(&[&all_users[..], &["run/scores.csv"]].concat(), ""));
}

#[test]
fn refused_input_leaves_nothing_on_stdout() {
    let fixture = Fixture::synthetic();
    let found = fixture.score_with(&["--histories", "-"], "user,item,label\nu,1,2\n");
    assert!(found.status.code() == Some(3) && found.stdout.is_empty(), "{}", stderr(&found));
    let found = fixture.score_with(&["--histories", "-"], "{\"history\": []}\n{\"history\": NaN}\n");
    assert!(stderr(&found).contains(":2: ") && !stderr(&found).contains("at line"), "{}", stderr(&found));
    let found = fixture.score_with(&["--histories", "-"], "user,item,label,item\nu,1,1,2\n");
    assert!(stderr(&found).contains(":1: two columns are called `item`"), "{}", stderr(&found));
    // A byte order mark is no part of the first line.
    let marked =
        fixture.score_with(&["--histories", "-"], "\u{feff}{\"user\": \"u\", \"history\": [[\"1\", 1]]}\n");
    assert!(success(marked).starts_with("user,rank,item"));
}
