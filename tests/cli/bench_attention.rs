//! `dfar-bench attention` without a GPU: predictions, and files of results.

use std::path::Path;
use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dfar-bench"));
    command.arg("attention").args(arguments).output().expect("dfar-bench should start")
}

fn predict(arguments: &[&str]) -> Output {
    run(&[&["--predict", "h200", "--seq-lens", "20,300", "--batch-tokens", "600"], arguments].concat())
}

fn files(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("the folder is there");
    entries.map(|e| e.expect("readable").file_name().to_string_lossy().into_owned()).collect()
}

#[test]
fn predictions_need_no_gpu() {
    let output = predict(&["--precision", "bf16"]);
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.starts_with("PREDICTIONS, not measurements"), "{text}");
    assert_eq!(text.lines().filter(|line| line.starts_with("backward")).count(), 2, "{text}");
}

/// Exit code 2, not 4 (no usable GPU): a prediction needs no GPU.
#[test]
fn shapes_without_a_kernel_are_wrong_usage() {
    for (arguments, says) in [
        (&["--head-dim", "12"][..], "head_dim is 12"),
        (&["--heads", "3"], "heads"),
        (&["--heads", "64", "--head-dim", "128"], "shared memory"),
    ] {
        let output = predict(arguments);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {text}");
        assert!(text.contains(says), "{arguments:?}: {text}");
    }
}

#[test]
fn a_results_file_replaces_the_old_one_at_once() {
    let folder = tempfile::tempdir().expect("a folder should be made");
    let path = folder.path().join("rows.json");
    std::fs::write(&path, "old").expect("it is writable");
    let output = predict(&["--json", path.to_str().expect("plain name")]);
    assert_eq!(output.status.code(), Some(0));
    let text = std::fs::read(&path).expect("it was written");
    let json: serde_json::Value = serde_json::from_slice(&text).expect("it should be JSON");
    assert_eq!(json["predictions"].as_array().map(Vec::len), Some(4));
    assert_eq!(files(folder.path()), ["rows.json"], "nothing beside it");
}

#[test]
fn a_file_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().expect("a folder should be made");
    for (path, code) in [("missing/rows.json", 1), ("..", 2)] {
        let path = folder.path().join(path);
        let output = predict(&["--json", path.to_str().expect("plain name")]);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{text}");
        assert!(text.contains(path.to_str().expect("plain name")), "{text}");
    }
    assert_eq!(files(folder.path()), [""; 0]);
}
