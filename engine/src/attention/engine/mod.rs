//! Factorization-heads attention on the CPU, forward and backward, fused.
//!
//! **Label order.** The keys of a sequence are packed once, all negative tokens before all positive
//! ones, and transposed: a vector register holds one feature of neighbouring keys. The score matrix
//! falls into dense blocks, one per (key head, label). The label mask keeps or drops a whole block,
//! so no element needs a label test. Keys of one label keep their order in time, so a causal query
//! reads a prefix of each block. One count per (query, label) expresses causality.
//!
//! **Tiles.** A tile of a few query rows (token, head) scores a stretch of keys into scratch in the
//! first-level cache, turns the scores into probabilities, multiplies them with the values, and
//! continues with a running maximum and sum. Scores are in base 2: the queries carry the factor
//! `log2(e) * scale`.
//!
//! | file | contents |
//! |---|---|
//! | `pack` | label order, visible counts, packed keys and values |
//! | `product` | the three matrix products in registers |
//! | `forward`, `backward` | a tile of rows over all its keys |
//! | `short/` | small scores: forward to 1,024 tokens, backward to 320 |
//! | `non_finite` | non-finite propagation in the backward pass |
//!
//! **Threads.** Work is halved by tokens, at sequence boundaries and inside sequences longer than
//! `CHUNK`, until a piece is small. Each piece writes its own rows of the outputs. The split
//! depends only on `cu_seqlens`, so results are bitwise equal for any number of threads. The packed
//! keys of one sequence, `O(T)`, dominate the memory. Each thread keeps its scratch for the next
//! call.

#![allow(clippy::needless_range_loop, reason = "one index addresses the registers of several arrays")]

mod backward;
mod forward;
mod non_finite;
mod pack;
mod product;
mod short;

use super::{AttentionError, FhaOptions, Gradients, Inputs, LabelMask, Normalization, Pairing, length};
use crate::simd::dispatch;
use backward::{Backward, Normalizer, Normalizers};
use forward::Forward;
use pack::{Row, Scratch};
use std::cell::RefCell;
use std::ops::Range;

/// Queries (for `dk` and `dv`: keys) of a long sequence per piece of work.
const CHUNK: usize = 512;

/// Longest sequence with a backward pass in one piece. Longer ones take two passes over chunks, one
/// for `dq` and one for `dk` and `dv`. This costs 7 instead of 5 products per score, but all
/// threads can share one sequence.
const SINGLE_PASS: usize = 1024;

/// Pieces of at most this many tokens are not split further.
const PIECE: usize = 256;

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
    static SHORT: RefCell<short::Scratch> = RefCell::new(short::Scratch::default());
    /// For the long sequence whose backward pass runs on this thread.
    static NORMALIZERS: RefCell<Vec<Normalizer>> = const { RefCell::new(Vec::new()) };
}

/// Bytes of scratch of the calling thread.
pub fn scratch_bytes() -> usize {
    SCRATCH.with_borrow(Scratch::bytes) + SHORT.with_borrow(short::Scratch::bytes)
}

/// Computes `o` (`[N, Q, K, d]`) and `lse` (`[N, Q]`); both are overwritten.
///
/// A row without keys (possible only with [`Normalization::Masked`] and `causal = false`) has
/// output 0 and `lse` -inf; so has a row whose scores are all -inf. Any other non-finite input
/// reaches the rows that read it and no others.
///
/// # Errors
/// As [`FhaOptions::check`], and for outputs of the wrong length. The outputs are unchanged then.
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

