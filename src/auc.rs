//! Area under the ROC curve, for the scores of a model and for those of the process that generated
//! a synthetic log.

/// Area under the ROC curve of `(score, is positive)` rows, ties counted half; `None` unless both
/// classes occur. Sorts `rows`. Scores must be finite.
pub fn auc(rows: &mut [(f32, bool)]) -> Option<f64> {
    rows.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
    // Twice the number of (positive, negative) pairs in the right order, so that half-counted ties
    // stay integers.
    let (mut twice, mut negatives_below) = (0u128, 0u128);
    for tie in rows.chunk_by(|a, b| a.0 == b.0) {
        let positives = tie.iter().filter(|r| r.1).count() as u128;
        let negatives = tie.len() as u128 - positives;
        twice += positives * (2 * negatives_below + negatives);
        negatives_below += negatives;
    }
    let pairs = negatives_below * (rows.len() as u128 - negatives_below);
    (pairs > 0).then(|| twice as f64 / (2 * pairs) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_count_half() {
        let auc = |rows: &[(f32, bool)]| auc(&mut rows.to_vec());
        assert_eq!(auc(&[(1.0, true), (0.0, false)]), Some(1.0));
        assert_eq!(auc(&[(0.0, true), (1.0, false)]), Some(0.0));
        assert_eq!(auc(&[(0.5, true), (0.5, false)]), Some(0.5));
        assert_eq!(auc(&[(2.0, true), (1.0, true), (1.0, false), (0.0, false)]), Some(3.5 / 4.0));
        assert_eq!(auc(&[(0.5, true)]), None);
    }
}
