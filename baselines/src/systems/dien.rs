//! DIEN (Zhou et al., AAAI 2019):
//!
//! ```text
//! s_t   = item[x_t];   h = GRU(s)                                  interest extractor
//! a     = softmax over the prefix of h_t A e
//! g_t   = (1 - a_t u_t) * g_(t-1) + a_t u_t * n_t                  AUGRU over h: interest evolution
//! S     = sum of s_t
//! parts = [e, g_L, S, e * S]
//! ```
//!
//! Auxiliary loss: [`next_event`](crate::ops::next_event), once for each encoded history. The GRU,
//! `S`, this loss, and the input products of attention and AUGRU are made once for each event.
//! Softmax and AUGRU remain for each prefix and candidate, and take nearly all the time. As in the
//! paper, and not in the published code, `a = 0` leaves the state alone.

use crate::ops::cell::{Cell, Steps};
use crate::ops::gru::States;
use crate::ops::next_event::{NextEvent, next_event_loss};
use crate::ops::prefix;
use crate::ops::prefix_attention::PrefixAttention;
use crate::ops::sequences::Sequences;
use crate::system::{Context, Encoded, Gradients, Part, Per, Settings, System};
use crate::{Floats, Result};
use dfar::device::cpu::elementwise::add_assign;
use dfar::device::{
    Activation, Dense, DeviceError, Embedding, Linear, LinearGradients, Lookup, Memory, Output,
};
use dfar::model::parameters::{Id, Names, glorot};

/// DIEN.
pub struct Dien {
    gru: Cell,
    /// `A: [D, D]`
    attention: Id,
    augru: Cell,
}

/// The steps of each row: its prefix.
struct Rows {
    first: Vec<u32>,
    offsets: Vec<u32>,
}

impl Rows {
    fn new(cx: Context) -> Result<Self> {
        let batch = &cx.x.batch;
        let mut first = Vec::with_capacity(batch.rows());
        for (groups, &start) in batch.group_offsets.windows(2).zip(&batch.cu_seqlens) {
            first.resize(batch.row_offsets[groups[1] as usize] as usize, start);
        }
        let mut offsets = vec![0u32];
        for length in &batch.row_length {
            let end = offsets[offsets.len() - 1].checked_add(*length);
            offsets.push(end.ok_or(DeviceError::Memory { bytes: usize::MAX })?);
        }
        Ok(Self { first, offsets })
    }

    fn sequences(&self) -> Sequences<'_> {
        Sequences { first: &self.first, offsets: &self.offsets }
    }
}

/// What the backward pass reads.
struct State {
    /// `[N, D]`
    events: Floats,
    /// `[N, 3D]` input product of the GRU.
    of_events: Floats,
    /// `[N, D]`
    h: Floats,
    /// `[N, 3D]` input product of the AUGRU.
    of_states: Floats,
    /// `[N, D]` `h A`
    key: Floats,
    /// `[R, D]` the candidate of each row.
    e: Floats,
    /// `[steps]`
    weights: Floats,
    /// `[steps, D]`; empty where only scores are asked for.
    g: Floats,
    /// `[G, D]`
    sum: Floats,
    rows: Rows,
}

impl State {
    fn gru<'a>(&'a self, cx: Context<'a>) -> Steps<'a> {
        Steps { sequences: Sequences::packed(&cx.x.batch.cu_seqlens), inputs: &self.of_events, gate: None }
    }

    fn augru(&self) -> Steps<'_> {
        Steps { sequences: self.rows.sequences(), inputs: &self.of_states, gate: Some(&self.weights) }
    }

    fn attention(&self, width: usize) -> PrefixAttention<'_> {
        PrefixAttention { width, sequences: self.rows.sequences(), key: &self.key, query: &self.e }
    }
}

impl Dien {
    /// Names the parameters `gru.*`, `attention.w` and `augru.*`.
    pub fn new(names: &mut Names, settings: &Settings) -> Self {
        let width = settings.width;
        Self {
            gru: Cell::new(names, "gru", width),
            attention: names.tensor("attention.w", &[width, width], glorot(width, width)),
            augru: Cell::new(names, "augru", width),
        }
    }

