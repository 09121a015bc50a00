//! The tables of a comparison from the results in its directory: Table 2, Table 3, the blind rows,
//! AUC by history length, learning curves. [`crate::markdown`] and [`crate::page`] print them.

use crate::results::{Figures, Row, RunResult};
use crate::statistics::{Cell, cell, holm, signed_rank};
use crate::tune::Search;
use dfar::attention::head_pairs::HeadPairs;
use dfar::evaluate::PartReport;
use serde::Serialize;
use std::collections::BTreeMap;

/// Titles of the metrics.
pub const METRICS: [&str; 4] = ["AUC", "MRR", "NDCG@10", "GAUC"];

/// The table that a line belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Section {
    /// Table 2.
    Systems,
    /// Table 3: DFAR without one of its parts.
    Ablations,
    /// Systems that read all events as if they were liked.
    Blind,
}

/// A system in a setting.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// Its table.
    pub section: Section,
    /// The system.
    pub system: Row,
    /// Its name in the table.
    pub title: String,
    /// See [`crate::results::Identity::setting`].
    pub setting: String,
    /// Its seeds, ascending.
    pub seeds: Vec<u64>,
    /// In the order of [`METRICS`]; none where a run has no such metric.
    pub cells: [Option<Cell>; 4],
    /// AUC by history length.
    pub by_length: Vec<LengthCell>,
    /// Against the reference: DFAR, and for a blind line the same system with feedback.
    pub against: Option<Comparison>,
    /// Mean seconds of a run.
    pub seconds: f64,
    /// Whether it is the DFAR that the others are compared with.
    pub reference: bool,
    /// Epochs of the first seed.
    pub curve: Vec<crate::results::CurvePoint>,
}

/// AUC of the events with `from..=to` events before them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LengthCell {
    /// Shortest history.
    pub from: u64,
    /// Longest; none for the last.
    pub to: Option<u64>,
    /// Groups.
    pub groups: u64,
    /// Over the seeds.
    pub auc: Option<Cell>,
}

/// The paired test of a line against its reference over users.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Comparison {
    /// Users in both.
    pub users: usize,
    /// Of them, users with a difference.
    pub differing: usize,
    /// Mean over users of the AUC of the reference less that of the line.
    pub difference: f64,
    /// p-value of [`signed_rank`].
    pub p: Option<f64>,
    /// Corrected by [`holm`] for the lines of the section.
    pub p_holm: Option<f64>,
}

/// Metrics of the test and validation parts by scores that no system learned.
#[derive(Clone, Debug)]
pub struct References {
    /// Number of training events of the candidate.
    pub popularity: [Option<PartReport>; 2],
    /// The generating process's own scores; synthetic data only.
    pub ceiling: [Option<PartReport>; 2],
}

/// How many of the runs a machine, a commit and a number of threads computed.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Origin {
    /// In words.
    pub words: String,
    /// Runs.
    pub runs: usize,
    /// Their seconds together.
    pub seconds: f64,
}

/// Attention weight by feedback of a row of DFAR.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PairsCell {
    /// The row.
    pub title: String,
    /// Mean weight of a pair of events, `[from][to]`, 0 skipped, 1 liked; mean over the seeds.
    pub mean: [[f64; 2]; 2],
    /// Seeds.
    pub seeds: usize,
}

impl PairsCell {
    /// From the sums of each seed; `None` without any.
    pub fn new(setting: &str, of_seeds: &[HeadPairs]) -> Option<Self> {
        let seeds = of_seeds.len();
        let mean = |from, to| of_seeds.iter().map(|sums| sums.mean(from, to)).sum::<f64>() / seeds as f64;
        let mean = [0, 1].map(|from| [0, 1].map(|to| mean(from, to)));
        (seeds > 0).then(|| Self { title: place(Row::Dfar, setting).1, mean, seeds })
    }
}

