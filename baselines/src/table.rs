//! Table 2 from the results in a directory: mean and standard deviation over seeds, as Markdown,
//! CSV and JSON. In each column the best mean is bold and the second is underlined.

use crate::results::{Figures, Row, RunResult};
use crate::tune::Search;
use dfar::evaluate::PartReport;
use serde::Serialize;
use std::fmt::Write;

/// Titles of the metrics.
pub const METRICS: [&str; 4] = ["AUC", "MRR", "NDCG@10", "GAUC"];

/// Mean and deviation of a metric.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// Mean over the seeds.
    pub mean: f64,
    /// Sample standard deviation; none for one seed.
    pub deviation: Option<f64>,
}

/// A system in a setting.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Line {
    /// The system.
    pub system: String,
    /// See [`crate::results::Identity::setting`].
    pub setting: String,
    /// Its seeds, ascending.
    pub seeds: Vec<u64>,
    /// In the order of [`METRICS`]; none where a run has no such metric.
    pub cells: [Option<Cell>; 4],
}

/// Metrics of the test and validation parts by scores that no system learned.
#[derive(Clone, Debug)]
pub struct References {
    /// Number of training events of the candidate.
    pub popularity: [Option<PartReport>; 2],
    /// The generating process's own scores; synthetic data only.
    pub ceiling: [Option<PartReport>; 2],
}

/// The table.
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
    /// In the order of Table 2.
    pub lines: Vec<Line>,
}

impl Table {
    /// From results of one data set.
    pub fn new(results: &[RunResult], references: References, searches: Vec<Search>) -> Self {
        let tested = results.iter().all(|result| result.test.is_some());
        let figures = |result: &RunResult| if tested { result.test } else { result.valid };
        let reference = |[of_test, of_valid]: [Option<PartReport>; 2]| {
            let PartReport { liked, .. } = if tested { of_test } else { of_valid }?;
            Some([Some(liked.auc), Some(liked.mrr), Some(liked.ndcg), liked.gauc])
        };
        let mut lines = Vec::new();
        for system in Row::all() {
            let mut own: Vec<&RunResult> = results.iter().filter(|r| r.system == system).collect();
            own.sort_by(|a, b| (&a.setting, a.seed).cmp(&(&b.setting, b.seed)));
            for of_setting in own.chunk_by(|a, b| a.setting == b.setting) {
                let value = |result: &&RunResult, metric: usize| figures(result)?.values[metric];
                lines.push(Line {
                    system: system.title().to_owned(),
                    setting: of_setting[0].setting.clone(),
                    seeds: of_setting.iter().map(|result| result.seed).collect(),
                    cells: std::array::from_fn(|metric| {
                        cell(of_setting.iter().map(|result| value(result, metric)))
                    }),
                });
            }
        }
        Self {
            groups: results.iter().find_map(figures).map_or(0, |Figures { groups, .. }| groups),
            part: if tested { "test" } else { "validation" },
            popularity: reference(references.popularity),
            ceiling: reference(references.ceiling),
            searches,
            lines,
        }
    }

    /// Place of each line by the mean of a metric: 0 for the best. Equal means share a place.
    fn places(&self, metric: usize) -> Vec<Option<usize>> {
        let mean = |line: &Line| line.cells[metric].map(|cell| cell.mean);
        let mut means: Vec<f64> = self.lines.iter().filter_map(mean).collect();
        means.sort_by(|a, b| b.total_cmp(a));
        means.dedup();
        let place = |line: &Line| means.iter().position(|other| Some(*other) == mean(line));
        self.lines.iter().map(place).collect()
    }