    fn attention<'a>(&self, cx: Context<'a>) -> Linear<&'a Floats> {
        let w = &cx.p[self.attention];
        Linear { w, bias: None, activation: Activation::None, inputs: cx.width, outputs: cx.width }
    }

    /// The state of a forward pass, and the last state of each row: `[R, D]`.
    fn forward(&self, cx: Context) -> Result<(State, Floats)> {
        let (device, batch, width) = (cx.device, &cx.x.batch, cx.width);
        let events = cx.events()?;
        let mut state = State {
            of_events: self.gru.inputs(cx, &events)?,
            h: device.alloc(events.len())?,
            of_states: device.alloc(0)?,
            key: device.alloc(events.len())?,
            e: device.alloc(batch.rows() * width)?,
            weights: device.alloc(0)?,
            g: device.alloc(0)?,
            sum: prefix::sum(cx, &events)?,
            rows: Rows::new(cx)?,
            events,
        };
        let mut h = device.alloc(state.events.len())?;
        self.gru.forward(cx, state.gru(cx), States { every: Some(&mut h), last: None });
        device.linear(self.attention(cx), &h, Output::overwrite(&mut state.key))?;
        state.of_states = self.augru.inputs(cx, &h)?;
        state.h = h;
        let steps = state.rows.sequences().steps();
        let candidates = cx.candidates()?;
        copy_rows(width, &candidates, &batch.row_pair, &mut state.e);
        let mut weights = device.alloc(steps)?;
        state.attention(width).forward(&mut weights);
        state.weights = weights;
        let mut last = device.alloc(batch.rows() * width)?;
        let mut g = device.alloc(if cx.gradients { steps * width } else { 0 })?;
        let every = cx.gradients.then_some(&mut g[..]);
        self.augru.forward(cx, state.augru(), States { every, last: Some(&mut last) });
        state.g = g;
        Ok((state, last))
    }

    /// Adds the gradients to `grads`. Returns the auxiliary loss.
    fn backward(&self, cx: Context, state: &State, d_parts: &[Floats], grads: &mut Gradients) -> Result<f64> {
        let (device, batch, width) = (cx.device, &cx.x.batch, cx.width);
        let [d_last, d_sum, d_product] = d_parts else { panic!("DIEN has three parts") };

        // e * S
        let mut d_sum: Floats = device.upload(d_sum)?;
        let rows = batch.row_group.iter().zip(&batch.row_pair);
        for ((&group, &pair), (d, e)) in
            rows.zip(d_product.chunks_exact(width).zip(state.e.chunks_exact(width)))
        {
            let group = group as usize * width..(group as usize + 1) * width;
            let d_e = &mut grads.candidates[pair as usize * width..][..width];
            add_product(d, e, &mut d_sum[group.clone()]);
            add_product(d, &state.sum[group], d_e);
        }

        let d_g = States { every: None, last: Some(&d_last[..]) };
        let kept = (&state.h, &state.g);
        let (mut d_h, d_weights) = self.augru.backward(cx, &mut grads.dense, state.augru(), kept, d_g)?;

        let (mut d_key, mut d_e) = (device.alloc(state.key.len())?, device.alloc(state.e.len())?);
        state.attention(width).backward(&state.weights, &d_weights, &mut d_key, &mut d_e);
        for (&pair, d_e) in batch.row_pair.iter().zip(d_e.chunks_exact(width)) {
            add_assign(d_e, &mut grads.candidates[pair as usize * width..][..width]);
        }
        let dw = &mut grads.dense[self.attention];
        let gradients = LinearGradients { dx: Some(Output::add(&mut d_h)), dw, dbias: None };
        device.linear_backward(self.attention(cx), &state.h, &state.key, &mut d_key, gradients)?;

        let auxiliary = self.auxiliary(cx, state, &mut d_h, grads)?;

        let d_states = States { every: Some(&d_h[..]), last: None };
        let kept = (&state.events, &state.h);
        let (d_events, _) = self.gru.backward(cx, &mut grads.dense, state.gru(cx), kept, d_states)?;
        add_assign(&d_events, &mut grads.tokens);
        add_assign(&prefix::sum_backward(cx, &d_sum)?, &mut grads.tokens);
        Ok(auxiliary)
    }

    /// The auxiliary loss; 0 for a batch without sampled negatives.
    fn auxiliary(&self, cx: Context, state: &State, d_h: &mut [f32], grads: &mut Gradients) -> Result<f64> {
        if cx.x.negative_item.is_empty() {
            return Ok(0.0);
        }
        let mut negative = cx.device.alloc(state.events.len())?;
        let rows = Lookup { table: &cx.p[cx.tables.item], index: &cx.x.negative_item };
        cx.device.gather_sum(cx.width, &[rows], &mut negative)?;
        let values = NextEvent { state: &state.h[..], event: &state.events[..], negative: &negative[..] };
        let gradients =
            NextEvent { state: d_h, event: &mut grads.tokens[..], negative: &mut grads.negatives[..] };
        Ok(next_event_loss(cx.width, cx.auxiliary, &cx.x.batch.cu_seqlens, values, Some(gradients)))
    }
}

impl System for Dien {
    fn encode<'a>(&'a self, cx: Context<'a>) -> Result<Encoded<'a>> {
        let batch = &cx.x.batch;
        let (state, last) = self.forward(cx)?;
        let sum = cx.device.upload(&state.sum)?;
        let mut product = cx.device.zeros(state.e.len())?;
        for ((&group, e), product) in
            batch.row_group.iter().zip(state.e.chunks_exact(cx.width)).zip(product.chunks_exact_mut(cx.width))
        {
            add_product(e, &sum[group as usize * cx.width..][..cx.width], product);
        }
        let part = |values, per| Part { values, width: cx.width, per };
        Ok(Encoded {
            parts: vec![part(last, Per::Row), part(sum, Per::Group), part(product, Per::Row)],
            backward: Box::new(move |_, d_parts, grads| self.backward(cx, &state, &d_parts, grads)),
        })
    }
}

/// `y[i] = x[index[i]]`
fn copy_rows(width: usize, x: &[f32], index: &[u32], y: &mut [f32]) {
    for (&i, y) in index.iter().zip(y.chunks_exact_mut(width)) {
        y.copy_from_slice(&x[i as usize * width..][..width]);
    }
}

/// `z += x * y`
fn add_product(x: &[f32], y: &[f32], z: &mut [f32]) {
    z.iter_mut().zip(x.iter().zip(y)).for_each(|(z, (x, y))| *z += x * y);
}
