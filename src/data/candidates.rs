//! The negatives of the evaluation groups: drawn once, stored with the data, the same for every
//! model.

use super::log::ItemSet;
use rand::{Rng, RngExt};

/// Options of the evaluation groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CandidateOptions {
    /// Negatives per group.
    pub negatives: usize,
    /// Exclude all items of the user's whole history. Off in the published protocol.
    pub exclude_seen: bool,
    /// Seed of the draw.
    pub seed: u64,
}

impl Default for CandidateOptions {
    fn default() -> Self {
        CandidateOptions { negatives: 9, exclude_seen: false, seed: 1 }
    }
}

/// Draws items by popularity, without repeats.
#[derive(Debug)]
pub(super) struct Sampler {
    counts: Vec<u32>,
    table: AliasTable,
    /// Items with a weight.
    drawable: usize,
    excluded: ItemSet,
    /// Excluded items that have a weight.
    excluded_drawable: usize,
    taken: ItemSet,
}

impl Sampler {
    /// A sampler with these weights; `None` if all are zero.
    pub(super) fn new(counts: Vec<u32>) -> Option<Sampler> {
        let drawable = counts.iter().filter(|&&count| count > 0).count();
        (drawable > 0).then(|| Sampler {
            table: AliasTable::new(&counts),
            drawable,
            excluded: ItemSet::new(counts.len()),
            excluded_drawable: 0,
            taken: ItemSet::new(counts.len()),
            counts,
        })
    }

    /// The weights.
    pub(super) fn counts(&self) -> &[u32] {
        &self.counts
    }

    /// Replaces the excluded items.
    pub(super) fn exclude(&mut self, items: impl Iterator<Item = u32>) {
        self.excluded.clear();
        self.excluded_drawable = 0;
        for item in items {
            if self.excluded.insert(item) && self.counts[item as usize] > 0 {
                self.excluded_drawable += 1;
            }
        }
    }

    /// Appends `wanted` distinct items to `out`, none of them excluded or the target. If fewer can
    /// be drawn, returns their number as an error.
    ///
    /// Items are drawn one after the other by weight among those still allowed. Rejection does this
    /// in constant time per draw. After many rejections in a row (few items left, or nearly all the
    /// weight taken), a scan over all items draws from the same distribution.
    pub(super) fn draw(
        &mut self,
        wanted: usize,
        target: u32,
        rng: &mut impl Rng,
        out: &mut Vec<u32>,
    ) -> Result<(), usize> {
        const PATIENCE: usize = 200;
        self.taken.clear();
        self.taken.insert(target);
        let target_counts = self.counts[target as usize] > 0 && !self.excluded.contains(target);
        let available = self.drawable - self.excluded_drawable - usize::from(target_counts);
        if available < wanted {
            return Err(available);
        }
        for _ in 0..wanted {
            let drawn = (0..PATIENCE).map(|_| self.table.draw(rng)).find(|&item| self.allows(item));
            let item = drawn.unwrap_or_else(|| self.draw_by_scan(rng));
            self.taken.insert(item);
            out.push(item);
        }
        Ok(())
    }

    fn allows(&self, item: u32) -> bool {
        !self.taken.contains(item) && !self.excluded.contains(item)
    }

    fn draw_by_scan(&self, rng: &mut impl Rng) -> u32 {
        let allowed = || {
            let weights = self.counts.iter().enumerate();
            weights.filter(|&(item, &weight)| weight > 0 && self.allows(item as u32))
        };
        let total: u64 = allowed().map(|(_, &weight)| u64::from(weight)).sum();
        let mut left = rng.random_range(0..total);
        for (item, &weight) in allowed() {
            match left.checked_sub(u64::from(weight)) {
                Some(rest) => left = rest,
                None => return item as u32,
            }
        }
        unreachable!("the draw is below the sum of the weights")
    }
}

