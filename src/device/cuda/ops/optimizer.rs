//! Launches of `step/optimizer.cu`: gradient clipping and Adam over all tensors.

use super::loss::BLOCK_SUM_SHARED;
use crate::device::cuda::array::{Array, Staging};
use crate::device::cuda::gpu::Gpu;
use crate::device::cuda::kernel::{Block, Kernel, Launch, Module, Pointer};
use crate::device::cuda::plan::rows::{THREADS, block_of};
use crate::device::cuda::runtime::Runtime;
use crate::device::{AdamRows, AdamStep, AdamTensor, Clip, DeviceError, Optimizer, Slot};
use bytemuck::{Pod, Zeroable};

const fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: Module::new("step/optimizer.cu"), entry }
}

const SQUARES: Kernel = kernel("optimizer_squares");
const NORMS: Kernel = kernel("optimizer_norms");
const ADAM: Kernel = kernel("optimizer_adam");

/// All kernels of the file, each with its largest block.
pub const KERNELS: &[(Kernel, Block)] = &[
    (SQUARES, block_of(BLOCK_SUM_SHARED)),
    (NORMS, Block { warps: NORM_THREADS / 32, shared_bytes: 0 }),
    (ADAM, block_of(0)),
];

/// Threads of the single block of `optimizer_norms`: `NORM_THREADS` of `step/optimizer.cu`.
pub const NORM_THREADS: usize = 1024;

/// As `Tensor` of `step/optimizer.cu`.
#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Tensor {
    value: Pointer,
    first: Pointer,
    second: Pointer,
    gradient: Pointer,
    rows: Pointer,
    len: u64,
    width: u32,
    first_chunk: u32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct OptimizerParams {
    tensors: Pointer,
    squares: Pointer,
    tensor_square: Pointer,
    factor: Pointer,
    losses: Pointer,
    norm: Pointer,
    previous: Pointer,
    tensor_count: u32,
    chunk_count: u32,
    chunk: u32,
    loss_count: u32,
    lr: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    correction1: f32,
    correction2: f32,
    limit: f32,
    global: u32,
}

// As in step/optimizer.cu.
const _: () = assert!(size_of::<Tensor>() == 56);
const _: () = assert!(size_of::<OptimizerParams>() == 104);

/// Values per chunk: at least four accesses per thread, and at most about 4096 chunks. The chunks
/// determine the order of summation, so they depend on the number of values only.
fn chunk_of(values: usize) -> usize {
    4096 * values.div_ceil(4096 * 4096).max(1)
}

impl<R: Runtime> Optimizer for Gpu<R> {
    fn adam(
        &self,
        step: &AdamStep,
        tensors: &mut [AdamTensor<Array<R, f32>, Array<R, u32>>],
        norm: Slot<Array<R, f64>>,
        previous: Option<&Array<R, f64>>,
    ) -> Result<(), DeviceError> {
        assert!(norm.index < norm.values.len(), "the slot lies outside its buffer");
        assert!(previous.is_none_or(|previous| norm.index < previous.len()), "the slot of the step before");
        self.settle_gradients()?;
        let chunk = chunk_of(tensors.iter().map(|t| t.gradient.len()).sum());
        let mut chunks = 0;
        let mut table = Vec::with_capacity(tensors.len());
        for t in tensors.iter() {
            assert_eq!(
                [t.first.len(), t.second.len()],
                [t.value.len(); 2],
                "a tensor and its moments differ in length"
            );
            let (rows, width) = match t.rows {
                None => {
                    assert_eq!(t.gradient.len(), t.value.len(), "a tensor and its gradient differ in length");
                    (0, 1)
                }
                Some(AdamRows { index, width }) => {
                    assert_eq!(
                        t.gradient.len(),
                        index.len() * width,
                        "a gradient by rows is not [rows, width]"
                    );
                    (index.pointer(), width)
                }
            };
            table.push(Tensor {
                value: t.value.pointer(),
                first: t.first.pointer(),
                second: t.second.pointer(),
                gradient: t.gradient.pointer(),
                rows,
                len: t.gradient.len() as u64,
                width: width as u32,
                first_chunk: chunks as u32,
            });
            chunks += t.gradient.len().div_ceil(chunk);
        }
        // A pinned staging buffer: a copy from pageable memory may wait for the device.
        let mut staging = Staging::new(self.runtime())?;
        let table = staging.add(&table)?;
        staging.send()?;
        let squares = self.array::<f64>(chunks)?;
        let tensor_square = self.array::<f64>(tensors.len())?;
        let factor = self.array::<f32>(tensors.len() + 1)?;
        let correction = |beta: f32| (1.0 - f64::from(beta).powf(step.step as f64)) as f32;
        let (limit, global) = match step.clip {
            None => (-1.0, 0),
            Some(Clip::PerTensor(limit)) => (limit, 0),
            Some(Clip::Global(limit)) => (limit, 1),
        };
        let params = OptimizerParams {
            tensors: table.pointer(),
            squares: squares.pointer(),
            tensor_square: tensor_square.pointer(),
            factor: factor.pointer(),
            losses: norm.values.pointer(),
            norm: norm.values.pointer_at(norm.index),
            previous: previous.map_or(0, |previous| previous.pointer_at(norm.index)),
            tensor_count: tensors.len() as u32,
            chunk_count: chunks as u32,
            chunk: chunk as u32,
            loss_count: norm.index as u32,
            lr: step.lr,
            beta1: step.beta1,
            beta2: step.beta2,
            eps: step.eps,
            correction1: correction(step.beta1),
            correction2: correction(step.beta2),
            limit,
            global,
        };
        let by_chunk = |shared_bytes: usize| Launch {
            grid: [chunks as u32, 1],
            threads: THREADS as u32,
            shared_bytes: shared_bytes as u32,
        };
        let norms = Launch { grid: [1, 1], threads: NORM_THREADS as u32, shared_bytes: 0 };
        // SAFETY: the table has the addresses and checked lengths of tensors that are borrowed
        // mutably; the caller guarantees the row indices; squares, tensor_square and factor have
        // the lengths of these counts and are freed behind the launches on the same stream.
        unsafe {
            self.launch(SQUARES, by_chunk(BLOCK_SUM_SHARED), &params)?;
            self.launch(NORMS, norms, &params)?;
            self.launch(ADAM, by_chunk(0), &params)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::chunk_of;

    #[test]
    fn there_are_never_many_more_than_4096_chunks() {
        for values in [0, 1, 4096, 1 << 20, 1 << 24, (1 << 24) + 1, 3_000_000_000] {
            let chunk = chunk_of(values);
            assert!(chunk.is_multiple_of(4096) && values.div_ceil(chunk) <= 4096, "{values}: {chunk}");
        }
    }
}
