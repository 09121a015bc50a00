//! The statistics that `dfar-data info` prints.

use super::{Dataset, Part, Protocol};
use crate::auc::auc;
use serde::Serialize;

/// Statistics of a data set, among them the paper's Table 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Statistics {
    /// Users.
    pub users: usize,
    /// Items.
    pub items: usize,
    /// Liked events.
    pub positive: u64,
    /// Skipped events.
    pub negative: u64,
    /// Mean number of events per user.
    pub mean_records_per_user: f64,
    /// Quantiles of the number of events of a user.
    pub history_length: Vec<Quantile>,
    /// Events by their position in the history of their user.
    pub by_position: Vec<PositionSize>,
    /// Neighbouring events of a user by their feedback, `[before][after]`; 0 is a skipped event, 1
    /// a liked one.
    pub transitions: [[u64; 2]; 2],
    /// Training events.
    pub train: PartSize,
    /// Validation events, each with an evaluation group.
    pub valid: PartSize,
    /// Test events, each with an evaluation group.
    pub test: PartSize,
    /// Liked test groups with an empty history.
    pub test_without_history: u64,
    /// First and last time, in milliseconds since 1970.
    pub times: [i64; 2],
    /// AUC of the generating process's scores over the liked test groups, which no model can be
    /// expected to exceed. Synthetic sets only.
    pub ceiling_auc: Option<f64>,
    /// How the data set was made.
    pub protocol: Protocol,
}

/// A quantile.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quantile {
    /// Share of the users with at most this many events, 0 to 1.
    pub share: f64,
    /// Number of events.
    pub events: usize,
}

/// Events at positions `from..=to` of the histories.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PositionSize {
    /// First position, from 1.
    pub from: usize,
    /// Last position.
    pub to: usize,
    /// The events.
    #[serde(flatten)]
    pub size: PartSize,
}

/// Number of events of a part by feedback.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct PartSize {
    /// Liked events.
    pub liked: u64,
    /// Skipped events.
    pub skipped: u64,
}

impl PartSize {
    fn add(&mut self, feedback: &[u8]) {
        let liked = feedback.iter().filter(|&&y| y == 1).count() as u64;
        self.liked += liked;
        self.skipped += feedback.len() as u64 - liked;
    }
}

/// Adds the events of a history, in ranges of positions that double in length: 1, 2-3, 4-7, ..
fn add_positions(by_position: &mut Vec<PositionSize>, feedback: &[u8]) {
    let (mut from, mut place) = (1, 0);
    while from <= feedback.len() {
        let to = 2 * from - 1;
        if by_position.len() == place {
            by_position.push(PositionSize { from, to, size: PartSize::default() });
        }
        by_position[place].size.add(&feedback[from - 1..to.min(feedback.len())]);
        (from, place) = (to + 1, place + 1);
    }
}

/// Computes the statistics in one pass over a data set.
pub fn statistics(data: &Dataset) -> Statistics {
    let [mut train, mut valid, mut test] = [PartSize::default(); 3];
    let mut lengths = Vec::with_capacity(data.users());
    let mut times = [i64::MAX, i64::MIN];
    let (mut by_position, mut transitions) = (Vec::new(), [[0; 2]; 2]);
    for user in 0..data.users() as u32 {
        let events = data.user(user);
        train.add(&events.feedback[..events.train_end]);
        valid.add(&events.feedback[events.train_end..events.valid_end]);
        test.add(&events.feedback[events.valid_end..]);
        lengths.push(events.items.len());
        add_positions(&mut by_position, events.feedback);
        for pair in events.feedback.windows(2) {
            transitions[usize::from(pair[0])][usize::from(pair[1])] += 1;
        }
        if let (Some(&first), Some(&last)) = (events.times.first(), events.times.last()) {
            times = [times[0].min(first), times[1].max(last)];
        }
    }
    lengths.sort_unstable();
    let quantile = |share: f64| Quantile {
        share,
        events: *lengths
            .get(((share * lengths.len() as f64).ceil() as usize).saturating_sub(usize::from(share > 0.0)))
            .unwrap_or(&0),
    };
    let groups = data.groups(Part::Test);
    let liked = |group: &super::Group| data.user(group.user).feedback[group.event as usize] == 1;
    let test_without_history = groups.iter().filter(|group| group.event == 0 && liked(group)).count() as u64;
    Statistics {
        users: data.users(),
        items: data.items(),
        positive: train.liked + valid.liked + test.liked,
        negative: train.skipped + valid.skipped + test.skipped,
        mean_records_per_user: data.events() as f64 / data.users().max(1) as f64,
        history_length: [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1.0].map(quantile).to_vec(),
        by_position,
        transitions,
        train,
        valid,
        test,
        test_without_history,
        times,
        ceiling_auc: ceiling_auc(data, Part::Test),
        protocol: data.protocol().clone(),
    }
}

/// AUC of the generating process's scores over the liked groups of a part, ties counted half;
/// `None` without scores or without liked groups.
pub fn ceiling_auc(data: &Dataset, part: Part) -> Option<f64> {
    let groups = data.groups(part);
    groups.ceiling?;
    let mut rows = Vec::new();
    for group in groups.iter() {
        if data.user(group.user).feedback[group.event as usize] == 1 {
            let scores = group.ceiling.into_iter().flatten();
            rows.extend(scores.enumerate().map(|(place, &score)| (score, place == 0)));
        }
    }
    auc(&mut rows)
}
