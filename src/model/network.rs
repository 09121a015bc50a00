//! The network of one batch, forward and backward. It follows `docs/mathematics.md` line by line.
//!
//! ```text
//! s        = E_item[x] + E_pos[t] + E_lab[y]                       [N, D]
//! seq      = Encoder(s)                                            [N, D]
//! for each interest f (0 negative, 1 positive), with its own tokens of seq:
//!   mean_f = prefix means of Encoder_f(seq[y = f])                 [G, D]
//!   att_f  = target attention of the candidates over s             [R, D]
//!   logit_f = Tower_f([E_item[c], mean, mean_f, att_f])            [R]
//! ```

use super::block::{Attend, BlockState, Encoder, Sequences};
use super::indices::{DeviceTouched, Indices};
use super::parameters::{Block, Id, Layout, Linear};
use super::tensors::Tensors;
use super::{LossOptions, ModelConfig, ModelError, StepLoss, StepObserver, StepPart};
use crate::attention::FhaOptions;
use crate::device::{
    self, Activation, Buffer, Columns, ConcatPart, Device, DeviceError, Floats, Interests, Linear as Layer,
    LinearGradients, Lookup, Output, Qkv, SegmentSum, Segments, Slot, SoftmaxState, Store, TargetGradients,
    TargetInputs, TargetState,
};

/// Indices of the interests.
const NEGATIVE: usize = 0;
const POSITIVE: usize = 1;
/// Parts of a tower's input: candidate, mean, mean of the interest, attended vector.
const PARTS: usize = 4;
const CANDIDATE: usize = 0;
const MEAN: usize = 1;
const MEAN_OF_INTEREST: usize = 2;
const ATTENDED: usize = 3;

/// Gradients of one batch: embedding tables by row of the batch, other tensors whole.
pub struct Gradients<D: Device> {
    pub dense: Tensors<D>,
    pub item: Floats<D>,
    pub position: Floats<D>,
    pub label: Floats<D>,
}

impl<D: Device> Gradients<D> {
    /// One buffer per parameter, embedding tables by row of the batch.
    pub fn by_row(self, layout: &Layout) -> Tensors<D> {
        let Self { mut dense, item, position, label } = self;
        for (id, rows) in [(layout.item, item), (layout.position, position), (layout.label, label)] {
            dense[id] = rows;
        }
        dense
    }
}

/// The scalar results of a step in one device buffer: the parts of the loss, and the norm of the
/// gradients.
pub struct Report<D: Device> {
    values: D::Buffer<f64>,
}

/// Positions in a report. `rank_loss` writes BCE and IBL next to each other. `adam` reads all
/// values before the norm.
mod report {
    pub const BCE: usize = 0;
    pub const IBL: usize = 1;
    pub const IDL: [usize; 2] = [2, 3];
    pub const L2: [usize; 3] = [4, 5, 6];
    pub const NORM: usize = 7;
    pub const LEN: usize = 8;
}

impl<D: Device> Report<D> {
    fn new(device: &D) -> Result<Self, DeviceError> {
        Ok(Self { values: device.zeros(report::LEN)? })
    }

    fn slot(&mut self, index: usize) -> Slot<'_, D::Buffer<f64>> {
        Slot { values: &mut self.values, index }
    }

    /// The slot of the norm.
    pub fn norm(&mut self) -> Slot<'_, D::Buffer<f64>> {
        self.slot(report::NORM)
    }

    /// The buffer, whose last value is the norm.
    pub fn values(&self) -> &D::Buffer<f64> {
        &self.values
    }

    /// The losses. Waits for them.
    ///
    /// # Errors
    /// As [`losses`].
    pub fn read(&self, device: &D, options: &LossOptions) -> Result<StepLoss, ModelError> {
        losses(&device.download(&self.values)?, options)
    }
}

