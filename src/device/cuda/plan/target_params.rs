//! Arguments of the kernels of `target/target_attention.cu`.

use crate::device::cuda::kernel::Pointer;
use bytemuck::{Pod, Zeroable};
use std::mem::size_of;

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct MlpParams {
    pub(crate) items: Pointer,
    pub(crate) pairs: Pointer,
    pub(crate) a: Pointer,
    pub(crate) r: Pointer,
    pub(crate) z: Pointer,
    pub(crate) c: Pointer,
    pub(crate) w0: Pointer,
    pub(crate) w1: Pointer,
    pub(crate) b1: Pointer,
    pub(crate) w2: Pointer,
    pub(crate) b2: Pointer,
    pub(crate) e: Pointer,
    pub(crate) de: Pointer,
    pub(crate) token_sums: Pointer,
    pub(crate) pair_sums: Pointer,
    pub(crate) weight_sums: Pointer,
    pub(crate) item_count: u32,
    pub(crate) width: u32,
    pub(crate) hidden0: u32,
    pub(crate) hidden1: u32,
    pub(crate) blocks: u32,
    pub(crate) slope: f32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct SoftmaxParams {
    pub(crate) rows: Pointer,
    pub(crate) pairs: Pointer,
    pub(crate) pair_rows: Pointer,
    pub(crate) tiles: Pointer,
    pub(crate) s: Pointer,
    pub(crate) e: Pointer,
    pub(crate) lse: Pointer,
    pub(crate) att: Pointer,
    pub(crate) datt: Pointer,
    pub(crate) de: Pointer,
    pub(crate) ds: Pointer,
    pub(crate) row_count: u32,
    pub(crate) width: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct CombineParams {
    pub(crate) w0: Pointer,
    pub(crate) b0: Pointer,
    pub(crate) token: Pointer,
    pub(crate) candidate: Pointer,
    pub(crate) bias: Pointer,
    pub(crate) width: u32,
    pub(crate) hidden0: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct SumParams {
    pub(crate) list: Pointer,
    pub(crate) sums: Pointer,
    pub(crate) hidden: Pointer,
    pub(crate) input: Pointer,
    pub(crate) count: u32,
    pub(crate) width: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
pub(crate) struct GradientParams {
    pub(crate) token: Pointer,
    pub(crate) candidate: Pointer,
    pub(crate) bias: Pointer,
    pub(crate) sums: Pointer,
    pub(crate) w0: Pointer,
    pub(crate) b0: Pointer,
    pub(crate) w1: Pointer,
    pub(crate) b1: Pointer,
    pub(crate) w2: Pointer,
    pub(crate) b2: Pointer,
    pub(crate) width: u32,
    pub(crate) hidden0: u32,
    pub(crate) hidden1: u32,
    pub(crate) unused: u32,
}

// As in the headers of target/target_attention.cu.
const _: () = assert!(size_of::<MlpParams>() == 152);
const _: () = assert!(size_of::<SoftmaxParams>() == 96);
const _: () = assert!(size_of::<CombineParams>() == 48);
const _: () = assert!(size_of::<SumParams>() == 40);
const _: () = assert!(size_of::<GradientParams>() == 96);
