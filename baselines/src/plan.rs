//! The runs of a comparison: systems, ablations and settings, each with all seeds.

use crate::results::{Identity, Options, Row};
use crate::tune;
use dfar::batch::Feedback;
use dfar::train::Config;
use dfar::train::checkpoint::DataInfo;
use std::collections::HashSet;

/// A row of the tables: a system, or what was taken from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Variant {
    /// The system itself: Table 2.
    Full,
    /// DFAR with plain attention heads: Table 3.
    WithoutFha,
    /// DFAR without the label mask.
    WithoutMask,
    /// DFAR without the disentangling loss.
    WithoutIdl,
    /// DFAR without the interest-wise BPR loss.
    WithoutIbl,
    /// The system reads all events as if they were liked.
    Blind,
}

impl Variant {
    /// The rows of Table 3.
    pub const ABLATIONS: [Self; 4] =
        [Self::WithoutFha, Self::WithoutMask, Self::WithoutIdl, Self::WithoutIbl];

    fn apply(self, config: &mut Config, options: &mut Options) {
        match self {
            Self::Full => {}
            Self::WithoutFha => (config.fha, config.label_mask) = (false, false),
            // With one head there is none: the same run as the full system.
            Self::WithoutMask => config.label_mask &= config.heads == 1,
            Self::WithoutIdl => config.idl = 0.0,
            Self::WithoutIbl => config.bpr = 0.0,
            Self::Blind => options.feedback = Some(Feedback::Ignored),
        }
    }
}

/// A comparison.
#[derive(Clone, Debug)]
pub struct Study {
    /// Its systems, in the order of their runs.
    pub systems: Vec<Row>,
    /// Its seeds.
    pub seeds: Vec<u64>,
    /// Whether to add the rows of Table 3 and the blind rows.
    pub ablations: bool,
    /// Settings tried for each system; 0 and 1: only the given one.
    pub settings: usize,
    /// Whether the search of DFAR includes its half-life.
    pub tune_half_life: bool,
    /// The given configuration.
    pub config: Config,
    /// The given options.
    pub options: Options,
    /// The data set.
    pub data: DataInfo,
}

impl Study {
    /// The rows: Table 2, Table 3, blind.
    pub fn rows(&self) -> Vec<(Row, Variant)> {
        let of_all = |variant| self.systems.iter().map(move |&system| (system, variant));
        let mut rows: Vec<_> = of_all(Variant::Full).collect();
        if self.ablations {
            if self.systems.contains(&Row::Dfar) {
                rows.extend(Variant::ABLATIONS.map(|variant| (Row::Dfar, variant)));
            }
            rows.extend(of_all(Variant::Blind));
        }
        rows
    }

    /// One run.
    pub fn run(&self, system: Row, variant: Variant, tuned: usize, seed: u64) -> Identity {
        let (mut config, mut options) = (Config { seed, ..self.config.clone() }, self.options);
        tune::apply(&tune::setting(system, self.tune_half_life, tuned), &mut config, &mut options);
        variant.apply(&mut config, &mut options);
        Identity { tuned, ..Identity::new(system, &config, &options, &self.data) }
    }

    /// [`Identity::setting`] of the rows of a system, with this setting of the search.
    pub fn settings_of(&self, system: Row, tuned: usize) -> Vec<String> {
        let variants = [Variant::Full, Variant::Blind].into_iter().chain(Variant::ABLATIONS);
        variants.map(|variant| self.run(system, variant, tuned, self.seeds[0]).setting()).collect()
    }

    /// The runs of the search: all settings of a system with the first seed. Empty without one.
    pub fn search(&self) -> Vec<Identity> {
        if self.settings < 2 {
            return Vec::new();
        }
        let of_system = |&system: &Row| {
            (0..self.settings).map(move |k| self.run(system, Variant::Full, k, self.seeds[0]))
        };
        self.systems.iter().flat_map(of_system).collect()
    }

    /// The runs of the tables. `chosen` returns the setting of a system. Rows that are the same run
    /// (with one head there is no mask to leave out) are run once.
    pub fn runs(&self, chosen: impl Fn(Row) -> usize) -> Vec<Identity> {
        let mut known = HashSet::new();
        let mut runs = Vec::new();
        for (system, variant) in self.rows() {
            for &seed in &self.seeds {
                let run = self.run(system, variant, chosen(system), seed);
                if known.insert(run.path("".as_ref())) {
                    runs.push(run);
                }
            }
        }
        runs
    }
}
