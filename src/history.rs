//! What a model sees of a user's events: which of them, with which labels, and cut how.
//!
//! A question about event `t` ("would the user like this next?") is answered from the events before `t`. All
//! questions whose history fits the model share one pass over the user's first events; each later one needs a
//! window of its own, because positions count from the oldest kept event.

use crate::batch::{Group, History};
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// How much of the feedback the model is shown: the feedback-blind switches of one and the same model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Feedback {
    /// Every event with its label.
    #[default]
    Mixed,
    /// Only the liked events.
    PositiveOnly,
    /// Every event, all labelled as liked.
    Ignored,
}

/// One user's events as the model sees them.
#[derive(Clone, Debug)]
pub struct View<'a> {
    items: Cow<'a, [u32]>,
    labels: Cow<'a, [u8]>,
    /// `[events + 1]` seen events before each event, where that is not the event's own index.
    before: Option<Vec<u32>>,
}

/// A question: candidates for the place of the user's event `event`.
#[derive(Clone, Debug, PartialEq)]
pub struct Question {
    /// Index among the user's events; only earlier events are history.
    pub event: usize,
    /// Candidate items.
    pub candidates: Vec<u32>,
    /// Target of each candidate.
    pub targets: Vec<f32>,
}

impl<'a> View<'a> {
    /// Events oldest first; `feedback` is 1 where the user liked the item.
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

    /// Seen events before event `event`: the length of its history before it is cut to the model's.
    pub fn length(&self, event: usize) -> usize {
        match &self.before {
            None => event,
            Some(before) => before[event] as usize,
        }
    }

    /// The last `max_length` seen events.
    pub fn recent(&self, max_length: usize) -> (&[u32], &[u8]) {
        let start = self.items.len().saturating_sub(max_length);
        (&self.items[start..], &self.labels[start..])
    }

    /// Histories that answer `questions` (ascending by event) exactly: one for all that fit in `max_length`, one
    /// window for each of the others. Groups keep the order of the questions.
    pub fn histories(&self, questions: Vec<Question>, max_length: usize) -> Vec<History> {
        let mut histories: Vec<History> = Vec::new();
        let mut shared = History::default();
        let mut shared_length = 0;
        for question in questions {
            let length = self.length(question.event);
            let group = Group {
                length: length.min(max_length) as u32,
                candidates: question.candidates,
                targets: question.targets,
            };
            if length <= max_length {
                shared_length = length;
                shared.groups.push(group);
            } else {
                histories.push(History {
                    items: self.items[length - max_length..length].to_vec(),
                    labels: self.labels[length - max_length..length].to_vec(),
                    groups: vec![group],
                });
            }
        }
        if !shared.groups.is_empty() {
            shared.items = self.items[..shared_length].to_vec();
            shared.labels = self.labels[..shared_length].to_vec();
            histories.insert(0, shared);
        }
        histories
    }
}

/// The long way: one history for each (prefix, candidate), nothing shared. For tests and measurements.
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
    fn prefixes_share_a_pass_and_later_questions_get_windows() {
        let view = View::new(&ITEMS, &FEEDBACK, Feedback::Mixed);
        let histories = view.histories(vec![ask(1), ask(3), ask(4), ask(5)], 3);
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
    fn positive_only_counts_kept_events() {
        let view = View::new(&ITEMS, &FEEDBACK, Feedback::PositiveOnly);
        let histories = view.histories(vec![ask(3), ask(4), ask(5)], 2);
        assert_eq!(
            histories.iter().map(shape).collect::<Vec<_>>(),
            [(vec![10, 13], vec![1, 1], vec![1, 2]), (vec![13, 14], vec![1, 1], vec![2])]
        );
    }

    #[test]
    fn ignored_feedback_keeps_every_event() {
        let view = View::new(&ITEMS, &FEEDBACK, Feedback::Ignored);
        assert_eq!(shape(&view.histories(vec![ask(3)], 9)[0]), (vec![10, 11, 12], vec![1; 3], vec![3]));
    }

    #[test]
    fn the_long_way_has_one_row_a_history() {
        let view = View::new(&ITEMS, &FEEDBACK, Feedback::Mixed);
        let mut question = ask(4);
        question.candidates = vec![7, 8];
        question.targets = vec![1.0, 0.0];
        let long = without_sharing(&view.histories(vec![ask(1), question], 9));
        assert_eq!(long.len(), 3);
        assert_eq!(shape(&long[0]), (vec![10], vec![1], vec![1]));
        assert_eq!(shape(&long[2]), (vec![10, 11, 12, 13], vec![1, 0, 0, 1], vec![4]));
        assert_eq!((long[2].groups[0].candidates[0], long[2].groups[0].targets[0]), (8, 0.0));
    }
}
