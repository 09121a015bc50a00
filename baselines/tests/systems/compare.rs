//! `dfar-compare`: the protocol of DFAR for all, and result files that survive an interruption.

use dfar::batch::Feedback;
use dfar::data::Dataset;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::device::Precision;
use dfar::device::cpu::Cpu;
use dfar::train::checkpoint::DataInfo;
use dfar::train::draw::Drawer;
use dfar::train::run::Run;
use dfar::train::{Config, Fit};
use dfar_baselines::Kind;
use dfar_baselines::loss::Ranking;
use dfar_baselines::results::{Identity, Options, Row};
use dfar_baselines::systems::sasrec::Pool;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;

const SMALL: [&str; 10] =
    ["--data", "x.dfar", "--width", "8", "--max-length", "10", "--batch-tokens", "150", "--epochs", "2"];

fn folder() -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    let options =
        SyntheticOptions { users: 30, items: 40, events_per_user: 12.0, ..SyntheticOptions::default() };
    synthetic::write(&options, dir.path().join("x.dfar")).expect("a data set");
    dir
}

fn compare(dir: &Path, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dfar-compare"));
    command.current_dir(dir).args(SMALL).args(more).output().expect("dfar-compare should start")
}

#[track_caller]
fn finished(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    stderr.into_owned()
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A result file without what depends on the machine.
fn figures(path: &Path) -> serde_json::Value {
    let mut result: serde_json::Value = serde_json::from_str(&text(path)).expect("a result is JSON");
    for field in ["seconds", "threads", "jobs", "device"] {
        result["provenance"][field] = 0.into();
    }
    for epoch in result["fitted"]["epochs"].as_array_mut().expect("epochs") {
        epoch["train_seconds"] = 0.into();
        epoch["valid_seconds"] = 0.into();
    }
    result
}

#[test]
fn a_comparison_continues_where_it_stopped_and_does_not_depend_on_threads() {
    let dir = folder();
    let out = dir.path().join("out");
    let all = ["--out", "out", "--seeds", "2", "--seed", "7"];
    let systems = |list| [&all[..], &["--systems", list]].concat();
    finished(&compare(dir.path(), &systems("din,gru4rec,dien,dfn")));
    let said = finished(&compare(dir.path(), &systems("dien,sasrec,dfar")));
    assert!(said.contains("DIEN (positive-only), seed 7: finished before"), "{said}");
    assert!(said.contains("DFAR (mixed), seed 8, epoch 2: loss "), "{said}");
    let markdown = text(&out.join("table.md"));
    let rows = markdown.lines().skip(4).take_while(|line| !line.is_empty());
    let rows: Vec<&str> = rows.map(|line| line.split(" | ").next().expect("a cell")).collect();
    assert_eq!(
        rows,
        [
            "| popularity",
            "| ceiling",
            "| DIN",
            "| GRU4REC",
            "| DIEN",
            "| SASRec",
            "| DFN",
            "| DFAR",
            "| DFAR over the best other"
        ]
    );
    assert!(markdown.contains("**") && markdown.contains("<u>") && markdown.contains(" ± "), "{markdown}");
    let table: serde_json::Value = serde_json::from_str(&text(&out.join("table.json"))).expect("JSON");
    assert_eq!(table["lines"][2]["seeds"], serde_json::json!([7, 8]));
    assert_eq!(text(&out.join("table.csv")).lines().count(), 7);

    // As if killed before the last file: what is missing is made again, with the same bits.
    let missing = out.join("results/dien-positive-only-8.json");
    let (before, others) = (figures(&missing), text(&out.join("results/dien-positive-only-7.json")));
    std::fs::remove_file(&missing).expect("the file is there");
    std::fs::write(out.join("results/.dien-positive-only-8.json.partial"), "{").expect("a leftover");
    finished(&compare(dir.path(), &[&systems("dien")[..], &["--threads", "1"]].concat()));
    assert_eq!(figures(&missing), before);
    assert_eq!(text(&out.join("results/dien-positive-only-7.json")), others);
    let figures = |markdown: &str| markdown.split("\n\n").take(3).map(str::to_owned).collect::<Vec<_>>();
    assert_eq!(figures(&text(&out.join("table.md"))), figures(&markdown));
}

/// All result files of a directory, by name.
fn results(out: &Path) -> std::collections::BTreeMap<String, serde_json::Value> {
    let files = std::fs::read_dir(out.join("results")).expect("results");
    let paths = files.map(|entry| entry.expect("an entry").path());
    paths.map(|path| (path.file_name().expect("a name").to_string_lossy().into(), figures(&path))).collect()
}

#[test]
fn searches_and_ablations_do_not_depend_on_jobs_and_add_only_their_runs() {
    let dir = folder();
    let study = ["--tune", "2", "--ablations", "--seeds", "2", "--systems", "sasrec,dfar", "--threads", "2"];
    let run = |out: &str, more: &[&str]| {
        finished(&compare(dir.path(), &[&["--out", out], more].concat()));
        results(&dir.path().join(out))
    };
    let one = run("one", &study);
    let said = compare(dir.path(), &[&["--out", "two", "--jobs", "2"], &study[..]].concat());
    assert!(finished(&said).contains("18 of 18 runs done"));
    assert_eq!(results(&dir.path().join("two")), one);
    // Eight rows with two seeds, and with the first seed the other setting of each system.
    assert_eq!(one.len(), 18, "{:?}", one.keys());
    assert!(one.contains_key("sasrec-positive-only-tuned-1-2020.json"), "{:?}", one.keys());
    let model = |name: &str| std::fs::read(dir.path().join(name).join("models/dfar-mixed-2020.safetensors"));
    assert!(model("one").expect("a model") == model("two").expect("a model"));
    let table: serde_json::Value =
        serde_json::from_str(&text(&dir.path().join("one/table.json"))).expect("JSON");
    for search in table["searches"].as_array().expect("searches") {
        let auc = |number: usize| search["settings"][number]["valid_auc"].as_f64().expect("an AUC");
        assert_eq!(search["chosen"], u64::from(auc(1) > auc(0)), "{search}");
    }

    // Without a search, the runs of setting 0 are there already.
    let files = |out: &str| std::fs::read_dir(dir.path().join(out).join("results")).expect("results").count();
    let before = files("one");
    let said = finished(&compare(dir.path(), &["--out", "one", "--systems", "sasrec", "--seeds", "1"]));
    assert!(said.contains("SASRec (positive-only), seed 2020: finished before"), "{said}");
    assert_eq!(files("one"), before);
}

#[test]
fn a_continued_search_counts_the_runs_of_the_chosen_setting() {
    let dir = folder();
    // Setting 0 learns nothing, so the other one is chosen.
    let study = ["--out", "out", "--tune", "2", "--seeds", "3", "--systems", "sasrec", "--lr", "1e-9"];
    finished(&compare(dir.path(), &study));
    let third = dir.path().join("out/results/sasrec-positive-only-tuned-1-2022.json");
    std::fs::remove_file(third).expect("the chosen setting has run with all seeds");
    let said = finished(&compare(dir.path(), &study));
    assert!(said.contains("1 of 1 runs done"), "{said}");
}

#[test]
fn a_comparison_killed_at_any_moment_ends_with_the_same_results() {
    let dir = folder();
    let study = ["--systems", "gru4rec,dfn,dfar", "--seeds", "2", "--batch-rows", "100"];
    let arguments = |out: &'static str| [&["--out", out], &study[..]].concat();
    let mut command = Command::new(env!("CARGO_BIN_EXE_dfar-compare"));
    command.current_dir(dir.path()).args(SMALL).args(arguments("killed")).stderr(std::process::Stdio::null());
    let mut child = command.spawn().expect("dfar-compare should start");
    let first = dir.path().join("killed/results/gru4rec-positive-only-2020.json");
    while !first.exists() {
        assert!(child.try_wait().expect("a child").is_none(), "it ended without a result");
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    child.kill().expect("it can be killed");
    child.wait().expect("a child");
    let before = text(&first);
    assert!(results(&dir.path().join("killed")).len() < 6, "it was killed too late");

    let said = finished(&compare(dir.path(), &arguments("killed")));
    assert!(said.contains("GRU4REC (positive-only), seed 2020: finished before"), "{said}");
    finished(&compare(dir.path(), &arguments("whole")));
    assert_eq!(text(&first), before);
    assert_eq!(results(&dir.path().join("killed")), results(&dir.path().join("whole")));
}

#[test]
fn seeds_and_systems_added_later_add_only_their_runs() {
    let dir = folder();
    let files = || {
        let folder = std::fs::read_dir(dir.path().join("out/results")).expect("results");
        folder
            .map(|entry| entry.expect("an entry").path())
            .map(|path| (text(&path), path))
            .collect::<Vec<_>>()
    };
    let run = |systems, seeds| {
        finished(&compare(dir.path(), &["--out", "out", "--systems", systems, "--seeds", seeds]))
    };
    run("sasrec", "1");
    let first = files();
    let said = run("sasrec,caser", "2");
    assert!(said.contains("3 of 3 runs done"), "{said}");
    let second = files();
    assert_eq!(second.len(), 4);
    assert!(first.iter().all(|file| second.contains(file)));
}

#[test]
fn tables_have_one_configuration() {
    let dir = folder();
    let run = |systems, more: &[&str]| {
        let arguments = [&["--out", "out", "--seeds", "1", "--systems", systems][..], more].concat();
        compare(dir.path(), &arguments)
    };
    finished(&run("sasrec", &[]));
    for (systems, more, other) in [
        ("caser", ["--lr", "0.5"], "another lr"),
        ("caser", ["--negatives", "3"], "another negatives"),
        ("dfar", ["--seed", "7"], ""),
        ("dfar", ["--half-life", "2"], ""),
        ("gru4rec", ["--feedback", "ignored"], ""),
    ] {
        let output = run(systems, &more);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.success(), other.is_empty(), "{more:?}: {stderr}");
        assert!(other.is_empty() || stderr.contains(other), "{more:?}: {stderr}");
    }
    // A title with a comma is quoted.
    let csv = text(&dir.path().join("out/table.csv"));
    assert!(csv.contains("systems,\"DFAR, half-life 2\",mixed half-life-2,1,"), "{csv}");
}

#[test]
fn tables_have_the_chosen_settings_of_all_finished_searches() {
    let dir = folder();
    let run = |systems, settings| {
        finished(&compare(
            dir.path(),
            &["--out", "out", "--seeds", "1", "--systems", systems, "--tune", settings],
        ))
    };
    run("sasrec", "2");
    run("caser", "2");
    let table = text(&dir.path().join("out/table.md"));
    let table: serde_json::Value = {
        assert!(table.contains("SASRec") && table.contains("Caser"), "{table}");
        serde_json::from_str(&text(&dir.path().join("out/table.json"))).expect("JSON")
    };
    assert_eq!(table["searches"].as_array().expect("a list").len(), 2);
    let said = run("gru4rec", "3");
    assert!(said.contains("SASRec is not in the tables: its search with --tune 3 is not finished"), "{said}");
    assert!(!text(&dir.path().join("out/table.md")).contains("SASRec"));
}

/// The number of a setting means another one in each search of a directory.
#[test]
fn tables_have_one_search() {
    let dir = folder();
    let study = ["--out", "out", "--seeds", "1", "--systems", "din,dfar", "--tune", "4", "--ablations"];
    let table = |more: &[&str]| {
        finished(&compare(dir.path(), &[&study[..], more].concat()));
        let table: serde_json::Value =
            serde_json::from_str(&text(&dir.path().join("out/table.json"))).expect("JSON");
        table["lines"].as_array().expect("a list").clone()
    };
    let with_half_life = |lines: &[serde_json::Value]| {
        let of = |line: &&serde_json::Value| line["setting"].as_str().expect("text").contains("half-life");
        lines.iter().filter(of).count()
    };
    let first = table(&[]);
    assert_eq!(with_half_life(&first), 0);
    let searched = table(&["--tune-half-life"]);
    let dfar = searched.iter().filter(|line| line["system"] == "dfar").count();
    assert!([0, dfar].contains(&with_half_life(&searched)), "{searched:?}");
    assert_eq!(table(&[]), first);
    assert!(first.iter().any(|line| line["reference"] == true));
}

#[test]
fn figure_4_leaves_out_the_model_of_another_run() {
    let dir = folder();
    let one = ["--out", "out", "--seeds", "1", "--systems", "dfar"];
    finished(&compare(dir.path(), &one));
    finished(&compare(dir.path(), &[&one[..], &["--out", "other", "--half-life", "2"]].concat()[2..]));
    let model = |name: &str| dir.path().join(name).with_extension("safetensors");
    let [other, own] = ["other/models/dfar-mixed-half-life-2-2020", "out/models/dfar-mixed-2020"].map(model);
    std::fs::copy(other, own).expect("a file");
    assert!(finished(&compare(dir.path(), &one)).contains("is not the model of its result"));
    assert!(!text(&dir.path().join("out/table.md")).contains("Attention weight"));
}

#[test]
fn a_log_under_another_name_is_the_same_data_set() {
    let dir = folder();
    let one = ["--out", "out", "--seeds", "1", "--systems", "gru4rec"];
    finished(&compare(dir.path(), &one));
    let file = dir.path().join("out/results/gru4rec-positive-only-2020.json");
    let altered = |pointer: &str, value: &str| {
        let mut result: serde_json::Value = serde_json::from_str(&text(&file)).expect("JSON");
        *result.pointer_mut(pointer).expect("a field") = value.into();
        std::fs::write(&file, result.to_string()).expect("a file");
        compare(dir.path(), &one)
    };
    let renamed = altered("/run/data/protocol/source/format", "csv");
    assert!(finished(&renamed).contains("finished before"));
    assert!(text(&dir.path().join("out/table.md")).contains("GRU4REC"));
    let other = altered("/run/data/content", "0");
    let stderr = String::from_utf8_lossy(&other.stderr);
    assert!(other.status.code() == Some(2) && stderr.contains("has another data set"), "{stderr}");
}

#[test]
fn a_search_includes_the_half_life_on_request() {
    let dir = folder();
    let study = ["--out", "out", "--seeds", "1", "--systems", "dfar", "--tune", "2", "--tune-half-life"];
    finished(&compare(dir.path(), &study));
    let table: serde_json::Value =
        serde_json::from_str(&text(&dir.path().join("out/table.json"))).expect("JSON");
    let search = &table["searches"][0];
    assert_eq!(search["settings"][0]["values"]["half_life"], 0.0);
    let drawn = search["settings"][1]["values"]["half_life"].as_f64().expect("a number");
    assert!((0.5..=64.0).contains(&drawn), "{drawn}");
    let result = dir.path().join(format!("out/results/dfar-mixed-half-life-{drawn}-tuned-1-2020.json"));
    assert_eq!(figures(&result)["run"]["config"]["half_life"], drawn);
}

#[test]
fn a_directory_in_use_is_refused() {
    let dir = folder();
    let out = dir.path().join("out");
    std::fs::create_dir(&out).expect("a folder");
    let arguments = ["--out", "out", "--seeds", "1", "--systems", "sasrec"];
    let lock = dfar::train::run::Lock::take(&out).expect("nobody uses it");
    let output = compare(dir.path(), &arguments);
    assert!(String::from_utf8_lossy(&output.stderr).contains("in use by another process"), "{output:?}");
    drop(lock);
    finished(&compare(dir.path(), &arguments));
}

#[test]
fn a_quiet_comparison_prints_only_the_table() {
    let dir = folder();
    let arguments = ["--out", "out", "--seeds", "1", "--systems", "sasrec", "--quiet", "--json"];
    let output = compare(dir.path(), &arguments);
    assert_eq!(finished(&output), "");
    assert_eq!(String::from_utf8_lossy(&output.stdout), text(&dir.path().join("out/table.json")));
}

#[test]
fn the_page_and_the_tables_have_every_system() {
    let dir = folder();
    let all = ["--out", "out", "--seeds", "2", "--ablations", "--systems", "caser,sasrec,dfar"];
    finished(&compare(dir.path(), &all));
    let (page, markdown) = (text(&dir.path().join("out/index.html")), text(&dir.path().join("out/table.md")));
    for words in ["Caser", "SASRec", "DFAR w/o FHA", "DFAR w/o MO", "DFAR w/o IDL", "DFAR w/o IBL"] {
        assert!(page.contains(words) && markdown.contains(words), "no {words}");
    }
    for words in ["Attention weight by feedback", "AUC by history length", "ceiling", "popularity"] {
        assert!(page.contains(words) && markdown.contains(words), "no {words}");
    }
    // Ten rows: three systems, four ablations, and the three without feedback.
    assert_eq!(text(&dir.path().join("out/table.csv")).lines().count(), 11);
}

#[test]
fn completions_and_man_pages_are_written() {
    let dir = tempfile::tempdir().expect("a folder");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dfar-compare"));
        command.current_dir(dir.path()).args(arguments).output().expect("dfar-compare should start")
    };
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = run(&["completions", shell]);
        let script = String::from_utf8(output.stdout).expect("text");
        assert!(output.status.success(), "{shell}");
        for word in ["verify", "ablations", "tune"] {
            assert!(script.contains(word), "{word} in {shell}");
        }
    }
    assert!(run(&["man", "man1"]).status.success());
    let page = text(&dir.path().join("man1/dfar-compare.1"));
    assert!(page.contains("Exit codes") && page.contains("ablations"), "{page}");
    assert!(text(&dir.path().join("man1/dfar-compare-verify.1")).contains(".SH OPTIONS"));
}

