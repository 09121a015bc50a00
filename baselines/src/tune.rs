//! Tuning: the same number of settings for every system, drawn at random from fixed ranges.
//!
//! Setting 0 is the given configuration. Setting `k` depends on the system and on `k` alone, so a
//! larger budget only adds settings. The choice looks at validation data only.

use crate::plan::Study;
use crate::results::{Options, Row};
use crate::system::Kind;
use dfar::train::Config;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// Seed of the search.
const SEED: u64 = 2020;

/// A value that is searched, uniformly in its logarithm.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Range {
    /// Its name: a key of [`Config`], or `aux`.
    pub name: &'static str,
    /// Smallest value.
    pub low: f64,
    /// Largest value.
    pub high: f64,
}

/// A value of a setting.
pub type Value = (&'static str, f64);

/// The ranges of a system: learning rate, L2 penalty, and the weights of its own losses. With
/// `half_life`, DFAR's half-life too; it is the last, so the other values stay the same.
pub fn ranges(system: Row, half_life: bool) -> Vec<Range> {
    let range = |name, low, high| Range { name, low, high };
    let mut ranges = vec![range("lr", 3e-4, 1e-2), range("embed_l2", 1e-8, 1e-4)];
    match system {
        Row::Baseline(Kind::Dien) => ranges.push(range("aux", 0.03, 3.0)),
        Row::Baseline(Kind::Feedrec) => ranges.push(range("idl", 1e-4, 1e-1)),
        Row::Baseline(_) => {}
        Row::Dfar => {
            ranges.extend([range("bpr", 0.01, 1.0), range("idl", 1e-5, 1e-2)]);
            ranges.extend(half_life.then(|| range("half_life", 0.5, 64.0)));
        }
    }
    ranges
}

/// The values of setting `number`; none for setting 0. `half_life` as in [`ranges`].
pub fn setting(system: Row, half_life: bool, number: usize) -> Vec<Value> {
    if number == 0 {
        return Vec::new();
    }
    let place = Row::all().iter().position(|row| *row == system).expect("all rows hold each row");
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    rng.set_stream((number as u64) << 8 | place as u64);
    let mut draw = |Range { name, low, high }: Range| {
        let share: f64 = rng.random();
        (name, three_digits(low * (high / low).powf(share)))
    };
    ranges(system, half_life).into_iter().map(&mut draw).collect()
}

/// To three significant digits, which a report can print.
fn three_digits(value: f64) -> f64 {
    format!("{value:.2e}").parse().expect("a printed number is a number")
}

/// Replaces the values of a setting.
pub fn apply(setting: &[Value], config: &mut Config, options: &mut Options) {
    for &(name, value) in setting {
        match name {
            "lr" => config.lr = value,
            "embed_l2" => config.embed_l2 = value,
            "idl" => config.idl = value,
            "bpr" => config.bpr = value,
            "half_life" => config.half_life = value,
            "aux" => options.aux = value,
            other => unreachable!("{other} is not searched"),
        }
    }
}

/// The setting with the best validation AUC, of settings `0..`; the first of equal ones. 0 without
/// validation data.
pub fn choose(valid_auc: &[Option<f64>]) -> usize {
    let mut best = 0;
    for (number, auc) in valid_auc.iter().enumerate() {
        if auc > &valid_auc[best] {
            best = number;
        }
    }
    best
}

/// The record of a search, as the table prints it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Search {
    /// The system.
    pub system: Row,
    /// Seed of the runs.
    pub run_seed: u64,
    /// What was searched.
    pub ranges: Vec<Range>,
    /// The settings, from 0 on.
    pub settings: Vec<Tried>,
    /// Number of the chosen one.
    pub chosen: usize,
}

/// A setting that was tried.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Tried {
    /// Its values.
    pub values: serde_json::Map<String, serde_json::Value>,
    /// Validation AUC of its best epoch.
    pub valid_auc: Option<f64>,
}

impl Search {
    /// The search of a study in one system, from the validation AUC of each setting.
    pub fn new(study: &Study, system: Row, valid_auc: &[Option<f64>]) -> Self {
        let (given, half_life) = (&study.config, study.tune_half_life);
        let ranges = ranges(system, half_life);
        let of_given = |range: &Range| match range.name {
            "lr" => given.lr,
            "embed_l2" => given.embed_l2,
            "idl" => given.idl,
            "bpr" => given.bpr,
            "half_life" => given.half_life,
            _ => study.options.aux,
        };
        let tried = |(number, &valid_auc): (usize, &Option<f64>)| {
            let values: Vec<Value> = match number {
                0 => ranges.iter().map(|range| (range.name, of_given(range))).collect(),
                _ => setting(system, half_life, number),
            };
            let values = values.into_iter().map(|(name, value)| (name.to_owned(), value.into())).collect();
            Tried { values, valid_auc }
        };
        let settings = valid_auc.iter().enumerate().map(tried).collect();
        Self { system, run_seed: study.seeds[0], ranges, settings, chosen: choose(valid_auc) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_lie_in_their_ranges_and_differ() {
        for system in Row::all() {
            let drawn: Vec<Vec<Value>> = (1..30).map(|number| setting(system, true, number)).collect();
            for values in &drawn {
                for (range, (name, value)) in ranges(system, true).iter().zip(values) {
                    assert!(
                        range.name == *name && (range.low..=range.high).contains(value),
                        "{name} {value}"
                    );
                }
            }
            assert!(drawn.windows(2).all(|pair| pair[0] != pair[1]), "{system:?}");
            // The whole range is used.
            let rates: Vec<f64> = drawn.iter().map(|values| values[0].1).collect();
            assert!(rates.iter().any(|&lr| lr < 1e-3) && rates.iter().any(|&lr| lr > 3e-3), "{rates:?}");
        }
        assert_ne!(setting(Row::Dfar, false, 1)[0], setting(Row::Baseline(Kind::Din), false, 1)[0]);
    }

    #[test]
    fn a_search_of_the_half_life_changes_no_other_value() {
        for system in Row::all() {
            let (without, mut with) = (setting(system, false, 3), setting(system, true, 3));
            if system == Row::Dfar {
                assert!(with.pop().is_some_and(|(name, _)| name == "half_life"));
            }
            assert_eq!(without, with);
        }
    }

    #[test]
    fn the_choice_is_the_first_of_the_best() {
        assert_eq!(choose(&[Some(0.5), Some(0.7), None, Some(0.7)]), 1);
        assert_eq!(choose(&[None, Some(0.1)]), 1);
        assert_eq!(choose(&[None, None]), 0);
    }
}
