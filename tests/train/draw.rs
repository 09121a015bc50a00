//! Properties of a drawn epoch, recomputed from the data set.

use dfar::batch::{Batch, History};
use dfar::batch::{Cut, Feedback};
use dfar::data::Dataset;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::train::draw::{DrawOptions, Drawer, TrainTargets};
use dfar::train::negatives::NegativeSource;
use std::collections::{BTreeMap, BTreeSet, HashSet};

fn data(users: usize, items: usize) -> Dataset {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.dfar");
    let options = SyntheticOptions { users, items, events_per_user: 20.0, ..SyntheticOptions::default() };
    synthetic::write(&options, &path).unwrap();
    let bytes = std::fs::read(&path).unwrap();
    Dataset::from_bytes(&bytes, "x.dfar").unwrap()
}

fn options() -> DrawOptions {
    DrawOptions {
        seed: 7,
        targets: TrainTargets::Positive,
        feedback: Feedback::Mixed,
        cut: Cut::exact(12),
        source: NegativeSource::InBatch,
        negatives: 9,
        negative_pool: 0,
        sample_rate: 1.0,
        batch_tokens: 200,
        batch_rows: 1000,
    }
}

fn epoch(data: &Dataset, options: &DrawOptions, epoch: u64) -> Vec<Vec<History>> {
    let drawer = Drawer::new(data, options.clone());
    let plan = drawer.plan(epoch);
    (0..plan.size.batches).map(|batch| drawer.draw(&plan, epoch, batch)).collect()
}

/// The (history, labels, item, target) of the first candidate of every group, as a multiset.
type Asked = BTreeMap<(Vec<u32>, Vec<u8>, u32, bool), usize>;

fn asked(batches: &[Vec<History>]) -> Asked {
    let mut all = Asked::new();
    for history in batches.iter().flatten() {
        for group in &history.groups {
            let end = group.length as usize;
            let key = (
                history.items[..end].to_vec(),
                history.labels[..end].to_vec(),
                group.candidates[0],
                group.targets[0] == 1.0,
            );
            *all.entry(key).or_default() += 1;
        }
    }
    all
}

/// The expected groups, event by event.
fn expected(data: &Dataset, options: &DrawOptions) -> Asked {
    let mut all = Asked::new();
    for user in 0..data.users() as u32 {
        let events = data.user(user);
        for t in 1..events.train_end {
            let liked = events.feedback[t] == 1;
            if !liked && options.targets == TrainTargets::Positive {
                continue;
            }
            let mut seen: Vec<(u32, u8)> = (0..t).map(|i| (events.items[i], events.feedback[i])).collect();
            match options.feedback {
                Feedback::Mixed => {}
                Feedback::PositiveOnly => seen.retain(|e| e.1 == 1),
                Feedback::Ignored => seen.iter_mut().for_each(|e| e.1 = 1),
            }
            let seen = &seen[options.cut.start(seen.len())..];
            let key = (
                seen.iter().map(|e| e.0).collect(),
                seen.iter().map(|e| e.1).collect(),
                events.items[t],
                liked || options.targets == TrainTargets::All,
            );
            *all.entry(key).or_default() += 1;
        }
    }
    all
}

#[test]
fn an_epoch_has_every_target_once_with_its_exact_history() {
    let data = data(60, 80);
    for targets in [TrainTargets::Positive, TrainTargets::All, TrainTargets::Feedback] {
        for feedback in [Feedback::Mixed, Feedback::PositiveOnly, Feedback::Ignored] {
            for stride in [1, 5] {
                let cut = Cut { max_length: 12, stride };
                let options = DrawOptions { targets, feedback, cut, ..options() };
                let batches = epoch(&data, &options, 3);
                assert_eq!(asked(&batches), expected(&data, &options), "{targets:?}, {feedback:?}, {stride}");
            }
        }
    }
}

#[test]
fn the_plan_has_the_sizes_of_the_drawn_batches() {
    let data = data(60, 80);
    for (targets, negative_pool, stride) in
        [(TrainTargets::Positive, 0, 1), (TrainTargets::Positive, 12, 4), (TrainTargets::Feedback, 12, 1)]
    {
        let cut = Cut { max_length: 12, stride };
        let options = DrawOptions { targets, negative_pool, cut, ..options() };
        let drawer = Drawer::new(&data, options.clone());
        let plan = drawer.plan(0);
        let batches = epoch(&data, &options, 0);
        let histories = || batches.iter().flatten();
        let groups = || histories().flat_map(|h| &h.groups);
        assert!(plan.size.windows > 0 && plan.size.shared_passes > 0, "the test should see both");
        assert_eq!(plan.size.targets, groups().count());
        assert_eq!(plan.size.rows, groups().map(|g| g.candidates.len()).sum::<usize>());
        assert_eq!(plan.size.tokens, histories().map(|h| h.items.len()).sum::<usize>());
        assert_eq!(plan.size.shared_passes + plan.size.windows, histories().count());
        for batch in &batches {
            let packed = Batch::pack(batch).unwrap();
            assert!(batch.len() == 1 || packed.tokens() <= options.batch_tokens);
            assert!(batch.len() == 1 || packed.rows() <= options.batch_rows);
        }
    }
}