/// The losses in the values of a report.
///
/// # Errors
/// [`ModelError::NonFinite`] names a non-finite part of the loss. The norm is not checked.
pub fn losses(values: &[f64], options: &LossOptions) -> Result<StepLoss, ModelError> {
    let [bce, ibl, gradient_norm] = [report::BCE, report::IBL, report::NORM].map(|i| values[i]);
    let idl = report::IDL.iter().map(|&i| values[i]).sum();
    let l2 = report::L2.iter().map(|&i| values[i]).sum();
    for (part, value) in [("bce", bce), ("ibl", ibl), ("idl", idl), ("l2", l2)] {
        if !f64::is_finite(value) {
            return Err(ModelError::NonFinite { tensor: format!("loss.{part}") });
        }
    }
    let loss = bce + options.bpr as f64 * ibl + options.idl as f64 * idl + options.embed_l2 as f64 * l2;
    Ok(StepLoss { loss, bce, ibl, idl, l2, gradient_norm })
}

/// A network with its parameters and one batch.
pub struct Network<'a, D: Device> {
    pub device: &'a D,
    pub config: &'a ModelConfig,
    pub layout: &'a Layout,
    pub p: &'a Tensors<D>,
    pub batch: &'a Indices<D>,
}

/// Activations shared by both interests.
struct Encoded<D: Device> {
    seq: Floats<D>,
    blocks: Vec<BlockState<D>>,
    mean: Floats<D>,
}

impl<D: Device> Encoded<D> {
    /// The embedded tokens `s`, kept by the first block for its backward pass.
    fn s(&self) -> &Floats<D> {
        self.blocks[0].input()
    }
}

/// The encoder of one interest.
struct Dual<D: Device> {
    blocks: Vec<BlockState<D>>,
    mean: Floats<D>,
}

/// Target attention of one interest.
struct Attended<D: Device> {
    a: Floats<D>,
    r: Floats<D>,
    e: Floats<D>,
    lse: Floats<D>,
    att: Floats<D>,
}

/// Input of a tower and the outputs of its layers; the last is the logit.
type Tower<D> = [Floats<D>; 4];

/// Gradients of the inputs of both towers.
struct TowerGradients<D: Device> {
    /// `[C, D]`
    d_candidate: Floats<D>,
    /// `[G, D]` of the mean of the history.
    d_mean: Floats<D>,
    /// `[G, D]` of the mean of each interest.
    d_means: [Floats<D>; 2],
    /// `[R, D]` of the attended tokens of each interest.
    d_atts: [Floats<D>; 2],
}

type Done = Result<(), DeviceError>;

