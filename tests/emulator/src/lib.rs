//! An emulator of a GPU: runs the sources of `kernels/` on the CPU, one fibre per thread, and
//! checks every memory access.
//!
//! A [`Device`] owns memory. A launch fails, with a message, at the first out-of-bounds access,
//! read of uninitialized memory, misaligned access, write to an input, race in shared memory, or
//! barrier that some threads do not reach. [`Emulated`] is a device behind the library's runtime
//! interface.

mod emulated;

pub use emulated::{Copies, Emulated, gpu};

use bytemuck::Pod;
use dfar::device::cuda::kernel::{Element, Kernel, Launch, Module, Pointer};
use dfar::device::cuda::plan::tile::HEAD_DIMS;
use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;

unsafe extern "C" {
    fn dfar_emulator_new() -> *mut c_void;
    fn dfar_emulator_free(device: *mut c_void);
    fn dfar_emulator_allocate(device: *mut c_void, bytes: usize) -> *mut u8;
    fn dfar_emulator_release(device: *mut c_void, at: *mut u8, bytes: usize);
    fn dfar_emulator_owned(device: *mut c_void, at: *const u8, bytes: usize) -> bool;
    fn dfar_emulator_mark(device: *mut c_void, at: *mut u8, bytes: usize, read_only: bool);
    fn dfar_emulator_disown(device: *mut c_void, at: *mut u8, bytes: usize);
    fn dfar_emulator_unwritten(device: *mut c_void, at: *const u8, bytes: usize) -> usize;
    fn dfar_emulator_counts(
        device: *const c_void,
        exponentials: *mut u64,
        multiply_adds: *mut u64,
        copied: *mut u64,
    );
    fn dfar_emulator_find(module: *const c_char, name: *const c_char) -> *const c_void;
    fn dfar_emulator_launch(
        device: *mut c_void,
        entry: *const c_void,
        params: *const c_void,
        grid_x: u32,
        grid_y: u32,
        threads: u32,
        shared_bytes: usize,
    ) -> *const c_char;
}

/// Kernels of `faults.cpp`, with one planted fault each.
pub const FAULTS: Module = Module::new("faults");

/// Kernels of `functions.cpp`: single functions of the library's kernels.
pub const FUNCTIONS: Module = Module::new("functions");

/// Head widths for which the attention kernels of an element type are compiled: all with the
/// feature `sweep`, the widths of common models without. `modules` in build.rs compiles them.
pub fn head_dims(element: Element) -> &'static [usize] {
    match element {
        _ if cfg!(feature = "sweep") => &HEAD_DIMS,
        Element::F32 => &[8, 16],
        Element::Bf16 => &[16],
        Element::F16 => &[],
    }
}

/// Operations executed by a device's kernels since it was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Special-function exponentials, counted per thread.
    pub exponentials: u64,
    /// Multiply-adds of tensor-core products.
    pub multiply_adds: u64,
    /// Bytes copied asynchronously from global to shared memory.
    pub copied: u64,
}

/// Device memory and a single multiprocessor.
pub struct Device {
    raw: NonNull<c_void>,
    not_shared: PhantomData<*mut ()>,
}

/// An array in the memory of a [`Device`].
#[derive(Clone, Copy, Debug)]
pub struct Array<T> {
    at: *mut u8,
    len: usize,
    of: PhantomData<T>,
}

impl<T> Array<T> {
    /// Device address, for kernel arguments.
    pub fn pointer(&self) -> Pointer {
        self.at as Pointer
    }
}

impl Default for Device {
    fn default() -> Self {
        Self::new()
    }
}

impl Device {
    /// A device with 1 GiB of free memory.
    pub fn new() -> Device {
        // SAFETY: the constructor takes no argument, and aborts instead of returning null.
        let raw = NonNull::new(unsafe { dfar_emulator_new() }).expect("a device should be made");
        Device { raw, not_shared: PhantomData }
    }

    /// Allocates uninitialized memory; `None` if there is too little.
    fn allocate_bytes(&self, bytes: usize) -> Option<*mut u8> {
        // SAFETY: `raw` is a live device, which checks the size against its memory.
        let at = unsafe { dfar_emulator_allocate(self.raw.as_ptr(), bytes) };
        (!at.is_null()).then_some(at)
    }

    /// Frees memory.
    ///
    /// # Safety
    /// `at` is from [`Device::allocate_bytes`] with the same `bytes`, and is not released yet.
    unsafe fn release(&self, at: *mut u8, bytes: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe { dfar_emulator_release(self.raw.as_ptr(), at, bytes) }
    }

    /// Whether all these bytes are in one allocation.
    fn is_owned(&self, at: *const u8, bytes: usize) -> bool {
        // SAFETY: compares the address with the bounds of the device's memory first.
        unsafe { dfar_emulator_owned(self.raw.as_ptr(), at, bytes) }
    }

