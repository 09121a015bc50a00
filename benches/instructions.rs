//! Small fixed jobs whose instructions `.ci/instructions` counts under callgrind. Run alone, it
//! prints their names.
//!
//! Counts depend on the program, not on the load of the machine. Everything runs on one thread,
//! except the import, which has two. `.ci/instructions` tells callgrind to count inside of
//! [`measured`] only and to write a total at each of its returns, so every job is one call of it,
//! after a first run that fills buffers.

use dfar::attention::FhaOptions;
use dfar::batch::{Batch, Feedback};
use dfar::data::import::{self, ImportOptions, LogFormat};
use dfar::data::{Split, import::ColumnOptions};
use dfar::device::cpu::Cpu;
use dfar::evaluate::{Query, rank};
use dfar::model::{Model, Optimizer};
use dfar::simd;
use dfar::train::Config;
use dfar_tools::attention::batch;
use dfar_tools::train::steps::uniform;
use std::fmt::Write;
use std::hint::black_box;
use std::sync::Arc;

const ITEMS: usize = 500;

/// What callgrind counts.
#[inline(never)]
fn measured(job: &mut dyn FnMut()) {
    black_box(job)();
}

fn count(name: &str, mut job: impl FnMut()) {
    job();
    measured(&mut job);
    println!("{name}");
}

fn attention() {
    for length in [20, 100, 300] {
        let mut batch = batch::Batch::new(FhaOptions::new(2, 16), length, 1200);
        count(&format!("attention-forward-{length}"), || batch.forward().expect("the options are valid"));
        count(&format!("attention-backward-{length}"), || batch.backward().expect("the options are valid"));
    }
}

fn model(config: &Config) -> Model<Cpu> {
    Model::initialized(Arc::new(Cpu::new()), config.model(ITEMS), config.seed, config.init)
        .expect("the default model can be made")
}

fn training_step() {
    let config = Config { max_length: 40, ..Config::default() };
    let (mut model, loss, adam) = (model(&config), config.loss(), config.adam());
    let mut optimizer = Optimizer::new(&model).expect("its buffers can be made");
    let batch: Batch = uniform(ITEMS, 40, 2, 10, 1).expect("the sizes are small");
    count("training-step", || {
        let step = model.train_step(&batch, &loss, &adam, &mut optimizer);
        black_box(step.expect("a step succeeds"));
    });
}

fn scoring() {
    let model = model(&Config { max_length: 40, ..Config::default() });
    let query = |first: u32| Query {
        items: (0..40).map(|event| (first + 7 * event) % ITEMS as u32).collect(),
        labels: (0..40).map(|event| (event % 3 == 0) as u8).collect(),
        candidates: (0..50).collect(),
    };
    let queries: Vec<Query> = (0..2).map(query).collect();
    count("scoring", || {
        black_box(rank(&model, Feedback::Mixed, &queries, 1).expect("the queries are valid"));
    });
}

fn import_csv() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let log = folder.path().join("log.csv");
    let mut text = "user,item,rating,time\n".to_owned();
    for row in 0..1000u64 {
        let (user, item) = (row * 7919 % 50, row * 104_729 % 200);
        let time = 1_600_000_000 + row;
        writeln!(text, "{user},{item},{},{time}", row % 5 + 1).expect("a String can be written to");
    }
    std::fs::write(&log, text).expect("the folder can be written to");
    let mut options = ImportOptions::new(LogFormat::Csv, vec![log], folder.path().join("log.dfar"));
    let name = |column: &str| Some(column.to_owned());
    options.columns = ColumnOptions {
        user: name("user"),
        item: name("item"),
        time: name("time"),
        label: name("rating"),
        ..ColumnOptions::default()
    };
    options.liked = import::Liked::Above(3.0);
    options.split = Split::LeaveLast;
    options.k_core = None;
    count("import-csv", || {
        import::import(&options, &()).expect("the log is well-formed");
    });
}

fn main() {
    let threads = rayon::ThreadPoolBuilder::new().num_threads(1).use_current_thread();
    threads.build_global().expect("no other pool was started");
    println!("simd {}", simd::name());
    attention();
    training_step();
    scoring();
    import_csv();
}
