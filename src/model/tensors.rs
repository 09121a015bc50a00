//! A list of device buffers, one a parameter.

use super::parameters::{Id, Layout};
use super::{HostTensor, ModelError};
use crate::device::{Buffer, Device, DeviceError};
use std::ops::{Index, IndexMut};

/// One buffer a parameter, in the order of the layout: values, gradients or moments.
pub struct Tensors<D: Device>(Vec<D::Buffer<f32>>);

impl<D: Device> Tensors<D> {
    /// Uploads one slice a parameter.
    pub fn upload<'a>(device: &D, values: impl IntoIterator<Item = &'a [f32]>) -> Result<Self, DeviceError> {
        Ok(Self(values.into_iter().map(|v| device.upload(v)).collect::<Result<_, _>>()?))
    }

    /// Zeros for every parameter.
    pub fn zeros(device: &D, layout: &Layout) -> Result<Self, DeviceError> {
        Ok(Self(layout.specs.iter().map(|s| device.zeros(s.len())).collect::<Result<_, _>>()?))
    }

    /// Room for every parameter but the embedding tables, whose gradients come by rows and are put in later.
    pub fn gradients(device: &D, layout: &Layout) -> Result<Self, DeviceError> {
        let tables = [layout.item, layout.position, layout.label];
        let len = |id: Id| if tables.contains(&id) { 0 } else { layout.specs[id].len() };
        Ok(Self((0..layout.specs.len()).map(|id| device.alloc(len(id))).collect::<Result<_, _>>()?))
    }

    /// Two different tensors at once.
    pub fn two(&mut self, ids: [Id; 2]) -> [&mut D::Buffer<f32>; 2] {
        self.0.get_disjoint_mut(ids).expect("two different parameters")
    }

    /// Six different tensors at once.
    pub fn six(&mut self, ids: [Id; 6]) -> [&mut D::Buffer<f32>; 6] {
        self.0.get_disjoint_mut(ids).expect("six different parameters")
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = &D::Buffer<f32>> {
        self.0.iter()
    }

    /// All of them, in order.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut D::Buffer<f32>> {
        self.0.iter_mut()
    }

    /// Copies to the host, names prefixed.
    pub fn download(&self, device: &D, layout: &Layout, prefix: &str) -> Result<Vec<HostTensor>, ModelError> {
        let tensor = |(spec, buffer): (&super::parameters::Spec, &D::Buffer<f32>)| {
            let values = device.download(buffer)?;
            debug_assert_eq!(values.len(), buffer.len());
            Ok(HostTensor { name: format!("{prefix}{}", spec.name), shape: spec.shape.clone(), values })
        };
        layout.specs.iter().zip(&self.0).map(tensor).collect()
    }
}

impl<D: Device> Index<Id> for Tensors<D> {
    type Output = D::Buffer<f32>;
    fn index(&self, id: Id) -> &Self::Output {
        &self.0[id]
    }
}

impl<D: Device> IndexMut<Id> for Tensors<D> {
    fn index_mut(&mut self, id: Id) -> &mut Self::Output {
        &mut self.0[id]
    }
}
