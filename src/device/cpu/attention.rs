//! Factorization-heads attention on the CPU, forward and backward, fused.
//!
//! A sequence's keys are packed once in *label order* (all negative tokens, then all positive ones) and
//! transposed, so that a vector register holds one feature of neighbouring keys. The score matrix then falls in
//! dense blocks, one a (key head, label), that are kept or not kept as a whole: nothing tests a label per
//! element. Because the order inside a label is that of time, what a causal query sees of a block is a prefix of
//! it, and causality is one count per (query, label).
//!
//! Queries are taken a few rows (token, head) at a time. A tile of rows scores a stretch of keys into scratch
//! that stays in the nearest cache, turns it into probabilities, multiplies with the values, and moves on with a
//! running maximum and sum. Scores are in base 2 from the start: `log2(e) * scale` is multiplied into the queries.
//!
//! | file | contents |
//! |---|---|
//! | `pack` | label order, visible counts, packed keys and values |
//! | `product` | the three matrix products in registers |
//! | `forward`, `backward` | a row tile through all its keys |
//! | `not_finite` | faults of the input, kept to what depends on them |
//!
//! Work is split in two by tokens until a piece is small: at sequence boundaries, and inside sequences longer
//! than `CHUNK`. Every piece writes its own rows of the outputs, and where the splits fall depends only on
//! `cu_seqlens`, so the number of threads never shows in a result. The packed keys of one sequence, `O(T)`, are
//! the largest thing in memory; each thread keeps its scratch for the next call.

#![allow(
    clippy::needless_range_loop,
    reason = "registers are indexed by row and vector, several arrays at once"
)]

mod backward;
mod forward;
mod not_finite;
mod pack;
mod product;

use crate::attention::{AttentionError, FhaOptions, Gradients, Inputs, LabelMask};
use crate::attention::{Normalization, Pairing};
use crate::device::cpu::simd::dispatch;
use crate::device::cpu::{Cpu, CpuBuffer, Done, Floats, Indices};
use crate::device::{Attention, DeviceError, Memory, Qkv, QkvGradients, SoftmaxState};
use backward::{Backward, Normalizer, Normalizers};
use forward::Forward;
use pack::{Row, Scratch};
use std::cell::RefCell;
use std::ops::Range;

/// Tokens of a long sequence whose queries (or, for `dk` and `dv`, keys) are one piece of work.
const CHUNK: usize = 512;

/// Longest sequence whose backward pass is one piece. Beyond it, `dq` and (`dk`, `dv`) are computed in two
/// passes over chunks, which costs 7 instead of 5 products a score but lets all threads work on one sequence.
const SINGLE_PASS: usize = 1024;

/// Work below this many tokens is not worth another thread.
const PIECE: usize = 256;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
    /// Of the long sequence this thread has the backward pass of, if any.
    static NORMALIZERS: RefCell<Vec<Normalizer>> = const { RefCell::new(Vec::new()) };
}

/// Bytes of scratch the calling thread holds.
pub fn scratch_bytes() -> usize {
    SCRATCH.with_borrow(Scratch::bytes)
}

/// Computes `o` (`[N, Q, K, d]`) and `lse` (`[N, Q]`); both are overwritten.
///
/// A row with nothing to attend to (possible only with [`Normalization::Masked`] and `causal = false`) has
/// output 0 and `lse` -inf. Input that is not finite spoils the rows that read it, and no others.
///
/// # Errors
/// [`FhaOptions::check`], and outputs of the wrong length; nothing is written then.
pub fn forward(
    options: &FhaOptions,
    inputs: Inputs,
    o: &mut [f32],
    lse: &mut [f32],
) -> Result<(), AttentionError> {
    options.check_outputs(&inputs, o.len(), lse.len())?;
    let shape = Shape::new(options);
    forward_sequences(&shape, &inputs, 0..inputs.cu_seqlens.len() - 1, o, lse);
    Ok(())
}

/// Computes the gradients of a loss with respect to `q`, `k` and `v`, given `o` and `lse` as [`forward`] left
/// them and the gradient `d_o` (`[N, Q, K, d]`) with respect to `o`.
///
/// Input that is not finite spoils the gradients that depend on it, and no others: docs/kernels.md, "What is not finite", says
/// which. Such a sequence is computed twice.
///
/// # Errors
/// [`FhaOptions::check`], and buffers of the wrong length; nothing is written then.
pub fn backward(
    options: &FhaOptions,
    inputs: Inputs,
    o: &[f32],
    lse: &[f32],
    d_o: &[f32],
    gradients: Gradients,
) -> Result<(), AttentionError> {
    use crate::attention::length;
    let tokens = options.check_outputs(&inputs, o.len(), lse.len())?;
    length("d_o", "[N, Q, K, d]", d_o.len(), options.output_len(tokens))?;
    let Gradients { dq, dk, dv } = gradients;
    for (name, found) in [("dq", dq.len()), ("dk", dk.len()), ("dv", dv.len())] {
        length(name, "[N, H, d]", found, inputs.q.len())?;
    }
    let shape = Shape::new(options);
    let saved = Saved { o, lse, d_o };
    backward_sequences(&shape, &inputs, &saved, 0..inputs.cu_seqlens.len() - 1, [dq, dk, dv]);
    Ok(())
}

