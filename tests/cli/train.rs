//! `dfar-train` on the command line.

use crate::skip::skip;
use crate::write_set;
use dfar::train::checkpoint::{Checkpoint, ModelFile};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const SMALL: [&str; 8] = ["--width", "8", "--max-length", "10", "--batch-tokens", "150", "--epochs", "2"];

fn dfar_train(dir: &Path, args: &[&str]) -> Output {
    crate::dfar_train(dir, args).output().unwrap()
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("the program should exit by itself")
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    write_set(dir.path());
    dir
}

/// A finished small run in `dir/out`.
fn trained(dir: &Path, out: &str, more: &[&str]) -> Output {
    let args = [&["--data", "x.dfar", "--out", out], &SMALL[..], more].concat();
    let output = dfar_train(dir, &args);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    output
}

fn bytes(path: impl AsRef<Path>) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn the_report_is_of_the_model_in_the_file() {
    let dir = folder();
    trained(dir.path(), "run", &[]);
    let file = ModelFile::load(&dir.path().join("run/model.safetensors")).unwrap();
    let report: serde_json::Value =
        serde_json::from_slice(&bytes(dir.path().join("run/metrics.json"))).unwrap();
    assert_eq!(report["best_epoch"].as_u64(), Some(file.info.epoch as u64));
    // Not those of the parameters after the last step.
    assert_eq!(report["valid"]["auc"].as_f64(), file.info.valid_auc);
}

#[test]
fn help_lists_the_flags_and_commands() {
    let output = dfar_train(Path::new("."), &["--help"]);
    assert_eq!(code(&output), 0);
    for word in ["evaluate", "score", "--no-fha", "--train-targets", "--workers", "--resume", "Exit codes"] {
        assert!(stdout(&output).contains(word), "{word}");
    }
}

#[test]
fn usage_errors_name_the_mistake_and_leave_no_files() {
    let dir = folder();
    std::fs::write(dir.path().join("bad.toml"), "pateince = 3\n").unwrap();
    std::fs::write(dir.path().join("not.dfar"), "hello").unwrap();
    for (args, expected, message) in [
        (&["--heads", "two"][..], 2, "invalid value 'two'"),
        (&["--no-such-flag"], 2, "--no-such-flag"),
        (&["--threads", "4097"], 2, "--threads: 4097 is above 4096"),
        (&["--config", "bad.toml"], 2, "did you mean `patience`?"),
        (&["--config", "missing.toml"], 2, "missing.toml"),
        (&["--lr", "nan"], 2, "lr = NaN"),
        (&["--data", "missing.dfar"], 3, "missing.dfar"),
        (&["--data", "not.dfar"], 3, "not a dfar data set"),
        (&["--resume", "nowhere"], 3, "holds no run"),
        (&["evaluate", "--run", "nowhere"], 3, "holds no run"),
        (&["score", "--run", "nowhere", "--history", ""], 3, "holds no run"),
        (&["--data", "x.dfar", "--heads", "3"], 2, "heads"),
    ] {
        let output = dfar_train(dir.path(), args);
        assert_eq!(code(&output), expected, "{args:?}: {}", stderr(&output));
        assert!(stderr(&output).contains(message), "{args:?}: {}", stderr(&output));
        assert!(output.stdout.is_empty());
        assert!(!dir.path().join("runs").exists(), "{args:?} left a run behind");
    }
}

