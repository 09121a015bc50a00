//! `dfar-train evaluate --head-pairs`.

use super::table::{count, table};
use dfar::attention::head_pairs::{HeadPairs, rows_add_up};
use dfar::data::{Dataset, Part};
use dfar::device::Device;
use dfar::evaluate;
use dfar::model::Model;
use dfar::train::{Config, Event, TrainError, score_options};
use serde::Serialize;
use std::fmt;
use std::ops::ControlFlow;

/// Attention weight of the history encoder by feedback, over the test histories.
#[derive(Debug, Serialize)]
pub struct HeadPairsReport {
    /// `[from][to]`: 0 skipped, 1 liked.
    #[serde(flatten)]
    sums: HeadPairs,
    /// Mean weight of a pair of events, `[from][to]`.
    mean: [[f64; 2]; 2],
    /// Whether the weights that an event receives add up to 1 in each head.
    rows_add_up: bool,
}

impl HeadPairsReport {
    pub fn of<D: Device>(
        model: &Model<D>,
        data: &Dataset,
        config: &Config,
        observe: &mut dyn FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Self, TrainError> {
        let options = score_options(config, &**model.device());
        let (part, groups) = (Part::Test, data.groups(Part::Test).len());
        let sums = evaluate::head_pairs(model, data, part, &options, &mut |done| {
            observe(Event::Scored { part, done, groups })
        })?;
        let mean = [0, 1].map(|from| [0, 1].map(|to| sums.mean(from, to)));
        Ok(Self { sums, mean, rows_add_up: rows_add_up(&model.config().encoder_attention()) })
    }
}

impl fmt::Display for HeadPairsReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "attention between events of the test histories: mean weight of a pair (pairs)")?;
        let mut rows = vec![["", "to skipped", "to liked"].map(String::from).to_vec()];
        for (from, name) in [(0, "from skipped"), (1, "from liked")] {
            let cell = |to: usize| {
                format!("{:.5} ({})", self.mean[from][to], count(self.sums.pairs[from][to] as usize))
            };
            rows.push(vec![name.to_owned(), cell(0), cell(1)]);
        }
        f.write_str(&table(&rows))?;
        match self.rows_add_up {
            true => Ok(()),
            false => writeln!(f, "the label mask drops weights after the softmax; what remains is shown"),
        }
    }
}
