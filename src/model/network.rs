//! The network of one batch, forward and backward: `docs/mathematics.md` line by line.
//!
//! ```text
//! s        = E_item[x] + E_pos[t] + E_lab[y]                       [N, D]
//! seq      = Encoder(s)                                            [N, D]
//! for each interest f (0 negative, 1 positive), with its own tokens of seq:
//!   mean_f = prefix means of Encoder_f(seq[y = f])                 [G, D]
//!   att_f  = target attention of the candidates over s             [R, D]
//!   logit_f = Tower_f([E_item[c], mean, mean_f, att_f])            [R]
//! ```

use super::block::{self, BlockState, Sequences};
use super::indices::Indices;
use super::parameters::{Layout, Linear};
use super::tensors::Tensors;
use super::{LossOptions, ModelConfig, ModelError, StepLoss, StepObserver, StepPart};
use crate::attention::FhaOptions;
use crate::device::{Activation, Buffer, Device, DeviceError, Slot, Store, TargetWeights};

/// Interests, by feedback.
const NEGATIVE: usize = 0;
const POSITIVE: usize = 1;
/// Parts of a tower's input: candidate, mean, mean of the interest, attended vector.
const PARTS: usize = 4;
const CANDIDATE: usize = 0;
const MEAN: usize = 1;
const MEAN_OF_INTEREST: usize = 2;
const ATTENDED: usize = 3;

/// Gradients of one batch: small tensors whole, embedding tables by touched row.
pub struct Gradients<D: Device> {
    pub dense: Tensors<D>,
    pub item: D::Buffer<f32>,
    pub position: D::Buffer<f32>,
    pub label: D::Buffer<f32>,
}

impl<D: Device> Gradients<D> {
    /// One buffer a parameter, those of the tables by touched row.
    pub fn by_row(self, layout: &Layout) -> Tensors<D> {
        let Self { mut dense, item, position, label } = self;
        for (id, rows) in [(layout.item, item), (layout.position, position), (layout.label, label)] {
            dense[id] = rows;
        }
        dense
    }
}

/// What a step leaves on the device for the host: its losses in parts, and the gradients' norm, in one buffer.
pub struct Report<D: Device> {
    values: D::Buffer<f64>,
}

/// Values of a report, in order. BCE and IBL are neighbours, as `rank_loss` writes them; the norm comes last, as `adam` reads
/// all that lies before it.
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

    /// Where the gradients' norm goes.
    pub fn norm(&mut self) -> Slot<'_, D::Buffer<f64>> {
        self.slot(report::NORM)
    }

    /// Waits for the step.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] names the part of the loss that is not finite. (The norm may not be.)
    pub fn read(&self, device: &D, options: &LossOptions) -> Result<StepLoss, ModelError> {
        let values = device.download(&self.values)?;
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
}

/// A network bound to its parameters and one batch.
pub struct Network<'a, D: Device> {
    pub device: &'a D,
    pub config: &'a ModelConfig,
    pub layout: &'a Layout,
    pub p: &'a Tensors<D>,
    pub batch: &'a Indices<D>,
}

/// Everything before the interests part.
struct Encoded<D: Device> {
    seq: D::Buffer<f32>,
    blocks: Vec<BlockState<D>>,
    mean: D::Buffer<f32>,
}

impl<D: Device> Encoded<D> {
    /// The raw tokens `s`, which the first block keeps for its backward pass.
    fn s(&self) -> &D::Buffer<f32> {
        self.blocks[0].input()
    }
}

/// One interest.
struct Interest<D: Device> {
    blocks: Vec<BlockState<D>>,
    mean: D::Buffer<f32>,
    a: D::Buffer<f32>,
    r: D::Buffer<f32>,
    e: D::Buffer<f32>,
    lse: D::Buffer<f32>,
    att: D::Buffer<f32>,
    /// Input of the tower, then the output of each of its layers; the last is the logit.
    tower: [D::Buffer<f32>; 4],
}

type Done = Result<(), DeviceError>;