    /// Marks bytes as written.
    ///
    /// # Safety
    /// The bytes lie inside one allocation.
    unsafe fn mark(&self, at: *mut u8, bytes: usize, read_only: bool) {
        // SAFETY: guaranteed by the caller.
        unsafe { dfar_emulator_mark(self.raw.as_ptr(), at, bytes, read_only) }
    }

    /// Removes bytes from an allocation: an access to them is then out of bounds.
    ///
    /// # Safety
    /// The bytes lie inside one allocation.
    unsafe fn disown(&self, at: *mut u8, bytes: usize) {
        // SAFETY: guaranteed by the caller.
        unsafe { dfar_emulator_disown(self.raw.as_ptr(), at, bytes) }
    }

    /// Number of uninitialized bytes.
    ///
    /// # Safety
    /// The bytes lie inside one allocation.
    unsafe fn unwritten(&self, at: *const u8, bytes: usize) -> usize {
        // SAFETY: guaranteed by the caller.
        unsafe { dfar_emulator_unwritten(self.raw.as_ptr(), at, bytes) }
    }

    /// Operations executed by kernels so far.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        let Counts { exponentials, multiply_adds, copied } = &mut counts;
        // SAFETY: `raw` is a live device; the call writes each of the three values once.
        unsafe { dfar_emulator_counts(self.raw.as_ptr(), exponentials, multiply_adds, copied) }
        counts
    }

    fn allocate<T: Pod>(&self, len: usize) -> Array<T> {
        let at = self.allocate_bytes(len * size_of::<T>()).expect("the emulator's memory should suffice");
        Array { at, len, of: PhantomData }
    }

    /// Allocates an array that kernels may read but not write.
    pub fn input<T: Pod>(&self, values: &[T]) -> Array<T> {
        let array = self.allocate(values.len());
        // SAFETY: the device just allocated this many bytes, 256-byte aligned, and no other
        // reference to them exists.
        unsafe {
            std::slice::from_raw_parts_mut(array.at.cast::<T>(), values.len()).copy_from_slice(values);
            self.mark(array.at, size_of_val(values), true);
        }
        array
    }

    /// Allocates an uninitialized array.
    pub fn output<T: Pod>(&self, len: usize) -> Array<T> {
        self.allocate(len)
    }

    /// # Errors
    /// If a part of the array was never written.
    pub fn read<T: Pod>(&self, array: &Array<T>) -> Result<Vec<T>, String> {
        // SAFETY: arrays stay allocated as long as the device; the length is that of the
        // allocation.
        let unwritten = unsafe { self.unwritten(array.at, array.len * size_of::<T>()) };
        if unwritten > 0 {
            return Err(format!("{unwritten} of {} bytes were never written", array.len * size_of::<T>()));
        }
        // SAFETY: as above; any bytes are a T; no kernel is running.
        Ok(unsafe { std::slice::from_raw_parts(array.at.cast::<T>(), array.len) }.to_vec())
    }

    /// Runs a kernel to completion.
    ///
    /// # Errors
    /// A message with the first fault of any thread.
    pub fn launch<P: Pod>(&self, kernel: Kernel, launch: Launch, params: &P) -> Result<(), String> {
        self.launch_bytes(kernel, launch, bytemuck::bytes_of(params))
    }

    fn launch_bytes(&self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), String> {
        let c = |name: &str| CString::new(name).expect("names of kernels should hold no zero");
        let (module, name) = (c(&kernel.module.name()), c(kernel.entry));
        // SAFETY: the lookup compares the names, which outlive the call.
        let entry = unsafe { dfar_emulator_find(module.as_ptr(), name.as_ptr()) };
        if entry.is_null() {
            return Err(format!("there is no kernel {} in {}", kernel.entry, kernel.module.name()));
        }
        let Launch { grid: [x, y], threads, shared_bytes } = launch;
        if x == 0 || y == 0 {
            return Ok(());
        }
        // The kernel reads the argument in place, so it needs the alignment of the struct.
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut aligned)[..params.len()].copy_from_slice(params);
        // SAFETY: each access of the kernel through `params` is checked against this device's
        // arrays before it happens; a bad access ends the launch.
        let message = unsafe {
            let params = aligned.as_ptr().cast();
            dfar_emulator_launch(self.raw.as_ptr(), entry, params, x, y, threads, shared_bytes as usize)
        };
        if message.is_null() {
            return Ok(());
        }
        // SAFETY: not null, so a zero-terminated message that the device keeps until its next
        // launch.
        Err(format!("{}: {}", kernel.entry, unsafe { CStr::from_ptr(message) }.to_string_lossy()))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: from dfar_emulator_new, and freed once.
        unsafe { dfar_emulator_free(self.raw.as_ptr()) }
    }
}
