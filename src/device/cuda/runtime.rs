//! The floor everything stands on: memory, launches and matrix products of one machine that runs the kernels.
//!
//! [`Cuda`](super::Cuda) is a GPU; `tests/emulator` is the same kernels on the CPU. All that is above (checks, plans, the
//! order of launches) is written once over this trait, in [`Gpu`](super::Gpu), and so is tested where there is no GPU.
//!
//! Everything asked of a runtime happens in the order it was asked for; only [`Runtime::read`] waits.

use super::CudaError;
use super::compile::Module;
use super::params::Pointer;
use crate::device::{Activation, Buffer, Store};
use bytemuck::Pod;
use std::marker::PhantomData;
use std::sync::Arc;

/// What a kernel is called: the module it is compiled in, and its name there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Source and macros.
    pub module: Module,
    /// Name.
    pub entry: &'static str,
}

/// Grid and block of one launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks along x and y. Nothing is to be launched when one is 0.
    pub grid: [u32; 2],
    /// Threads of a block.
    pub threads: u32,
    /// Dynamic shared memory in bytes.
    pub shared_bytes: u32,
}

/// What products are computed with; sums are f32 either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Precision {
    /// Factors as they are.
    #[default]
    F32,
    /// Factors rounded to bf16, on the tensor cores.
    Bf16,
}

impl Precision {
    /// Its name, as in `--precision`.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }
}

/// `c = activation(a b + bias)`, all f32, row-major and packed: `a: [m, k]`, `b: [k, n]`, `c: [m, n]`.
#[derive(Clone, Copy, Debug)]
pub struct Gemm {
    /// `m`, `n`, `k`; none of them 0.
    pub shape: [usize; 3],
    /// Address of `a`.
    pub a: Pointer,
    /// Whether `a` lies in memory as `[k, m]`.
    pub a_transposed: bool,
    /// Address of `b`.
    pub b: Pointer,
    /// Whether `b` lies in memory as `[n, k]`.
    pub b_transposed: bool,
    /// Address of `c`.
    pub c: Pointer,
    /// Whether the result replaces `c` or is added to it. Adding goes with neither bias nor activation.
    pub store: Store,
    /// `[n]`, or null.
    pub bias: Pointer,
    /// Applied last.
    pub activation: Activation,
    /// Of the factors.
    pub precision: Precision,
}

/// What the machine offers a block, and how many blocks at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Shared memory a block may have, in bytes.
    pub shared_per_block: usize,
    /// Multiprocessors.
    pub multiprocessors: usize,
}

/// Device memory, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// Not taken, by anybody.
    pub free: usize,
    /// In all.
    pub total: usize,
}

/// A machine that runs the kernels.
pub trait Runtime: Send + Sync + 'static {
    /// What it is, for logs.
    fn name(&self) -> String;

    /// Its limits.
    fn limits(&self) -> Limits;

    /// Its memory.
    ///
    /// # Errors
    /// What the driver reports.
    fn memory(&self) -> Result<Memory, CudaError>;

    /// `bytes` bytes (not 0) of unspecified content, at a multiple of 256.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`], or what the driver reports.
    fn allocate(&self, bytes: usize) -> Result<Pointer, CudaError>;

    /// Gives memory back, for what is asked for later.
    ///
    /// # Safety
    /// `at` is from [`Runtime::allocate`] of this runtime with as many `bytes`, and was not freed.
    unsafe fn free(&self, at: Pointer, bytes: usize);

    /// Fills memory with zeros.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Safety
    /// The bytes lie inside one allocation.
    unsafe fn zero(&self, at: Pointer, bytes: usize) -> Result<(), CudaError>;

    /// Copies from the host; `host` may be changed as soon as this returns.
    ///
    /// # Errors
    /// What the driver reports.
    ///
    /// # Safety
    /// `host.len()` bytes from `at` on lie inside one allocation.
    unsafe fn write(&self, at: Pointer, host: &[u8]) -> Result<(), CudaError>;

    /// Copies to the host, after all that was asked for before.
    ///
    /// # Errors
    /// What the driver reports, including failures of earlier launches.
    ///
    /// # Safety
    /// `host.len()` bytes from `at` on lie inside one allocation.
    unsafe fn read(&self, at: Pointer, host: &mut [u8]) -> Result<(), CudaError>;

    /// Starts a kernel.
    ///
    /// # Errors
    /// A kernel that cannot be compiled, and what the driver reports.
    ///
    /// # Safety
    /// `params` are the bytes of the argument that the kernel declares; with this grid, each of its pointers is to memory
    /// of the shape the kernel's contract names.
    unsafe fn launch(&self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), CudaError>;

    /// Starts a matrix product.
    ///
    /// # Errors
    /// What the library reports.
    ///
    /// # Safety
    /// The addresses are of matrices of the shapes named, `c` overlapping no other.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), CudaError>;
}