/// The tables.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Table {
    /// Liked events of the part whose groups were scored.
    pub groups: u64,
    /// `test`, or `validation` for a data set without liked test events.
    pub part: &'static str,
    /// Popularity, not ranked.
    pub popularity: Option<[Option<f64>; 4]>,
    /// What the generating process itself reaches, not ranked. Synthetic data only.
    pub ceiling: Option<[Option<f64>; 4]>,
    /// Searches for a setting.
    pub searches: Vec<Search>,
    /// By section, in each in the order of Table 2.
    pub lines: Vec<Line>,
    /// DFAR over the best other system, in percent, in the order of [`METRICS`].
    pub improvement: [Option<Improvement>; 4],
    /// Attention weight by feedback.
    pub head_pairs: Vec<PairsCell>,
    /// Where the runs were computed.
    pub origins: Vec<Origin>,
}

/// DFAR against the best other system.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Improvement {
    /// The other one.
    pub over: String,
    /// Of the mean, in percent.
    pub percent: f64,
}

impl Table {
    /// From results of one data set. `own` is the setting of the DFAR to compare with.
    pub fn new(
        results: &[RunResult],
        own: &str,
        references: References,
        searches: Vec<Search>,
        head_pairs: Vec<PairsCell>,
    ) -> Self {
        let tested = results.iter().all(|result| result.test.is_some());
        let reference = |[of_test, of_valid]: [Option<PartReport>; 2]| {
            let PartReport { liked, .. } = if tested { of_test } else { of_valid }?;
            Some([Some(liked.auc), Some(liked.mrr), Some(liked.ndcg), liked.gauc])
        };
        let mut by_line: BTreeMap<(usize, &str), Vec<&RunResult>> = BTreeMap::new();
        for result in results {
            let place = Row::all().iter().position(|row| *row == result.system).unwrap_or(usize::MAX);
            by_line.entry((place, &result.setting)).or_default().push(result);
        }
        let mut runs: Vec<Vec<&RunResult>> = by_line.into_values().collect();
        runs.iter_mut().for_each(|runs| runs.sort_by_key(|run| run.seed));
        let mut lines: Vec<Line> = runs.iter().map(|runs| Line::new(runs, own, tested)).collect();
        if lines.iter().all(|line| line.section == Section::Blind) {
            lines.iter_mut().for_each(|line| line.section = Section::Systems);
        }
        compare(&mut lines, &runs);
        lines.sort_by_key(|line| line.section as u8);
        let figures = |result: &RunResult| if tested { result.test } else { result.valid };
        Self {
            groups: results.iter().find_map(figures).map_or(0, |Figures { groups, .. }| groups),
            part: if tested { "test" } else { "validation" },
            popularity: reference(references.popularity),
            ceiling: reference(references.ceiling),
            searches,
            improvement: std::array::from_fn(|metric| improvement(&lines, metric)),
            lines,
            head_pairs,
            origins: origins(results),
        }
    }

    /// The lines of a section.
    pub fn section(&self, section: Section) -> Vec<&Line> {
        self.lines.iter().filter(|line| line.section == section).collect()
    }

    /// The DFAR that the others are compared with.
    pub fn dfar(&self) -> Option<&Line> {
        self.lines.iter().find(|line| line.reference)
    }
}

impl Line {
    fn new(runs: &[&RunResult], own: &str, tested: bool) -> Self {
        let first = runs[0];
        let figures = |run: &&RunResult| if tested { run.test } else { run.valid };
        let metric = |metric: usize| cell(runs.iter().map(|run| figures(run)?.values[metric]));
        let (section, title) = place(first.system, &first.setting);
        Self {
            section,
            system: first.system,
            title,
            setting: first.setting.clone(),
            seeds: runs.iter().map(|run| run.seed).collect(),
            cells: std::array::from_fn(metric),
            by_length: by_length(runs),
            against: None,
            seconds: runs.iter().map(|run| run.seconds).sum::<f64>() / runs.len() as f64,
            reference: first.system == Row::Dfar && first.setting == own,
            curve: first.curve.clone(),
        }
    }
}

/// The table of a line and its name there.
fn place(system: Row, setting: &str) -> (Section, String) {
    let without: Vec<&str> = setting
        .split(' ')
        .filter_map(|word| match word {
            "no-fha" => Some("FHA"),
            "no-label-mask" => Some("MO"),
            "no-idl" => Some("IDL"),
            "no-ibl" => Some("IBL"),
            _ => None,
        })
        .collect();
    let mut title = system.title().to_owned();
    if let Some(events) = setting.split(' ').find_map(|word| word.strip_prefix("half-life-")) {
        title += &format!(", half-life {events}");
    }
    match (without.is_empty(), setting.starts_with("ignored")) {
        (false, _) => (Section::Ablations, format!("{title} w/o {}", without.join(", "))),
        (true, true) => (Section::Blind, title),
        (true, false) => (Section::Systems, title),
    }
}

