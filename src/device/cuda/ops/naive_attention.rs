//! Naive FHA on the device, for benchmarks: cuBLASLt products around
//! `attention/naive_attention.cu`, with all scores in memory.

use crate::attention::{FhaOptions, LabelMask, Normalization, Pairing};
use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Block, Kernel, Module, Pointer};
use crate::device::cuda::plan::rows::blocks;
use crate::device::cuda::runtime::{Gemm, Runtime};
use crate::device::{Activation, Store};
use bytemuck::{Pod, Zeroable};

const THREADS: usize = 256;

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("attention/naive_attention.cu"), entry }
}

/// All kernels of the file, each with its block.
pub const KERNELS: &[(Kernel, Block)] = &[
    (kernel("naive_split_heads"), BLOCK),
    (kernel("naive_merge_heads"), BLOCK),
    (kernel("naive_softmax"), BLOCK),
    (kernel("naive_softmax_backward"), BLOCK),
];
const BLOCK: Block = Block { warps: THREADS / 32, shared_bytes: 0 };

/// Mirrors `HeadsParams` of `attention/naive_attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct HeadsParams {
    x: Pointer,
    y: Pointer,
    label: Pointer,
    tokens: u32,
    heads: u32,
    slots: u32,
    group: u32,
    width: u32,
    unused: u32,
}

/// Mirrors `SoftmaxParams` of `attention/naive_attention.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct SoftmaxParams {
    scores: Pointer,
    d_scores: Pointer,
    lse: Pointer,
    label: Pointer,
    sequences: u32,
    length: u32,
    slots: u32,
    keys: u32,
    group: u32,
    causal: u32,
    masked: u32,
    scale: f32,
}

/// Buffers of the naive form for sequences of one length.
pub struct Naive<R: Runtime> {
    options: FhaOptions,
    sequences: usize,
    length: usize,
    label: Array<R, u8>,
    /// `q: [Q, N, d]`, `k: [H, N, d]` and `v: [H, N, d]`, head-major.
    split: [Array<R, f32>; 3],
    /// Scores, then probabilities: `[Q, H, sequences, T, T]`; and their gradients.
    scores: [Array<R, f32>; 2],
    /// `[Q * H, N, d]`, head-major.
    output: Array<R, f32>,
}

impl<R: Runtime> Gpu<R> {
    /// Allocates buffers for `sequences` sequences of `length` tokens, in f32. `label: [N]`.
    ///
    /// # Errors
    /// As [`Runtime::allocate`].
    ///
    /// # Panics
    /// If the pairing is [`Pairing::PerHead`], or if `label` has the wrong length.
    pub fn naive(
        &self,
        options: &FhaOptions,
        sequences: usize,
        length: usize,
        label: &[u8],
    ) -> Result<Naive<R>, CudaError> {
        assert_eq!(options.pairing, Pairing::Factorized, "naive attention supports Pairing::Factorized only");
        let tokens = sequences * length;
        let labelled = options.label_mask == LabelMask::Feedback;
        assert!(!labelled || label.len() == tokens, "{} labels for {tokens} tokens", label.len());
        let (slots, heads, d) = (options.query_slots(), options.heads, options.head_dim);
        let scores = || self.array(slots * heads * tokens * length);
        Ok(Naive {
            options: *options,
            sequences,
            length,
            label: self.copy_of(if labelled { label } else { &[] })?,
            split: [
                self.array(slots * tokens * d)?,
                self.array(heads * tokens * d)?,
                self.array(heads * tokens * d)?,
            ],
            scores: [scores()?, scores()?],
            output: self.array(slots * heads * tokens * d)?,
        })
    }