/// The packed batch as [`forward`] and [`backward`] read it.
pub struct AttentionPlan {
    options: FhaOptions,
    cu_seqlens: Indices,
    label: CpuBuffer<u8>,
}

impl AttentionPlan {
    fn inputs<'a>(&'a self, qkv: Qkv<&'a Floats>) -> Inputs<'a> {
        let Qkv { q, k, v } = qkv;
        Inputs { q, k, v, cu_seqlens: &self.cu_seqlens, label: &self.label }
    }
}

impl Attention for Cpu {
    type AttentionPlan = AttentionPlan;

    fn attention_plan(
        &self,
        (): &mut (),
        options: &FhaOptions,
        cu_seqlens: &[u32],
        label: &[u8],
    ) -> Result<AttentionPlan, DeviceError> {
        let (cu_seqlens, label) = (self.upload(cu_seqlens)?, self.upload(label)?);
        Ok(AttentionPlan { options: *options, cu_seqlens, label })
    }
    fn attention(&self, plan: &AttentionPlan, qkv: Qkv<&Floats>, state: SoftmaxState<&mut Floats>) -> Done {
        Ok(forward(&plan.options, plan.inputs(qkv), state.o, state.lse)?)
    }
    fn attention_backward(
        &self,
        plan: &AttentionPlan,
        qkv: Qkv<&Floats>,
        state: SoftmaxState<&Floats>,
        d_o: &Floats,
        gradients: QkvGradients<&mut Floats>,
    ) -> Done {
        let QkvGradients { dq, dk, dv } = gradients;
        let (SoftmaxState { o, lse }, gradients) = (state, Gradients { dq, dk, dv });
        Ok(backward(&plan.options, plan.inputs(qkv), o, lse, d_o, gradients)?)
    }
}

/// The options, and what follows from them.
#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    d: usize,
    query_slots: usize,
    key_slots: usize,
    /// Lists a sequence's tokens are sorted into: 2 by label, or 1.
    lists: usize,
    masked: bool,
    per_head: bool,
    causal: bool,
    scale: f32,
}

/// Query heads that serve the same tokens and meet the same key heads.
#[derive(Clone)]
struct Group {
    /// The list of query tokens they serve.
    list: usize,
    /// The head that `slots.start` stands for.
    head: usize,
    /// Their slots in `o` and `lse`.
    slots: Range<usize>,
    /// The key heads they meet; slot 0 of `o` belongs to the first.
    key_heads: Range<usize>,
}

impl Shape {
    fn new(options: &FhaOptions) -> Self {
        let per_head = options.pairing == Pairing::PerHead;
        let lists = if options.label_mask == LabelMask::Feedback { 2 } else { 1 };
        Self {
            heads: options.heads,
            d: options.head_dim,
            query_slots: options.query_slots(),
            key_slots: options.key_slots(),
            lists,
            masked: options.normalization == Normalization::Masked,
            per_head,
            causal: options.causal,
            scale: options.scale,
        }
    }

    fn groups(self) -> impl Iterator<Item = Group> {
        let count = if self.per_head { self.heads } else { self.lists };
        (0..count).map(move |g| {
            if self.per_head {
                Group { list: 0, head: g, slots: g..g + 1, key_heads: g..g + 1 }
            } else {
                let slots = 0..self.query_slots;
                Group { list: g, head: g * self.query_slots, slots, key_heads: 0..self.heads }
            }
        })
    }

    /// Whether keys of list `list` reach the output through key head `head`.
    fn keeps(&self, head: usize, list: usize) -> bool {
        self.lists == 1 || head / (self.heads / 2) == list
    }

    /// Whether keys of list `list` are in the denominator through key head `head`.
    fn reads(&self, head: usize, list: usize) -> bool {
        !self.masked || self.keeps(head, list)
    }

    /// Values a token has in `q`, `k` or `v`.
    fn width(&self) -> usize {
        self.heads * self.d
    }

    /// Values a token has in `o`.
    fn output_width(&self) -> usize {
        self.query_slots * self.key_slots * self.d
    }
}