/// Walker's alias method in Vose's form, in exact integers: draws by weight in constant time.
///
/// Every item has a column of height `total`. Its own weight (times the number of items) fills the
/// lower part; one other item fills the rest.
#[derive(Debug)]
struct AliasTable {
    total: u64,
    /// Height up to which a column belongs to its own item.
    own: Vec<u64>,
    other: Vec<u32>,
}

impl AliasTable {
    fn new(weights: &[u32]) -> AliasTable {
        let total: u64 = weights.iter().map(|&weight| u64::from(weight)).sum();
        // Both factors are below 2^32.
        let mut own: Vec<u64> =
            weights.iter().map(|&weight| u64::from(weight) * weights.len() as u64).collect();
        let mut other: Vec<u32> = (0..weights.len() as u32).collect();
        let (mut low, mut high): (Vec<u32>, Vec<u32>) =
            other.iter().partition(|&&item| own[item as usize] < total);
        while let (Some(&poor), Some(&rich)) = (low.last(), high.last()) {
            low.pop();
            other[poor as usize] = rich;
            own[rich as usize] -= total - own[poor as usize];
            if own[rich as usize] < total {
                high.pop();
                low.push(rich);
            }
        }
        AliasTable { total, own, other }
    }

    fn draw(&self, rng: &mut impl Rng) -> u32 {
        let column = rng.random_range(0..self.own.len() as u32);
        let height = rng.random_range(0..self.total);
        if height < self.own[column as usize] { column } else { self.other[column as usize] }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    /// The exact probability of each item under the table, times n * total.
    fn masses(weights: &[u32]) -> Vec<u64> {
        let table = AliasTable::new(weights);
        let mut mass = vec![0; weights.len()];
        for column in 0..weights.len() {
            let own = table.own[column].min(table.total);
            mass[column] += own;
            mass[table.other[column] as usize] += table.total - own;
        }
        mass
    }

    #[test]
    fn alias_table_is_exact() {
        for weights in
            [vec![1], vec![5, 0, 1], vec![1, 1, 1, 1], vec![0, 7, 1000, 3, 0, 2], vec![u32::MAX, 1]]
        {
            let expected: Vec<u64> = weights.iter().map(|&w| u64::from(w) * weights.len() as u64).collect();
            assert_eq!(masses(&weights), expected, "{weights:?}");
        }
    }

    #[test]
    fn draws_all_that_are_left_however_unlikely() {
        // One item has nearly all the weight, so the scan draws the last items.
        let mut counts = vec![1; 12];
        counts[3] = u32::MAX;
        counts[7] = 0;
        let mut sampler = Sampler::new(counts).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut out = Vec::new();
        sampler.draw(10, 0, &mut rng, &mut out).unwrap();
        out.sort_unstable();
        assert_eq!(out, [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]);
        assert_eq!(sampler.draw(11, 0, &mut rng, &mut out), Err(10));
        // A duplicate, an item without weight, and the target: each must be counted once.
        sampler.exclude([3, 3, 7, 0].into_iter());
        assert_eq!(sampler.draw(10, 0, &mut rng, &mut out), Err(9));
        assert_eq!(sampler.draw(9, 1, &mut rng, &mut out), Err(8));
        out.clear();
        sampler.draw(8, 1, &mut rng, &mut out).unwrap();
        out.sort_unstable();
        assert_eq!(out, [2, 4, 5, 6, 8, 9, 10, 11]);
    }

    #[test]
    fn draws_follow_popularity() {
        let counts = vec![10, 20, 30, 40, 0];
        let mut sampler = Sampler::new(counts.clone()).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut seen = [0.0; 5];
        let draws = 100_000;
        for _ in 0..draws {
            let mut out = Vec::new();
            sampler.draw(1, 4, &mut rng, &mut out).unwrap();
            seen[out[0] as usize] += 1.0;
        }
        for (item, count) in counts.into_iter().enumerate() {
            let expected = f64::from(count) / 100.0;
            let deviation = (expected * (1.0 - expected) / f64::from(draws)).sqrt();
            let found = seen[item] / f64::from(draws);
            assert!((found - expected).abs() <= 5.0 * deviation, "item {item}: {found} against {expected}");
        }
    }
}
