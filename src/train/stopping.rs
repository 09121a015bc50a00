//! Early stopping on the validation AUC, for DFAR and for the systems compared with it.

use super::config::Config;

/// Whether no epoch follows, after `epochs` of them, the last `stale` without a better one.
pub fn ended(config: &Config, epochs: usize, stale: usize) -> bool {
    epochs >= config.epochs || (config.patience > 0 && stale >= config.patience)
}

/// Whether an epoch is the best so far, by its validation AUC and that of the best before. Without
/// validation there is no criterion, so the last epoch is kept.
pub fn is_better(auc: Option<f64>, best: Option<f64>) -> bool {
    match (auc, best) {
        (Some(auc), Some(best)) => auc > best,
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patience_0_never_stops_early() {
        let config = |patience| Config { epochs: 9, patience, ..Config::default() };
        assert!(!ended(&config(0), 8, 8) && ended(&config(0), 9, 0));
        assert!(!ended(&config(3), 8, 2) && ended(&config(3), 5, 3));
    }

    #[test]
    fn an_equal_epoch_is_not_better() {
        assert!(is_better(Some(0.6), Some(0.5)) && !is_better(Some(0.5), Some(0.5)));
        assert!(is_better(Some(0.1), None) && is_better(None, Some(0.9)));
    }
}
