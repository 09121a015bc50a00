//! Each system can learn a small set by heart: its gradients lead somewhere, and no part of it is
//! cut off.

use dfar::batch::History;
use dfar::data::Dataset;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::device::cpu::Cpu;
use dfar::evaluate::metrics::auc;
use dfar::model;
use dfar::train::Config;
use dfar::train::draw::Drawer;
use dfar::train::negatives::NegativeSource;
use dfar_baselines::learner::{Baseline, Dfar, Learner};
use dfar_baselines::loss::Ranking;
use dfar_baselines::{Kind, LossOptions, Model, Settings};
use std::sync::Arc;

const ROUNDS: usize = 300;

/// Batches of histories, each with the sampled items that DIEN reads.
type Batches = Vec<(Vec<History>, Vec<u32>)>;

fn data() -> (tempfile::TempDir, Dataset) {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("x.dfar");
    let options =
        SyntheticOptions { users: 20, items: 200, events_per_user: 12.0, ..SyntheticOptions::default() };
    synthetic::write(&options, &path).expect("a data set");
    let data = Dataset::open(&path).expect("a data set");
    (dir, data)
}

fn config(kind: Option<Kind>) -> Config {
    let defaults = Config { width: 16, max_length: 12, lr: 0.01, ..Config::default() };
    Config {
        feedback: kind.map_or(defaults.feedback, Kind::feedback),
        train_negatives: NegativeSource::Uniform,
        batch_tokens: 150,
        ..defaults
    }
}

/// One epoch, drawn once: every round trains on the same rows.
fn batches(data: &Dataset, config: &Config, samples: bool) -> Batches {
    let drawer = Drawer::new(data, config.draw());
    let plan = drawer.plan(0);
    let draw = |batch| {
        let histories = drawer.draw(&plan, 0, batch);
        let negatives = match samples {
            true => drawer.event_negatives(&plan, 0, batch, &histories),
            false => Vec::new(),
        };
        (histories, negatives)
    };
    (0..plan.size.batches).map(draw).collect()
}

/// Trains until the AUC over the training rows is above 0.99.
#[track_caller]
fn overfits<L: Learner>(mut learner: L, batches: &Batches) {
    let packer = learner.packer();
    let pack = |(histories, negatives): &(Vec<History>, Vec<u32>)| {
        L::pack(&packer, histories, negatives).expect("a batch")
    };
    let mut reached = 0.0;
    for round in 1..=ROUNDS {
        for batch in batches {
            learner.step(pack(batch)).expect("a step");
        }
        if round % 20 == 0 {
            let mut rows = Vec::new();
            for batch in batches {
                let scores = learner.score(pack(batch)).expect("scores");
                let groups = batch.0.iter().flat_map(|history| &history.groups);
                let targets = groups.flat_map(|group| group.targets.iter().copied());
                rows.extend(scores.into_iter().zip(targets.map(|target| target == 1.0)));
            }
            reached = auc(&mut rows).expect("both classes");
            if reached > 0.99 {
                return;
            }
        }
    }
    panic!("AUC {reached} after {ROUNDS} rounds");
}

#[track_caller]
fn baseline_overfits(kind: Kind) {
    let (_dir, data) = data();
    let config = config(Some(kind));
    let settings = Settings {
        items: data.items(),
        max_length: config.max_length,
        width: config.width,
        ..Settings::default()
    };
    let auxiliary = kind.auxiliary().map_or(0.0, |(_, weight)| weight as f32);
    let loss = LossOptions { ranking: Ranking::Bce, embed_l2: 0.0, auxiliary };
    let model = Model::initialized(Arc::new(Cpu::new()), kind, settings, config.seed, config.init);
    let learner = Baseline::new(model.expect("a model"), loss, config.adam()).expect("a model");
    overfits(learner, &batches(&data, &config, kind.samples_items()));
}

#[test]
fn din_overfits() {
    baseline_overfits(Kind::Din);
}

#[test]
fn caser_overfits() {
    baseline_overfits(Kind::Caser);
}

#[test]
fn gru4rec_overfits() {
    baseline_overfits(Kind::Gru4rec);
}

#[test]
fn dien_overfits() {
    baseline_overfits(Kind::Dien);
}

#[test]
fn sasrec_overfits() {
    baseline_overfits(Kind::Sasrec);
}

#[test]
fn tha4rec_overfits() {
    baseline_overfits(Kind::Tha4rec);
}

#[test]
fn dfn_overfits() {
    baseline_overfits(Kind::Dfn);
}

#[test]
fn feedrec_overfits() {
    baseline_overfits(Kind::Feedrec);
}

#[test]
fn dfar_overfits() {
    let (_dir, data) = data();
    let config = config(None);
    let network = config.model(data.items());
    let model = model::Model::initialized(Arc::new(Cpu::new()), network, config.seed, config.init);
    let learner = Dfar::new(model.expect("a model"), config.loss(), config.adam()).expect("a model");
    overfits(learner, &batches(&data, &config, false));
}
