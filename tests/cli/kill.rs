//! `dfar-train` killed (SIGKILL) at random moments: the run can always be continued, ends with the
//! same bytes, and leaves only the documented files.
//!
//! `DFAR_KILL_CHAINS=500 cargo test --test cli kill::` kills for longer.
#![cfg(unix)]

use crate::{SMALL_RUN, dfar_train, short_run, write_set};
use dfar::train::checkpoint::{Checkpoint, ModelFile};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

/// Number of kills of a run before it may finish.
const KILLS: usize = 4;

const RUN_FILES: [&str; 6] =
    ["checkpoint.safetensors", "config.toml", "curves.svg", "log.jsonl", "metrics.json", "model.safetensors"];

fn run(dir: &Path, args: &[&str]) -> Output {
    dfar_train(dir, args).output().unwrap()
}

#[track_caller]
fn succeeds(dir: &Path, args: &[&str]) -> Output {
    let output = run(dir, args);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{args:?}: {log}\nin {:?}", listing(&dir.join("run")));
    output
}

/// Starts the command, and kills it after `delay` unless it has finished.
fn killed(dir: &Path, args: &[&str], delay: Duration) {
    let mut child = dfar_train(dir, args).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    std::thread::sleep(delay);
    child.kill().unwrap();
    let status = child.wait().unwrap();
    assert!(status.code().is_none_or(|code| code == 0), "{args:?} ended with {status}");
}

/// Sorted names in a directory; empty if it does not exist.
fn listing(dir: &Path) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return Vec::new() };
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn model(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("model.safetensors")).unwrap()
}

fn chains(default: usize) -> usize {
    std::env::var("DFAR_KILL_CHAINS").map_or(default, |chains| chains.parse().expect("a number of chains"))
}

/// A random moment within the run; early ones are more likely.
fn moment(rng: &mut impl Rng, whole: Duration) -> Duration {
    let share: f64 = rng.random();
    whole.mul_f64(1.1 * share * share)
}

/// The arguments that continue `run`, as the program's own messages say.
fn next_args<'a>(dir: &Path, start: &[&'a str]) -> Vec<&'a str> {
    let files = listing(&dir.join("run"));
    if files.iter().any(|name| name == "config.toml") {
        return vec!["--resume", "run"];
    }
    let refused = run(dir, &["--resume", "run"]);
    let message = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(3), "{message}");
    assert!(message.contains("start one with --out run"), "{message}");
    start.to_vec()
}

/// Runs chains of kills; `expected` are the files of the finished run.
fn kill_in_chains(dir: &Path, start: &[&str], chains: usize, expected: &[&str]) {
    let began = Instant::now();
    succeeds(dir, start);
    let whole = began.elapsed();
    let run = dir.join("run");
    assert_eq!(listing(&run), expected);
    let model_of_whole = model(&run);
    std::fs::remove_dir_all(&run).unwrap();

    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for chain in 0..chains {
        let mut moments = Vec::new();
        for _ in 0..KILLS {
            let args = next_args(dir, start);
            moments.push(moment(&mut rng, whole));
            killed(dir, &args, moments[moments.len() - 1]);
        }
        succeeds(dir, &next_args(dir, start));
        assert!(model(&run) == model_of_whole, "chain {chain}, killed after {moments:?}");
        assert_eq!(listing(&run), expected, "chain {chain}, killed after {moments:?}");
        std::fs::remove_dir_all(&run).unwrap();
    }
}

#[test]
fn a_run_killed_at_any_moment_continues_and_leaves_no_other_files() {
    let dir = tempfile::tempdir().unwrap();
    write_set(dir.path());
    let more = ["--batch-tokens", "150", "--epochs", "3", "--patience", "0", "--checkpoint-seconds", "0"];
    let start = [&SMALL_RUN[..], &more].concat();
    kill_in_chains(dir.path(), &start, chains(8), &RUN_FILES);
}

/// The first second of a run without `--data`, in which the synthetic set is made.
#[test]
fn a_run_killed_while_its_synthetic_set_is_made_continues() {
    let dir = tempfile::tempdir().unwrap();
    let start =
        ["--out", "run", "--width", "8", "--epochs", "1", "--sample-rate", "0.02", "--batch-tokens", "4096"];
    let expected = [&RUN_FILES[..], &["synthetic.dfar"]].concat();
    kill_in_chains(dir.path(), &start, chains(3), &expected);
}

/// A directory as a kill leaves it, made by hand, because the moments between two files are short.
struct Killed {
    dir: tempfile::TempDir,
    run: PathBuf,
}

impl Killed {
    fn new(files: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_set(dir.path());
        succeeds(dir.path(), &short_run());
        let run = dir.path().join("run");
        let config = std::fs::read(run.join("config.toml")).unwrap();
        std::fs::remove_dir_all(&run).unwrap();
        std::fs::create_dir(&run).unwrap();
        for &name in files {
            let content = if name == "config.toml" { &config } else { &b"half a fi"[..] };
            let path = run.join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, content).unwrap();
        }
        Self { dir, run }
    }
}

#[test]
fn a_run_killed_during_its_start_can_be_started_again() {
    for files in [
        &[][..],
        &[".lock"],
        &[".lock", ".config.toml.partial"],
        &[".lock", "config.toml"],
        &[".lock", "config.toml", ".synthetic.dfar.partial/.a1B2c3.dfar-partial", "log.jsonl"],
        &[".lock", "config.toml", "log.jsonl", ".checkpoint.safetensors.partial", "synthetic.dfar"],
    ] {
        let killed = Killed::new(files);
        let output = succeeds(killed.dir.path(), &short_run());
        assert!(!String::from_utf8_lossy(&output.stderr).contains("resum"));
        assert_eq!(listing(&killed.run), RUN_FILES, "after {files:?}");
    }
}

