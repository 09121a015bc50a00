//! Lower bounds of the time of each part of a training step on a GPU, from the shape of a batch.
//!
//! The bound of a part is that of its best implementation: one pass forward and one backward over
//! both interests. A pass reads its inputs from other parts once and writes its outputs once;
//! values are f32 in memory. Activations that backward needs are either **kept** (written and read
//! again) or **recomputed**, whichever is faster. Counted are bytes, multiply-adds of products, and
//! exponentials of attention; the floor of a part is the largest of the three times. Element-wise
//! arithmetic, latency and launches are omitted, so a real step is slower.

use crate::attention::batch::{Pass, needed};
use crate::limits::gpu::Limits;
use dfar::attention::FhaOptions;
use dfar::batch::{Batch, BatchIndices, LabelSplit, Lists, Touched};
use dfar::device::Precision;
use dfar::model::{ModelConfig, StepPart};
use serde::Serialize;
use std::ops::{Add, AddAssign, Mul};

/// Bytes per second from host to card: PCI Express 5.0 with 16 lanes, one way, by its
/// specification.
const HOST_LINK: f64 = 64e9;
/// Bytes of a value, and of an index.
const VALUE: f64 = 4.0;

/// Data to move and arithmetic to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Work {
    /// Bytes between host and card.
    pub sent: f64,
    /// Bytes between the card's memory and the chip.
    pub bytes: f64,
    /// Multiply-adds of products.
    pub multiply_adds: f64,
    /// Exponentials.
    pub exponentials: f64,
}

impl Work {
    /// f32 values or indices read or written.
    fn values(count: f64) -> Self {
        Self { bytes: VALUE * count, ..Self::default() }
    }

    fn products(multiply_adds: f64) -> Self {
        Self { multiply_adds, ..Self::default() }
    }

    /// The work of attention over sequences, in one direction.
    fn attention(options: &FhaOptions, cu_seqlens: &[u32], pass: Pass) -> Self {
        let (multiply_adds, exponentials) = needed(options, cu_seqlens, pass);
        Self { multiply_adds, exponentials, ..Self::default() }
    }

    /// Seconds by bytes, by multiply-adds, by exponentials.
    fn bounds(&self, limits: &Limits, precision: Precision) -> [f64; 3] {
        let multiply_adds = match precision {
            Precision::F32 => limits.multiply_adds,
            Precision::Bf16 => limits.products / 2.0,
        };
        [
            (self.sent / HOST_LINK).max(self.bytes / limits.copy),
            self.multiply_adds / multiply_adds,
            self.exponentials / limits.exponentials,
        ]
    }
}

impl Add for Work {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self {
            sent: self.sent + other.sent,
            bytes: self.bytes + other.bytes,
            multiply_adds: self.multiply_adds + other.multiply_adds,
            exponentials: self.exponentials + other.exponentials,
        }
    }
}

impl AddAssign for Work {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Mul<f64> for Work {
    type Output = Self;
    fn mul(self, by: f64) -> Self {
        Self {
            sent: self.sent * by,
            bytes: self.bytes * by,
            multiply_adds: self.multiply_adds * by,
            exponentials: self.exponentials * by,
        }
    }
}

/// The work of a part: the fixed share, and the two ways to provide backward with activations.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct PartWork {
    always: Work,
    kept: Work,
    again: Work,
}

impl PartWork {
    fn always(work: Work) -> Self {
        Self { always: work, ..Self::default() }
    }
}

/// The work of the parts of a step on one batch.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepWork([PartWork; StepPart::ALL.len()]);

/// The lower bound of a part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Floor {
    /// Work of the faster of the two ways.
    pub work: Work,
    /// Seconds by bytes, by multiply-adds, by exponentials.
    pub bounds: [f64; 3],
    /// The largest of the three; summed over the batches.
    pub seconds: f64,
}

impl Floor {
    fn new(work: Work, limits: &Limits, precision: Precision) -> Self {
        let bounds = work.bounds(limits, precision);
        Self { work, bounds, seconds: bounds.into_iter().fold(0.0, f64::max) }
    }