#[test]
fn wrong_usage_is_named() {
    let dir = folder();
    let one = ["--out", "out", "--seeds", "1", "--systems", "gru4rec"];
    finished(&compare(dir.path(), &one));
    let fails = |more: &[&str], code: i32, reason: &str| {
        let output = compare(dir.path(), &[&one[..4], more].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.code() == Some(code) && stderr.contains(reason), "{code}, {reason}: {stderr}");
    };
    // A file of a version before a key: its run had the default.
    let file = dir.path().join("out/results/gru4rec-positive-only-2020.json");
    let mut older: serde_json::Value = serde_json::from_str(&text(&file)).expect("JSON");
    older["run"]["config"].as_object_mut().expect("a table").remove("tensorboard").expect("a key");
    std::fs::write(&file, older.to_string()).expect("a file");
    assert!(finished(&compare(dir.path(), &one)).contains("finished before"));
    fails(&["--systems", "gru4rec", "--lr", "0.5"], 2, "gru4rec-positive-only-2020.json has another lr");
    fails(&["--systems", "gru4rec,bert"], 2, "there are din, caser, gru4rec");
    fails(&["--systems", "dfar,din", "--train-targets", "feedback"], 2, "DIN does not read skipped events");
    fails(&["--systems", "dfar", "--tune-half-life"], 2, "--tune <N>");
    fails(&["--systems", "dfar", "--tune", "1", "--tune-half-life"], 2, "it needs --tune 2 or more");
    fails(&["--systems", "dfar", "--tune", "1001"], 2, "1001 is not in 0..=1000");
    fails(&["--systems", "din", "--precision", "bf16"], 2, "all systems compute in f32");
    let on_gpu = |systems, more: &[&str], reason: &str| {
        fails(&[&["--systems", systems, "--device", "cuda"], more].concat(), 2, reason);
    };
    on_gpu("din,caser,dfn", &[], "no CUDA kernels for Caser, DFN: list some of din, sasrec, dfar");
    on_gpu("all", &[], "no CUDA kernels for Caser, GRU4REC");
    on_gpu("din,dfar", &["--jobs", "2"], "one run follows the other");
    fails(&["--systems", "din", "--device", "auto"], 2, "choose cpu or cuda");
    let of_cpu = "gru4rec-positive-only-2020.json has another device";
    fails(&["--systems", "din", "--device", "cuda"], 2, of_cpu);
    let onto_a_file = compare(dir.path(), &["--out", "x.dfar", "--seeds", "1", "--systems", "gru4rec"]);
    let stderr = String::from_utf8_lossy(&onto_a_file.stderr);
    assert!(stderr.contains("x.dfar/results") && !stderr.contains("epoch"), "{stderr}");
    // Also of a system whose turn comes last.
    for systems in ["din", "gru4rec,dfar"] {
        fails(&["--systems", systems, "--heads", "3"], 2, "must be a multiple of the number of heads");
    }
    let copy = dir.path().join("out/results/gru4rec-positive-only-2020 copy.json");
    std::fs::copy(&file, &copy).expect("a file");
    fails(&["--systems", "gru4rec"], 1, "the file of its run is out/results/gru4rec-positive-only-2020.json");
    std::fs::remove_file(copy).expect("a file");
    std::fs::write(&file, "{").expect("a file");
    fails(&["--systems", "gru4rec"], 1, "is not a result of dfar-compare");
}

