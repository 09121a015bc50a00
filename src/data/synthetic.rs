//! A synthetic log whose true probabilities are known.
//!
//! Items lie in clusters, the clusters on a ring. Within a cluster, an item's share falls as a
//! power of its rank (Zipf). A user likes three clusters and dislikes three; every 40 events one of
//! the liked clusters is replaced. An event is drawn as
//!
//! ```text
//! cluster   k ~ (1 - m) taste(k) + m walk(k | cluster and feedback of the event before)
//! item      i ~ Zipf within k
//! feedback  liked with a probability set by the taste for k: liked, disliked or neither
//! ```
//!
//! where the walk stays near the last cluster after a like and goes to the far side of the ring
//! after a skip. The same previous item therefore has opposite meanings, by its feedback. A model
//! that ignores feedback sees a mixture of both and cannot reach the accuracy of one that reads it.
//!
//! **The ceiling.** In a group, the target comes from `p(i | liked, history)` and the negatives
//! from the popularity `q(i)` among the training events. By Neyman and Pearson, no score separates
//! the two better than the likelihood ratio `log p(i | liked, history) - log q(i)`. Dividing by
//! `p(liked | history)` makes scores comparable between groups. The process knows the user's
//! tastes, while a model has to infer them, so a model approaches the ceiling but does not reach
//! it.

use super::assemble::{Scorer, Workplace, assemble};
use super::external_sort::RecordWriter;
use super::log::{Event, Log};
use super::names::Names;
use super::writer::check_output;
use super::{Candidates, DataError, Made, Protocol, Repeats, Source, Split, Weighting};
use crate::replacement::folder_of;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// Clusters on the ring.
const CLUSTERS: usize = 16;
/// Number of clusters a user likes, and number a user dislikes.
const TASTES: usize = 3;
/// Number of events after which one liked cluster is replaced.
const DRIFT: usize = 40;
/// Share of the walk in the choice of a cluster.
const WALK: f64 = 0.8;
/// Share of liked and of disliked clusters in a user's taste; all clusters share the rest by
/// popularity.
const TASTE: [f64; 2] = [0.5, 0.2];
/// Probability that an event in a liked, a disliked and any other cluster is liked.
const LIKED: [f64; 3] = [0.8, 0.2, 0.5];
/// Probability of a step by 0, 1 or 2 clusters, to either side, around the walk's aim.
const STEPS: [f64; 3] = [0.5, 0.17, 0.08];
/// Exponent and offset of the Zipf law.
const ZIPF: (f64, f64) = (0.9, 5.0);
/// Every history has at least this many events.
const SHORTEST: usize = 5;
/// Begin (2023-11-14) and length (100 days) of the log, in milliseconds.
const SPAN: (i64, i64) = (1_700_000_000_000, 100 * 86_400_000);

/// Options of a synthetic set. The protocol stores them: the same options give the same file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SyntheticOptions {
    /// Users.
    pub users: usize,
    /// Items.
    pub items: usize,
    /// Mean number of events per user; lengths are exponentially distributed from five events up.
    pub events_per_user: f64,
    /// Seed of the events, of the split and of the negatives.
    pub seed: u64,
    /// Negatives of each evaluation group.
    pub negatives: usize,
    /// How histories are split.
    pub split: Split,
}

impl Default for SyntheticOptions {
    fn default() -> Self {
        SyntheticOptions {
            users: 1000,
            items: 500,
            events_per_user: 50.0,
            seed: 1,
            negatives: 9,
            split: Split::TEMPORAL,
        }
    }
}