    /// The name of the largest bound.
    pub fn bound(&self) -> &'static str {
        let moved = if self.work.sent > 0.0 { "host link" } else { "memory" };
        let names = [moved, "products", "exponentials"];
        let bounds = self.bounds.into_iter().zip(names);
        bounds.max_by(|a, b| a.0.total_cmp(&b.0)).expect("there are three").1
    }
}

impl AddAssign for Floor {
    fn add_assign(&mut self, other: Self) {
        self.work += other.work;
        self.bounds.iter_mut().zip(other.bounds).for_each(|(sum, more)| *sum += more);
        self.seconds += other.seconds;
    }
}

impl StepWork {
    /// The work of a step of the network `config` on `batch`.
    pub fn new(config: &ModelConfig, batch: &Batch, dense_embeddings: bool) -> Self {
        let shape = Shape::new(config, batch);
        Self(StepPart::ALL.map(|part| match part {
            StepPart::Input => PartWork::always(Work { sent: VALUE * shape.indices, ..Work::default() }),
            StepPart::Encoder => shape.encoder(config, batch),
            StepPart::Dual => shape.dual(config, batch),
            StepPart::TargetAttention => shape.target_attention(config),
            StepPart::Towers => shape.towers(config),
            StepPart::Optimizer => PartWork::always(shape.optimizer(config, dense_embeddings)),
        }))
    }

    /// The floor of each part, in the order of [`StepPart::ALL`].
    pub fn floors(&self, limits: &Limits, precision: Precision) -> [Floor; StepPart::ALL.len()] {
        self.0.map(|PartWork { always, kept, again }| {
            let [kept, again] = [kept, again].map(|more| Floor::new(always + more, limits, precision));
            if kept.seconds < again.seconds { kept } else { again }
        })
    }
}

/// Counts of a batch, and widths of a network.
struct Shape {
    tokens: f64,
    groups: f64,
    rows: f64,
    pairs: f64,
    scores: f64,
    /// Rows of the item and position tables that are read.
    table_rows: f64,
    /// The largest possible number of rows of candidates among them.
    candidate_rows: f64,
    /// Values of the batch's arrays.
    indices: f64,
    width: f64,
}

impl Shape {
    fn new(config: &ModelConfig, batch: &Batch) -> Self {
        let items = batch.touched_item.row.len();
        Self {
            tokens: batch.tokens() as f64,
            groups: batch.groups() as f64,
            rows: batch.rows() as f64,
            pairs: batch.pairs() as f64,
            scores: batch.score_offsets.last().map_or(0.0, |&scores| scores.into()),
            table_rows: (items + batch.touched_position.row.len() + batch.touched_label.row.len()) as f64,
            candidate_rows: batch.pairs().min(items) as f64,
            indices: indices(batch) as f64,
            width: config.width as f64,
        }
    }

    fn encoder(&self, config: &ModelConfig, batch: &Batch) -> PartWork {
        let Self { tokens, groups, pairs, table_rows, width, .. } = *self;
        let mut part = self.blocks(config, &config.encoder_attention(), &batch.cu_seqlens);
        // Reads indices and tables; writes `s`, the sequence and the means.
        part.always += Work::values(3.0 * tokens + table_rows * width + (2.0 * tokens + groups) * width);
        // Reads `s` and the gradients of `s`, of the sequence and of the means; writes the gradient
        // of the tokens.
        part.always += Work::values((4.0 * tokens + groups) * width);
        // Reads this and the gradients of the candidates by segments, writes the gradients of table
        // rows; reads the rows for their squares.
        part.always += Work::values(tokens + pairs + (tokens + 3.0 * pairs + 2.0 * table_rows) * width);
        part
    }

    fn dual(&self, config: &ModelConfig, batch: &Batch) -> PartWork {
        let Self { tokens, groups, width, .. } = *self;
        let mut sum = PartWork::default();
        for split in &batch.split {
            let part = self.blocks(config, &config.interest_attention(), &split.cu_seqlens);
            sum.always += part.always;
            sum.kept += part.kept;
            sum.again += part.again;
        }
        // Forward: reads the sequence by label, writes the means of both interests. Backward: reads
        // the sequence and the gradients of the means, writes the gradient of the sequence.
        sum.always += Work::values(2.0 * tokens + (tokens + 2.0 * groups) * width);
        sum.always += Work::values((2.0 * tokens + 2.0 * groups) * width);
        sum
    }