/// Over the lengths of the first run; those of all runs of a comparison are the same.
fn by_length(runs: &[&RunResult]) -> Vec<LengthCell> {
    let of_bucket = |bucket: &crate::results::Bucket| {
        let same = |run: &RunResult| {
            run.by_length.iter().find(|other| (other.from, other.to) == (bucket.from, bucket.to)).copied()
        };
        let auc = cell(runs.iter().map(|run| same(run).map(|other| other.auc)));
        LengthCell { from: bucket.from, to: bucket.to, groups: bucket.groups, auc }
    };
    runs[0].by_length.iter().map(of_bucket).collect()
}

/// Adds the paired tests: of Tables 2 and 3 against DFAR, of a blind line against its system.
fn compare(lines: &mut [Line], runs: &[Vec<&RunResult>]) {
    let dfar = lines.iter().position(|line| line.reference);
    for section in [Section::Systems, Section::Ablations, Section::Blind] {
        let of_section: Vec<usize> = (0..lines.len()).filter(|&i| lines[i].section == section).collect();
        for &i in &of_section {
            let own = |line: &Line| {
                let of_system = line.section == Section::Systems && line.system == lines[i].system;
                of_system && (line.reference || line.system != Row::Dfar)
            };
            let reference = if section == Section::Blind { lines.iter().position(own) } else { dfar };
            let against = reference.filter(|&reference| reference != i);
            lines[i].against = against.and_then(|reference| compared(&runs[reference], &runs[i]));
        }
        let p = |i: &usize| lines[*i].against.and_then(|against| against.p);
        let tested: Vec<usize> = of_section.into_iter().filter(|i| p(i).is_some()).collect();
        let corrected = holm(&tested.iter().filter_map(p).collect::<Vec<_>>());
        for (i, p) in tested.into_iter().zip(corrected) {
            lines[i].against.as_mut().expect("it has a p-value").p_holm = Some(p);
        }
    }
}

/// The test over the users of two lines: AUC of each user, mean over the seeds of both.
fn compared(reference: &[&RunResult], other: &[&RunResult]) -> Option<Comparison> {
    let common: Vec<u64> = reference
        .iter()
        .map(|run| run.seed)
        .filter(|seed| other.iter().any(|run| run.seed == *seed))
        .collect();
    let (of_reference, of_other) = (user_auc(reference, &common), user_auc(other, &common));
    let paired = of_reference.iter().filter_map(|(user, auc)| Some(auc - of_other.get(user)?));
    let differences: Vec<f64> = paired.collect();
    if differences.is_empty() {
        return None;
    }
    let test = signed_rank(&differences);
    let difference = differences.iter().sum::<f64>() / differences.len() as f64;
    Some(Comparison { users: differences.len(), differing: test.n, difference, p: test.p, p_holm: None })
}

/// Mean AUC over the runs with these seeds, of each user that all of them have.
fn user_auc(runs: &[&RunResult], seeds: &[u64]) -> BTreeMap<u32, f64> {
    let mut sums: BTreeMap<u32, (f64, usize)> = BTreeMap::new();
    for run in runs.iter().filter(|run| seeds.contains(&run.seed)) {
        if let Some(users) = &run.users {
            for (&user, &auc) in users.user.iter().zip(&users.auc) {
                let sum = sums.entry(user).or_default();
                *sum = (sum.0 + auc, sum.1 + 1);
            }
        }
    }
    sums.retain(|_, (_, count)| *count == seeds.len());
    sums.into_iter().map(|(user, (sum, count))| (user, sum / count as f64)).collect()
}