fn options() -> Options {
    Options { feedback: None, ranking: Ranking::Bce, pool: Pool::Mean, aux: 1.0 }
}

fn small(data: &Dataset) -> (Config, DataInfo) {
    let config = Config { width: 8, max_length: 10, batch_tokens: 150, epochs: 3, ..Config::default() };
    (config, DataInfo::of(data))
}

#[test]
fn dfar_is_trained_as_by_dfar_train() {
    let dir = folder();
    let data = Dataset::open(dir.path().join("x.dfar")).expect("a data set");
    let (config, info) = small(&data);
    let dfar = Row::parse("dfar").expect("a system");
    let found = Identity::new(dfar, &config, &options(), &info)
        .run(Arc::new(Cpu::new()), &data, 0, &mut |_| {})
        .expect("a run")
        .fitted;
    let run = Run::create(&dir.path().join("run")).expect("a directory");
    let mut fit = Fit::start(Arc::new(Cpu::new()), &data, config.clone(), &run).expect("a run");
    fit.run(&mut |_| ControlFlow::Continue(())).expect("training");
    let expected: Vec<_> = fit.state().records.iter().map(|e| (e.epoch, e.loss, e.valid_auc)).collect();
    let epochs: Vec<_> = found.epochs.iter().map(|e| (e.epoch, e.loss, e.valid_auc)).collect();
    assert_eq!(epochs, expected);
    assert_eq!(found.best_epoch, fit.state().best.as_ref().expect("a best model").epoch);
    let halved = Config { half_life: 2.5, ..config };
    let setting =
        |name| Identity::new(Row::parse(name).expect("a system"), &halved, &options(), &info).setting();
    assert_eq!([setting("dfar"), setting("din")], ["mixed half-life-2.5", "positive-only"]);
}