    /// The blocks of one encoder, without inputs and outputs.
    fn blocks(&self, config: &ModelConfig, options: &FhaOptions, cu_seqlens: &[u32]) -> PartWork {
        let tokens = f64::from(*cu_seqlens.last().expect("offsets have one more entry than sequences"));
        let (blocks, width) = (config.blocks as f64, self.width);
        let [o, lse] = [options.output_len(1), options.lse_len(1)].map(|n| n as f64);
        // Three projections, the output projection, and two layers.
        let products = Work::products(tokens * (5.0 * width + o) * width);
        let [forward, backward] =
            [Pass::Forward, Pass::Backward].map(|pass| Work::attention(options, cu_seqlens, pass));
        // Six matrices with biases, one of them for all pairs of heads, and three norms.
        let pairs = if config.fha { config.heads as f64 } else { 1.0 };
        let parameters = ((5.0 + pairs) * width + 12.0) * width;
        PartWork {
            always: (products * 3.0 + forward + backward + Work::values(3.0 * parameters)) * blocks,
            // Queries, keys, values, output of attention with `lse`, and the outputs of three
            // layers.
            kept: Work::values(2.0 * tokens * (6.0 * width + o + lse)) * blocks,
            again: (products + forward) * blocks,
        }
    }

    fn target_attention(&self, config: &ModelConfig) -> PartWork {
        let Self { tokens, rows, pairs, scores, candidate_rows, width, .. } = *self;
        let [h0, h1] = config.attention.map(|n| n as f64);
        // The first layer is split into a term of the token, a term of the candidate and a term of
        // their product.
        let hidden =
            tokens * (width + h0) * width + pairs * width * h0 + scores * (width * h0 + h0 * h1 + h1);
        let forward = hidden + scores * width;
        let exponentials = Work { exponentials: scores, ..Work::default() };
        let index = pairs + 2.0 * rows;
        let parameters = (width + 4.0 * h0) * width + h0 * (1.0 + h1) + 2.0 * h1 + 1.0;
        let both = |work: Work| work * 2.0;
        let mut always = both(Work::products(3.0 * forward) + exponentials * 2.0);
        // Forward: reads `s` and candidates; writes attended vectors and `lse` of both interests.
        always += Work::values(index + (tokens + candidate_rows) * width);
        always += both(Work::values(rows * (width + 1.0)));
        // Backward: reads these and the gradients of the attended vectors; writes the gradients of
        // `s` and of the candidates of both interests.
        always += Work::values(index + (2.0 * tokens + candidate_rows) * width);
        always += both(Work::values(rows * (2.0 * width + 1.0) + pairs * width + 3.0 * parameters));
        let kept = 2.0 * (tokens * (width + h0) + pairs * h0 + scores * (h0 + h1 + 1.0));
        PartWork { always, kept: both(Work::values(kept)), again: both(Work::products(hidden)) }
    }

    fn towers(&self, config: &ModelConfig) -> PartWork {
        let Self { groups, rows, pairs, candidate_rows, width, .. } = *self;
        let [t0, t1] = config.tower.map(|n| n as f64);
        let forward = rows * (4.0 * width * t0 + t0 * t1 + t1);
        let parameters = 4.0 * width * t0 + t0 * (1.0 + t1) + 2.0 * t1 + 1.0;
        // Indices and targets of the rows; candidates, the history's means, both interests' means
        // and attended vectors.
        let read = Work::values(3.0 * rows + (candidate_rows + 3.0 * groups + 2.0 * rows) * width);
        let written = Work::values((pairs + 3.0 * groups + 2.0 * rows) * width);
        PartWork {
            always: Work::products(2.0 * 3.0 * forward)
                + read * 2.0
                + written
                + Work::values(2.0 * 3.0 * parameters),
            kept: Work::values(2.0 * 2.0 * rows * (t0 + t1)),
            again: Work::products(2.0 * forward),
        }
    }

