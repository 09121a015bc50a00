//! Metrics of each user: what a paired test compares.

use dfar::data::{Dataset, Part};
use dfar::evaluate::metrics::{GaucRule, ScoredGroups};
use serde::Serialize;
use serde_json::Value;

/// Metrics over the liked groups of each user, one entry a user, by ascending user. Rounded to six
/// decimals.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct UserFigures {
    /// The users.
    pub user: Vec<u32>,
    /// Groups of each.
    pub groups: Vec<u32>,
    /// AUC over all rows of a user.
    pub auc: Vec<f64>,
    /// MRR.
    pub mrr: Vec<f64>,
    /// NDCG@10.
    pub ndcg: Vec<f64>,
}

impl UserFigures {
    /// From JSON.
    pub fn parse(json: &Value) -> Option<Self> {
        let list = |name| json.get(name)?.as_array();
        let whole = |name| -> Option<Vec<u32>> {
            list(name)?.iter().map(|value| u32::try_from(value.as_u64()?).ok()).collect()
        };
        let real = |name| -> Option<Vec<f64>> { list(name)?.iter().map(Value::as_f64).collect() };
        let found = Self {
            user: whole("user")?,
            groups: whole("groups")?,
            auc: real("auc")?,
            mrr: real("mrr")?,
            ndcg: real("ndcg")?,
        };
        let lengths = [found.groups.len(), found.auc.len(), found.mrr.len(), found.ndcg.len()];
        lengths.iter().all(|&length| length == found.user.len()).then_some(found)
    }
}

/// The metrics of each user from the scores `[G, 1 + negatives]` of a part; `None` without liked
/// groups or without negatives.
pub fn user_figures(data: &Dataset, part: Part, scores: &[f32]) -> Option<UserFigures> {
    let groups = data.groups(part);
    let candidates = 1 + groups.negatives_per_group;
    let mut found = UserFigures::default();
    let mut next = 0;
    for of_user in groups.user.chunk_by(|a, b| a == b) {
        let user = of_user[0];
        let feedback = data.user(user).feedback;
        let is_liked = |group: &usize| feedback[groups.event[*group] as usize] == 1;
        let kept: Vec<f32> = (next..next + of_user.len())
            .filter(is_liked)
            .flat_map(|group| &scores[group * candidates..(group + 1) * candidates])
            .copied()
            .collect();
        next += of_user.len();
        let users = vec![user; kept.len() / candidates];
        let groups = ScoredGroups { user: &users, scores: &kept, candidates };
        if let Some(metrics) = groups.metrics(GaucRule::BothClasses) {
            found.user.push(user);
            found.groups.push(metrics.groups as u32);
            found.auc.push(rounded(metrics.auc));
            found.mrr.push(rounded(metrics.mrr));
            found.ndcg.push(rounded(metrics.ndcg));
        }
    }
    (!found.user.is_empty()).then_some(found)
}

fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}
