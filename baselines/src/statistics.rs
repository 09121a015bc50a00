//! Means over seeds, and the test between two systems.
//!
//! The test is the two-sided Wilcoxon signed-rank test over users: it asks whether the differences
//! of a user's AUC lie symmetrically around 0. Users without a difference are left out, equal
//! differences share their mean rank, and the p-value is that of the normal approximation, whose
//! variance is corrected for ties. Several tests of one table are corrected by Holm's method.

use serde::Serialize;

/// Fewest users with a difference for which there is a p-value: below, the normal approximation is
/// wrong.
pub const FEWEST: usize = 10;

/// Mean and deviation of some values.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// Mean.
    pub mean: f64,
    /// Sample standard deviation; none for one value.
    pub deviation: Option<f64>,
}

/// Mean and deviation; `None` without values, or where one is missing.
pub fn cell(values: impl Iterator<Item = Option<f64>>) -> Option<Cell> {
    let values: Vec<f64> = values.collect::<Option<_>>()?;
    if values.is_empty() {
        return None;
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
    Some(Cell { mean, deviation })
}

/// A signed-rank test.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SignedRank {
    /// Differences other than 0.
    pub n: usize,
    /// Sum of the ranks of the positive ones.
    pub positive: f64,
    /// Two-sided p-value; none for fewer than [`FEWEST`] differences.
    pub p: Option<f64>,
}

/// The Wilcoxon signed-rank test. Differences are compared to nine decimals, so that rounding makes
/// no difference of two equal values.
pub fn signed_rank(differences: &[f64]) -> SignedRank {
    let rounded = differences.iter().map(|d| (d * 1e9).round());
    let mut signed: Vec<f64> = rounded.filter(|d| *d != 0.0).collect();
    signed.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
    let n = signed.len();
    let (mut positive, mut ties, mut before) = (0.0, 0.0, 0);
    for equal in signed.chunk_by(|a, b| a.abs() == b.abs()) {
        let count = equal.len();
        let rank = before as f64 + (count + 1) as f64 / 2.0;
        positive += rank * equal.iter().filter(|d| **d > 0.0).count() as f64;
        ties += (count as f64).powi(3) - count as f64;
        before += count;
    }
    let m = n as f64;
    let mean = m * (m + 1.0) / 4.0;
    let variance = m * (m + 1.0) * (2.0 * m + 1.0) / 24.0 - ties / 48.0;
    let p = || libm::erfc((positive - mean).abs() / (2.0 * variance).sqrt());
    SignedRank { n, positive, p: (n >= FEWEST).then(p) }
}

/// Holm's correction: the p-values, in their order, such that rejecting those below a level keeps
/// the probability of any wrong rejection below it.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[a].total_cmp(&p[b]));
    let mut corrected = vec![0.0; p.len()];
    let mut largest: f64 = 0.0;
    for (place, &index) in order.iter().enumerate() {
        largest = largest.max((p[index] * (p.len() - place) as f64).min(1.0));
        corrected[index] = largest;
    }
    corrected
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn assert_near(found: f64, expected: f64) {
        assert!((found - expected).abs() <= 1e-12 * expected.abs(), "{found}, not {expected}");
    }

    /// Expected values of `scipy.stats.wilcoxon(d, zero_method="wilcox", correction=False,
    /// method="asymptotic")`, scipy 1.16.
    #[test]
    fn signed_ranks_are_those_of_scipy() {
        let eighths = [
            6, -5, -4, -3, -4, 6, 7, 3, -6, -5, -1, 0, 3, 1, -2, -4, 5, 5, -6, -5, 1, 0, 8, 2, 0, 0, 4, 3,
            -4, 5, 6, 9, 6, -2, -1, 4, 4, 5, 7, -2,
        ];
        let found = signed_rank(&eighths.map(|d| f64::from(d) / 8.0));
        assert_eq!((found.n, found.positive), (36, 439.0));
        assert_near(found.p.expect("a p-value"), 0.09493664458884163);

        let d = [0.013, -0.021, 0.034, 0.055, -0.007, 0.089, 0.012, 0.144, -0.031, 0.064, 0.077, 0.041];
        let found = signed_rank(&d);
        assert_eq!((found.n, found.positive), (12, 68.0));
        assert_near(found.p.expect("a p-value"), 0.022909099354356588);

        let hundredths: Vec<f64> = (1..=100).map(|d| f64::from(d) / 100.0).collect();
        assert_near(signed_rank(&hundredths).p.expect("a p-value"), 3.896559845095909e-18);
    }

    #[test]
    fn the_test_is_symmetric_and_ignores_rounding() {
        let d: Vec<f64> = (1..30).map(|i| f64::from(i * i % 17) - 6.0).collect();
        let negative: Vec<f64> = d.iter().map(|d| -d).collect();
        assert_eq!(signed_rank(&d).p, signed_rank(&negative).p);
        let nearly: Vec<f64> = d.iter().enumerate().map(|(i, d)| d + 1e-13 * i as f64).collect();
        assert_eq!(signed_rank(&d), signed_rank(&nearly));
        assert_eq!(signed_rank(&d[..9]).p, None);
        assert_eq!(signed_rank(&[0.0, 1e-12]), SignedRank { n: 0, positive: 0.0, p: None });
    }

    #[test]
    fn holm_is_monotone_in_p_and_bounded() {
        let expected = [0.04, 0.09, 0.09, 0.025, 0.5];
        for (found, expected) in holm(&[0.01, 0.04, 0.03, 0.005, 0.5]).into_iter().zip(expected) {
            assert_near(found, expected);
        }
        assert_eq!(holm(&[0.9, 0.6]), [1.0, 1.0]);
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn one_value_has_no_deviation_and_a_missing_one_no_cell() {
        assert_eq!(cell([Some(0.5)].into_iter()), Some(Cell { mean: 0.5, deviation: None }));
        assert_eq!(cell([Some(0.5), None].into_iter()), None);
        assert_eq!(cell(std::iter::empty()), None);
    }
}