/// Makes a data set file.
pub fn write(options: &SyntheticOptions, path: impl AsRef<Path>) -> Result<Made, DataError> {
    let path = path.as_ref();
    check_output(path)?;
    let folder = folder_of(path);
    let process = Process::new(options)?;
    let mut events = RecordWriter::new(folder);
    let mut history = Vec::new();
    for user in 0..options.users as u32 {
        process.generate(user, &mut history);
        events.extend(&history)?;
    }
    let log = Log {
        events: events.finish()?,
        users: numbered("users", options.users)?,
        items: numbered("items", options.items)?,
    };
    let protocol = Protocol {
        source: Source {
            format: "synthetic".to_owned(),
            files: Vec::new(),
            rows: log.events.len(),
            bad_rows: 0,
            repeated_rows: 0,
            other_events: 0,
            decisions: Vec::new(),
        },
        positive: "planted".to_owned(),
        repeats: Repeats::Keep,
        k_core: None,
        split: options.split,
        candidates: Candidates {
            negatives: options.negatives,
            weighting: Weighting::TrainPopularity,
            exclude_seen: false,
            seed: options.seed,
            hash: String::new(),
        },
        synthetic: Some(options.clone()),
    };
    assemble(log, protocol, Some(&process), Workplace { output: path, folder, sort_memory: 32 << 20 })
}

/// The names "0", "1", and so on.
fn numbered(what: &'static str, count: usize) -> Result<Names, DataError> {
    let mut names = Names::new(what);
    for number in 0..count {
        names.intern(&number.to_string())?;
    }
    Ok(names)
}

/// The generating process.
struct Process {
    seed: u64,
    items: usize,
    mean_events: f64,
    /// Weight of each item.
    weights: Vec<f64>,
    /// Sum of the weights of each cluster.
    cluster_weights: [f64; CLUSTERS],
    /// For each cluster k, the prefix sums of the weights of its items k, k + CLUSTERS, k + 2
    /// CLUSTERS, ...
    running: Vec<Vec<f64>>,
}

/// The clusters a user likes and dislikes in one period.
struct Tastes {
    liked: [usize; TASTES],
    disliked: [usize; TASTES],
}

impl Process {
    fn new(options: &SyntheticOptions) -> Result<Process, DataError> {
        let refuse = |option, value: String, reason| Err(DataError::InvalidOption { option, value, reason });
        if options.users == 0 || options.users >= u32::MAX as usize {
            return refuse("users", options.users.to_string(), "is zero or too large");
        }
        if options.items < CLUSTERS || options.items >= u32::MAX as usize {
            return refuse("items", options.items.to_string(), "is below 16 or too large");
        }
        let mean = options.events_per_user;
        if !(mean >= SHORTEST as f64 && mean <= 1e6) {
            return refuse("events", mean.to_string(), "events per user are below 5 or above a million");
        }
        let (exponent, offset) = ZIPF;
        let weights: Vec<f64> =
            (0..options.items).map(|rank| (rank as f64 + offset).powf(-exponent)).collect();
        let running: Vec<Vec<f64>> = (0..CLUSTERS)
            .map(|cluster| {
                let own = weights.iter().skip(cluster).step_by(CLUSTERS);
                own.scan(0.0, |sum, weight| {
                    *sum += weight;
                    Some(*sum)
                })
                .collect()
            })
            .collect();
        let cluster_weights = std::array::from_fn(|cluster| running[cluster][running[cluster].len() - 1]);
        Ok(Process {
            seed: options.seed,
            items: options.items,
            mean_events: mean,
            weights,
            cluster_weights,
            running,
        })
    }

    /// Two random streams per user: tastes have a stream of their own, so that they can be drawn
    /// again without the events.
    fn rng(&self, user: u32, stream: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(1 + 2 * u64::from(user) + stream);
        rng
    }

    /// A user's tastes in each period of [`DRIFT`] events.
    fn tastes(&self, user: u32) -> impl Iterator<Item = Tastes> {
        let mut rng = self.rng(user, 0);
        let mut order: [usize; CLUSTERS] = std::array::from_fn(|cluster| cluster);
        for place in 0..2 * TASTES {
            order.swap(place, rng.random_range(place as u32..CLUSTERS as u32) as usize);
        }
        let mut period = 0;
        std::iter::from_fn(move || {
            if period > 0 {
                let fresh = rng.random_range(2 * TASTES as u32..CLUSTERS as u32) as usize;
                order.swap(period % TASTES, fresh);
            }
            period += 1;
            Some(Tastes {
                liked: std::array::from_fn(|place| order[place]),
                disliked: std::array::from_fn(|place| order[TASTES + place]),
            })
        })
    }