    /// Converts `[N, heads, d]` to `[slots, N, d]`, or back.
    fn heads(
        &self,
        naive: &Naive<R>,
        entry: &'static str,
        x: &Array<R, f32>,
        y: &mut Array<R, f32>,
        [heads, slots]: [usize; 2],
    ) -> Result<(), CudaError> {
        let (tokens, d) = (naive.sequences * naive.length, naive.options.head_dim);
        let [inner, outer] = if entry == "naive_split_heads" { [heads, slots] } else { [slots, heads] };
        assert!(
            x.len() == inner * tokens * d && y.len() == outer * tokens * d,
            "x and y have {} and {} values",
            x.len(),
            y.len()
        );
        let params = HeadsParams {
            x: x.pointer(),
            y: y.pointer(),
            label: if slots < heads { naive.label.pointer() } else { 0 },
            tokens: tokens as u32,
            heads: heads as u32,
            slots: slots as u32,
            group: (heads / 2) as u32,
            width: d as u32,
            unused: 0,
        };
        // SAFETY: lengths are checked above; y is borrowed mutably; with fewer slots than heads,
        // every token has a label.
        unsafe { self.launch(kernel(entry), blocks(y.len(), THREADS), &params) }
    }

    fn split_inputs(&self, naive: &mut Naive<R>, qkv: [&Array<R, f32>; 3]) -> Result<(), CudaError> {
        let (heads, slots) = (naive.options.heads, naive.options.query_slots());
        for (i, x) in qkv.into_iter().enumerate() {
            let mut y = std::mem::replace(&mut naive.split[i], self.array(0)?);
            let slots = if i == 0 { slots } else { heads };
            let done = self.heads(naive, "naive_split_heads", x, &mut y, [heads, slots]);
            naive.split[i] = y;
            done?;
        }
        Ok(())
    }

    fn softmax(&self, naive: &Naive<R>, entry: &'static str, lse: &Array<R, f32>) -> Result<(), CudaError> {
        let options = &naive.options;
        let rows = naive.sequences * naive.length * options.query_slots();
        assert_eq!(lse.len(), rows, "lse is not [N, Q]");
        let params = SoftmaxParams {
            scores: naive.scores[0].pointer(),
            d_scores: naive.scores[1].pointer(),
            lse: lse.pointer(),
            label: naive.label.pointer(),
            sequences: naive.sequences as u32,
            length: naive.length as u32,
            slots: options.query_slots() as u32,
            keys: options.heads as u32,
            group: (options.heads / 2) as u32,
            causal: options.causal.into(),
            masked: u32::from(
                options.normalization == Normalization::Masked && options.label_mask == LabelMask::Feedback,
            ),
            scale: options.scale,
        };
        // SAFETY: scores have the shapes of the options, and the length of lse is checked above;
        // one warp per row.
        unsafe { self.launch(kernel(entry), blocks(rows, THREADS / 32), &params) }
    }

    /// One product per sequence. `a`, `b`: array, matrix index, and whether it is transposed; `c`:
    /// array, matrix index, and how it is stored. Index `i` is the i-th group of `sequences`
    /// matrices.
    fn products(
        &self,
        naive: &Naive<R>,
        shape: [usize; 3],
        (a, a_at, a_transposed): (&Array<R, f32>, usize, bool),
        (b, b_at, b_transposed): (&Array<R, f32>, usize, bool),
        (c, c_at, store): (&Array<R, f32>, usize, Store),
    ) -> Result<(), CudaError> {
        let ([m, n, k], count) = (shape, naive.sequences);
        let at = |x: &Array<R, f32>, index: usize, size: usize| {
            assert!((index + 1) * count * size <= x.len(), "matrix {index} lies outside its array");
            x.pointer_at(index * count * size)
        };
        let gemm = Gemm {
            shape,
            a: at(a, a_at, m * k),
            a_transposed,
            b: at(b, b_at, k * n),
            b_transposed,
            c: at(c, c_at, m * n),
            store,
            bias: 0,
            activation: Activation::None,
            precision: self.precision(),
        };
        // SAFETY: all matrices lie inside their arrays, as checked above; c is in an array of its
        // own.
        unsafe { self.runtime().gemm_batch(&gemm, count) }
    }

    fn all_scores(&self, naive: &Naive<R>) -> Result<(), CudaError> {
        let Naive { options, length, split: [q, k, _], scores: [scores, _], .. } = naive;
        let shape = [*length, *length, options.head_dim];
        for (pair, (slot, head)) in pairs(options).enumerate() {
            self.products(naive, shape, (q, slot, false), (k, head, true), (scores, pair, Store::Overwrite))?;
        }
        Ok(())
    }

