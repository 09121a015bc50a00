//! Execution and memory of [`Gpu`], and the list of all kernels. The operations are in
//! [`ops`](super::ops).

use super::array::{Array, Download, Staging};
use super::error::CudaError;
use super::gpu::{Gpu, products};
use super::kernel::{self, Block, Kernel};
use super::ops::{
    convert, embedding, layer_norm, limits, loss, naive_attention, optimizer, prefix_mean, rows,
    target_attention,
};
use super::plan::rows::block_of;
use super::plan::target_shape::Shape;
use super::runtime::{self, Runtime};
use crate::device::{DeviceError, Element, Execution, Memory};

type Done = Result<(), DeviceError>;

impl<R: Runtime> Execution for Gpu<R> {
    type Event = R::Mark;

    fn name(&self) -> String {
        format!("{} ({})", self.runtime().name(), self.precision().name())
    }
    fn steps_in_flight(&self) -> usize {
        2
    }
    fn captured<T>(&self, work: impl FnMut() -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        self.captured_work(work)
    }
    fn side_by_side<T>(
        &self,
        work: impl FnMut(usize) -> Result<T, DeviceError>,
    ) -> Result<[T; 2], DeviceError> {
        self.two_lanes(work)
    }
    fn together<T>(&self, work: impl FnOnce() -> Result<T, DeviceError>) -> Result<T, DeviceError> {
        self.one_group(work)
    }
    fn settle(&self) -> Done {
        Ok(self.settle_gradients()?)
    }
    fn record_event(&self) -> Result<R::Mark, DeviceError> {
        Ok(self.runtime().mark()?)
    }
    fn seconds_between(&self, from: &R::Mark, to: &R::Mark) -> Result<f64, DeviceError> {
        Ok(self.runtime().seconds_between(from, to)?)
    }
}

impl<R: Runtime> Memory for Gpu<R> {
    type Buffer<T: Element> = Array<R, T>;
    type Staging = Staging<R>;
    type Download<T: Element> = Download<R, T>;

    fn check_room(&self, parameters: usize, copies: usize) -> Done {
        let runtime::Memory { free, total } = self.runtime().memory()?;
        let needed = parameters.saturating_mul(copies * size_of::<f32>());
        if needed > free { Err(CudaError::NoRoom { parameters, needed, free, total }.into()) } else { Ok(()) }
    }
    fn alloc<T: Element>(&self, len: usize) -> Result<Array<R, T>, DeviceError> {
        Ok(self.array(len)?)
    }
    fn zeros<T: Element>(&self, len: usize) -> Result<Array<R, T>, DeviceError> {
        Ok(Array::zeros(self.runtime(), len)?)
    }
    fn upload<T: Element>(&self, host: &[T]) -> Result<Array<R, T>, DeviceError> {
        Ok(self.copy_of(host)?)
    }
    fn staging(&self) -> Result<Staging<R>, DeviceError> {
        Ok(Staging::new(self.runtime())?)
    }
    fn stage<T: Element>(&self, staging: &mut Staging<R>, host: &[T]) -> Result<Array<R, T>, DeviceError> {
        Ok(staging.add(host)?)
    }
    fn send(&self, staging: Staging<R>) -> Done {
        Ok(staging.send()?)
    }
    fn download<T: Element>(&self, buffer: &Array<R, T>) -> Result<Vec<T>, DeviceError> {
        self.settle_gradients()?;
        Ok(buffer.to_vec()?)
    }
    fn begin_download<T: Element>(&self, buffer: &Array<R, T>) -> Result<Download<R, T>, DeviceError> {
        self.settle_gradients()?;
        Ok(buffer.begin_download()?)
    }
    fn finish_download<T: Element>(&self, download: Download<R, T>) -> Result<Vec<T>, DeviceError> {
        Ok(download.finish()?)
    }
}

/// Shapes of target attention in the kernel list: those of the paper, and twice its width.
const TARGET_SHAPES: [Shape; 2] =
    [Shape { width: 32, hidden0: 80, hidden1: 40 }, Shape { width: 64, hidden0: 80, hidden1: 40 }];

/// Every kernel except those of attention, with its largest block.
pub fn step_kernels() -> Vec<(Kernel, Block)> {
    let files = [
        rows::KERNELS,
        products::KERNELS,
        embedding::KERNELS,
        layer_norm::KERNELS,
        prefix_mean::KERNELS,
        loss::KERNELS,
        optimizer::KERNELS,
        naive_attention::KERNELS,
        limits::KERNELS,
    ];
    let mut kernels = files.concat();
    for element in [kernel::Element::F32, kernel::Element::Bf16] {
        let module = convert::module(element);
        kernels.extend(convert::ENTRIES.map(|entry| (Kernel { module, entry }, block_of(0))));
        kernels.extend(TARGET_SHAPES.into_iter().flat_map(|shape| target_attention::kernels(element, shape)));
    }
    kernels
}
