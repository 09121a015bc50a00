//! Ranking metrics over candidate groups. Definitions: `docs/training.md`.
//!
//! Ties never favour the positive: a tie counts half in AUC, and MRR and NDCG are expectations over
//! a uniformly random order of tied candidates. A model that gives all candidates the same score
//! gets the metrics of random guessing.

pub use crate::auc::auc;
use serde::{Deserialize, Serialize};

/// Ranks counted by NDCG.
pub const NDCG_CUTOFF: usize = 10;

/// Users with fewer rows than this count as AUC 1 under [`GaucRule::Dfar`].
const DFAR_MIN_ROWS: usize = 10;

/// The users that count in GAUC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
pub enum GaucRule {
    /// Users with both classes; the number of the others is reported.
    #[default]
    #[serde(rename = "none")]
    #[value(name = "none")]
    BothClasses,
    /// As in the published DFAR code: a user with fewer than 10 rows counts with AUC 1. This
    /// inflates GAUC; for comparison only.
    #[serde(rename = "dfar")]
    Dfar,
}

/// Metrics of a set of groups.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Area under the ROC curve over all rows, ties counted half.
    pub auc: f64,
    /// Mean over groups of the expected reciprocal rank of the positive.
    pub mrr: f64,
    /// Mean over groups of the expected NDCG@10 of the positive.
    pub ndcg: f64,
    /// AUC of each user, weighted by the number of rows; `None` if no user has both classes.
    pub gauc: Option<f64>,
    /// Number of groups.
    pub groups: usize,
    /// Number of rows: groups times candidates.
    pub rows: usize,
    /// Users that count in GAUC.
    pub gauc_users: usize,
    /// Users left out of GAUC because all their rows have one class.
    pub gauc_users_left_out: usize,
}

/// Scored groups of equal size: the first candidate of each group is its positive.
#[derive(Clone, Copy, Debug)]
pub struct ScoredGroups<'a> {
    /// `[G]` user of each group.
    pub user: &'a [u32],
    /// `[G * candidates]` scores, all finite.
    pub scores: &'a [f32],
    /// Candidates per group, including the positive.
    pub candidates: usize,
}

impl ScoredGroups<'_> {
    /// All metrics; `None` if there is no group or no negative.
    ///
    /// # Panics
    /// If `scores` is not `[user.len() * candidates]`.
    pub fn metrics(&self, rule: GaucRule) -> Option<Metrics> {
        let (groups, candidates) = (self.user.len(), self.candidates);
        assert_eq!(self.scores.len(), groups * candidates, "one score per candidate");
        if groups == 0 || candidates < 2 {
            return None;
        }
        let (mut mrr, mut ndcg) = (0.0, 0.0);
        for group in self.scores.chunks_exact(candidates) {
            let (above, ties) = standing(group);
            mrr += expected_reciprocal_rank(above, ties);
            ndcg += expected_ndcg(above, ties);
        }
        let labelled = |i: usize| (self.scores[i], i.is_multiple_of(candidates));
        let all = auc(&mut (0..self.scores.len()).map(labelled).collect::<Vec<_>>())?;

        let mut by_user: Vec<u32> = (0..groups as u32).collect();
        by_user.sort_by_key(|&g| self.user[g as usize]);
        let (mut sum, mut weight, mut users, mut left_out) = (0.0, 0.0, 0, 0);
        let mut rows = Vec::new();
        for of_user in by_user.chunk_by(|&a, &b| self.user[a as usize] == self.user[b as usize]) {
            rows.clear();
            for &g in of_user {
                rows.extend((g as usize * candidates..(g as usize + 1) * candidates).map(labelled));
            }
            let of_user = match rule {
                GaucRule::Dfar if rows.len() < DFAR_MIN_ROWS => Some(1.0),
                _ => auc(&mut rows),
            };
            match of_user {
                Some(auc) => {
                    sum += auc * rows.len() as f64;
                    weight += rows.len() as f64;
                    users += 1;
                }
                None => left_out += 1,
            }
        }
        Some(Metrics {
            auc: all,
            mrr: mrr / groups as f64,
            ndcg: ndcg / groups as f64,
            gauc: (users > 0).then(|| sum / weight),
            groups,
            rows: self.scores.len(),
            gauc_users: users,
            gauc_users_left_out: left_out,
        })
    }
}

/// The number of scores of `group[1..]` above `group[0]`, and the number equal to it.
fn standing(group: &[f32]) -> (usize, usize) {
    let positive = group[0];
    let above = group[1..].iter().filter(|&&s| s > positive).count();
    let ties = group[1..].iter().filter(|&&s| s == positive).count();
    (above, ties)
}

/// Mean of `1 / rank` over the ranks `above + 1 ..= above + ties + 1`, all equally likely.
pub fn expected_reciprocal_rank(above: usize, ties: usize) -> f64 {
    (above + 1..=above + ties + 1).map(|rank| 1.0 / rank as f64).sum::<f64>() / (ties + 1) as f64
}

/// Mean of `1 / log2(rank + 1)` (0 beyond [`NDCG_CUTOFF`]) over the same ranks.
pub fn expected_ndcg(above: usize, ties: usize) -> f64 {
    let gain = |rank: usize| 1.0 / ((rank + 1) as f64).log2();
    (above + 1..=(above + ties + 1).min(NDCG_CUTOFF)).map(gain).sum::<f64>() / (ties + 1) as f64
}
