//! A GPU made of fibres: runs the sources of `kernels/` on the CPU and judges every memory access they make.
//!
//! A [`Device`] owns memory. A launch fails, with a message, at the first access outside a buffer, read of memory nobody
//! wrote, misaligned access, write to an input, race in shared memory, or barrier that not all threads reach. [`Emulated`]
//! is a device as the library's own code uses a GPU.

mod emulated;

pub use emulated::{Copies, Emulated, gpu};

use bytemuck::Pod;
use dfar::device::cuda::kernel::{Kernel, Launch, Module, Pointer};
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

/// The kernels of `faults.cpp`, with a fault each.
pub const FAULTS: Module = Module::new("faults");

/// The kernels of `functions.cpp`: functions of the kernels by themselves.
pub const FUNCTIONS: Module = Module::new("functions");

/// What a device's kernels have done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Special-function exponentials, of single threads.
    pub exponentials: u64,
    /// Multiply-adds of tensor-core products.
    pub multiply_adds: u64,
    /// Bytes copied asynchronously from global to shared memory.
    pub copied: u64,
}

/// Memory and a single multiprocessor.
pub struct Device {
    raw: NonNull<c_void>,
    not_shared: PhantomData<*mut ()>,
}

/// An array in a [`Device`]'s memory.
#[derive(Clone, Copy, Debug)]
pub struct Array<T> {
    at: *mut u8,
    len: usize,
    of: PhantomData<T>,
}

impl<T> Array<T> {
    /// Its address, for arguments of kernels.
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
    /// A device with 1 GiB of memory, none of it used.
    pub fn new() -> Device {
        // SAFETY: the constructor takes nothing; it aborts rather than return null.
        let raw = NonNull::new(unsafe { dfar_emulator_new() }).expect("a device should be made");
        Device { raw, not_shared: PhantomData }
    }

    /// Memory that nobody has written; `None` when there is not as much.
    fn allocate_bytes(&self, bytes: usize) -> Option<*mut u8> {
        // SAFETY: `raw` is a live device, which checks the size against its memory.
        let at = unsafe { dfar_emulator_allocate(self.raw.as_ptr(), bytes) };
        (!at.is_null()).then_some(at)
    }

    /// # Safety
    /// `at` is from [`Device::allocate_bytes`] with as many bytes, and not released.
    unsafe fn release(&self, at: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { dfar_emulator_release(self.raw.as_ptr(), at, bytes) }
    }

    /// Whether all these bytes are in one allocation.
    fn is_owned(&self, at: *const u8, bytes: usize) -> bool {
        // SAFETY: compares the address with the device's memory before it looks anything up.
        unsafe { dfar_emulator_owned(self.raw.as_ptr(), at, bytes) }
    }

    /// Notes that bytes hold values.
    ///
    /// # Safety
    /// They lie inside one allocation.
    unsafe fn mark(&self, at: *mut u8, bytes: usize, read_only: bool) {
        // SAFETY: the caller's promise.
        unsafe { dfar_emulator_mark(self.raw.as_ptr(), at, bytes, read_only) }
    }

    /// Takes bytes out of an allocation: an access to them is one outside every array.
    ///
    /// # Safety
    /// They lie inside one allocation.
    unsafe fn disown(&self, at: *mut u8, bytes: usize) {
        // SAFETY: the caller's promise.
        unsafe { dfar_emulator_disown(self.raw.as_ptr(), at, bytes) }
    }

    /// How many bytes nobody has written.
    ///
    /// # Safety
    /// They lie inside one allocation.
    unsafe fn unwritten(&self, at: *const u8, bytes: usize) -> usize {
        // SAFETY: the caller's promise.
        unsafe { dfar_emulator_unwritten(self.raw.as_ptr(), at, bytes) }
    }

    /// What kernels have done so far.
    pub fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        let Counts { exponentials, multiply_adds, copied } = &mut counts;
        // SAFETY: `raw` is a live device, and the three places are written once each.
        unsafe { dfar_emulator_counts(self.raw.as_ptr(), exponentials, multiply_adds, copied) }
        counts
    }

    fn allocate<T: Pod>(&self, len: usize) -> Array<T> {
        let at = self.allocate_bytes(len * size_of::<T>()).expect("the emulator's memory should suffice");
        Array { at, len, of: PhantomData }
    }

    /// An array kernels may read and not write.
    pub fn input<T: Pod>(&self, values: &[T]) -> Array<T> {
        let array = self.allocate(values.len());
        // SAFETY: the device just allocated this many bytes, 256-byte aligned, and nothing else refers to them.
        unsafe {
            std::slice::from_raw_parts_mut(array.at.cast::<T>(), values.len()).copy_from_slice(values);
            self.mark(array.at, size_of_val(values), true);
        }
        array
    }

    /// An array nobody has written.
    pub fn output<T: Pod>(&self, len: usize) -> Array<T> {
        self.allocate(len)
    }

    /// What an array holds; an error when nobody wrote a part of it.
    pub fn read<T: Pod>(&self, array: &Array<T>) -> Result<Vec<T>, String> {
        // SAFETY: arrays stay allocated as long as the device; the length is what was allocated.
        let unwritten = unsafe { self.unwritten(array.at, array.len * size_of::<T>()) };
        if unwritten > 0 {
            return Err(format!("{unwritten} of {} bytes were never written", array.len * size_of::<T>()));
        }
        // SAFETY: as above; any bytes are a T, and no kernel is running.
        Ok(unsafe { std::slice::from_raw_parts(array.at.cast::<T>(), array.len) }.to_vec())
    }

    /// Runs a kernel to its end.
    ///
    /// # Errors
    /// The first fault of any thread, in words.
    pub fn launch<P: Pod>(&self, kernel: Kernel, launch: Launch, params: &P) -> Result<(), String> {
        self.launch_bytes(kernel, launch, bytemuck::bytes_of(params))
    }

    fn launch_bytes(&self, kernel: Kernel, launch: Launch, params: &[u8]) -> Result<(), String> {
        let c = |name: &str| CString::new(name).expect("names of kernels should hold no zero");
        let (module, name) = (c(&kernel.module.name()), c(kernel.entry));
        // SAFETY: the look-up compares the names, which outlive the call.
        let entry = unsafe { dfar_emulator_find(module.as_ptr(), name.as_ptr()) };
        if entry.is_null() {
            return Err(format!("there is no kernel {} in {}", kernel.entry, kernel.module.name()));
        }
        let Launch { grid: [x, y], threads, shared_bytes } = launch;
        if x == 0 || y == 0 {
            return Ok(());
        }
        // The kernel reads the argument in place: it has to be aligned as the struct is.
        let mut aligned = vec![0u64; params.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut aligned)[..params.len()].copy_from_slice(params);
        // SAFETY: every access the kernel makes through `params` is checked against this device's arrays before it
        // happens, and refused (the launch ends) where it is not inside one.
        let message = unsafe {
            let params = aligned.as_ptr().cast();
            dfar_emulator_launch(self.raw.as_ptr(), entry, params, x, y, threads, shared_bytes as usize)
        };
        if message.is_null() {
            return Ok(());
        }
        // SAFETY: not null: a zero-terminated message that lives in the device until the next launch.
        Err(format!("{}: {}", kernel.entry, unsafe { CStr::from_ptr(message) }.to_string_lossy()))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: made by dfar_emulator_new, and dropped once.
        unsafe { dfar_emulator_free(self.raw.as_ptr()) }
    }
}
