//! A training loop of your own over `Model`: batches drawn on other threads, a learning rate
//! schedule, validation after each epoch.
//!
//!     cargo run --release --example training_loop

use dfar::batch::ahead::ahead;
use dfar::batch::{Batch, Feedback};
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::data::{Dataset, Part};
use dfar::device::cpu::Cpu;
use dfar::evaluate::metrics::GaucRule;
use dfar::evaluate::{self, ScoreOptions};
use dfar::model::{AdamOptions, Model, Optimizer};
use dfar::train::Config;
use dfar::train::draw::Drawer;
use std::error::Error;
use std::ops::ControlFlow;
use std::sync::Arc;

/// Trains five epochs and prints the validation AUC after each.
pub fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("log.dfar");
    synthetic::write(&SyntheticOptions { users: 150, items: 30, ..SyntheticOptions::default() }, &path)?;
    let data = Dataset::open(&path)?;

    // Config has the defaults of dfar-train: model size, weights of the loss, options for drawing
    // batches.
    let config = Config { width: 16, max_length: 20, batch_tokens: 128, ..Config::default() };
    let mut model =
        Model::initialized(Arc::new(Cpu::new()), config.model(data.items()), config.seed, config.init)?;
    let mut optimizer = Optimizer::new(&model)?;
    let drawer = Drawer::new(&data, config.draw());

    let epochs = 5;
    let mut aucs = vec![auc(&model, &data)?];
    for epoch in 0..epochs {
        // The plan of an epoch and its batches depend only on the seed and on their numbers.
        let plan = drawer.training_plan(epoch)?;
        let adam = AdamOptions { lr: 1e-2 * 0.8f32.powi(epoch as i32), ..config.adam() };
        // Two threads draw and pack batches; this thread trains on them in order.
        let make = |index| Batch::pack(&drawer.draw(&plan, epoch, index));
        let mean = ahead(0..plan.size.batches, 2, make, |batches| -> Result<f64, Box<dyn Error>> {
            let mut sum = 0.0;
            for batch in batches {
                sum += model.train_step(&batch?, &config.loss(), &adam, &mut optimizer)?.loss;
            }
            Ok(sum / plan.size.batches as f64)
        })?;
        aucs.push(auc(&model, &data)?);
        println!("epoch {epoch}: loss {mean:.4}, validation AUC {:.4}", aucs[aucs.len() - 1]);
    }
    assert!(aucs[0] < 0.6 && aucs[epochs as usize] > aucs[0] + 0.1, "{aucs:?}");
    Ok(())
}

/// The AUC over the validation events: how often the model scores a liked event above a sampled
/// item.
fn auc(model: &Model<Cpu>, data: &Dataset) -> Result<f64, Box<dyn Error>> {
    let options =
        ScoreOptions { feedback: Feedback::Mixed, batch_tokens: 4096, batch_rows: 8192, workers: 1 };
    let scores =
        evaluate::score_part(model, data, Part::Valid, &options, &mut |_| ControlFlow::Continue(()))?;
    let report = evaluate::part_report(data, Part::Valid, &scores, GaucRule::BothClasses, &[]);
    Ok(report.ok_or("no validation event was liked")?.liked.auc)
}