fn improvement(lines: &[Line], metric: usize) -> Option<Improvement> {
    let mean = |line: &Line| line.cells[metric].map(|cell| cell.mean);
    let own = mean(lines.iter().find(|line| line.reference)?)?;
    let others = lines.iter().filter(|line| line.section == Section::Systems && line.system != Row::Dfar);
    let (over, best) = others
        .filter_map(|line| Some((line.title.clone(), mean(line)?)))
        .max_by(|(_, a), (_, b)| a.total_cmp(b))?;
    Some(Improvement { over, percent: 100.0 * (own - best) / best })
}

/// Place of each line by the mean of a metric: 0 for the best. Equal means share a place.
pub fn places(lines: &[&Line], metric: usize) -> Vec<Option<usize>> {
    let mean = |line: &&Line| line.cells[metric].map(|cell| cell.mean);
    let mut means: Vec<f64> = lines.iter().filter_map(mean).collect();
    means.sort_by(|a, b| b.total_cmp(a));
    means.dedup();
    let place = |line: &&Line| means.iter().position(|other| Some(*other) == mean(line));
    lines.iter().map(place).collect()
}

fn origins(results: &[RunResult]) -> Vec<Origin> {
    let mut found: BTreeMap<String, (usize, f64)> = BTreeMap::new();
    for result in results {
        let origin = found.entry(result.origin()).or_default();
        *origin = (origin.0 + 1, origin.1 + result.seconds);
    }
    found.into_iter().map(|(words, (runs, seconds))| Origin { words, runs, seconds }).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::results::CurvePoint;
    use crate::system::Kind;

    /// A line of Table 2 with these AUCs, and a table of lines.
    pub(crate) fn line(system: Row, setting: &str, auc: [f64; 2]) -> Line {
        let values = || cell(auc.into_iter().map(Some));
        let (section, title) = place(system, setting);
        let bucket = |from, to| LengthCell { from, to, groups: 5, auc: values() };
        Line {
            section,
            system,
            title,
            setting: setting.to_owned(),
            seeds: vec![1, 2],
            cells: [values(), values(), values(), None],
            by_length: vec![bucket(0, Some(9)), bucket(10, None)],
            against: None,
            seconds: 1.5,
            reference: system == Row::Dfar && setting == "mixed",
            curve: [0.6, 0.7].map(|auc| CurvePoint { loss: 1.0 - auc, valid_auc: Some(auc) }).to_vec(),
        }
    }

    pub(crate) fn table(lines: Vec<Line>) -> Table {
        Table {
            groups: 9,
            part: "test",
            popularity: Some([Some(0.9); 4]),
            ceiling: None,
            searches: Vec::new(),
            improvement: std::array::from_fn(|metric| improvement(&lines, metric)),
            lines,
            head_pairs: vec![PairsCell {
                title: "DFAR".to_owned(),
                mean: [[0.1, 0.2], [0.3, 0.4]],
                seeds: 3,
            }],
            origins: vec![Origin { words: "a machine".to_owned(), runs: 3, seconds: 7200.0 }],
        }
    }

    #[test]
    fn lines_belong_to_their_tables() {
        let din = Row::Baseline(Kind::Din);
        assert_eq!(place(din, "positive-only"), (Section::Systems, "DIN".to_owned()));
        assert_eq!(place(din, "ignored tuned-2"), (Section::Blind, "DIN".to_owned()));
        let (section, title) = place(Row::Dfar, "mixed no-label-mask no-idl tuned-2");
        assert_eq!((section, &title[..]), (Section::Ablations, "DFAR w/o MO, IDL"));
        let (section, title) = place(Row::Dfar, "mixed half-life-2.5 tuned-1");
        assert_eq!((section, &title[..]), (Section::Systems, "DFAR, half-life 2.5"));
    }

    #[test]
    fn the_improvement_is_over_the_best_other_system() {
        let lines = vec![
            line(Row::Baseline(Kind::Din), "positive-only", [0.4, 0.4]),
            line(Row::Baseline(Kind::Caser), "positive-only", [0.5, 0.5]),
            line(Row::Dfar, "mixed", [0.6, 0.6]),
            line(Row::Dfar, "mixed no-fha", [0.9, 0.9]),
        ];
        let found = improvement(&lines, 0).expect("an improvement");
        assert!(found.over == "Caser" && (found.percent - 20.0).abs() < 1e-9, "{found:?}");
        assert_eq!(improvement(&lines[..2], 0), None);
    }
}