/// The losses, poolings and feedback that are no default.
#[test]
fn every_switch_trains() {
    let dir = folder();
    let data = Dataset::open(dir.path().join("x.dfar")).expect("a data set");
    let (config, info) = small(&data);
    for (kind, feedback) in [(Kind::Caser, Feedback::Ignored), (Kind::Feedrec, Feedback::PositiveOnly)] {
        let options = Options { feedback: Some(feedback), ranking: Ranking::Softmax, ..options() };
        let run = Identity::new(Row::Baseline(kind), &config, &options, &info);
        let fitted = run.run(Arc::new(Cpu::new()), &data, 0, &mut |_| {}).expect("a run").fitted;
        assert!(fitted.epochs[2].loss < fitted.epochs[0].loss, "{kind:?}: {:?}", fitted.epochs);
        assert!(run.setting().ends_with(" softmax"), "{}", run.setting());
    }
    let options = Options { pool: Pool::Last, ..options() };
    let run = Identity::new(Row::Baseline(Kind::Tha4rec), &config, &options, &info);
    let fitted = run.run(Arc::new(Cpu::new()), &data, 0, &mut |_| {}).expect("a run").fitted;
    assert!(fitted.epochs[2].loss < fitted.epochs[0].loss, "{:?}", fitted.epochs);
    assert_eq!(run.setting(), "positive-only last");
}

