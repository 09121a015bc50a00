//! Launches of `attention/convert.cu`: converts f32 heads of any width to the element type and
//! padded width of `attention/attention.cu`, and back.

use crate::device::cuda::array::Array;
use crate::device::cuda::error::CudaError;
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Define, Element, Kernel, Module, Pointer, Value};
use crate::device::cuda::plan::rows::{THREADS, blocks};
use crate::device::cuda::runtime::Runtime;
use bytemuck::{Pod, Zeroable};

/// `attention/convert.cu` for an element type.
pub const fn module(element: Element) -> Module {
    Module::new("attention/convert.cu").with("DFAR_ELEMENT", Define::Word(element.cuda_name()))
}

/// Its entry points: to the kernels' type and width, and back.
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

// As in attention/convert.cu.
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
    // SAFETY: the lengths are checked above; the callers own or mutably borrow the destination.
    unsafe { gpu.launch_for_both(kernel, blocks(rows * padded / 2, THREADS), &params) }
}

/// Converts rows of `width` f32 values to rows of `padded` values of type `T`, padded with zeros.
pub(crate) fn to<R: Runtime, T: Value>(
    gpu: &Gpu<R>,
    (x, width): (&Array<R, f32>, usize),
    padded: usize,
) -> Result<Array<R, T>, CudaError> {
    let y = gpu.array(x.len() / width * padded)?;
    run(gpu, ENTRIES[0], (x, width), (&y, padded))?;
    Ok(y)
}

/// Converts the first `width` values of each row of `padded` values to f32.
pub(crate) fn from<R: Runtime, T: Value>(
    gpu: &Gpu<R>,
    (y, padded): (&Array<R, T>, usize),
    (x, width): (&mut Array<R, f32>, usize),
) -> Result<(), CudaError> {
    run(gpu, ENTRIES[1], (x, width), (y, padded))
}