/// What the forward pass left, and the gradient that comes back.
struct Saved<'a> {
    o: &'a [f32],
    lse: &'a [f32],
    d_o: &'a [f32],
}

/// One sequence of the batch: its slices of everything that is read.
#[derive(Clone, Copy)]
struct Sequence<'a> {
    shape: &'a Shape,
    tokens: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// Empty where no label is read.
    label: &'a [u8],
}

impl<'a> Sequence<'a> {
    fn new(shape: &'a Shape, inputs: &Inputs<'a>, index: usize) -> Self {
        let tokens = span(inputs, index..index + 1);
        let part = |x: &'a [f32]| &x[tokens.start * shape.width()..tokens.end * shape.width()];
        Self {
            shape,
            tokens: tokens.len(),
            q: part(inputs.q),
            k: part(inputs.k),
            v: part(inputs.v),
            label: if shape.lists == 2 { &inputs.label[tokens] } else { &[] },
        }
    }

    /// The query of a row.
    fn query(&self, row: &Row) -> &'a [f32] {
        &self.q[row.token * self.shape.width() + row.head * self.shape.d..][..self.shape.d]
    }

    fn list(&self, token: usize) -> usize {
        if self.label.is_empty() { 0 } else { self.label[token] as usize }
    }
}

impl<'a> Saved<'a> {
    fn sequence(&self, shape: &Shape, tokens: Range<usize>) -> Saved<'a> {
        let (width, slots) = (shape.output_width(), shape.query_slots);
        Saved {
            o: &self.o[tokens.start * width..tokens.end * width],
            lse: &self.lse[tokens.start * slots..tokens.end * slots],
            d_o: &self.d_o[tokens.start * width..tokens.end * width],
        }
    }
}

/// The tokens of a range of sequences.
fn span(inputs: &Inputs, sequences: Range<usize>) -> Range<usize> {
    inputs.cu_seqlens[sequences.start] as usize..inputs.cu_seqlens[sequences.end] as usize
}

/// Where to split a range of sequences so that both sides have about the same number of tokens; `None` when
/// the range is small enough, or a single sequence.
fn split(inputs: &Inputs, sequences: &Range<usize>) -> Option<usize> {
    let tokens = span(inputs, sequences.clone());
    if sequences.len() < 2 || tokens.len() <= PIECE {
        return None;
    }
    let half = (tokens.start + tokens.len() / 2) as u32;
    let starts = &inputs.cu_seqlens[sequences.clone()];
    Some(sequences.start + starts.partition_point(|&s| s < half).clamp(1, sequences.len() - 1))
}

/// Where to split a range of tokens of one sequence; `None` when it is one chunk.
fn split_chunks(tokens: &Range<usize>) -> Option<usize> {
    (tokens.len() > CHUNK).then(|| tokens.start + tokens.len().div_ceil(CHUNK) / 2 * CHUNK)
}

fn forward_sequences(
    shape: &Shape,
    inputs: &Inputs,
    sequences: Range<usize>,
    mut o: &mut [f32],
    mut lse: &mut [f32],
) {
    if let Some(middle) = split(inputs, &sequences) {
        let tokens = span(inputs, sequences.start..middle).len();
        let (o, o_right) = o.split_at_mut(tokens * shape.output_width());
        let (lse, lse_right) = lse.split_at_mut(tokens * shape.query_slots);
        rayon::join(
            || forward_sequences(shape, inputs, sequences.start..middle, o, lse),
            || forward_sequences(shape, inputs, middle..sequences.end, o_right, lse_right),
        );
        return;
    }
    for index in sequences {
        let sequence = Sequence::new(shape, inputs, index);
        let here = o.split_off_mut(..sequence.tokens * shape.output_width()).expect("o has N rows");
        let lse = lse.split_off_mut(..sequence.tokens * shape.query_slots).expect("lse has N rows");
        forward_chunks(sequence, 0..sequence.tokens, here, lse);
    }
}

fn forward_chunks(sequence: Sequence, queries: Range<usize>, o: &mut [f32], lse: &mut [f32]) {
    let shape = sequence.shape;
    if let Some(middle) = split_chunks(&queries) {
        let tokens = middle - queries.start;
        let (o, o_right) = o.split_at_mut(tokens * shape.output_width());
        let (lse, lse_right) = lse.split_at_mut(tokens * shape.query_slots);
        rayon::join(
            || forward_chunks(sequence, queries.start..middle, o, lse),
            || forward_chunks(sequence, middle..queries.end, o_right, lse_right),
        );
    } else if !queries.is_empty() {
        SCRATCH.with_borrow_mut(|scratch| {
            dispatch(Forward { sequence, queries, o, lse, scratch });
        });
    }
}

