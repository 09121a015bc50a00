//! Histories: the events that the model reads, their labels, and the cut of long histories.
//!
//! A question about event `t` ("would the user like this item next?") is answered from the events
//! before `t`. All questions with a history of at most `max_length` events share one encoder pass.
//! Later questions need windows, because positions count from the oldest kept event. [`Cut`] sets
//! the starts of windows.

use super::{Group, History};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// The cut of histories longer than the model allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Longest history of the model.
    pub max_length: usize,
    /// Windows start at multiples of `stride`, and the questions between two starts share a window.
    /// A cut history keeps more than `max_length - stride` of the latest events. A stride of 1
    /// keeps exactly `max_length`, with one window per question.
    pub stride: usize,
}

impl Cut {
    /// Keeps exactly the last `max_length` events.
    pub fn exact(max_length: usize) -> Self {
        Self { max_length, stride: 1 }
    }

    /// Index of the first kept event of a history of `length` events.
    pub fn start(self, length: usize) -> usize {
        length.saturating_sub(self.max_length).next_multiple_of(self.stride)
    }
}

/// The feedback in the histories. The variants without it are feedback-blind baselines of the same
/// model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Feedback {
    /// All events with their labels.
    #[default]
    Mixed,
    /// Only the liked events.
    PositiveOnly,
    /// All events, labelled as liked.
    Ignored,
}

/// The events of one user as model input.
#[derive(Clone, Debug)]
pub struct View<'a> {
    items: Cow<'a, [u32]>,
    labels: Cow<'a, [u8]>,
    /// `[events + 1]` number of kept events before each event; `None` if all events are kept.
    before: Option<Vec<u32>>,
}

/// Candidates for event `event` of a user.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Index of the event. Only earlier events form the history.
    pub event: usize,
    /// Candidate items.
    pub candidates: Vec<u32>,
    /// Target of each candidate.
    pub targets: Vec<f32>,
}

impl<'a> View<'a> {
    /// From events, oldest first. `feedback` is 1 for a liked item, else 0.
    pub fn new(items: &'a [u32], feedback: &'a [u8], mode: Feedback) -> Self {
        match mode {
            Feedback::Mixed => Self { items: items.into(), labels: feedback.into(), before: None },
            Feedback::Ignored => {
                Self { items: items.into(), labels: vec![1; feedback.len()].into(), before: None }
            }
            Feedback::PositiveOnly => {
                let liked: Vec<u32> =
                    items.iter().zip(feedback).filter(|&(_, &f)| f == 1).map(|(&i, _)| i).collect();
                let mut before = Vec::with_capacity(items.len() + 1);
                let mut count = 0;
                before.push(0);
                for &f in feedback {
                    count += u32::from(f == 1);
                    before.push(count);
                }
                Self { labels: vec![1; liked.len()].into(), items: liked.into(), before: Some(before) }
            }
        }
    }

    /// Length of the history of event `event` before the cut.
    pub fn length(&self, event: usize) -> usize {
        match &self.before {
            None => event,
            Some(before) => before[event] as usize,
        }
    }

    /// The last `max_length` kept events.
    pub fn recent(&self, max_length: usize) -> (&[u32], &[u8]) {
        let start = self.items.len().saturating_sub(max_length);
        (&self.items[start..], &self.labels[start..])
    }

    /// The histories of `questions`, which ascend by event. Questions whose windows start at the
    /// same event share a history. Groups keep the order of the questions.
    pub fn histories(&self, questions: Vec<Question>, cut: Cut) -> Vec<History> {
        let mut histories: Vec<History> = Vec::new();
        let mut last_start = None;
        for Question { event, candidates, targets } in questions {
            let end = self.length(event);
            let start = cut.start(end);
            if last_start.replace(start) != Some(start) {
                histories.push(History::default());
            }
            let history = histories.last_mut().expect("the first question began one");
            let seen = start + history.items.len();
            history.items.extend_from_slice(&self.items[seen..end]);
            history.labels.extend_from_slice(&self.labels[seen..end]);
            history.groups.push(Group { length: (end - start) as u32, candidates, targets });
        }
        histories
    }
}

