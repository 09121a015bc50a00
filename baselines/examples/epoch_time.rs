//! Times one training epoch of each system on a data set, with the options of `dfar-train`:
//!
//!     cargo run --release -p dfar-baselines --example epoch_time -- ml-100k.dfar [SYSTEM..]

use dfar::data::Dataset;
use dfar::device::cpu::Cpu;
use dfar::train::Config;
use dfar::train::draw::Drawer;
use dfar_baselines::loss::Ranking;
use dfar_baselines::{Kind, LossOptions, Model, Optimizer, Settings};
use rand::{RngExt, SeedableRng};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let data = Dataset::open(Path::new(&arguments.next().ok_or("the first argument is a data set")?))?;
    let chosen: Vec<String> = arguments.collect();
    println!("{} threads", rayon::current_num_threads());
    println!("system    seconds  drawing  batches  tokens     rows  loss");
    for kind in Kind::ALL {
        if chosen.is_empty() || chosen.iter().any(|name| name == kind.name()) {
            epoch(kind, &data)?;
        }
    }
    Ok(())
}

/// Trains one epoch and prints its time, of which `drawing` is spent outside the system.
fn epoch(kind: Kind, data: &Dataset) -> Result<(), Box<dyn Error>> {
    let config = Config { feedback: kind.feedback(), ..Config::default() };
    let settings = Settings { items: data.items(), max_length: config.max_length, ..Settings::default() };
    let mut model = Model::initialized(Arc::new(Cpu::new()), kind, settings, config.seed, config.init)?;
    let mut optimizer = Optimizer::new(&model)?;
    let auxiliary = kind.auxiliary().map_or(0.0, |(_, weight)| weight as f32);
    let options = LossOptions { ranking: Ranking::Bce, embed_l2: config.embed_l2 as f32, auxiliary };
    let samples = kind.samples_items();
    let drawer = Drawer::new(data, config.draw());
    let plan = drawer.training_plan(0)?;
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(config.seed);
    let (mut drawing, mut sum) = (0.0, 0.0);
    let start = Instant::now();
    for index in 0..plan.size.batches {
        let drawn = Instant::now();
        let histories = drawer.draw(&plan, 0, index);
        let events = if samples { histories.iter().map(|h| h.items.len()).sum() } else { 0 };
        let negatives: Vec<u32> = (0..events).map(|_| rng.random_range(0..data.items() as u32)).collect();
        let x = model.inputs(&histories, &negatives).map_err(|error| format!("{error:?}"))?;
        drawing += drawn.elapsed().as_secs_f64();
        sum += model.train_step(&x, &options, &config.adam(), &mut optimizer)?.loss;
    }
    let size = plan.size;
    println!(
        "{:9} {:7.2}  {drawing:7.2}  {:7}  {:6}  {:7}  {:.4}",
        kind.title(),
        start.elapsed().as_secs_f64(),
        size.batches,
        size.tokens,
        size.rows,
        sum / size.batches as f64
    );
    Ok(())
}