/// Computes the gradients of a loss with respect to `q`, `k` and `v` from the results `o` and `lse`
/// of [`forward`] and the gradient `d_o` (`[N, Q, K, d]`) with respect to `o`.
///
/// A non-finite input reaches the gradients that depend on it and no others;
/// docs/kernels/attention.md lists them. The engine computes such a sequence twice.
///
/// # Errors
/// As [`FhaOptions::check`], and for buffers of the wrong length. The gradients are unchanged then.
pub fn backward(
    options: &FhaOptions,
    inputs: Inputs,
    o: &[f32],
    lse: &[f32],
    d_o: &[f32],
    gradients: Gradients,
) -> Result<(), AttentionError> {
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

/// The options, and sizes derived from them.
#[derive(Clone, Copy)]
struct Shape {
    heads: usize,
    d: usize,
    query_slots: usize,
    key_slots: usize,
    /// Lists of tokens per sequence: one per label, or 1 without label mask.
    lists: usize,
    masked: bool,
    per_head: bool,
    causal: bool,
    scale: f32,
}

/// Query heads that serve the same tokens and attend to the same key heads.
#[derive(Clone)]
struct Group {
    /// The list of their query tokens.
    list: usize,
    /// The head of slot `slots.start`.
    head: usize,
    /// Their slots in `o` and `lse`.
    slots: Range<usize>,
    /// The key heads they attend to; slot 0 of `o` belongs to the first.
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

    /// Whether the label mask keeps keys of list `list` in key head `head`.
    fn keeps(&self, head: usize, list: usize) -> bool {
        self.lists == 1 || head / (self.heads / 2) == list
    }

    /// Whether keys of list `list` in key head `head` enter the denominator.
    fn reads(&self, head: usize, list: usize) -> bool {
        !self.masked || self.keeps(head, list)
    }

    /// Values per token of `q`, `k` or `v`.
    fn width(&self) -> usize {
        self.heads * self.d
    }

    /// Values per token of `o`.
    fn output_width(&self) -> usize {
        self.query_slots * self.key_slots * self.d
    }
}

/// Results of the forward pass, and the gradient of the output.
struct Saved<'a> {
    o: &'a [f32],
    lse: &'a [f32],
    d_o: &'a [f32],
}

/// The inputs of one sequence.
#[derive(Clone, Copy)]
struct Sequence<'a> {
    shape: &'a Shape,
    tokens: usize,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    /// Empty without label mask.
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

    /// Its first `tokens` tokens.
    fn first(self, tokens: usize) -> Self {
        let part = |x: &'a [f32]| &x[..tokens * self.shape.width()];
        let label = if self.label.is_empty() { self.label } else { &self.label[..tokens] };
        Self { tokens, q: part(self.q), k: part(self.k), v: part(self.v), label, ..self }
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

/// Splits a range of sequences into two of about the same number of tokens. `None` for a small
/// range or a single sequence.
fn split(inputs: &Inputs, sequences: &Range<usize>) -> Option<usize> {
    let tokens = span(inputs, sequences.clone());
    if sequences.len() < 2 || tokens.len() <= PIECE {
        return None;
    }
    let half = (tokens.start + tokens.len() / 2) as u32;
    let starts = &inputs.cu_seqlens[sequences.clone()];
    Some(sequences.start + starts.partition_point(|&s| s < half).clamp(1, sequences.len() - 1))
}

/// Splits a range of tokens of one sequence. `None` for a single chunk.
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

/// Computes queries of a short sequence of small scores. `false` for another sequence.
fn forward_short(sequence: Sequence, queries: Range<usize>, o: &mut [f32], lse: &mut [f32]) -> bool {
    short::covers_forward(sequence.shape, sequence.tokens)
        && SHORT.with_borrow_mut(|scratch| dispatch(short::Forward { sequence, queries, o, lse, scratch }))
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
    } else if !queries.is_empty() && !forward_short(sequence, queries.clone(), o, lse) {
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
        let finite = backward_sequence(sequence, &saved, [&mut *dq, &mut *dk, &mut *dv]);
        // Without causality every row reads every key.
        if shape.causal && !finite {
            non_finite::confine(sequence, &saved, [dq, dk, dv], backward_sequence);
        }
    }
}

/// Returns whether `dq` is finite.
fn backward_sequence(sequence: Sequence, saved: &Saved, [dq, dk, dv]: [&mut [f32]; 3]) -> bool {
    if let Some(finite) = backward_short(sequence, saved, [&mut *dq, &mut *dk, &mut *dv]) {
        return finite;
    }
    let all = 0..sequence.tokens;
    if sequence.tokens <= SINGLE_PASS {
        run_backward(sequence, saved, all.clone(), all, Normalizers::Find, Some(&mut *dq), Some([dk, dv]));
    } else {
        // Taken, not borrowed: a thread that waits in `join` may start another long sequence.
        let mut normalizers = NORMALIZERS.take();
        normalizers.resize(all.len() * sequence.shape.query_slots, Normalizer::default());
        backward_queries(sequence, saved, all.clone(), &mut normalizers, &mut *dq);
        backward_keys(sequence, saved, all, &normalizers, dk, dv);
        NORMALIZERS.set(normalizers);
    }
    non_finite::is_finite(dq)
}

/// Computes a short sequence of small scores and returns whether `dq` is finite. `None` for another
/// sequence.
fn backward_short(sequence: Sequence, saved: &Saved, gradients: [&mut [f32]; 3]) -> Option<bool> {
    if !short::covers_backward(sequence.shape, sequence.tokens) {
        return None;
    }
    SHORT.with_borrow_mut(|scratch| dispatch(short::Backward { sequence, saved, gradients, scratch }))
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