impl<D: Device> Network<'_, D> {
    /// Positive logits `[R]`. The negative interest does not enter them and is not computed.
    pub fn score(&self) -> Result<D::Buffer<f32>, DeviceError> {
        let encoded = self.encode(&mut ())?;
        let Interest { tower: [_, _, _, logit], .. } = self.interest(&encoded, POSITIVE, &mut ())?;
        Ok(logit)
    }

    /// Both logits, negative first: `[R]` each.
    pub fn logits(&self) -> Result<[D::Buffer<f32>; 2], DeviceError> {
        let encoded = self.encode(&mut ())?;
        let logit =
            |f| self.interest(&encoded, f, &mut ()).map(|Interest { tower: [_, _, _, logit], .. }| logit);
        Ok([logit(NEGATIVE)?, logit(POSITIVE)?])
    }

    /// Loss and gradients. `observer` is told of the parts.
    pub fn gradients(
        &self,
        options: &LossOptions,
        observer: &mut dyn StepObserver,
    ) -> Result<(Report<D>, Gradients<D>), DeviceError> {
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let encoded = self.encode(observer)?;
        let interests =
            [self.interest(&encoded, NEGATIVE, observer)?, self.interest(&encoded, POSITIVE, observer)?];

        let mut report = Report::new(device)?;
        let mut d_logit = [device.alloc(batch.rows)?, device.alloc(batch.rows)?];
        let [d_neg, d_pos] = &mut d_logit;
        let [neg, pos] = &interests;
        let slot = report.slot(report::BCE);
        device.rank_loss(options.bpr, &pos.tower[3], &neg.tower[3], &batch.target, d_pos, d_neg, slot)?;

        let mut grads = Tensors::gradients(device, self.layout)?;
        let mut d_mean = device.alloc(batch.groups * width)?;
        let mut d_candidate = device.alloc(batch.pairs * width)?;
        let mut d_means = [device.alloc(batch.groups * width)?, device.alloc(batch.groups * width)?];
        let mut d_atts = [device.alloc(batch.rows * width)?, device.alloc(batch.rows * width)?];
        for f in [NEGATIVE, POSITIVE] {
            let dx = self.tower_backward(&interests[f], f, &mut d_logit[f], &mut grads)?;
            // The second interest adds to what the first wrote.
            let store = if f == NEGATIVE { Store::Overwrite } else { Store::Add };
            device.concat_backward(
                width,
                CANDIDATE,
                PARTS,
                &dx,
                Some(batch.pair_rows.segments()),
                (&mut d_candidate, store),
            )?;
            device.concat_backward(
                width,
                MEAN,
                PARTS,
                &dx,
                Some(batch.group_rows.segments()),
                (&mut d_mean, store),
            )?;
            device.concat_backward(
                width,
                MEAN_OF_INTEREST,
                PARTS,
                &dx,
                Some(batch.group_rows.segments()),
                (&mut d_means[f], Store::Overwrite),
            )?;
            device.concat_backward(width, ATTENDED, PARTS, &dx, None, (&mut d_atts[f], Store::Overwrite))?;
        }
        let [d_neg, d_pos] = &mut d_means;
        let slot = report.slot(report::IDL[0]);
        device.cosine_loss(width, options.idl, &pos.mean, &neg.mean, d_pos, d_neg, slot)?;
        let [d_neg, d_pos] = &mut d_atts;
        let slot = report.slot(report::IDL[1]);
        device.cosine_loss(width, options.idl, &pos.att, &neg.att, d_pos, d_neg, slot)?;

        observer.enter(StepPart::Encoder)?;
        let mut d_s = device.zeros(batch.tokens * width)?;
        let mut d_seq = device.alloc(batch.tokens * width)?;
        device.prefix_mean_backward(
            width,
            &batch.cu_seqlens,
            &batch.group_offsets,
            &batch.group_length,
            &batch.group_length,
            &d_mean,
            &mut d_seq,
        )?;
        let mut d_r = Vec::with_capacity(2);
        for (f, interest) in interests.into_iter().enumerate() {
            observer.enter(StepPart::TargetAttention)?;
            d_r.push(self.target_backward(encoded.s(), &interest, f, &d_atts[f], &mut d_s, &mut grads)?);
            observer.enter(StepPart::Dual)?;
            self.interest_encoder_backward(interest, f, &d_means[f], &mut d_seq, &mut grads)?;
        }
        observer.enter(StepPart::Encoder)?;
        let options_of_encoder = self.config.encoder_attention();
        let d_input = block::backward(
            device,
            &self.layout.encoder,
            self.p,
            &mut grads,
            &self.sequences(&options_of_encoder),
            encoded.blocks,
            d_seq,
        )?;
        device.add(&d_input, &mut d_s)?;
        device.add(&d_r[NEGATIVE], &mut d_candidate)?;
        device.add(&d_r[POSITIVE], &mut d_candidate)?;

        let mut rows = |id,
                        touched: &super::indices::DeviceTouched<D>,
                        sources: &[&D::Buffer<f32>],
                        slot|
         -> Result<D::Buffer<f32>, DeviceError> {
            let mut y = device.alloc(touched.row.len() * width)?;
            device.segment_sum(
                width,
                sources,
                touched.source.segments(),
                options.embed_l2,
                &self.p[id],
                &touched.row,
                &mut y,
            )?;
            device.half_square_sum(width, &self.p[id], &touched.row, report.slot(slot))?;
            Ok(y)
        };
        let [item_l2, position_l2, label_l2] = report::L2;
        let item = rows(self.layout.item, &batch.touched_item, &[&d_s, &d_candidate], item_l2)?;
        let position = rows(self.layout.position, &batch.touched_position, &[&d_s], position_l2)?;
        let sources = [&d_s, &d_r[NEGATIVE], &d_r[POSITIVE]];
        let label = rows(self.layout.label, &batch.touched_label, &sources, label_l2)?;
        Ok((report, Gradients { dense: grads, item, position, label }))
    }

    fn sequences<'a>(&'a self, options: &'a FhaOptions) -> Sequences<'a, D> {
        let batch = self.batch;
        Sequences {
            tokens: batch.tokens,
            plan: &batch.attention,
            tokens_by_label: [&batch.split[0].token, &batch.split[1].token],
            options,
        }
    }

    fn interest_sequences<'a>(&'a self, f: usize, options: &'a FhaOptions) -> Sequences<'a, D> {
        let split = &self.batch.split[f];
        Sequences {
            tokens: split.tokens,
            plan: &split.attention,
            tokens_by_label: [&split.token, &split.token],
            options,
        }
    }

    fn encode(&self, observer: &mut dyn StepObserver) -> Result<Encoded<D>, DeviceError> {
        observer.enter(StepPart::Encoder)?;
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let tables = [
            (&self.p[self.layout.item], &batch.item),
            (&self.p[self.layout.position], &batch.position),
            (&self.p[self.layout.label], &batch.label_row),
        ];
        let options = self.config.encoder_attention();
        let (seq, blocks) =
            block::forward(device, &self.layout.encoder, self.p, &self.sequences(&options), &tables)?;
        let mut mean = device.alloc(batch.groups * width)?;
        device.prefix_mean(
            width,
            &seq,
            &batch.cu_seqlens,
            &batch.group_offsets,
            &batch.group_length,
            &batch.group_length,
            &mut mean,
        )?;
        Ok(Encoded { seq, blocks, mean })
    }

    fn interest(
        &self,
        encoded: &Encoded<D>,
        f: usize,
        observer: &mut dyn StepObserver,
    ) -> Result<Interest<D>, DeviceError> {
        observer.enter(StepPart::Dual)?;
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let split = &batch.split[f];

        let options = self.config.interest_attention();
        let (y, blocks) = block::forward(
            device,
            &self.layout.interest[f],
            self.p,
            &self.interest_sequences(f, &options),
            &[(&encoded.seq, &split.token)],
        )?;
        let mut mean = device.alloc(batch.groups * width)?;
        device.prefix_mean(
            width,
            &y,
            &split.cu_seqlens,
            &batch.group_offsets,
            &split.count,
            &batch.group_length,
            &mut mean,
        )?;

        observer.enter(StepPart::TargetAttention)?;
        let target = &self.layout.target[f];
        let mut a = device.alloc(batch.tokens * width)?;
        device.linear(
            encoded.s(),
            &self.p[target.w],
            None,
            Activation::None,
            (&mut a, Store::Overwrite),
            (width, width),
        )?;
        let mut r = device.alloc(batch.pairs * width)?;
        device.gather_sum(
            width,
            &[
                (&self.p[self.layout.item], &batch.pair_item),
                (&self.p[self.layout.label], &batch.interest_row[f]),
            ],
            &mut r,
        )?;
        let (mut e, mut lse, mut att) =
            (device.alloc(batch.scores)?, device.alloc(batch.rows)?, device.alloc(batch.rows * width)?);
        device.target_attention(
            &batch.target_attention,
            encoded.s(),
            &a,
            &r,
            self.target_weights(f),
            &mut e,
            &mut lse,
            &mut att,
        )?;

        observer.enter(StepPart::Towers)?;
        let mut input = device.alloc(batch.rows * PARTS * width)?;
        let parts = [
            (&self.p[self.layout.item], Some(&batch.row_item)),
            (&encoded.mean, Some(&batch.row_group)),
            (&mean, Some(&batch.row_group)),
            (&att, None),
        ];
        device.concat(width, &parts, &mut input)?;
        let [first, second, last] = self.layout.tower[f];
        let h1 = self.tower_layer(&input, &first, Activation::Relu)?;
        let h2 = self.tower_layer(&h1, &second, Activation::Relu)?;
        let logit = self.tower_layer(&h2, &last, Activation::None)?;
        Ok(Interest { blocks, mean, a, r, e, lse, att, tower: [input, h1, h2, logit] })
    }

    fn tower_layer(
        &self,
        x: &D::Buffer<f32>,
        layer: &Linear,
        activation: Activation,
    ) -> Result<D::Buffer<f32>, DeviceError> {
        let mut y = self.device.alloc(self.batch.rows * layer.widths.1)?;
        self.device.linear(
            x,
            &self.p[layer.w],
            Some(&self.p[layer.b]),
            activation,
            (&mut y, Store::Overwrite),
            layer.widths,
        )?;
        Ok(y)
    }

    fn tower_backward(
        &self,
        interest: &Interest<D>,
        f: usize,
        d_logit: &mut D::Buffer<f32>,
        grads: &mut Tensors<D>,
    ) -> Result<D::Buffer<f32>, DeviceError> {
        let [first, second, last] = self.layout.tower[f];
        let [input, h1, h2, logit] = &interest.tower;
        let mut layer = |layer: Linear,
                         activation,
                         x: &D::Buffer<f32>,
                         y: &D::Buffer<f32>,
                         dy: &mut D::Buffer<f32>|
         -> Result<D::Buffer<f32>, DeviceError> {
            let mut dx = self.device.alloc(self.batch.rows * layer.widths.0)?;
            let [dw, db] = grads.two([layer.w, layer.b]);
            self.device.linear_backward(
                x,
                &self.p[layer.w],
                activation,
                y,
                dy,
                Some((&mut dx, Store::Overwrite)),
                dw,
                Some(db),
                layer.widths,
            )?;
            Ok(dx)
        };
        let mut d_h2 = layer(last, Activation::None, h2, logit, d_logit)?;
        let mut d_h1 = layer(second, Activation::Relu, h1, h2, &mut d_h2)?;
        layer(first, Activation::Relu, input, h1, &mut d_h1)
    }

    /// Adds to `d_s` and returns the gradient of `r: [C, D]`.
    fn target_backward(
        &self,
        s: &D::Buffer<f32>,
        interest: &Interest<D>,
        f: usize,
        d_att: &D::Buffer<f32>,
        d_s: &mut D::Buffer<f32>,
        grads: &mut Tensors<D>,
    ) -> Result<D::Buffer<f32>, DeviceError> {
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let target = &self.layout.target[f];
        let (mut da, mut dr) = (device.alloc(batch.tokens * width)?, device.alloc(batch.pairs * width)?);
        let [m0, m1, m2] = target.mlp;
        let [w0, b0, w1, b1, w2, b2] = grads.six([m0.w, m0.b, m1.w, m1.b, m2.w, m2.b]);
        let gradients = TargetWeights { w0, b0, w1, b1, w2, b2 };
        let Interest { a, r, e, lse, att, .. } = interest;
        device.target_attention_backward(
            &batch.target_attention,
            s,
            a,
            r,
            self.target_weights(f),
            e,
            lse,
            att,
            d_att,
            d_s,
            &mut da,
            &mut dr,
            gradients,
        )?;
        let dw = &mut grads[target.w];
        device.linear_backward(
            s,
            &self.p[target.w],
            Activation::None,
            a,
            &mut da,
            Some((d_s, Store::Add)),
            dw,
            None,
            (width, width),
        )?;
        Ok(dr)
    }

    /// Adds to `d_seq`.
    fn interest_encoder_backward(
        &self,
        interest: Interest<D>,
        f: usize,
        d_mean: &D::Buffer<f32>,
        d_seq: &mut D::Buffer<f32>,
        grads: &mut Tensors<D>,
    ) -> Done {
        let (device, batch, width) = (self.device, self.batch, self.config.width);
        let split = &batch.split[f];
        let mut dy = device.alloc(split.tokens * width)?;
        device.prefix_mean_backward(
            width,
            &split.cu_seqlens,
            &batch.group_offsets,
            &split.count,
            &batch.group_length,
            d_mean,
            &mut dy,
        )?;
        let options = self.config.interest_attention();
        let dx = block::backward(
            device,
            &self.layout.interest[f],
            self.p,
            grads,
            &self.interest_sequences(f, &options),
            interest.blocks,
            dy,
        )?;
        device.scatter_add(width, &dx, &split.token, d_seq)
    }

    fn target_weights(&self, f: usize) -> TargetWeights<&D::Buffer<f32>> {
        let [m0, m1, m2] = self.layout.target[f].mlp;
        let p = self.p;
        TargetWeights { w0: &p[m0.w], b0: &p[m0.b], w1: &p[m1.w], b1: &p[m1.b], w2: &p[m2.w], b2: &p[m2.b] }
    }
}
