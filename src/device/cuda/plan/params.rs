//! Kernel arguments, as declared in `attention/params.cuh` and `attention/seqlen.cuh`.

use crate::device::cuda::kernel::Pointer;
use bytemuck::{Pod, Zeroable};
use std::mem::{offset_of, size_of};

/// Arguments of every kernel of `attention/attention.cu`, which documents what each reads and
/// writes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub struct AttentionParams {
    /// `[N, H, d]`
    pub q: Pointer,
    /// `[N, H, d]`
    pub k: Pointer,
    /// `[N, H, d]`
    pub v: Pointer,
    /// `[N, Q, K, d]`
    pub o: Pointer,
    /// `[N, Q]`
    pub lse: Pointer,
    /// `[N, Q, K, d]`
    pub d_o: Pointer,
    /// `[N, Q]`, `sum_b <d_o, o>` of each row; written by dq, read by dk_dv.
    pub delta: Pointer,
    /// `[N, Q]`, f32 only: 1 over the sum of the row's `p`; written by dq, read by dk_dv.
    pub correction: Pointer,
    /// `[N, H, d]`
    pub dq: Pointer,
    /// `[N, H, d]`
    pub dk: Pointer,
    /// `[N, H, d]`
    pub dv: Pointer,
    /// [`Plan::order`](super::attention::Plan::order); null without labels.
    pub order: Pointer,
    /// [`Plan::feedback`](super::attention::Plan::feedback); null without labels.
    pub feedback: Pointer,
    /// [`Item`]s, one per block; for whole sequences, one per sequence.
    pub items: Pointer,
    /// Heads `H`.
    pub heads: u32,
    /// Query slots `Q`.
    pub query_slots: u32,
    /// Key slots `K`.
    pub key_slots: u32,
    /// Heads per feedback group; 0 without labels.
    pub group: u32,
    /// 1: causal, a token attends to itself and earlier tokens.
    pub causal: u32,
    /// 1: [`Masked`](crate::attention::Normalization::Masked), only kept pairs enter the
    /// denominator.
    pub masked: u32,
    /// Factor of the scores.
    pub scale: f32,
    /// Whole sequences: warps that share a sequence.
    pub item_warps: u32,
    /// Whole sequences: rows per key head in shared memory.
    pub capacity: u32,
    /// 2^31 over the query rows per token, rounded up.
    pub slot_share: u32,
}

/// A work item: a sequence, or one block's part of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Item {
    /// First token of the sequence in the batch.
    pub start: u32,
    /// Number of tokens of the sequence.
    pub length: u32,
    /// Number of tokens of label 0; without labels, of all tokens.
    pub negatives: u32,
    /// First query row of the block, or its first key in label order.
    pub first: u32,
}

// As in attention/params.cuh and attention/seqlen.cuh.
const _: () = assert!(size_of::<AttentionParams>() == 152);
const _: () = assert!(offset_of!(AttentionParams, items) == 104);
const _: () = assert!(offset_of!(AttentionParams, scale) == 136);
const _: () = assert!(size_of::<Item>() == 16);