/// An array in a runtime's memory, given back when dropped. One of length 0 has a null address.
pub struct Array<R: Runtime, T> {
    runtime: Arc<R>,
    at: Pointer,
    len: usize,
    element: PhantomData<T>,
}

// SAFETY: a runtime may be used from any thread, and the array is an address for it: no T is ever borrowed through it.
unsafe impl<R: Runtime, T> Send for Array<R, T> {}
// SAFETY: as above.
unsafe impl<R: Runtime, T> Sync for Array<R, T> {}

impl<R: Runtime, T: Pod> Array<R, T> {
    /// Room for `len` values, content unspecified.
    ///
    /// # Errors
    /// As [`Runtime::allocate`].
    pub fn new(runtime: &Arc<R>, len: usize) -> Result<Self, CudaError> {
        let at = if len == 0 { 0 } else { runtime.allocate(len * size_of::<T>())? };
        Ok(Self { runtime: runtime.clone(), at, len, element: PhantomData })
    }

    /// `len` zeros.
    ///
    /// # Errors
    /// As [`Runtime::allocate`] and [`Runtime::zero`].
    pub fn zeros(runtime: &Arc<R>, len: usize) -> Result<Self, CudaError> {
        let mut array = Self::new(runtime, len)?;
        array.zero()?;
        Ok(array)
    }

    /// A copy of `host`.
    ///
    /// # Errors
    /// As [`Runtime::allocate`] and [`Runtime::write`].
    pub fn of(runtime: &Arc<R>, host: &[T]) -> Result<Self, CudaError> {
        let mut array = Self::new(runtime, host.len())?;
        array.copy_from(host)?;
        Ok(array)
    }

    /// Replaces all values.
    ///
    /// # Errors
    /// As [`Runtime::write`].
    ///
    /// # Panics
    /// If `host` is not as long.
    pub fn copy_from(&mut self, host: &[T]) -> Result<(), CudaError> {
        assert_eq!(host.len(), self.len, "a copy from the host should be as long as the array");
        if self.len > 0 {
            // SAFETY: the array has this many bytes.
            unsafe { self.runtime.write(self.at, bytemuck::cast_slice(host))? };
        }
        Ok(())
    }

    /// Makes all values 0.
    ///
    /// # Errors
    /// As [`Runtime::zero`].
    pub fn zero(&mut self) -> Result<(), CudaError> {
        if self.len > 0 {
            // SAFETY: the array's own bytes.
            unsafe { self.runtime.zero(self.at, self.len * size_of::<T>())? };
        }
        Ok(())
    }

    /// The values, on the host.
    ///
    /// # Errors
    /// As [`Runtime::read`].
    pub fn to_vec(&self) -> Result<Vec<T>, CudaError> {
        let mut host = vec![T::zeroed(); self.len];
        self.copy_to(&mut host)?;
        Ok(host)
    }

    /// Copies the values to the host.
    ///
    /// # Errors
    /// As [`Runtime::read`].
    ///
    /// # Panics
    /// If `host` is not as long.
    pub fn copy_to(&self, host: &mut [T]) -> Result<(), CudaError> {
        assert_eq!(host.len(), self.len, "a copy to the host should be as long as the array");
        if self.len > 0 {
            // SAFETY: the array has this many bytes.
            unsafe { self.runtime.read(self.at, bytemuck::cast_slice_mut(host))? };
        }
        Ok(())
    }

    /// Its address, for arguments of kernels.
    pub fn pointer(&self) -> Pointer {
        self.at
    }

    /// Address of the value `index`, which may be one past the last.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn pointer_at(&self, index: usize) -> Pointer {
        assert!(index <= self.len, "value {index} of {}", self.len);
        self.at + (index * size_of::<T>()) as Pointer
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether it lies in the memory of `runtime`.
    pub fn is_on(&self, runtime: &Arc<R>) -> bool {
        Arc::ptr_eq(&self.runtime, runtime)
    }
}

impl<R: Runtime, T: Pod> Buffer<T> for Array<R, T> {
    fn len(&self) -> usize {
        self.len
    }
}

impl<R: Runtime, T> Drop for Array<R, T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: allocated in `new` with this many bytes; nothing else frees it.
            unsafe { self.runtime.free(self.at, self.len * size_of::<T>()) };
        }
    }
}