#[test]
fn a_device_is_chosen_and_a_missing_one_reported() {
    let dir = folder();
    let small = [&["--data", "x.dfar", "--out", "run"], &SMALL[..]].concat();
    let run = |more: &[&str]| dfar_train(dir.path(), &[&small[..], more].concat());
    // Without AVX-512 there is no bf16.
    let bf16 = [&small[..], &["--device", "cpu", "--precision", "bf16"]].concat();
    let refused = crate::dfar_train(dir.path(), &bf16).env("DFAR_SIMD", "portable").output().unwrap();
    assert_eq!(code(&refused), 2);
    for words in ["--precision: products in bf16 on the CPU need AVX512-BF16", "use --precision f32"] {
        assert!(stderr(&refused).contains(words), "{}", stderr(&refused));
    }
    assert!(!dir.path().join("run").exists());

    let without_gpu = dfar::device::cuda::device_count().is_err();
    // `--cuda-graphs` has no effect on the CPU.
    let auto = run(&["--device", "auto", "--cuda-graphs"]);
    assert_eq!(code(&auto), 0, "{}", stderr(&auto));
    assert_eq!(stderr(&auto).contains("CUDA graphs"), !without_gpu, "{}", stderr(&auto));
    assert_eq!(stderr(&auto).contains("computing on the CPU"), without_gpu, "{}", stderr(&auto));
    if without_gpu {
        std::fs::remove_dir_all(dir.path().join("run")).unwrap();
        let wide = ["--data", "x.dfar", "--out", "run", "--device", "cuda", "--width", "256"];
        let output = dfar_train(dir.path(), &wide);
        assert_eq!(code(&output), 2, "{}", stderr(&output));
        assert!(stderr(&output).contains("--width: cuda: no target attention"), "{}", stderr(&output));
        let output = run(&["--device", "cuda"]);
        assert_eq!(code(&output), 4, "{}", stderr(&output));
        assert!(!dir.path().join("run").exists());
        assert!(stderr(&output).contains("no NVIDIA driver found"), "{}", stderr(&output));
    }
}

#[test]
fn a_run_in_bf16_resumes_in_bf16_and_is_evaluated_in_f32_where_bf16_is_missing() {
    if let Err(error) = dfar::device::cpu::Cpu::bf16() {
        return skip(error);
    }
    let dir = folder();
    let bf16 = ["--precision", "bf16"];
    trained(dir.path(), "whole", &bf16);
    let short = [&["--data", "x.dfar", "--out", "parts", "--epochs", "1"], &SMALL[..6], &bf16[..]].concat();
    assert_eq!(code(&dfar_train(dir.path(), &short)), 0);
    trained(dir.path(), "f32", &[]);
    let resumed = dfar_train(dir.path(), &["--resume", "parts", "--epochs", "2"]);
    assert_eq!(code(&resumed), 0, "{}", stderr(&resumed));
    let model = |run: &str| bytes(dir.path().join(run).join("model.safetensors"));
    assert!(model("parts") == model("whole") && model("f32") != model("whole"));

    let evaluate = |run: &str, simd: Option<&str>| {
        let mut command = crate::dfar_train(dir.path(), &["evaluate", "--run", run, "--json"]);
        let output = command.envs(simd.map(|simd| ("DFAR_SIMD", simd))).output().unwrap();
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        let report: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
        (report["test"]["auc"].as_f64().expect("an AUC"), stderr(&output))
    };
    let report: serde_json::Value =
        serde_json::from_slice(&bytes(dir.path().join("whole/metrics.json"))).unwrap();
    let (in_bf16, note) = evaluate("whole", None);
    assert!(!note.contains("computing in f32"), "{note}");
    assert_eq!(Some(in_bf16), report["test"]["auc"].as_f64());
    let (in_f32, note) = evaluate("whole", Some("portable"));
    assert!(note.contains("computing in f32 (products in bf16"), "{note}");
    assert!((in_f32 - in_bf16).abs() < 0.02, "{in_f32} and {in_bf16}");
}