fn backward_sequences(
    shape: &Shape,
    inputs: &Inputs,
    saved: &Saved,
    sequences: Range<usize>,
    mut gradients: [&mut [f32]; 3],
) {
    if let Some(middle) = split(inputs, &sequences) {
        let tokens = span(inputs, sequences.start..middle).len();
        let [dq, dk, dv] = gradients.map(|x| x.split_at_mut(tokens * shape.width()));
        rayon::join(
            || backward_sequences(shape, inputs, saved, sequences.start..middle, [dq.0, dk.0, dv.0]),
            || backward_sequences(shape, inputs, saved, middle..sequences.end, [dq.1, dk.1, dv.1]),
        );
        return;
    }
    for index in sequences {
        let sequence = Sequence::new(shape, inputs, index);
        let saved = saved.sequence(shape, span(inputs, index..index + 1));
        let [dq, dk, dv] = gradients
            .each_mut()
            .map(|x| x.split_off_mut(..sequence.tokens * shape.width()).expect("gradients have N rows"));
        backward_sequence(sequence, &saved, [&mut *dq, &mut *dk, &mut *dv]);
        // Without causality there is no key that a row does not see.
        if shape.causal && !not_finite::is_finite(dq) {
            not_finite::confine(sequence, &saved, [dq, dk, dv], backward_sequence);
        }
    }
}

fn backward_sequence(sequence: Sequence, saved: &Saved, [dq, dk, dv]: [&mut [f32]; 3]) {
    let all = 0..sequence.tokens;
    if sequence.tokens <= SINGLE_PASS {
        run_backward(sequence, saved, all.clone(), all, Normalizers::Find, Some(dq), Some([dk, dv]));
    } else {
        // Taken out while it is used: a thread that waits in `join` may start on another long sequence.
        let mut normalizers = NORMALIZERS.take();
        normalizers.resize(all.len() * sequence.shape.query_slots, Normalizer::default());
        backward_queries(sequence, saved, all.clone(), &mut normalizers, dq);
        backward_keys(sequence, saved, all, &normalizers, dk, dv);
        NORMALIZERS.set(normalizers);
    }
}

/// `dq` of a range of queries, and their normalizers.
fn backward_queries(
    sequence: Sequence,
    saved: &Saved,
    queries: Range<usize>,
    normalizers: &mut [Normalizer],
    dq: &mut [f32],
) {
    let shape = sequence.shape;
    if let Some(middle) = split_chunks(&queries) {
        let tokens = middle - queries.start;
        let (dq, dq_right) = dq.split_at_mut(tokens * shape.width());
        let (normalizers, right) = normalizers.split_at_mut(tokens * shape.query_slots);
        rayon::join(
            || backward_queries(sequence, saved, queries.start..middle, normalizers, dq),
            || backward_queries(sequence, saved, middle..queries.end, right, dq_right),
        );
    } else {
        let keys = 0..if shape.causal { queries.end } else { sequence.tokens };
        run_backward(sequence, saved, keys, queries, Normalizers::Record(normalizers), Some(dq), None);
    }
}

/// `dk` and `dv` of a range of keys.
fn backward_keys(
    sequence: Sequence,
    saved: &Saved,
    keys: Range<usize>,
    normalizers: &[Normalizer],
    dk: &mut [f32],
    dv: &mut [f32],
) {
    if let Some(middle) = split_chunks(&keys) {
        let left = (middle - keys.start) * sequence.shape.width();
        let (dk, dk_right) = dk.split_at_mut(left);
        let (dv, dv_right) = dv.split_at_mut(left);
        rayon::join(
            || backward_keys(sequence, saved, keys.start..middle, normalizers, dk, dv),
            || backward_keys(sequence, saved, middle..keys.end, normalizers, dk_right, dv_right),
        );
    } else {
        let queries = if sequence.shape.causal { keys.start } else { 0 }..sequence.tokens;
        let normalizers = Normalizers::Recorded(normalizers);
        run_backward(sequence, saved, keys, queries, normalizers, None, Some([dk, dv]));
    }
}

fn run_backward(
    sequence: Sequence,
    saved: &Saved,
    keys: Range<usize>,
    queries: Range<usize>,
    normalizers: Normalizers,
    dq: Option<&mut [f32]>,
    dkv: Option<[&mut [f32]; 2]>,
) {
    if !queries.is_empty() {
        SCRATCH.with_borrow_mut(|scratch| {
            dispatch(Backward { sequence, saved, keys, queries, normalizers, dq, dkv, scratch });
        });
    }
}