/// The losses of an epoch on the kernels in the emulator are those of the CPU.
#[test]
fn din_sasrec_and_dfar_train_in_the_emulator() {
    let dir = folder();
    let data = Dataset::open(dir.path().join("x.dfar")).expect("a data set");
    let (config, info) = small(&data);
    let config = Config { epochs: 1, sample_rate: 0.2, ..config };
    let gpu = Arc::new(dfar_emulator::gpu(Precision::F32));
    let last = Options { pool: Pool::Last, ..options() };
    for (name, options) in [("din", options()), ("sasrec", options()), ("sasrec", last), ("dfar", options())]
    {
        let run = Identity::new(Row::parse(name).expect("a system"), &config, &options, &info);
        let on_cpu = run.run(Arc::new(Cpu::new()), &data, 0, &mut |_| {}).expect("a run").fitted;
        let on_gpu = run.run(gpu.clone(), &data, 0, &mut |_| {}).expect("a run").fitted;
        let (a, b) = (on_cpu.epochs[0].loss, on_gpu.epochs[0].loss);
        assert!((a - b).abs() < 1e-5 * a, "{name}: {a} on the CPU, {b} on the GPU");
        let [a, b] = [&on_cpu, &on_gpu].map(|fitted| fitted.test.as_ref().expect("a test part").liked.auc);
        assert!((a - b).abs() < 1e-3, "{name}: test AUC {a} on the CPU, {b} on the GPU");
    }
    let caser = Identity::new(Row::Baseline(Kind::Caser), &config, &self::options(), &info);
    let error = caser.run(gpu, &data, 0, &mut |_| {}).expect_err("there are no kernels").to_string();
    assert!(error.contains("Caser") && error.contains("no CUDA kernels"), "{error}");
}

#[test]
fn an_event_is_never_its_own_negative() {
    let dir = folder();
    let data = Dataset::open(dir.path().join("x.dfar")).expect("a data set");
    let (config, _) = small(&data);
    let drawer = Drawer::new(&data, config.draw());
    let plan = drawer.plan(0);
    let mut seen = std::collections::HashSet::new();
    for batch in 0..plan.size.batches {
        let histories = drawer.draw(&plan, 0, batch);
        let negatives = drawer.event_negatives(&plan, 0, batch, &histories);
        assert_eq!(negatives, drawer.event_negatives(&plan, 0, batch, &histories));
        let items: Vec<u32> = histories.iter().flat_map(|history| history.items.clone()).collect();
        assert_eq!(items.len(), negatives.len());
        assert!(items.iter().zip(&negatives).all(|(item, negative)| item != negative));
        seen.extend(negatives);
    }
    assert!(seen.len() > data.items() / 2, "only {} of {} items", seen.len(), data.items());
}