#[test]
fn a_run_leaves_the_documented_files() {
    let dir = folder();
    let output = trained(dir.path(), "run", &[]);
    let table = stdout(&output);
    for word in ["AUC", "MRR", "NDCG@10", "GAUC", "popularity", "DFAR", "ceiling", "best epoch"] {
        assert!(table.contains(word), "{word} in\n{table}");
    }
    let log = stderr(&output);
    for word in ["epoch 1: loss", "validation AUC", "device busy"] {
        assert!(log.contains(word), "{word} in\n{log}");
    }
    assert!(!log.contains('\u{1b}'), "no bars without a terminal");

    let run = dir.path().join("run");
    let metrics: serde_json::Value = serde_json::from_slice(&bytes(run.join("metrics.json"))).unwrap();
    for part in ["test", "valid"] {
        for name in ["auc", "mrr", "ndcg", "gauc"] {
            let value = metrics[part][name].as_f64().unwrap_or_else(|| panic!("{part} {name}: {metrics}"));
            assert!((0.0..=1.0).contains(&value));
        }
    }
    for name in ["best_epoch", "seconds", "instances_per_second", "parameters"] {
        assert!(metrics[name].as_f64().unwrap() > 0.0, "{name}");
    }
    assert!(metrics["data"]["protocol"]["candidates"]["hash"].is_string());
    assert!(String::from_utf8(bytes(run.join("curves.svg"))).unwrap().starts_with("<svg"));
    let log = String::from_utf8(bytes(run.join("log.jsonl"))).unwrap();
    assert!(log.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()));

    // `--json` prints the same metrics, and nothing else on stdout; `evaluate` computes them again.
    let output = trained(dir.path(), "run2", &["--json", "--quiet"]);
    assert!(output.stderr.is_empty(), "{}", stderr(&output));
    let printed: serde_json::Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(printed["test"], metrics["test"]);
    let again = dfar_train(dir.path(), &["evaluate", "--run", "run", "--json"]);
    let again: serde_json::Value = serde_json::from_str(&stdout(&again)).unwrap();
    assert_eq!((&again["test"], &again["valid"]), (&metrics["test"], &metrics["valid"]));
}

#[test]
fn a_saved_configuration_repeats_the_run_and_flags_win_over_it() {
    let dir = folder();
    trained(dir.path(), "first", &["--bpr", "0.3", "--no-label-mask"]);
    let repeat = |out: &str, more: &[&str]| {
        let output =
            dfar_train(dir.path(), &[&["--config", "first/config.toml", "--out", out], more].concat());
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        bytes(dir.path().join(out).join("model.safetensors"))
    };
    let first = bytes(dir.path().join("first/model.safetensors"));
    assert!(repeat("second", &[]) == first);
    assert!(repeat("by three workers", &["--workers", "3"]) == first);
    assert!(repeat("third", &["--seed", "9"]) != first);
    trained(dir.path(), "dense", &["--dense-embeddings"]);
    trained(dir.path(), "sparse", &[]);
    let args = ["--config", "dense/config.toml", "--out", "switched", "--dense-embeddings=false"];
    assert_eq!(code(&dfar_train(dir.path(), &args)), 0);
    let model = |run: &str| bytes(dir.path().join(run).join("model.safetensors"));
    assert!(model("switched") == model("sparse") && model("switched") != model("dense"));
}

