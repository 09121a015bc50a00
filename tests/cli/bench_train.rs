//! `dfar-bench train` on the command line.

use dfar::data::Split;
use dfar::data::synthetic::{self, SyntheticOptions};
use std::process::{Command, Output};

const PARTS: [&str; 6] = ["input", "encoder", "dual", "target_attention", "towers", "optimizer"];
const SMALL: [&str; 7] = ["--batches", "3", "--max-length", "10", "--batch-rows", "60", "--json"];

fn bench_train(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dfar-bench")).arg("train").args(args).output().unwrap()
}

fn json(args: &[&str]) -> serde_json::Value {
    let output = bench_train(args);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("what is printed is JSON")
}

fn number(value: &serde_json::Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

/// Checks the fields of every profile, and returns its parts.
fn parts(profile: &serde_json::Value) -> Vec<serde_json::Value> {
    let parts = profile["parts"].as_array().expect("a list of parts").clone();
    assert_eq!(parts.iter().map(|row| row["part"].as_str().unwrap()).collect::<Vec<_>>(), PARTS);
    parts
}

#[test]
fn a_step_is_timed_by_part() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.dfar");
    synthetic::write(&SyntheticOptions { users: 40, items: 40, ..SyntheticOptions::default() }, &path)
        .unwrap();
    let data = path.to_str().unwrap();
    for (source, ways) in
        [(&["--data", data][..], 3), (&["--uniform"], 0), (&["--uniform", "--workers", "2"], 0)]
    {
        let printed = json(&[source, &SMALL].concat());
        assert_eq!(printed["sharing"].as_array().unwrap().len(), ways);
        let profile = &printed["steps"];
        assert_eq!(profile["steps"], 2, "the first of three only warms up");
        let seconds: Vec<f64> = parts(profile).iter().map(|row| number(&row["seconds"])).collect();
        let (inside, all) = (seconds.iter().sum::<f64>(), number(&profile["seconds"]));
        assert!(seconds.iter().all(|&s| s > 0.0) && inside <= all, "{profile}");
        assert!(parts(profile).iter().all(|row| row["floor"].is_null()), "a CPU is held against no card");
    }
}

#[test]
fn products_in_f16_are_refused() {
    let output = bench_train(&["--uniform", "--predict", "h200", "--precision", "f16"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

#[test]
fn floors_are_predicted_without_a_gpu() {
    let floor = |card: &str, precision: &str| {
        let args = ["--uniform", "--predict", card, "--precision", precision];
        let printed = json(&[&args[..], &SMALL].concat());
        assert_eq!(
            (&printed["steps"]["steps"], &printed["steps"]["seconds"]),
            (&3.into(), &serde_json::Value::Null)
        );
        // Three batches of six histories: ten events and one group of ten candidates each.
        for (name, count) in [("instances", 180), ("tokens", 180), ("scores", 1800)] {
            let found = number(&printed["steps"][name]);
            assert!(found > 0.0 && found <= f64::from(count), "{name}: {printed}");
        }
        let floors = parts(&printed["steps"]).into_iter().map(|row| number(&row["floor"]["seconds"]));
        floors.inspect(|&seconds| assert!(seconds > 0.0)).collect::<Vec<_>>()
    };
    let [h100, h200, f32] = [floor("h100", "bf16"), floor("h200", "bf16"), floor("h200", "f32")];
    // The H200 has the same chip with faster memory; products take longer in f32.
    assert!(h100.iter().zip(&h200).all(|(h100, h200)| h200 <= h100) && h200 != h100);
    assert!(f32[3] > h200[3]);

    let args = ["--uniform", "--predict", "h200", "--launch-us", "3", "--batches", "1", "--batch-rows", "20"];
    let output = bench_train(&args);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("PREDICTIONS, not measurements"), "{text}");
    for word in [
        "H200 SXM, by its datasheet",
        "target attention",
        "optimizer",
        "floor us",
        "host link",
        "3 us each by assumption",
    ] {
        assert!(text.contains(word), "{word} in\n{text}");
    }
    assert!(!text.contains("instances/s"), "nothing was timed:\n{text}");
}

#[test]
fn random_batches_exclude_a_data_set() {
    let output = bench_train(&["--uniform", "--data", "x.dfar"]);
    assert_eq!(output.status.code(), Some(2));
}

#[test]
fn a_window_stride_beyond_the_window_is_wrong_usage() {
    let output = bench_train(&[&SMALL[..], &["--window-stride", "11"]].concat());
    let message = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(message.contains("window_stride"), "{message}");
}

#[test]
fn a_set_without_training_targets_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.dfar");
    let split = Split::Temporal { train: 0.001, valid: 0.1 }; // the first two of all events
    let options =
        SyntheticOptions { users: 40, items: 40, negatives: 1, split, ..SyntheticOptions::default() };
    synthetic::write(&options, &path).unwrap();
    let data = path.to_str().unwrap();
    for args in [&["--data", data][..], &["--data", data, "--predict", "h200"]] {
        let output = bench_train(&[args, &SMALL].concat());
        let message = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(3), 0), "{message}");
        assert!(message.contains("x.dfar has no training target"), "{message}");
    }
}
