//! Metrics against a naive computation and against cases computed by hand.

use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::data::{Dataset, Part};
use dfar::evaluate::metrics::auc;
use dfar::evaluate::metrics::{GaucRule, ScoredGroups, expected_ndcg, expected_reciprocal_rank};
use dfar::evaluate::{part_report, quartile_edges};
use proptest::prelude::*;

/// Every (positive, negative) pair, one at a time.
fn naive_auc(rows: &[(f32, bool)]) -> Option<f64> {
    let (mut right, mut pairs) = (0.0, 0.0);
    for &(p, positive) in rows {
        for &(n, other) in rows {
            if positive && !other {
                pairs += 1.0;
                right += if p > n { 1.0 } else { f64::from(u8::from(p == n)) / 2.0 };
            }
        }
    }
    (pairs > 0.0).then(|| right / pairs)
}

/// Averages a rank statistic over every order of the tied candidates, by listing the orders.
fn over_orders(group: &[f32], statistic: impl Fn(usize) -> f64) -> f64 {
    let mut ranks = Vec::new();
    let mut order: Vec<usize> = (0..group.len()).collect();
    permute(&mut order, 0, &mut |order| {
        if order.windows(2).all(|w| group[w[0]] >= group[w[1]]) {
            ranks.push(1 + order.iter().position(|&i| i == 0).unwrap());
        }
    });
    ranks.iter().map(|&r| statistic(r)).sum::<f64>() / ranks.len() as f64
}

fn permute(order: &mut [usize], from: usize, visit: &mut impl FnMut(&[usize])) {
    if from == order.len() {
        return visit(order);
    }
    for i in from..order.len() {
        order.swap(from, i);
        permute(order, from + 1, visit);
        order.swap(from, i);
    }
}

#[test]
fn auc_by_hand() {
    // Positives 3 and 1 against negatives 2 and 1: right, right, wrong, tie -> 2.5 / 4.
    assert_eq!(auc(&mut [(3.0, true), (2.0, false), (1.0, true), (1.0, false)]), Some(0.625));
    assert_eq!(auc(&mut [(0.0, true), (-0.0, false)]), Some(0.5), "0 and -0 tie");
    assert_eq!(auc(&mut [(1.0, true), (2.0, true)]), None);
    assert_eq!(auc(&mut []), None);
}

#[test]
fn ranks_by_hand() {
    assert_eq!(expected_reciprocal_rank(0, 0), 1.0);
    assert_eq!(expected_reciprocal_rank(1, 1), (1.0 / 2.0 + 1.0 / 3.0) / 2.0);
    assert_eq!(expected_ndcg(0, 0), 1.0);
    assert_eq!(expected_ndcg(2, 0), 0.5, "1 / log2(4)");
    assert_eq!(expected_ndcg(10, 0), 0.0, "rank 11 is beyond the cutoff");
    assert_eq!(expected_ndcg(9, 1), 0.5 / 11f64.log2(), "half the orders put it at rank 10");
}

#[test]
fn equal_scores_have_the_metrics_of_guessing() {
    let metrics = ScoredGroups { user: &[0, 0, 1], scores: &[0.3; 30], candidates: 10 }
        .metrics(GaucRule::BothClasses)
        .unwrap();
    let guess: f64 = (1..=10).map(|r| 1.0 / f64::from(r)).sum::<f64>() / 10.0;
    assert_eq!((metrics.auc, metrics.gauc), (0.5, Some(0.5)));
    assert!((metrics.mrr - guess).abs() < 1e-12);
}

#[test]
fn gauc_by_hand() {
    // User 7: one group, AUC 1, 2 rows. User 3: two groups (not adjacent), AUC 1/2: 4 rows.
    let groups = ScoredGroups { user: &[3, 7, 3], scores: &[1.0, 2.0, 9.0, 8.0, 2.0, 1.0], candidates: 2 };
    // User 3: positives 1, 2; negatives 2, 1: wrong, tie, tie, right -> 2 / 4.
    let metrics = groups.metrics(GaucRule::BothClasses).unwrap();
    assert_eq!(metrics.gauc, Some((1.0 * 2.0 + 0.5 * 4.0) / 6.0));
    assert_eq!((metrics.gauc_users, metrics.gauc_users_left_out), (2, 0));
    assert_eq!(metrics.mrr, (0.5 + 1.0 + 1.0) / 3.0);
    assert_eq!(groups.metrics(GaucRule::Dfar).unwrap().gauc, Some(1.0), "fewer than 10 rows count as 1");
}

#[test]
fn without_groups_or_negatives_there_are_no_metrics() {
    assert_eq!(ScoredGroups { user: &[], scores: &[], candidates: 10 }.metrics(GaucRule::BothClasses), None);
    assert_eq!(
        ScoredGroups { user: &[0], scores: &[1.0], candidates: 1 }.metrics(GaucRule::BothClasses),
        None
    );
}

/// A data set, and scores for its test groups, with ties.
fn scored_set() -> (Dataset, Vec<f32>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.dfar");
    let options =
        SyntheticOptions { users: 60, items: 40, events_per_user: 25.0, ..SyntheticOptions::default() };
    synthetic::write(&options, &path).unwrap();
    let data = Dataset::open(&path).unwrap();
    let groups = data.groups(Part::Test);
    let rows = groups.len() * (1 + groups.negatives_per_group);
    (data, (0..rows).map(|i| (i * 7919 % 23) as f32).collect())
}