    /// Forward: `q`, `k`, `v`: `[N, H, d]` to `o: [N, Q, K, d]` and `lse: [N, Q]`.
    ///
    /// # Errors
    /// A kernel that does not compile, or a driver error.
    ///
    /// # Panics
    /// If an array has another shape.
    pub fn naive_forward(
        &self,
        naive: &mut Naive<R>,
        qkv: [&Array<R, f32>; 3],
        o: &mut Array<R, f32>,
        lse: &mut Array<R, f32>,
    ) -> Result<(), CudaError> {
        self.split_inputs(naive, qkv)?;
        self.all_scores(naive)?;
        self.softmax(naive, "naive_softmax", lse)?;
        let Naive { options, length, split: [.., v], scores: [p, _], output, .. } = &*naive;
        let shape = [*length, options.head_dim, *length];
        for (pair, (_, head)) in pairs(options).enumerate() {
            self.products(
                naive,
                shape,
                (p, pair, false),
                (v, head, false),
                (output, pair, Store::Overwrite),
            )?;
        }
        let slots = options.query_slots() * options.heads;
        self.heads(naive, "naive_merge_heads", output, o, [slots, slots])
    }

    /// Backward: `d_o: [N, Q, K, d]` to `dq`, `dk`, `dv`: `[N, H, d]`. Recomputes the probabilities
    /// from `lse`.
    ///
    /// # Errors
    /// A kernel that does not compile, or a driver error.
    ///
    /// # Panics
    /// If an array has another shape.
    pub fn naive_backward(
        &self,
        naive: &mut Naive<R>,
        qkv: [&Array<R, f32>; 3],
        lse: &Array<R, f32>,
        d_o: &Array<R, f32>,
        gradients: [&mut Array<R, f32>; 3],
    ) -> Result<(), CudaError> {
        self.split_inputs(naive, qkv)?;
        self.all_scores(naive)?;
        let (heads, slots, d) = (naive.options.heads, naive.options.query_slots(), naive.options.head_dim);
        let (tokens, length) = (naive.sequences * naive.length, naive.length);
        let mut split_d_o = self.array(slots * heads * tokens * d)?;
        self.heads(naive, "naive_split_heads", d_o, &mut split_d_o, [slots * heads; 2])?;
        let [split_dq, split_dk, split_dv] = [
            self.array(slots * tokens * d)?,
            self.array(heads * tokens * d)?,
            self.array(heads * tokens * d)?,
        ];
        let Naive { options, split: [q, k, v], scores: [p, ds], .. } = &*naive;
        let store = |first: bool| if first { Store::Overwrite } else { Store::Add };
        for (pair, (_, head)) in pairs(options).enumerate() {
            let shape = [length, length, d];
            self.products(
                naive,
                shape,
                (&split_d_o, pair, false),
                (v, head, true),
                (ds, pair, Store::Overwrite),
            )?;
        }
        self.softmax(naive, "naive_softmax_backward", lse)?;
        for (pair, (slot, head)) in pairs(options).enumerate() {
            let shape = [length, d, length];
            let (dq, dk, dv) = (
                (&split_dq, slot, store(head == 0)),
                (&split_dk, head, store(slot == 0)),
                (&split_dv, head, store(slot == 0)),
            );
            self.products(naive, shape, (ds, pair, false), (k, head, false), dq)?;
            self.products(naive, shape, (ds, pair, true), (q, slot, false), dk)?;
            self.products(naive, shape, (p, pair, true), (&split_d_o, pair, false), dv)?;
        }
        let [dq, dk, dv] = gradients;
        self.heads(naive, "naive_merge_heads", &split_dq, dq, [heads, slots])?;
        self.heads(naive, "naive_merge_heads", &split_dk, dk, [heads; 2])?;
        self.heads(naive, "naive_merge_heads", &split_dv, dv, [heads; 2])
    }
}

/// (query slot, key head) pairs, in the order of the scores.
fn pairs(options: &FhaOptions) -> impl Iterator<Item = (usize, usize)> + use<> {
    let heads = options.heads;
    (0..options.query_slots()).flat_map(move |slot| (0..heads).map(move |head| (slot, head)))
}
