//! Negatives for training groups.

use crate::data::Dataset;
use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

/// Source of training negatives. The negatives of a group are always distinct and differ from its
/// positive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum NegativeSource {
    /// Targets of other users in the batch; if there are too few, more items by popularity.
    #[default]
    InBatch,
    /// Items with probability proportional to their training events.
    Popularity,
    /// All items with equal probability.
    Uniform,
}

/// A sampler of negatives.
#[derive(Debug)]
pub struct NegativeSampler {
    source: NegativeSource,
    /// Prefix sums of the training events of the items.
    cumulative: Vec<u64>,
}

impl NegativeSampler {
    /// A sampler over the items of `data`.
    pub fn new(data: &Dataset, source: NegativeSource) -> Self {
        let mut sum = 0;
        let cumulative = data
            .train_popularity()
            .into_iter()
            .map(|count| {
                sum += u64::from(count);
                sum
            })
            .collect();
        Self { source, cumulative }
    }

    /// Up to `count` distinct items other than `positive` for a group of `user`; fewer only if
    /// there are no more items. `in_batch`: the (user, item) of all targets of the batch.
    pub fn draw(
        &self,
        rng: &mut impl Rng,
        in_batch: &[(u32, u32)],
        user: u32,
        positive: Option<u32>,
        count: usize,
    ) -> Vec<u32> {
        let items = self.cumulative.len();
        let count = count.min(items - usize::from(positive.is_some()));
        let mut drawn = Vec::with_capacity(count);
        // Rejection is cheap while most draws are new; the bound ends it once new items run out.
        let tries = 16 * count + 64;
        let attempt = |drawn: &mut Vec<u32>, item: &mut dyn FnMut() -> Option<u32>| {
            for _ in 0..tries {
                if drawn.len() == count {
                    return;
                }
                if let Some(item) = item()
                    && Some(item) != positive
                    && !drawn.contains(&item)
                {
                    drawn.push(item);
                }
            }
        };
        if self.source == NegativeSource::InBatch && !in_batch.is_empty() {
            attempt(&mut drawn, &mut || {
                let (other, item) = in_batch[rng.random_range(0..in_batch.len())];
                (other != user).then_some(item)
            });
        }
        if self.source != NegativeSource::Uniform
            && let Some(&events) = self.cumulative.last()
            && events > 0
        {
            attempt(&mut drawn, &mut || {
                let event = rng.random_range(0..events);
                Some(self.cumulative.partition_point(|&sum| sum <= event) as u32)
            });
        }
        attempt(&mut drawn, &mut || Some(rng.random_range(0..items as u32)));
        if drawn.len() < count {
            let rest = (0..items as u32).filter(|&item| Some(item) != positive);
            let rest: Vec<u32> = rest.filter(|item| !drawn.contains(item)).collect();
            drawn.extend_from_slice(&rest[..count - drawn.len()]);
        }
        drawn
    }
}
