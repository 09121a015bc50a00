//! Arguments of the kernels, as `kernels/params.cuh` and `kernels/seqlen.cuh` declare them.

use crate::device::cuda::kernel::Pointer;
use bytemuck::{Pod, Zeroable};
use std::mem::{offset_of, size_of};

/// Arguments of every kernel of `attention.cu`; what a kernel reads and writes is said there.
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
    /// `[N, Q]`, from dq to dk_dv
    pub delta: Pointer,
    /// `[N, Q]`, f32 only, from dq to dk_dv
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
    /// [`Item`]s, one a block.
    pub items: Pointer,
    /// `H`
    pub heads: u32,
    /// `Q`
    pub query_slots: u32,
    /// `K`
    pub key_slots: u32,
    /// Heads of one feedback group; 0 without labels.
    pub group: u32,
    /// 1: a token sees itself and what came before.
    pub causal: u32,
    /// 1: only kept pairs enter the denominator.
    pub masked: u32,
    /// Factor on the scores.
    pub scale: f32,
    /// Whole sequences: warps that share one.
    pub item_warps: u32,
    /// Whole sequences: rows a head's keys have in shared memory.
    pub capacity: u32,
    /// 2^31 over the query rows of a token, rounded up.
    pub slot_share: u32,
}

/// A piece of one sequence: the work of one block.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct Item {
    /// First token of the sequence.
    pub start: u32,
    /// Its tokens.
    pub length: u32,
    /// Those of label 0; all of them without labels.
    pub negatives: u32,
    /// First query row, or first key in label order.
    pub first: u32,
}

// As in params.cuh and seqlen.cuh.
const _: () = assert!(size_of::<AttentionParams>() == 152);
const _: () = assert!(offset_of!(AttentionParams, items) == 104);
const _: () = assert!(offset_of!(AttentionParams, scale) == 136);
const _: () = assert!(size_of::<Item>() == 16);