#[test]
fn a_run_killed_before_its_first_checkpoint_starts_from_the_beginning() {
    let files = [".lock", "config.toml", "log.jsonl", ".checkpoint.safetensors.partial"];
    let killed = Killed::new(&files);
    let refused = run(killed.dir.path(), &["--resume", "run", "--lr", "0.1"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("--lr cannot change"));
    let output = succeeds(killed.dir.path(), &["--resume", "run", "--workers", "2"]);
    let log = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(log.contains("starting from the beginning"), "{log}");
    assert_eq!(listing(&killed.run), RUN_FILES);
    let config = std::fs::read_to_string(killed.run.join("config.toml")).unwrap();
    assert!(config.contains("negatives = 3\n") && config.contains("workers = 2\n"), "{config}");
}

#[test]
fn resuming_removes_its_own_leftovers_only() {
    let dir = tempfile::tempdir().unwrap();
    write_set(dir.path());
    succeeds(dir.path(), &short_run());
    let run = dir.path().join("run");
    for name in [".checkpoint.safetensors.partial", ".lock"] {
        std::fs::write(run.join(name), "half a fi").unwrap();
    }
    for name in [".tmpa1B2c3", "notes.txt"] {
        std::fs::write(run.join(name), "mine").unwrap();
    }
    succeeds(dir.path(), &["--resume", "run"]);
    let mut expected = [&RUN_FILES[..], &[".tmpa1B2c3", "notes.txt"]].concat();
    expected.sort();
    assert_eq!(listing(&run), expected);
}

#[test]
fn a_configuration_that_no_run_wrote_is_not_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    write_set(dir.path());
    let mine = "# my notes\nwidth = 8\nepochs = 1\n";
    std::fs::create_dir(dir.path().join("run")).unwrap();
    std::fs::write(dir.path().join("run/config.toml"), mine).unwrap();
    let output = run(dir.path(), &["--data", "x.dfar", "--out", "run", "--config", "run/config.toml"]);
    assert_eq!(output.status.code(), Some(2));
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(message.contains("holds a config.toml that no run wrote"), "{message}");
    assert_eq!(std::fs::read_to_string(dir.path().join("run/config.toml")).unwrap(), mine);
    assert_eq!(listing(&dir.path().join("run")), ["config.toml"]);
}

#[test]
fn files_that_no_run_wrote_are_not_overwritten() {
    for name in ["log.jsonl", "synthetic.dfar", "curves.svg"] {
        let dir = tempfile::tempdir().unwrap();
        write_set(dir.path());
        std::fs::create_dir(dir.path().join("run")).unwrap();
        std::fs::write(dir.path().join("run").join(name), "mine").unwrap();
        let output = run(dir.path(), &["--data", "x.dfar", "--out", "run"]);
        assert_eq!(output.status.code(), Some(2));
        let message = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(message.contains(&format!("{name} is not of a run")), "{message}");
        assert_eq!(std::fs::read(dir.path().join("run").join(name)).unwrap(), b"mine");
    }
}

/// A kill between the model of an epoch and its checkpoint, then a resume whose repeated epoch is
/// not the best, as on another device.
#[test]
fn a_model_newer_than_the_checkpoint_does_not_end_the_run() {
    let dir = tempfile::tempdir().unwrap();
    write_set(dir.path());
    succeeds(dir.path(), &short_run());
    let [model, checkpoint] =
        ["model.safetensors", "checkpoint.safetensors"].map(|name| dir.path().join("run").join(name));
    let data = dfar::data::Dataset::open(dir.path().join("x.dfar")).unwrap();
    let mut newer = ModelFile::load(&model).unwrap();
    newer.info.epoch = 2;
    newer.parameters[0].values[0] += 1.0;
    ModelFile::save(&model, &newer.info, newer.parameters, &data).unwrap();
    let mut older = Checkpoint::load(&checkpoint).unwrap();
    older.info.state.best.as_mut().expect("an epoch has ended").valid_auc = Some(1.0);
    older.save(&checkpoint).unwrap();
    // The checkpoint of a run that ends before this epoch.
    let ended = run(dir.path(), &["--resume", "run"]);
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        ended.status.code() == Some(2) && said.contains("is of epoch 2, after the last one of this run"),
        "{said}"
    );
    succeeds(dir.path(), &["--resume", "run", "--epochs", "2"]);
    assert_eq!(ModelFile::load(&model).unwrap().info.epoch, 2);
}

#[test]
fn the_model_of_another_run_is_not_the_best_of_this_one() {
    let dir = tempfile::tempdir().unwrap();
    write_set(dir.path());
    succeeds(dir.path(), &short_run());
    let model = dir.path().join("run/model.safetensors");
    let data = dfar::data::Dataset::open(dir.path().join("x.dfar")).unwrap();
    let own = ModelFile::load(&model).unwrap();
    type Change = fn(&mut ModelFile);
    let changes: [Change; 3] = [
        |other| other.info.epoch = 3,
        |other| other.info.model.half_life = Some(2.0),
        |other| {
            other.info.data.content = "0".to_owned();
        },
    ];
    for change in changes {
        let mut other = own.clone();
        other.info.epoch = 2;
        change(&mut other);
        ModelFile::save(&model, &other.info, other.parameters, &data).unwrap();
        let refused = run(dir.path(), &["--resume", "run", "--epochs", "4"]);
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(refused.status.code() == Some(3) && said.contains("is not the best model"), "{said}");
    }
}