#[test]
fn tensorboard_events_follow_the_log_and_change_no_result() {
    let dir = folder();
    trained(dir.path(), "plain", &[]);
    trained(dir.path(), "run", &["--tensorboard"]);
    let model = |run: &str| bytes(dir.path().join(run).join("model.safetensors"));
    assert!(model("plain") == model("run"));
    let output = dfar_train(dir.path(), &["--resume", "run", "--epochs", "3"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    for session in 1..=2 {
        let events = bytes(dir.path().join(format!("run/events.out.tfevents.{session:04}.dfar")));
        let contains = |text: &str| events.windows(text.len()).any(|window| window == text.as_bytes());
        assert!(contains("brain.Event:2") && contains("epoch/valid_auc"), "session {session}");
    }
    let output = dfar_train(dir.path(), &["--resume", "run", "--epochs", "4", "--tensorboard=false"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(!dir.path().join("run/events.out.tfevents.0003.dfar").exists());
}

#[test]
fn runs_are_not_overwritten() {
    let dir = folder();
    trained(dir.path(), "run", &[]);
    let output = dfar_train(dir.path(), &["--data", "x.dfar", "--out", "run"]);
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("finished run"), "{}", stderr(&output));
    // Without --out: runs/x, then runs/x-2.
    for expected in ["runs/x", "runs/x-2"] {
        let output = dfar_train(dir.path(), &[&["--data", "x.dfar"], &SMALL[..]].concat());
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        assert!(dir.path().join(expected).join("metrics.json").exists());
    }
}

#[test]
fn score_ranks_original_ids() {
    let dir = folder();
    trained(dir.path(), "run", &[]);
    let score = |args: &[&str]| dfar_train(dir.path(), &[&["score", "--run", "run"], args].concat());
    let output = score(&["--history", "3:1, 7:0", "--candidates", "1,2,5", "--json"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let ranking: Vec<serde_json::Value> = serde_json::from_str(&stdout(&output)).unwrap();
    let mut items: Vec<&str> = ranking.iter().map(|r| r["item"].as_str().unwrap()).collect();
    let logits: Vec<f64> = ranking.iter().map(|r| r["logit"].as_f64().unwrap()).collect();
    assert!(logits.is_sorted_by(|a, b| a >= b));
    items.sort_unstable();
    assert_eq!(items, ["1", "2", "5"]);
    // Neither history nor candidates: the best of all items.
    let output = score(&["--history", "", "--top", "4"]);
    assert_eq!(stdout(&output).lines().count(), 1 + 4, "{}", stderr(&output));

    for (args, expected, message) in [
        (["--history", "3:1,nosuch:1"], 3, "unknown item `nosuch` in --history"),
        (["--history", "3"], 2, "`3` is not ITEM:1"),
        (["--history", "3:2"], 2, "`3:2` is not ITEM:1"),
    ] {
        let output = score(&args);
        assert_eq!(code(&output), expected);
        assert!(stderr(&output).contains(message), "{}", stderr(&output));
    }
    let output = score(&["--history", "3:1", "--candidates", "1,zzz"]);
    assert!(stderr(&output).contains("unknown item `zzz` in --candidates"));
}

#[test]
fn divergence_exits_with_5() {
    let dir = folder();
    let args = ["--data", "x.dfar", "--out", "run", "--lr", "1e30", "--max-grad-norm", "0"];
    let output = dfar_train(dir.path(), &[&args, &SMALL[..]].concat());
    assert_eq!(code(&output), 5, "{}", stderr(&output));
    assert!(stderr(&output).contains("at step "), "{}", stderr(&output));
    Checkpoint::load(&dir.path().join("run/checkpoint.safetensors")).unwrap();
}

#[test]
fn only_the_length_of_a_resumed_run_may_change() {
    let dir = folder();
    trained(dir.path(), "run", &[]);
    let output = dfar_train(dir.path(), &["--resume", "run", "--lr", "0.1"]);
    assert_eq!(code(&output), 2);
    assert!(stderr(&output).contains("--lr cannot change"), "{}", stderr(&output));
    let output = dfar_train(dir.path(), &["--resume", "run", "--epochs", "3", "--workers", "2"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let longer = dir.path().join("run/model.safetensors");
    let args = ["--data", "x.dfar", "--out", "three", "--epochs", "3"];
    let output = dfar_train(dir.path(), &[&args, &SMALL[..6]].concat());
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(!stderr(&output).contains("differs from the checkpoint"), "{}", stderr(&output));
    assert!(bytes(longer) == bytes(dir.path().join("three/model.safetensors")));

    // The configuration of the checkpoint counts.
    let path = dir.path().join("run/config.toml");
    for (from, to, key) in [("seed = ", "seed = 1", "seed"), ("epochs = 4", "epochs = 9", "epochs")] {
        let edited = std::fs::read_to_string(&path).unwrap().replace(from, to);
        std::fs::write(&path, edited).unwrap();
        let output = dfar_train(dir.path(), &["--resume", "run", "--epochs", "4"]);
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        let note = format!("config.toml differs from the checkpoint ({key})");
        assert!(stderr(&output).contains(&note), "{}", stderr(&output));
    }
}

#[test]
fn an_instruction_set_that_the_processor_lacks_is_refused() {
    let dir = folder();
    let mut command = Command::new(env!("CARGO_BIN_EXE_dfar-train"));
    let output = command.current_dir(dir.path()).env("DFAR_SIMD", "AVX2").output().unwrap();
    let said = stderr(&output);
    assert!(code(&output) == 2 && said.contains("DFAR_SIMD: AVX2: this processor has"), "{said}");
    assert!(!dir.path().join("runs").exists());
}

#[test]
fn a_network_without_memory_leaves_no_files() {
    let dir = folder();
    let output = dfar_train(dir.path(), &["--data", "x.dfar", "--width", "1000000", "--heads", "1000000"]);
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert!(stderr(&output).contains("cannot allocate"), "{}", stderr(&output));
    assert!(!dir.path().join("runs").exists());
}

#[test]
fn an_ablation_of_a_file_is_switched_off_by_a_flag() {
    let dir = folder();
    std::fs::write(dir.path().join("no-fha.toml"), "fha = false\n").unwrap();
    trained(dir.path(), "run", &["--config", "no-fha.toml", "--no-fha=false"]);
    trained(dir.path(), "ablation", &["--no-fha"]);
    let fha = |run: &str| std::fs::read_to_string(dir.path().join(run).join("config.toml")).unwrap();
    assert!(fha("run").contains("fha = true\n") && fha("ablation").contains("fha = false\n"));
}

#[test]
fn a_run_that_goes_on_has_no_metrics_until_it_ends() {
    let dir = folder();
    trained(dir.path(), "run", &[]);
    let metrics = dir.path().join("run/metrics.json");
    let first = bytes(&metrics);
    // A refused command changes nothing.
    let fails =
        dfar_train(dir.path(), &["--resume", "run", "--epochs", "100", "--quiet", "--threads", "4097"]);
    assert!(code(&fails) == 2 && metrics.exists(), "{}", stderr(&fails));
    let mut child = Command::new(env!("CARGO_BIN_EXE_dfar-train"))
        .current_dir(dir.path())
        .args(["--resume", "run", "--epochs", "100000", "--patience", "0", "--quiet"])
        .spawn()
        .unwrap();
    wait_for(&dir.path().join("run"), "\"event\":\"resume\"");
    wait_for(&dir.path().join("run"), "\"epoch\":5,");
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!metrics.exists(), "the run is not finished");
    // config.toml would not repeat the run.
    let fewer = dfar_train(dir.path(), &["--resume", "run", "--epochs", "3"]);
    assert!(code(&fewer) == 2 && stderr(&fewer).contains("epochs are done"), "{}", stderr(&fewer));
    let output = dfar_train(dir.path(), &["--resume", "run", "--patience", "1"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(metrics.exists() && bytes(&metrics) != first);
    let again = dfar_train(dir.path(), &["--resume", "run"]);
    assert!(code(&again) == 0 && stderr(&again).contains("no epoch is left"), "{}", stderr(&again));
}

#[test]
fn a_relative_data_set_of_a_configuration_is_found_from_other_folders() {
    let dir = folder();
    std::fs::write(dir.path().join("my.toml"), "data = \"x.dfar\"\nepochs = 1\n").unwrap();
    let args = [&["--config", "my.toml", "--out", "run"], &SMALL[..]].concat();
    let output = dfar_train(dir.path(), &args);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let output = dfar_train(&dir.path().join("run"), &["evaluate", "--run", "."]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
}

/// Waits until the run in `dir` has a line with `text` in its log.
fn wait_for(dir: &Path, text: &str) {
    let start = Instant::now();
    while !std::fs::read_to_string(dir.join("log.jsonl")).is_ok_and(|log| log.contains(text)) {
        assert!(start.elapsed() < Duration::from_secs(120), "no {text} in the log");
        std::thread::sleep(Duration::from_millis(5));
    }
}

const ENDLESS: [&str; 6] = ["--data", "x.dfar", "--out", "run", "--patience", "0"];

#[cfg(unix)]
#[test]
fn an_interrupt_saves_and_names_the_command_to_resume() {
    let dir = folder();
    let args = [&ENDLESS[..], &SMALL[..6], &["--epochs", "100000"]].concat();
    let child =
        crate::dfar_train(dir.path(), &args).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    wait_for(&dir.path().join("run"), "\"epoch\":2");
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(code(&output), 130, "{}", stderr(&output));
    assert!(stderr(&output).contains("dfar-train --resume run"), "{}", stderr(&output));
    let checkpoint = Checkpoint::load(&dir.path().join("run/checkpoint.safetensors")).unwrap();
    let epochs = (checkpoint.info.state.epoch + 1).to_string();
    let output = dfar_train(dir.path(), &["--resume", "run", "--epochs", &epochs]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
}

/// The run is killed five times while it writes a checkpoint after every step.
#[cfg(unix)]
#[test]
fn a_killed_run_can_be_loaded_and_ends_the_same() {
    let dir = folder();
    let small = [&SMALL[..6], &["--epochs", "12"]].concat();
    let whole = [&["--data", "x.dfar", "--out", "whole", "--patience", "0"], &small[..]].concat();
    assert_eq!(code(&dfar_train(dir.path(), &whole)), 0);
    let args = [&ENDLESS[..], &small, &["--checkpoint-seconds", "0"]].concat();
    let run = dir.path().join("run");
    let mut resume: Vec<&str> = Vec::new();
    for round in 0..5u64 {
        let args = if resume.is_empty() { &args } else { &resume };
        let mut child =
            crate::dfar_train(dir.path(), args).stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        let start = Instant::now();
        while !run.join("checkpoint.safetensors").exists() && start.elapsed() < Duration::from_secs(60) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(3 + 11 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(round > 0 || !run.join("metrics.json").exists(), "the first kill should come in time");
        Checkpoint::load(&run.join("checkpoint.safetensors")).unwrap();
        resume = vec!["--resume", "run"];
    }
    let output = dfar_train(dir.path(), &["--resume", "run"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(bytes(run.join("model.safetensors")) == bytes(dir.path().join("whole/model.safetensors")));
}

/// Imports rows of `user,item,label`; every user meets the items in order.
fn imported(dir: &Path, rows: &[(&str, &str, u8)], more: &[&str]) {
    let mut log = "user,item,label,time\n".to_owned();
    for (time, (user, item, label)) in rows.iter().enumerate() {
        log += &format!("{user},{item},{label},{}\n", time + 1);
    }
    std::fs::write(dir.join("log.csv"), log).unwrap();
    let args = ["import", "--format", "csv", "--user-column", "user", "--item-column", "item"];
    let columns = ["--label-column", "label", "--time-column", "time", "--k-core", "0"];
    let files = ["--input", "log.csv", "--output", "small.dfar", "--quiet"];
    let output = Command::new(env!("CARGO_BIN_EXE_dfar-data"))
        .current_dir(dir)
        .args([&args[..], &columns, &files, more].concat())
        .output()
        .unwrap();
    assert_eq!(code(&output), 0, "{}", stderr(&output));
}

/// Four users who meet the same eight items.
fn rows(label: u8) -> Vec<(&'static str, &'static str, u8)> {
    let items = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let users = ["u", "v", "w", "x"];
    users.iter().flat_map(|user| items.iter().map(move |item| (*user, *item, label))).collect()
}

const TINY: [&str; 8] = ["--data", "small.dfar", "--out", "run", "--width", "8", "--epochs", "3"];

#[test]
fn an_epoch_without_targets_trains_on_one_and_reports_it() {
    let dir = tempfile::tempdir().unwrap();
    imported(dir.path(), &rows(1), &["--negatives", "1"]);
    let output = dfar_train(dir.path(), &[&TINY[..], &["--sample-rate", "0.000001"]].concat());
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stderr(&output).contains("drew no target; training on one"), "{}", stderr(&output));
    let output = dfar_train(dir.path(), &["--resume", "run", "--epochs", "5", "--patience", "0"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
}

#[test]
fn a_data_set_without_targets_or_metrics_is_reported_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    imported(dir.path(), &rows(0), &["--negatives", "1"]);
    let output = dfar_train(dir.path(), &TINY);
    assert_eq!(code(&output), 3, "{}", stderr(&output));
    assert!(
        stderr(&output).contains("no training event after a user's first is liked"),
        "{}",
        stderr(&output)
    );
    assert!(!dir.path().join("run").exists());
    let output = dfar_train(dir.path(), &[&TINY[..], &["--train-targets", "feedback"]].concat());
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(
        stdout(&output).contains("no event of the validation and test parts is liked"),
        "{}",
        stdout(&output)
    );

    std::fs::remove_dir_all(dir.path().join("run")).unwrap();
    imported(dir.path(), &rows(1), &["--negatives", "0"]);
    let output = dfar_train(dir.path(), &TINY);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    assert!(stdout(&output).contains("the evaluation groups have no negatives"), "{}", stdout(&output));
}

#[test]
fn a_folder_in_place_of_a_data_set_is_named() {
    let dir = folder();
    std::fs::create_dir(dir.path().join("folder.dfar")).unwrap();
    let output = dfar_train(dir.path(), &["--data", "folder.dfar"]);
    assert_eq!(code(&output), 3);
    assert!(stderr(&output).contains("it is a folder"), "{}", stderr(&output));
}

#[test]
fn the_saved_configuration_repeats_the_run() {
    let dir = folder();
    let seed = u64::MAX.to_string();
    trained(dir.path(), "one", &["--seed", &seed, "--heads", "1"]);
    let config = std::fs::read_to_string(dir.path().join("one/config.toml")).unwrap();
    assert!(config.contains(&format!("seed = \"{seed}\"\n")), "{config}");
    let output = dfar_train(dir.path(), &["--config", "one/config.toml", "--out", "two"]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
    let model = |run: &str| bytes(dir.path().join(run).join("model.safetensors"));
    assert!(model("one") == model("two"));
    let output = dfar_train(dir.path(), &["--resume", "one", "--epochs", "3", "--seed", &seed]);
    assert_eq!(code(&output), 0, "{}", stderr(&output));
}

/// Under limits of the system, a program ends with a message, without a panic or an abort. (Root
/// has no limit on threads, so the test limits the address space: a thread needs a stack.)
#[cfg(target_os = "linux")]
#[test]
fn limits_of_the_system_are_reported() {
    let dir = folder();
    let limited = |program: &str, kilobytes: usize, args: &str| {
        let script = format!("ulimit -v {kilobytes}; exec {program} {args}");
        let output = Command::new("sh").current_dir(dir.path()).args(["-c", &script]).output().unwrap();
        let signal = std::os::unix::process::ExitStatusExt::signal(&output.status);
        assert!(signal.is_none() && !stderr(&output).contains("panicked"), "{args}: {}", stderr(&output));
        output
    };
    // A thread needs room for its stack, and a few small allocations, which may come to the limit
    // first.
    let reported =
        |message: &str| ["cannot start threads", "out of memory"].iter().any(|m| message.contains(m));
    let train = "--data x.dfar --out run --epochs 1 --threads";
    let output = limited(env!("CARGO_BIN_EXE_dfar-train"), 400_000, &format!("{train} 1000"));
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert!(reported(&stderr(&output)), "{}", stderr(&output));
    assert!(!dir.path().join("run").exists());
    let many = "RAYON_NUM_THREADS=1000"; // these programs have no flag, or not for all they do
    for (program, args) in
        [(env!("CARGO_BIN_EXE_dfar-data"), "info x.dfar"), (env!("CARGO_BIN_EXE_dfar-bench"), "verify .")]
    {
        let output = limited(&format!("env {many} {program}"), 400_000, args);
        assert_eq!(code(&output), 1, "{}", stderr(&output));
        assert!(reported(&stderr(&output)), "{}", stderr(&output));
    }
    let wide = format!("{train} 1 --width 4096 --batch-tokens 100000");
    let output = limited(env!("CARGO_BIN_EXE_dfar-train"), 400_000, &wide);
    assert_eq!(code(&output), 1, "{}", stderr(&output));
    assert!(stderr(&output).contains("memory"), "{}", stderr(&output));

    // Wherever memory ends, from the first allocations of a program to its last.
    let rows = (0..100_000).map(|row| format!("u{},i{},{},{row}\n", row % 5000, row % 20_011, row % 2));
    let log = format!("user,item,label,time\n{}", rows.collect::<String>());
    std::fs::write(dir.path().join("log.csv"), log).unwrap();
    let import = "import --format csv --user-column user --item-column item --label-column label \
                  --time-column time --k-core 0 --negatives 1 --input log.csv --output log.dfar";
    let one = "env RAYON_NUM_THREADS=1";
    for (program, args) in [
        (env!("CARGO_BIN_EXE_dfar-data"), import),
        (env!("CARGO_BIN_EXE_dfar-train"), "--data x.dfar --out limited --epochs 1 --threads 1"),
    ] {
        // With less, the loader fails before the program begins.
        let starts = |kilobytes: &usize| {
            let script = format!("ulimit -v {kilobytes}; exec {program} --version");
            Command::new("sh").args(["-c", &script]).output().unwrap().status.success()
        };
        let least = (4_000..).step_by(1_000).find(starts).unwrap();
        let (mut refused, mut done) = (0, false);
        for kilobytes in (least..400_000).step_by(1_000) {
            let _ = std::fs::remove_dir_all(dir.path().join("limited"));
            let output = limited(&format!("{one} {program}"), kilobytes, args);
            let message = stderr(&output);
            match code(&output) {
                0 => done = true,
                1 => assert!(message.contains("memory") || message.contains("threads"), "{message}"),
                other => panic!("exit code {other} with {kilobytes} KiB: {message}"),
            }
            refused += usize::from(message.contains("out of memory"));
            if done {
                break;
            }
        }
        assert!(refused > 0 && done, "{args}: refused {refused} times, done: {done}");
    }
}

#[test]
fn evaluate_adds_attention_by_feedback_and_chosen_history_lengths() {
    let dir = folder();
    trained(dir.path(), "run", &[]);
    let evaluate = |more: &[&str]| {
        let output = dfar_train(dir.path(), &[&["evaluate", "--run", "run"], more].concat());
        assert_eq!(code(&output), 0, "{}", stderr(&output));
        stdout(&output)
    };
    let text = evaluate(&["--head-pairs", "--length-edges", "10"]);
    for words in ["to skipped", "from liked", "0-10", "11-", "label mask drops weights"] {
        assert!(text.contains(words), "no {words} in {text}");
    }
    let json = evaluate(&["--head-pairs", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    for pair in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        let field = |name: &str| json["head_pairs"][name][pair.0][pair.1].as_f64().unwrap();
        let mean = field("weight") / field("pairs");
        assert!(mean > 0.0 && mean < 1.0 && (mean - field("mean")).abs() < 1e-12, "{pair:?} {mean}");
    }
    assert!(!evaluate(&["--json"]).contains("head_pairs"));
    // No history is longer than the largest edge.
    assert!(!evaluate(&["--length-edges", "10,4294967295"]).contains("0-\n"));
    let all = evaluate(&["--length-edges", "4294967295", "--json"]);
    let all: serde_json::Value = serde_json::from_str(&all).unwrap();
    assert_eq!(all["test"]["by_length"].as_array().unwrap().len(), 1, "{all}");
    for edges in ["5,3", "5,5"] {
        let output = dfar_train(dir.path(), &["evaluate", "--run", "run", "--length-edges", edges]);
        assert!(code(&output) == 2 && stderr(&output).contains("must ascend"), "{}", stderr(&output));
    }
}