impl<D: Device> Network<'_, D> {
    /// Positive logits `[R]`. Skips the negative interest, on which they do not depend.
    pub fn score(&self) -> Result<Floats<D>, DeviceError> {
        self.logit(&self.encode(&mut ())?, POSITIVE)
    }

    /// Both logits, negative first: `[R]` each.
    pub fn logits(&self) -> Result<[Floats<D>; 2], DeviceError> {
        let encoded = self.encode(&mut ())?;
        Ok([self.logit(&encoded, NEGATIVE)?, self.logit(&encoded, POSITIVE)?])
    }

    /// The logits of one interest.
    fn logit(&self, encoded: &Encoded<D>, f: usize) -> Result<Floats<D>, DeviceError> {
        let (dual, attended) = (self.dual(encoded, f)?, self.attended(encoded, f)?);
        let [_, _, _, logit] = self.tower(encoded, &dual, &attended, f)?;
        Ok(logit)
    }

    /// The states of the blocks of the history encoder.
    pub fn encoder_states(&self) -> Result<Vec<BlockState<D>>, DeviceError> {
        Ok(self.encode(&mut ())?.blocks)
    }

    /// The attention of a block of the history encoder with other values, `[N, H, d]`.
    pub fn attend(
        &self,
        state: &BlockState<D>,
        v: &Floats<D>,
        out: SoftmaxState<&mut Floats<D>>,
    ) -> Result<(), DeviceError> {
        let [q, k] = state.queries_and_keys();
        self.device.attention(&self.batch.attention, Qkv { q, k, v }, out)
    }

    /// Loss and gradients. `observer` follows the parts.
    pub fn gradients(
        &self,
        options: &LossOptions,
        observer: &mut dyn StepObserver,
    ) -> Result<(Report<D>, Gradients<D>), DeviceError> {
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let encoded = self.encode(observer)?;
        observer.enter(StepPart::Dual)?;
        let duals = device.side_by_side(|f| self.dual(&encoded, f))?;
        observer.enter(StepPart::TargetAttention)?;
        let attended = device.side_by_side(|f| self.attended(&encoded, f))?;
        observer.enter(StepPart::Towers)?;
        let towers = device.side_by_side(|f| self.tower(&encoded, &duals[f], &attended[f], f))?;

        let mut report = Report::new(device)?;
        let mut d_logit = [device.alloc(batch.rows)?, device.alloc(batch.rows)?];
        let [neg, pos] = &towers;
        let logits = Interests { positive: &pos[3], negative: &neg[3] };
        let [.., label_l2] = report::L2;
        device.side_by_side(|which| match which {
            0 => {
                let (gradients, slot) = (by_interest(&mut d_logit), report.slot(report::BCE));
                device.rank_loss(options.bpr, logits, &batch.target, gradients, slot)
            }
            _ => self.half_squares(self.layout.label, &batch.touched_label, report.slot(label_l2)),
        })?;

        let mut grads = Tensors::gradients(device, self.layout)?;
        let dx_towers =
            device.side_by_side(|f| self.tower_backward(&towers[f], f, &mut d_logit[f], &mut grads))?;
        let TowerGradients { mut d_candidate, d_mean, mut d_means, mut d_atts } =
            self.inputs_backward(&dx_towers)?;
        device.side_by_side(|which| {
            let ([negative, positive], gradients) = match which {
                0 => (duals.each_ref().map(|dual| &dual.mean), &mut d_means),
                _ => (attended.each_ref().map(|attended| &attended.att), &mut d_atts),
            };
            let (vectors, slot) = (Interests { positive, negative }, report.slot(report::IDL[which]));
            device.cosine_loss(width, options.idl, vectors, by_interest(gradients), slot)
        })?;

        observer.enter(StepPart::Encoder)?;
        let mut d_s = device.zeros(batch.tokens * width)?;
        let mut d_seq = device.alloc(batch.tokens * width)?;
        device.prefix_mean_backward(width, batch.prefixes(), &d_mean, &mut d_seq)?;
        observer.enter(StepPart::TargetAttention)?;
        let d_r = device.side_by_side(|f| {
            self.target_backward(encoded.s(), &attended[f], f, &d_atts[f], &mut d_s, &mut grads)
        })?;
        observer.enter(StepPart::Dual)?;
        let mut duals = duals.map(Some);
        device.side_by_side(|f| {
            let dual = duals[f].take().expect("each interest has one");
            self.interest_encoder_backward(dual, f, &d_means[f], &mut d_seq, &mut grads)
        })?;
        observer.enter(StepPart::Encoder)?;
        let options_of_encoder = self.config.encoder_attention();
        let encoder = self.encoder(&options_of_encoder);
        let d_input = encoder.backward(&mut grads, encoded.blocks, d_seq)?;
        device.side_by_side(|which| match which {
            0 => device.add(&d_input, &mut d_s),
            _ => device.add(&d_r[NEGATIVE], &mut d_candidate),
        })?;
        device.add(&d_r[POSITIVE], &mut d_candidate)?;

        let [item, position, label] =
            self.tables_backward(options.embed_l2, &d_s, &d_candidate, &d_r, &mut report)?;
        device.settle()?;
        Ok((report, Gradients { dense: grads, item, position, label }))
    }

    /// Gradients of the parts of the towers' inputs.
    fn inputs_backward(&self, dx_towers: &[Floats<D>; 2]) -> Result<TowerGradients<D>, DeviceError> {
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let two = |len| -> Result<_, DeviceError> { Ok([device.alloc(len)?, device.alloc(len)?]) };
        let mut d_candidate = device.alloc(batch.pairs * width)?;
        let mut d_mean = device.alloc(batch.groups * width)?;
        let (mut d_means, mut d_atts) = (two(batch.groups * width)?, two(batch.rows * width)?);
        let (pairs, groups) = (Some(batch.pair_rows.segments()), Some(batch.group_rows.segments()));
        for (f, store) in [(NEGATIVE, Store::Overwrite), (POSITIVE, Store::Add)] {
            // The second interest adds to the gradients of the first.
            let dx = &dx_towers[f];
            device.side_by_side(|which| match which {
                0 => self.part_backward(dx, CANDIDATE, pairs, Output { values: &mut d_candidate, store }),
                _ => self.part_backward(dx, MEAN, groups, Output { values: &mut d_mean, store }),
            })?;
        }
        device.side_by_side(|f| {
            let dx = &dx_towers[f];
            self.part_backward(dx, MEAN_OF_INTEREST, groups, Output::overwrite(&mut d_means[f]))?;
            self.part_backward(dx, ATTENDED, None, Output::overwrite(&mut d_atts[f]))
        })?;
        Ok(TowerGradients { d_candidate, d_mean, d_means, d_atts })
    }

    /// Gradients of the rows of the tables `item`, `position` and `label`, from those of the
    /// embedded tokens `d_s`, of the candidates, and of the candidates of each interest `d_r`.
    /// Reports the L2 of the rows of items and positions.
    fn tables_backward(
        &self,
        l2: f32,
        d_s: &Floats<D>,
        d_candidate: &Floats<D>,
        d_r: &[Floats<D>; 2],
        report: &mut Report<D>,
    ) -> Result<[Floats<D>; 3], DeviceError> {
        let (device, layout, batch) = (self.device, self.layout, self.batch);
        let rows = |id, touched: &DeviceTouched<D>, sources: &[&Floats<D>]| -> Result<_, DeviceError> {
            let mut y = device.alloc(touched.row.len() * self.config.width)?;
            let rows = Lookup { table: &self.p[id], index: &touched.row };
            let sum = SegmentSum { sources, segments: touched.source.segments(), l2, rows };
            device.segment_sum(self.config.width, sum, &mut y)?;
            Ok(y)
        };
        let (items, positions) = (&batch.touched_item, &batch.touched_position);
        let [item_l2, position_l2, _] = report::L2;
        let [item, position] = device.side_by_side(|which| match which {
            0 => {
                self.half_squares(layout.item, items, report.slot(item_l2))?;
                rows(layout.item, items, &[d_s, d_candidate])
            }
            _ => {
                self.half_squares(layout.position, positions, report.slot(position_l2))?;
                rows(layout.position, positions, &[d_s])
            }
        })?;
        let sources = [d_s, &d_r[NEGATIVE], &d_r[POSITIVE]];
        let label = rows(layout.label, &batch.touched_label, &sources)?;
        Ok([item, position, label])
    }

    /// Half the squares of the rows of a table that the batch touches.
    fn half_squares(&self, id: Id, touched: &DeviceTouched<D>, sum: Slot<D::Buffer<f64>>) -> Done {
        let rows = Lookup { table: &self.p[id], index: &touched.row };
        self.device.half_square_sum(self.config.width, rows, sum)
    }

    fn encoder<'a>(&'a self, options: &'a FhaOptions) -> Encoder<'a, D> {
        let batch = self.batch;
        let sequences = Sequences {
            tokens: batch.tokens,
            attend: Attend::Plan(&batch.attention),
            tokens_by_label: [&batch.split[0].token, &batch.split[1].token],
            options,
        };
        self.stack(&self.layout.encoder, sequences)
    }

    fn interest_encoder<'a>(&'a self, f: usize, options: &'a FhaOptions) -> Encoder<'a, D> {
        let split = &self.batch.split[f];
        let sequences = Sequences {
            tokens: split.tokens,
            attend: Attend::Plan(&split.attention),
            tokens_by_label: [&split.token, &split.token],
            options,
        };
        self.stack(&self.layout.interest[f], sequences)
    }

    fn stack<'a>(&'a self, blocks: &'a [Block], sequences: Sequences<'a, D>) -> Encoder<'a, D> {
        Encoder { device: self.device, blocks, p: self.p, sequences }
    }

    fn encode(&self, observer: &mut dyn StepObserver) -> Result<Encoded<D>, DeviceError> {
        observer.enter(StepPart::Encoder)?;
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let tables = [
            Lookup { table: &self.p[self.layout.item], index: &batch.item },
            Lookup { table: &self.p[self.layout.position], index: &batch.position },
            Lookup { table: &self.p[self.layout.label], index: &batch.label_row },
        ];
        let options = self.config.encoder_attention();
        let (seq, blocks) = self.encoder(&options).forward(&tables)?;
        let mut mean = device.alloc(batch.groups * width)?;
        device.prefix_mean(width, batch.prefixes(), &seq, &mut mean)?;
        Ok(Encoded { seq, blocks, mean })
    }

    fn dual(&self, encoded: &Encoded<D>, f: usize) -> Result<Dual<D>, DeviceError> {
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let options = self.config.interest_attention();
        let tokens = Lookup { table: &encoded.seq, index: &batch.split[f].token };
        let (y, blocks) = self.interest_encoder(f, &options).forward(&[tokens])?;
        let mut mean = device.alloc(batch.groups * width)?;
        device.prefix_mean(width, batch.interest_prefixes(f), &y, &mut mean)?;
        Ok(Dual { blocks, mean })
    }

    fn attended(&self, encoded: &Encoded<D>, f: usize) -> Result<Attended<D>, DeviceError> {
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let mut a = device.alloc(batch.tokens * width)?;
        device.linear(self.target_projection(f), encoded.s(), Output::overwrite(&mut a))?;
        let mut r = device.alloc(batch.pairs * width)?;
        let tables = [
            Lookup { table: &self.p[self.layout.item], index: &batch.pair_item },
            Lookup { table: &self.p[self.layout.label], index: &batch.interest_row[f] },
        ];
        device.gather_sum(width, &tables, &mut r)?;
        let (mut e, mut lse, mut att) =
            (device.alloc(batch.scores)?, device.alloc(batch.rows)?, device.alloc(batch.rows * width)?);
        let inputs = TargetInputs { s: encoded.s(), a: &a, r: &r };
        let weights = self.p.target_weights(&self.layout.target[f].mlp);
        let state = TargetState { e: &mut e, lse: &mut lse, att: &mut att };
        device.target_attention(&batch.target_attention, inputs, weights, state)?;
        Ok(Attended { a, r, e, lse, att })
    }

    fn tower(
        &self,
        encoded: &Encoded<D>,
        dual: &Dual<D>,
        attended: &Attended<D>,
        f: usize,
    ) -> Result<Tower<D>, DeviceError> {
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let mut input = device.alloc(batch.rows * PARTS * width)?;
        let parts = [
            ConcatPart { values: &self.p[self.layout.item], index: Some(&batch.row_item) },
            ConcatPart { values: &encoded.mean, index: Some(&batch.row_group) },
            ConcatPart { values: &dual.mean, index: Some(&batch.row_group) },
            ConcatPart { values: &attended.att, index: None },
        ];
        device.concat(width, &parts, &mut input)?;
        let [first, second, last] = self.layout.tower[f];
        let h1 = self.tower_layer(&input, &first, Activation::Relu)?;
        let h2 = self.tower_layer(&h1, &second, Activation::Relu)?;
        let logit = self.tower_layer(&h2, &last, Activation::None)?;
        Ok([input, h1, h2, logit])
    }

    fn tower_layer(
        &self,
        x: &Floats<D>,
        layer: &Linear,
        activation: Activation,
    ) -> Result<Floats<D>, DeviceError> {
        let mut y = self.device.alloc(self.batch.rows * layer.outputs)?;
        self.device.linear(self.p.linear(layer, activation), x, Output::overwrite(&mut y))?;
        Ok(y)
    }

    fn tower_backward(
        &self,
        [input, h1, h2, logit]: &Tower<D>,
        f: usize,
        d_logit: &mut Floats<D>,
        grads: &mut Tensors<D>,
    ) -> Result<Floats<D>, DeviceError> {
        let [first, second, last] = self.layout.tower[f];
        let mut layer = |layer: Linear,
                         activation,
                         x: &Floats<D>,
                         y: &Floats<D>,
                         dy: &mut Floats<D>|
         -> Result<Floats<D>, DeviceError> {
            let mut dx = self.device.alloc(self.batch.rows * layer.inputs)?;
            let gradients = grads.linear_gradients(&layer, Output::overwrite(&mut dx));
            self.device.linear_backward(self.p.linear(&layer, activation), x, y, dy, gradients)?;
            Ok(dx)
        };
        let mut d_h2 = layer(last, Activation::None, h2, logit, d_logit)?;
        let mut d_h1 = layer(second, Activation::Relu, h1, h2, &mut d_h2)?;
        layer(first, Activation::Relu, input, h1, &mut d_h1)
    }

    /// The gradient of one part of a tower's input.
    fn part_backward(
        &self,
        dx_tower: &Floats<D>,
        part: usize,
        segments: Option<Segments<&device::Indices<D>>>,
        dx: Output<&mut Floats<D>>,
    ) -> Done {
        let columns = Columns { width: self.config.width, part, parts: PARTS };
        self.device.concat_backward(columns, dx_tower, segments, dx)
    }

    /// Adds to `d_s` and returns the gradient of `r: [C, D]`.
    fn target_backward(
        &self,
        s: &Floats<D>,
        attended: &Attended<D>,
        f: usize,
        d_att: &Floats<D>,
        d_s: &mut Floats<D>,
        grads: &mut Tensors<D>,
    ) -> Result<Floats<D>, DeviceError> {
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let target = &self.layout.target[f];
        let (mut da, mut dr) = (device.alloc(batch.tokens * width)?, device.alloc(batch.pairs * width)?);
        let Attended { a, r, e, lse, att } = attended;
        let (inputs, state) = (TargetInputs { s, a, r }, TargetState { e, lse, att });
        let weights = self.p.target_weights(&target.mlp);
        let gradients = TargetGradients {
            ds: &mut *d_s,
            da: &mut da,
            dr: &mut dr,
            weights: grads.target_gradients(&target.mlp),
        };
        device.target_attention_backward(
            &batch.target_attention,
            inputs,
            weights,
            state,
            d_att,
            gradients,
        )?;
        let gradients = LinearGradients { dx: Some(Output::add(d_s)), dw: &mut grads[target.w], dbias: None };
        device.linear_backward(self.target_projection(f), s, a, &mut da, gradients)?;
        Ok(dr)
    }

    /// Adds to `d_seq`.
    fn interest_encoder_backward(
        &self,
        dual: Dual<D>,
        f: usize,
        d_mean: &Floats<D>,
        d_seq: &mut Floats<D>,
        grads: &mut Tensors<D>,
    ) -> Done {
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let split = &batch.split[f];
        let mut dy = device.alloc(split.tokens * width)?;
        device.prefix_mean_backward(width, batch.interest_prefixes(f), d_mean, &mut dy)?;
        let options = self.config.interest_attention();
        let dx = self.interest_encoder(f, &options).backward(grads, dual.blocks, dy)?;
        device.scatter_add(width, &dx, &split.token, d_seq)
    }

    /// `a = s W`, without bias.
    fn target_projection(&self, f: usize) -> Layer<&Floats<D>> {
        let (w, width) = (&self.p[self.layout.target[f].w], self.config.width);
        Layer { w, bias: None, activation: Activation::None, inputs: width, outputs: width }
    }
}

/// Two values in the order of the labels, by name.
fn by_interest<T>([negative, positive]: &mut [T; 2]) -> Interests<&mut T> {
    Interests { positive, negative }
}