    /// As Markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!(
            "{} liked {} events. Mean and standard deviation over seeds; best in bold, second underlined.\n\n",
            self.groups, self.part
        );
        let _ = writeln!(text, "| | feedback, setting | {} | seeds |", METRICS.join(" | "));
        text.push_str("|---|---|---|---|---|---|---|\n");
        for (name, values) in [("popularity", self.popularity), ("ceiling", self.ceiling)] {
            let Some(values) = values else { continue };
            let cells = values.map(|value| value.map_or("-".to_owned(), |value| format!("{value:.4}")));
            let _ = writeln!(text, "| {name} | | {} | |", cells.join(" | "));
        }
        let places: [Vec<Option<usize>>; 4] = std::array::from_fn(|metric| self.places(metric));
        for (i, line) in self.lines.iter().enumerate() {
            let cell = |metric: usize| {
                let Some(Cell { mean, deviation }) = line.cells[metric] else { return "-".to_owned() };
                let mean = match places[metric][i] {
                    Some(0) => format!("**{mean:.4}**"),
                    Some(1) => format!("<u>{mean:.4}</u>"),
                    _ => format!("{mean:.4}"),
                };
                deviation.map_or(mean.clone(), |deviation| format!("{mean} ± {deviation:.4}"))
            };
            let cells: [String; 4] = std::array::from_fn(cell);
            let (system, setting, seeds) = (&line.system, &line.setting, line.seeds.len());
            let _ = writeln!(text, "| {system} | {setting} | {} | {seeds} |", cells.join(" | "));
        }
        text
    }

    /// As CSV, one line for each system and setting; an empty field where there is no value.
    pub fn csv(&self) -> String {
        let mut text = "system,setting,seeds".to_owned();
        METRICS.iter().for_each(|metric| {
            let _ = write!(text, ",{metric},{metric} deviation");
        });
        text.push('\n');
        let field = |value: Option<f64>| value.map_or(String::new(), |value| value.to_string());
        for line in &self.lines {
            let _ = write!(text, "{},{},{}", line.system, line.setting, line.seeds.len());
            for cell in line.cells {
                let (mean, deviation) = (cell.map(|c| c.mean), cell.and_then(|c| c.deviation));
                let _ = write!(text, ",{},{}", field(mean), field(deviation));
            }
            text.push('\n');
        }
        text
    }
}

/// `None` where a value is missing.
fn cell(values: impl Iterator<Item = Option<f64>>) -> Option<Cell> {
    let values: Vec<f64> = values.collect::<Option<_>>()?;
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    let deviation = (values.len() > 1).then(|| (squares / (n - 1.0)).sqrt());
    Some(Cell { mean, deviation })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(system: &str, auc: [f64; 2]) -> Line {
        let values = || cell(auc.into_iter().map(Some));
        Line {
            system: system.to_owned(),
            setting: "mixed".to_owned(),
            seeds: vec![1, 2],
            cells: [values(), values(), values(), None],
        }
    }

    #[test]
    fn the_best_is_bold_and_the_second_underlined() {
        let lines = vec![line("A", [0.5, 0.7]), line("B", [0.8, 0.8]), line("C", [0.1, 0.3])];
        let table = Table {
            groups: 9,
            part: "test",
            popularity: Some([Some(0.9); 4]),
            ceiling: None,
            searches: Vec::new(),
            lines,
        };
        let text = table.markdown();
        let rows: Vec<&str> = text.lines().skip(4).collect();
        assert_eq!(rows[0], "| popularity | | 0.9000 | 0.9000 | 0.9000 | 0.9000 | |");
        let a = "<u>0.6000</u> ± 0.1414";
        assert_eq!(rows[1], format!("| A | mixed | {a} | {a} | {a} | - | 2 |"));
        assert!(rows[2].starts_with("| B | mixed | **0.8000** ± 0.0000 |"), "{}", rows[2]);
        assert!(rows[3].starts_with("| C | mixed | 0.2000 ± 0.1414 |"), "{}", rows[3]);
        assert!(table.csv().lines().nth(2).is_some_and(|line| line.starts_with("B,mixed,2,0.8,0,")));
    }

    #[test]
    fn one_seed_has_no_deviation_and_a_missing_value_no_cell() {
        assert_eq!(cell([Some(0.5)].into_iter()), Some(Cell { mean: 0.5, deviation: None }));
        assert_eq!(cell([Some(0.5), None].into_iter()), None);
    }
}