#[test]
fn negatives_are_distinct_and_never_the_positive() {
    let data = data(60, 80);
    let sources = [NegativeSource::InBatch, NegativeSource::Popularity, NegativeSource::Uniform];
    for source in sources {
        for negative_pool in [0, 15] {
            let options = DrawOptions { source, negative_pool, ..options() };
            for group in epoch(&data, &options, 0).iter().flatten().flat_map(|h| &h.groups) {
                assert_eq!(group.candidates.len(), 10);
                assert_eq!(group.targets.iter().sum::<f32>(), 1.0);
                assert_eq!(group.candidates.iter().collect::<HashSet<_>>().len(), 10, "{group:?}");
            }
        }
    }
}

#[test]
fn in_batch_negatives_are_targets_of_the_batch() {
    // Large batches: enough targets of other users for every group.
    let data = data(60, 80);
    let options = DrawOptions { batch_tokens: 100_000, batch_rows: 100_000, ..options() };
    let batches = epoch(&data, &options, 0);
    assert_eq!(batches.len(), 1);
    let targets: BTreeSet<u32> = batches[0].iter().flat_map(|h| &h.groups).map(|g| g.candidates[0]).collect();
    for group in batches[0].iter().flat_map(|h| &h.groups) {
        assert!(group.candidates.iter().all(|c| targets.contains(c)));
    }
}

#[test]
fn a_pool_bounds_the_distinct_negatives_of_a_history() {
    let data = data(60, 80);
    let options = DrawOptions { negative_pool: 12, ..options() };
    for history in epoch(&data, &options, 0).iter().flatten() {
        let negatives: BTreeSet<u32> =
            history.groups.iter().flat_map(|g| &g.candidates[1..]).copied().collect();
        assert!(negatives.len() <= 12.max(options.negatives), "{}", negatives.len());
    }
}

#[test]
fn with_too_few_items_groups_have_fewer_negatives() {
    let data = data(30, 16);
    for negative_pool in [0, 20] {
        let options = DrawOptions { negatives: 30, negative_pool, ..options() };
        let drawer = Drawer::new(&data, options.clone());
        let batches = epoch(&data, &options, 0);
        let rows: usize = batches.iter().flatten().flat_map(|h| &h.groups).map(|g| g.candidates.len()).sum();
        assert_eq!(rows, drawer.plan(0).size.rows);
        for group in batches.iter().flatten().flat_map(|h| &h.groups) {
            assert_eq!(group.candidates.iter().collect::<HashSet<_>>().len(), data.items());
        }
    }
}

#[test]
fn a_batch_depends_only_on_seed_epoch_and_index() {
    let data = data(60, 80);
    let options = options();
    let first = epoch(&data, &options, 2);
    let drawer = Drawer::new(&data, options.clone());
    let plan = drawer.plan(2);
    let alone = drawer.draw(&plan, 2, 5);
    assert_eq!(alone, first[5], "drawn without the batches before it");
    assert_ne!(epoch(&data, &options, 3), first);
    assert_ne!(epoch(&data, &DrawOptions { seed: 8, ..options }, 2), first);
}

#[test]
fn an_epoch_without_targets_trains_on_one() {
    let data = data(3, 16);
    let options = DrawOptions { sample_rate: 1e-9, ..options() };
    let drawer = Drawer::new(&data, options.clone());
    let plan = drawer.training_plan(4).unwrap();
    assert!(plan.topped_up);
    assert_eq!((plan.size.targets, plan.size.batches), (1, 1));
    assert_eq!(asked(&epoch(&data, &options, 4)).values().sum::<usize>(), 1);
    assert!(
        !Drawer::new(&data, DrawOptions { sample_rate: 0.9, ..options }).training_plan(4).unwrap().topped_up
    );
}

#[test]
fn a_sample_rate_keeps_about_its_share_and_changes_by_epoch() {
    let data = data(200, 80);
    let all = Drawer::new(&data, options()).plan(0).size.targets;
    let sampled = DrawOptions { sample_rate: 0.3, ..options() };
    let kept = Drawer::new(&data, sampled.clone()).plan(0).size.targets;
    // Binomial: 5 standard deviations.
    let spread = 5.0 * (all as f64 * 0.3 * 0.7).sqrt();
    assert!((kept as f64 - 0.3 * all as f64).abs() < spread, "{kept} of {all}");
    assert_ne!(asked(&epoch(&data, &sampled, 0)), asked(&epoch(&data, &sampled, 1)));
}