    /// Reads gradient, value and both moments; writes all but the gradient.
    fn optimizer(&self, config: &ModelConfig, dense_embeddings: bool) -> Work {
        let all_rows = (config.items + config.max_length + 2) as f64;
        let rows = if dense_embeddings { all_rows } else { self.table_rows };
        let others = config.parameters() as f64 - all_rows * self.width;
        Work::values(7.0 * (others + rows * self.width))
    }
}

/// Number of values in the arrays of a batch.
fn indices(batch: &Batch) -> usize {
    let lists = |lists: &Lists| lists.offsets.len() + lists.members.len();
    let touched = |touched: &Touched| touched.row.len() + lists(&touched.source);
    let split = |split: &LabelSplit| split.token.len() + split.cu_seqlens.len() + split.count.len();
    let BatchIndices { cu_seqlens, item, position, label, group_offsets, group_length, row_offsets, .. } =
        &**batch;
    let BatchIndices {
        row_group, row_pair, row_length, target, pair_offsets, pair_item, score_offsets, ..
    } = &**batch;
    let of_histories = [cu_seqlens, group_offsets, pair_offsets].map(Vec::len);
    let of_tokens = [item.len(), position.len(), label.len().div_ceil(4)];
    let of_groups = [group_length, row_offsets].map(Vec::len);
    let of_rows = [row_group.len(), row_pair.len(), row_length.len(), target.len()];
    let of_pairs = [pair_item.len(), score_offsets.len(), lists(&batch.pair_rows)];
    let of_tables = [&batch.touched_item, &batch.touched_position, &batch.touched_label].map(touched);
    let plain = [&of_histories[..], &of_tokens, &of_groups, &of_rows, &of_pairs, &of_tables].concat();
    plain.into_iter().chain(batch.split.iter().map(split)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::gpu::Card;
    use crate::train::steps::uniform;
    use dfar::batch::{Group, History};

    fn config() -> ModelConfig {
        ModelConfig { width: 8, attention: [5, 3], tower: [7, 2], ..ModelConfig::new(100, 10) }
    }

    /// Three events, the second skipped, two candidates after them: counted by hand.
    fn batch() -> Batch {
        let groups = vec![Group { length: 3, candidates: vec![4, 5], targets: vec![1.0, 0.0] }];
        Batch::pack(&[History { items: vec![1, 2, 3], labels: vec![1, 0, 1], groups }]).expect("sound")
    }

    fn part(part: StepPart) -> PartWork {
        StepWork::new(&config(), &batch(), false).0[part as usize]
    }

    #[test]
    fn target_attention_by_hand() {
        let PartWork { always, kept, again } = part(StepPart::TargetAttention);
        let scores = 2.0 * 3.0;
        // The projection of a token and its term of the first layer, a candidate's term, and the
        // rest of the MLP.
        let hidden = 3.0 * (8.0 * 8.0 + 8.0 * 5.0) + 2.0 * 8.0 * 5.0 + scores * (8.0 * 5.0 + 5.0 * 3.0 + 3.0);
        let interests = 2.0;
        assert_eq!(always.multiply_adds, interests * 3.0 * (hidden + scores * 8.0));
        assert_eq!(always.exponentials, interests * 2.0 * scores);
        assert_eq!(again, Work::products(interests * hidden));
        let stored = 3.0 * (8.0 + 5.0) + 2.0 * 5.0 + scores * (5.0 + 3.0 + 1.0);
        assert_eq!(kept.bytes, 4.0 * interests * 2.0 * stored);
        let parameters = 8.0 * 8.0 + 32.0 * 5.0 + 5.0 + 5.0 * 3.0 + 3.0 + 3.0 + 1.0;
        let forward = 6.0 + (3.0 + 2.0) * 8.0 + interests * 2.0 * 9.0;
        let backward = 6.0 + (3.0 + 3.0 + 2.0) * 8.0 + interests * (2.0 * 17.0 + 2.0 * 8.0);
        assert_eq!(always.bytes, 4.0 * (forward + backward + interests * 3.0 * parameters));
    }

    #[test]
    fn encoders_by_hand() {
        // Six visible pairs of events; the label mask leaves one query slot of two heads of width
        // 4, and half of the values.
        let PartWork { always, kept, again } = part(StepPart::Encoder);
        let (inside, head) = (6.0 * 2.0, 4.0);
        let products = 3.0 * (5.0 * 8.0 * 8.0 + 8.0 * 8.0);
        let forward = (inside + inside / 2.0) * head;
        let backward = (3.0 * inside + 2.0 * inside / 2.0) * head;
        assert_eq!(always.multiply_adds, 3.0 * products + forward + backward);
        assert_eq!(always.exponentials, 2.0 * inside);
        assert_eq!((again.multiply_adds, again.exponentials), (products + forward, inside));
        assert_eq!(kept.bytes, 4.0 * 2.0 * 3.0 * (6.0 * 8.0 + 8.0 + 1.0));

        // Two liked events see three pairs, one skipped event sees one; without a mask, two slots
        // and sixteen values per token.
        let PartWork { always, kept, again } = part(StepPart::Dual);
        let inside = (3.0 + 1.0) * 4.0;
        let products = 3.0 * (5.0 * 8.0 * 8.0 + 16.0 * 8.0);
        assert_eq!(always.multiply_adds, 3.0 * products + (2.0 + 5.0) * inside * head);
        assert_eq!(always.exponentials, 2.0 * inside);
        assert_eq!(again.multiply_adds, products + 2.0 * inside * head);
        assert_eq!(kept.bytes, 4.0 * 2.0 * 3.0 * (6.0 * 8.0 + 16.0 + 2.0));
    }

    #[test]
    fn towers_and_the_optimizer_by_hand() {
        let PartWork { always, again, .. } = part(StepPart::Towers);
        let forward = 2.0 * (32.0 * 7.0 + 7.0 * 2.0 + 2.0);
        assert_eq!((always.multiply_adds, again.multiply_adds), (6.0 * forward, 2.0 * forward));

        // The batch touches five items, three positions and both labels.
        let all = config().parameters() as f64;
        let others = all - (100.0 + 10.0 + 2.0) * 8.0;
        assert_eq!(part(StepPart::Optimizer).always.bytes, 28.0 * (others + (5.0 + 3.0 + 2.0) * 8.0));
        let dense = StepWork::new(&config(), &batch(), true).0[StepPart::Optimizer as usize];
        assert_eq!(dense.always.bytes, 28.0 * all);
    }

    #[test]
    fn a_floor_is_its_largest_bound_in_the_faster_way() {
        let limits = Limits {
            copy: 1e9,
            exponentials: 1e9,
            multiply_adds: 1e9,
            products: 8e9,
            ..Card::H100.datasheet()
        };
        let work = StepWork(
            [PartWork {
                always: Work { bytes: 5.0, multiply_adds: 4.0, exponentials: 3.0, sent: 0.0 },
                kept: Work { bytes: 2.0, ..Work::default() },
                again: Work { multiply_adds: 8.0, ..Work::default() },
            }; 6],
        );
        // In f32, keeping costs 7 bytes and recomputing 12 multiply-adds; in bf16 these take the
        // time of 3.
        let [f32, bf16] =
            [Precision::F32, Precision::Bf16].map(|precision| work.floors(&limits, precision)[1]);
        assert_eq!((f32.work.bytes, f32.bound()), (7.0, "memory"));
        assert_eq!((bf16.work.multiply_adds, bf16.bound()), (12.0, "memory"));
        assert!((f32.seconds - 7e-9).abs() < 1e-15 && (bf16.seconds - 5e-9).abs() < 1e-15);
    }

    /// The work of a step grows with its batch, in every part that reads the batch.
    #[test]
    fn twice_the_batch_takes_about_twice_the_time() {
        let config = ModelConfig::new(1000, 50);
        let limits = Card::H200.datasheet();
        let floors = |groups| {
            let batch = uniform(1000, 50, groups, 10, 1).expect("small");
            StepWork::new(&config, &batch, false).floors(&limits, Precision::Bf16)
        };
        for (part, (one, two)) in StepPart::ALL.into_iter().zip(floors(200).into_iter().zip(floors(400))) {
            let ratio = two.seconds / one.seconds;
            let expected = if part == StepPart::Optimizer { 1.0..1.2 } else { 1.5..2.1 };
            assert!(expected.contains(&ratio), "{part:?}: {ratio}");
        }
    }
}