/// The metrics of the test groups with this feedback whose target is one of `events`.
fn metrics_of(
    data: &Dataset,
    scores: &[f32],
    feedback: u8,
    events: std::ops::RangeInclusive<u32>,
) -> Option<dfar::evaluate::metrics::Metrics> {
    let groups = data.groups(Part::Test);
    let candidates = 1 + groups.negatives_per_group;
    let (mut user, mut kept) = (Vec::new(), Vec::new());
    for (group, scores) in groups.iter().zip(scores.chunks(candidates)) {
        let liked = data.user(group.user).feedback[group.event as usize];
        if liked == feedback && events.contains(&group.event) {
            user.push(group.user);
            kept.extend_from_slice(scores);
        }
    }
    ScoredGroups { user: &user, scores: &kept, candidates }.metrics(GaucRule::BothClasses)
}

#[test]
fn a_report_has_liked_and_skipped_targets_apart_and_against_each_other() {
    let (data, scores) = scored_set();
    let report = part_report(&data, Part::Test, &scores, GaucRule::BothClasses, &[]).unwrap();
    let all = 0..=u32::MAX;
    assert_eq!(Some(report.liked), metrics_of(&data, &scores, 1, all.clone()));
    assert!(report.skipped.is_some());
    assert_eq!(report.skipped, metrics_of(&data, &scores, 0, all));
    let groups = data.groups(Part::Test);
    let targets: Vec<(f32, bool)> = groups
        .iter()
        .zip(scores.chunks(1 + groups.negatives_per_group))
        .map(|(group, scores)| (scores[0], data.user(group.user).feedback[group.event as usize] == 1))
        .collect();
    assert!((report.liked_above_skipped.unwrap() - naive_auc(&targets).unwrap()).abs() < 1e-12);
}

#[test]
fn every_liked_group_is_in_one_length_bucket() {
    let (data, scores) = scored_set();
    let quartiles = quartile_edges(&data, Part::Test);
    assert_eq!(quartiles.len(), 3, "{quartiles:?}");
    for edges in [quartiles.clone(), vec![0, 3, 4], vec![u32::MAX]] {
        let report = part_report(&data, Part::Test, &scores, GaucRule::BothClasses, &edges).unwrap();
        let groups: usize = report.by_length.iter().map(|bucket| bucket.metrics.groups).sum();
        assert_eq!(groups, report.liked.groups, "{edges:?}");
        for bucket in report.by_length {
            let to = bucket.to.unwrap_or(u32::MAX);
            assert!(bucket.from == 0 || edges.contains(&(bucket.from - 1)), "{edges:?}");
            assert!(bucket.to.is_none_or(|to| edges.contains(&to)), "{edges:?}");
            assert_eq!(Some(bucket.metrics), metrics_of(&data, &scores, 1, bucket.from..=to), "{edges:?}");
        }
    }
    let liked = metrics_of(&data, &scores, 1, 0..=u32::MAX).unwrap().groups;
    for (edge, quarter) in quartiles.into_iter().zip(1..) {
        let up_to = |last| metrics_of(&data, &scores, 1, 0..=last).map_or(0, |metrics| metrics.groups);
        let place = liked * quarter / 4;
        assert!(up_to(edge - 1) <= place && place < up_to(edge), "{edge}");
    }
}

proptest! {
    #[test]
    fn auc_matches_the_naive_auc(rows in prop::collection::vec(((-3i8..4).prop_map(f32::from), any::<bool>()), 0..60)) {
        let naive = naive_auc(&rows);
        let fast = auc(&mut rows.clone());
        prop_assert_eq!(naive.is_some(), fast.is_some());
        if let (Some(naive), Some(fast)) = (naive, fast) {
            prop_assert!((naive - fast).abs() < 1e-12);
        }
    }

    #[test]
    fn ranks_are_the_mean_over_all_orders(group in prop::collection::vec((0i8..4).prop_map(f32::from), 2..7)) {
        let metrics = ScoredGroups { user: &[0], scores: &group, candidates: group.len() }
            .metrics(GaucRule::BothClasses).unwrap();
        prop_assert!((metrics.mrr - over_orders(&group, |r| 1.0 / r as f64)).abs() < 1e-12);
        prop_assert!((metrics.ndcg - over_orders(&group, |r| 1.0 / ((r + 1) as f64).log2())).abs() < 1e-12);
    }

    #[test]
    fn gauc_is_the_weighted_mean_of_naive_aucs(
        users in prop::collection::vec(0u32..4, 1..12),
        seed in prop::collection::vec(-3i8..4, 36),
    ) {
        let scores: Vec<f32> = (0..users.len() * 3).map(|i| f32::from(seed[i % 36])).collect();
        let (mut sum, mut weight) = (0.0, 0.0);
        for user in 0..4 {
            let rows: Vec<(f32, bool)> = (0..scores.len())
                .filter(|i| users[i / 3] == user).map(|i| (scores[i], i % 3 == 0)).collect();
            if let Some(auc) = naive_auc(&rows) {
                sum += auc * rows.len() as f64;
                weight += rows.len() as f64;
            }
        }
        let metrics = ScoredGroups { user: &users, scores: &scores, candidates: 3 }
            .metrics(GaucRule::BothClasses).unwrap();
        prop_assert!((metrics.gauc.unwrap() - sum / weight).abs() < 1e-12);
    }
}
