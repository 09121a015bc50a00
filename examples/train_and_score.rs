//! Packs a log in memory into a batch, trains a model, and ranks items for a new user.
//!
//!     cargo run --release --example train_and_score

use dfar::batch::{Batch, Cut, Feedback, Question, View};
use dfar::device::{Clip, cpu::Cpu};
use dfar::evaluate::{Query, rank};
use dfar::model::{AdamOptions, Initialization, LossOptions, Model, ModelConfig, Optimizer};
use std::error::Error;
use std::sync::Arc;

const ITEMS: u32 = 40;
const MAX_LENGTH: usize = 20;

/// Packs, trains, ranks.
pub fn main() -> Result<(), Box<dyn Error>> {
    // The log: each user's events, oldest first, as (item, liked). Every user likes either the even
    // or the odd items.
    let users: Vec<Vec<(u32, u8)>> = (0..60)
        .map(|user: u32| {
            let event = |n: u32| {
                let item = (user * 7 + n * n * 5 + n * 2) % ITEMS;
                (item, u8::from(item % 2 == user % 2))
            };
            (0..12).map(event).collect()
        })
        .collect();

    // One group per liked event: its item, and two items that the user did not choose.
    let mut histories = Vec::new();
    for events in &users {
        let (items, liked): (Vec<u32>, Vec<u8>) = events.iter().copied().unzip();
        let questions = (1..items.len())
            .filter(|&event| liked[event] == 1)
            .map(|event| Question {
                event,
                candidates: vec![items[event], (items[event] + 9) % ITEMS, (items[event] + 15) % ITEMS],
                targets: vec![1.0, 0.0, 0.0],
            })
            .collect();
        // All groups of one user share one pass over the user's events.
        let view = View::new(&items, &liked, Feedback::Mixed);
        histories.extend(view.histories(questions, Cut::exact(MAX_LENGTH)));
    }
    let batch = Batch::pack(&histories)?;
    println!(
        "{} histories, {} tokens, {} candidates to score",
        histories.len(),
        batch.tokens(),
        batch.rows()
    );

    // Training. The whole log is one batch here; `train::Fit` draws batches, validates and writes
    // checkpoints.
    let config = ModelConfig::new(ITEMS as usize, MAX_LENGTH);
    let mut model = Model::initialized(Arc::new(Cpu::new()), config, 1, Initialization::Scaled)?;
    let mut optimizer = Optimizer::new(&model)?;
    let loss = LossOptions { bpr: 0.1, idl: 0.001, embed_l2: 0.0 };
    let adam = AdamOptions { lr: 3e-3, clip: Some(Clip::PerTensor(2.0)), dense_embeddings: false };
    let first = model.train_step(&batch, &loss, &adam, &mut optimizer)?.loss;
    let mut last = first;
    for _ in 0..60 {
        last = model.train_step(&batch, &loss, &adam, &mut optimizer)?.loss;
    }
    println!("loss {first:.3} -> {last:.3}");
    assert!(last < 0.8 * first);

    // Scoring: a new user liked 2 and 8 and skipped 5, so even items should come first.
    let candidates: Vec<u32> = (10..20).collect();
    let query = Query { items: vec![2, 5, 8], labels: vec![1, 0, 1], candidates };
    let logits = rank(&model, Feedback::Mixed, std::slice::from_ref(&query), 1)?.remove(0);
    let mut ranked: Vec<(u32, f32)> = query.candidates.into_iter().zip(logits).collect();
    ranked.sort_by(|a, b| b.1.total_cmp(&a.1));
    for &(item, logit) in &ranked {
        println!("item {item}: like with probability {:.2}", 1.0 / (1.0 + (-logit).exp()));
    }
    let even = ranked[..5].iter().filter(|(item, _)| item % 2 == 0).count();
    assert!(even >= 4, "{ranked:?}");
    Ok(())
}