/// One history per (prefix, candidate): the unshared baseline of tests and measurements.
pub fn without_sharing(histories: &[History]) -> Vec<History> {
    let mut out = Vec::new();
    for history in histories {
        for group in &history.groups {
            let length = group.length as usize;
            for (&candidate, &target) in group.candidates.iter().zip(&group.targets) {
                out.push(History {
                    items: history.items[..length].to_vec(),
                    labels: history.labels[..length].to_vec(),
                    groups: vec![Group {
                        length: group.length,
                        candidates: vec![candidate],
                        targets: vec![target],
                    }],
                });
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const ITEMS: [u32; 6] = [10, 11, 12, 13, 14, 15];
    const FEEDBACK: [u8; 6] = [1, 0, 0, 1, 1, 0];

    fn ask(event: usize) -> Question {
        Question { event, candidates: vec![event as u32], targets: vec![1.0] }
    }

    fn shape(history: &History) -> (Vec<u32>, Vec<u8>, Vec<u32>) {
        (history.items.clone(), history.labels.clone(), history.groups.iter().map(|g| g.length).collect())
    }

    #[test]
    fn short_prefixes_share_a_history_and_long_ones_get_windows() {
        let view = View::new(&ITEMS, &FEEDBACK, Feedback::Mixed);
        let histories = view.histories(vec![ask(1), ask(3), ask(4), ask(5)], Cut::exact(3));
        assert_eq!(
            histories.iter().map(shape).collect::<Vec<_>>(),
            [
                (vec![10, 11, 12], vec![1, 0, 0], vec![1, 3]),
                (vec![11, 12, 13], vec![0, 0, 1], vec![3]),
                (vec![12, 13, 14], vec![0, 1, 1], vec![3]),
            ]
        );
    }

    #[test]
    fn questions_share_the_window_of_a_stride() {
        let view = View::new(&ITEMS, &FEEDBACK, Feedback::Mixed);
        let histories = view.histories((1..6).map(ask).collect(), Cut { max_length: 3, stride: 2 });
        assert_eq!(
            histories.iter().map(shape).collect::<Vec<_>>(),
            [(vec![10, 11, 12], vec![1, 0, 0], vec![1, 2, 3]), (vec![12, 13, 14], vec![0, 1, 1], vec![2, 3]),]
        );
    }

    #[test]
    fn a_cut_keeps_more_than_max_length_minus_stride_events() {
        for (max_length, stride) in [(1, 1), (5, 1), (5, 2), (5, 5), (20, 7)] {
            let cut = Cut { max_length, stride };
            for length in 0..=max_length {
                assert_eq!(cut.start(length), 0);
            }
            for length in max_length + 1..100 {
                let kept = length - cut.start(length);
                assert!(kept <= max_length && kept > max_length - stride, "{cut:?}, {length}: {kept}");
            }
        }
    }

    #[test]
    fn positive_only_counts_kept_events() {
        let view = View::new(&ITEMS, &FEEDBACK, Feedback::PositiveOnly);
        let histories = view.histories(vec![ask(3), ask(4), ask(5)], Cut::exact(2));
        assert_eq!(
            histories.iter().map(shape).collect::<Vec<_>>(),
            [(vec![10, 13], vec![1, 1], vec![1, 2]), (vec![13, 14], vec![1, 1], vec![2])]
        );
    }

    #[test]
    fn ignored_feedback_keeps_every_event() {
        let view = View::new(&ITEMS, &FEEDBACK, Feedback::Ignored);
        assert_eq!(
            shape(&view.histories(vec![ask(3)], Cut::exact(9))[0]),
            (vec![10, 11, 12], vec![1; 3], vec![3])
        );
    }

    #[test]
    fn unshared_histories_have_one_row_each() {
        let view = View::new(&ITEMS, &FEEDBACK, Feedback::Mixed);
        let mut question = ask(4);
        question.candidates = vec![7, 8];
        question.targets = vec![1.0, 0.0];
        let long = without_sharing(&view.histories(vec![ask(1), question], Cut::exact(9)));
        assert_eq!(long.len(), 3);
        assert_eq!(shape(&long[0]), (vec![10], vec![1], vec![1]));
        assert_eq!(shape(&long[2]), (vec![10, 11, 12, 13], vec![1, 0, 0, 1], vec![4]));
        assert_eq!((long[2].groups[0].candidates[0], long[2].groups[0].targets[0]), (8, 0.0));
    }
}