    fn cluster(&self, item: u32) -> usize {
        item as usize % CLUSTERS
    }

    /// Probability of each cluster for the next event.
    fn next_cluster(&self, tastes: &Tastes, last: Option<(usize, bool)>) -> [f64; CLUSTERS] {
        let total: f64 = self.cluster_weights.iter().sum();
        let mut p = self.cluster_weights.map(|weight| (1.0 - TASTE[0] - TASTE[1]) * weight / total);
        for (clusters, share) in [(&tastes.liked, TASTE[0]), (&tastes.disliked, TASTE[1])] {
            for &cluster in clusters {
                p[cluster] += share / TASTES as f64;
            }
        }
        if let Some((cluster, liked)) = last {
            p = p.map(|p| p * (1.0 - WALK));
            let aim = if liked { cluster } else { cluster + CLUSTERS / 2 };
            for (distance, step) in STEPS.into_iter().enumerate() {
                p[(aim + distance) % CLUSTERS] += WALK * step;
                if distance > 0 {
                    p[(aim + CLUSTERS - distance) % CLUSTERS] += WALK * step;
                }
            }
        }
        p
    }

    fn generate(&self, user: u32, history: &mut Vec<Event>) {
        let mut rng = self.rng(user, 1);
        let length = SHORTEST + exponential(&mut rng, self.mean_events - SHORTEST as f64).round() as usize;
        // Users join during the first half and stay to the end, so that most are known when testing
        // begins.
        let join = rng.random_range(0..SPAN.1 / 2);
        let mut times: Vec<i64> = (0..length).map(|_| SPAN.0 + rng.random_range(join..SPAN.1)).collect();
        times.sort_unstable();
        history.clear();
        let mut tastes = self.tastes(user);
        let mut now = tastes.next().expect("periods do not end");
        let mut last = None;
        for (place, time) in times.into_iter().enumerate() {
            if place > 0 && place % DRIFT == 0 {
                now = tastes.next().expect("periods do not end");
            }
            let cluster = pick(&self.next_cluster(&now, last), &mut rng);
            let running = &self.running[cluster];
            let aim = rng.random::<f64>() * self.cluster_weights[cluster];
            let rank = running.partition_point(|&sum| sum <= aim).min(running.len() - 1);
            let liked = rng.random::<f64>() < now.liking(cluster);
            let item = (cluster + rank * CLUSTERS) as u32;
            history.push(Event { time, fraction: 0, user, item, feedback: liked.into() });
            last = Some((cluster, liked));
        }
    }
}

impl Tastes {
    /// Probability that an event in this cluster is liked.
    fn liking(&self, cluster: usize) -> f64 {
        if self.liked.contains(&cluster) {
            LIKED[0]
        } else if self.disliked.contains(&cluster) {
            LIKED[1]
        } else {
            LIKED[2]
        }
    }
}

impl Scorer for Process {
    fn score(&self, user: u32, history: &[Event], drawn: &[u32], candidates: &[u32], out: &mut Vec<f32>) {
        let period = history.len() / DRIFT;
        let now = self.tastes(user).nth(period).expect("periods do not end");
        let last = history.last().map(|event| (self.cluster(event.item), event.liked()));
        let liked: [f64; CLUSTERS] = {
            let p = self.next_cluster(&now, last);
            std::array::from_fn(|cluster| p[cluster] * now.liking(cluster))
        };
        let any: f64 = liked.iter().sum();
        let all_drawn: f64 = drawn.iter().map(|&count| f64::from(count)).sum();
        out.extend(candidates.iter().map(|&item| {
            let cluster = self.cluster(item);
            let p = liked[cluster] / any * self.weights[item as usize] / self.cluster_weights[cluster];
            // An item with no training events is never drawn as a negative, so its ratio would be
            // infinite; half a draw keeps it finite.
            let q = f64::from(drawn[item as usize]).max(0.5) / all_drawn;
            (p / q).ln() as f32
        }));
        debug_assert!(candidates.iter().all(|&item| (item as usize) < self.items));
    }
}

