//! Launches of `convert.cu`: heads from f32 and any width to what `attention.cu` is compiled for, and back.

use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Define, Element, Kernel, Module, Pointer, Value};
use crate::device::cuda::plan::rows::{THREADS, blocks};
use crate::device::cuda::runtime::Runtime;
use bytemuck::{Pod, Zeroable};

/// `convert.cu` for an element type.
pub const fn module(element: Element) -> Module {
    Module::new("convert.cu").with("DFAR_ELEMENT", Define::Word(element.cuda_name()))
}

/// Names of its kernels.
pub const ENTRIES: [&str; 2] = ["convert_to", "convert_from"];

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct ConvertParams {
    wide: Pointer,
    narrow: Pointer,
    rows: u64,
    width: u32,
    padded: u32,
}

// As in convert.cu.
const _: () = assert!(size_of::<ConvertParams>() == 32);

fn run<R: Runtime, T: Value>(
    gpu: &Gpu<R>,
    entry: &'static str,
    (wide, width): (&Array<R, f32>, usize),
    (narrow, padded): (&Array<R, T>, usize),
) -> Result<(), CudaError> {
    let rows = wide.len() / width;
    assert!(width <= padded && padded.is_multiple_of(8), "rows of {width} do not fit {padded}");
    assert_eq!((wide.len(), narrow.len()), (rows * width, rows * padded), "the arrays differ in rows");
    let params = ConvertParams {
        wide: wide.pointer(),
        narrow: narrow.pointer(),
        rows: rows as u64,
        width: width as u32,
        padded: padded as u32,
    };
    let kernel = Kernel { module: module(T::ELEMENT), entry };
    // SAFETY: lengths are checked above; callers own or mutably borrow what is written.
    unsafe { gpu.launch(kernel, blocks(rows * padded / 2, THREADS), &params) }
}

/// Rows of `width` values as rows of `padded`, zeros behind each.
pub(crate) fn to<R: Runtime, T: Value>(
    gpu: &Gpu<R>,
    (x, width): (&Array<R, f32>, usize),
    padded: usize,
) -> Result<Array<R, T>, CudaError> {
    let y = gpu.array(x.len() / width * padded)?;
    run(gpu, ENTRIES[0], (x, width), (&y, padded))?;
    Ok(y)
}

/// The first `width` values of each row of `padded`.
pub(crate) fn from<R: Runtime, T: Value>(
    gpu: &Gpu<R>,
    (y, padded): (&Array<R, T>, usize),
    (x, width): (&mut Array<R, f32>, usize),
) -> Result<(), CudaError> {
    run(gpu, ENTRIES[1], (x, width), (y, padded))
}