/// A random index with these probabilities.
fn pick(probabilities: &[f64], rng: &mut ChaCha8Rng) -> usize {
    let mut left = rng.random::<f64>();
    for (place, p) in probabilities.iter().enumerate() {
        left -= p;
        if left < 0.0 {
            return place;
        }
    }
    // Rounding may leave the sum slightly below one.
    probabilities.len() - 1
}

fn exponential(rng: &mut ChaCha8Rng, mean: f64) -> f64 {
    -mean * (1.0 - rng.random::<f64>()).ln()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Dataset, Part, statistics};

    /// AUC over the liked test groups by a score of (user, history, candidate).
    fn auc(data: &Dataset, mut score: impl FnMut(u32, &[Event], u32) -> f32) -> f64 {
        let mut rows = Vec::new();
        for group in data.groups(Part::Test).iter() {
            let events = data.user(group.user);
            let target = group.event as usize;
            if events.feedback[target] == 0 {
                continue;
            }
            let history: Vec<Event> = (0..target)
                .map(|place| Event {
                    time: events.times[place],
                    user: group.user,
                    item: events.items[place],
                    fraction: 0,
                    feedback: events.feedback[place].into(),
                })
                .collect();
            rows.push((score(group.user, &history, events.items[target]), true));
            rows.extend(group.negatives.iter().map(|&item| (score(group.user, &history, item), false)));
        }
        crate::auc::auc(&mut rows).expect("there are liked test groups")
    }

    #[test]
    fn feedback_is_worth_knowing_and_popularity_is_not() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("synthetic.dfar");
        let options = SyntheticOptions::default();
        write(&options, &path).expect("the options are good");
        let data = Dataset::open(&path).expect("the file is good");
        let process = Process::new(&options).expect("the options are good");
        let drawn = data.train_popularity();

        // The stored scores equal the process's, computed again here from the file alone.
        let mut again = Vec::new();
        let ceiling = auc(&data, |user, history, item| {
            again.clear();
            process.score(user, history, &drawn, &[item], &mut again);
            again[0]
        });
        let stored = statistics::ceiling_auc(&data, Part::Test).expect("synthetic sets have one");
        assert_eq!(ceiling, stored);

        // The best score without feedback: the last event counts as liked and as skipped, each with
        // its probability.
        let blind = auc(&data, |user, history, item| {
            let now = process.tastes(user).nth(history.len() / DRIFT).expect("periods do not end");
            let mut p = process.next_cluster(&now, None);
            if let Some(last) = history.last() {
                let cluster = process.cluster(last.item);
                let like = now.liking(cluster);
                let [after_like, after_skip] =
                    [true, false].map(|liked| process.next_cluster(&now, Some((cluster, liked))));
                p = std::array::from_fn(|k| like * after_like[k] + (1.0 - like) * after_skip[k]);
            }
            let liked: [f64; CLUSTERS] = std::array::from_fn(|k| p[k] * now.liking(k));
            let cluster = process.cluster(item);
            let share = process.weights[item as usize] / process.cluster_weights[cluster];
            (liked[cluster] / liked.iter().sum::<f64>() * share / f64::from(drawn[item as usize]).max(0.5))
                .ln() as f32
        });
        let popularity = auc(&data, |_, _, item| drawn[item as usize] as f32);
        eprintln!("ceiling {ceiling:.4}, without feedback {blind:.4}, popularity {popularity:.4}");
        assert!((0.80..0.92).contains(&ceiling), "ceiling {ceiling}");
        assert!(ceiling - blind > 0.04, "ceiling {ceiling}, without feedback {blind}");
        assert!(
            popularity < 0.6 && blind > popularity + 0.1,
            "popularity {popularity}, without feedback {blind}"
        );
    }

    #[test]
    fn clusters_are_drawn_with_probabilities() {
        let process = Process::new(&SyntheticOptions::default()).expect("the options are good");
        for user in 0..20 {
            for now in process.tastes(user).take(8) {
                assert!(now.liked.iter().all(|cluster| !now.disliked.contains(cluster)));
                for last in [None, Some((3, true)), Some((15, false))] {
                    let p = process.next_cluster(&now, last);
                    assert!(p.iter().all(|&p| p > 0.0));
                    assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                }
            }
        }
    }
}
