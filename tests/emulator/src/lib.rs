//! A GPU made of fibres: runs the sources of `kernels/` on the CPU and judges every memory access they make.
//!
//! A [`Device`] owns memory. A launch fails, with a message, at the first access outside a buffer, read of memory nobody
//! wrote, misaligned access, write to an input, race in shared memory, or barrier that not all threads reach.

use bytemuck::Pod;
use dfar::device::cuda::params::Pointer;
use dfar::device::cuda::plan::Launch;
use dfar::device::cuda::tile::Element;
use std::ffi::{CStr, CString, c_char, c_void};
use std::marker::PhantomData;
use std::ptr::NonNull;

type Kernel = unsafe extern "C" fn(*const c_void);

unsafe extern "C" {
    fn dfar_emulator_new() -> *mut c_void;
    fn dfar_emulator_free(device: *mut c_void);
    fn dfar_emulator_allocate(device: *mut c_void, bytes: usize) -> *mut u8;
    fn dfar_emulator_mark(device: *mut c_void, at: *mut u8, bytes: usize, read_only: bool);
    fn dfar_emulator_unwritten(device: *mut c_void, at: *const u8, bytes: usize) -> usize;
    fn dfar_emulator_launch(
        device: *mut c_void,
        kernel: Kernel,
        params: *const c_void,
        grid_x: u32,
        grid_y: u32,
        threads: u32,
        shared_bytes: usize,
    ) -> *const c_char;
    fn dfar_emulator_bf16(name: *const c_char, head_dim: u32) -> Option<Kernel>;
    fn dfar_emulator_f16(name: *const c_char, head_dim: u32) -> Option<Kernel>;
    fn dfar_emulator_f32(name: *const c_char, head_dim: u32) -> Option<Kernel>;
    fn dfar_emulator_faults(name: *const c_char, zero: u32) -> Option<Kernel>;
}

/// Where to look for a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Module {
    /// `attention.cu` for an element type and head width.
    Attention(Element, usize),
    /// `faults.cpp`: kernels with a fault each.
    Faults,
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

    fn allocate<T: Pod>(&self, len: usize) -> Array<T> {
        // SAFETY: `raw` is a live device, which checks the size against its memory.
        let at = unsafe { dfar_emulator_allocate(self.raw.as_ptr(), len * size_of::<T>()) };
        assert!(!at.is_null(), "the emulator's memory should suffice");
        Array { at, len, of: PhantomData }
    }

    /// An array kernels may read and not write.
    pub fn input<T: Pod>(&self, values: &[T]) -> Array<T> {
        let array = self.allocate(values.len());
        // SAFETY: the device just allocated this many bytes, 256-byte aligned, and nothing else refers to them.
        unsafe {
            std::slice::from_raw_parts_mut(array.at.cast::<T>(), values.len()).copy_from_slice(values);
            dfar_emulator_mark(self.raw.as_ptr(), array.at, size_of_val(values), true);
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
        let unwritten =
            unsafe { dfar_emulator_unwritten(self.raw.as_ptr(), array.at, array.len * size_of::<T>()) };
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
    pub fn launch<P: Pod>(
        &self,
        module: Module,
        entry: &str,
        launch: Launch,
        params: &P,
    ) -> Result<(), String> {
        let name = CString::new(entry).expect("names of kernels should hold no zero");
        // SAFETY: the look-ups compare the name, which outlives the call, and return null for what they do not know.
        let kernel = unsafe {
            match module {
                Module::Attention(Element::Bf16, d) => dfar_emulator_bf16(name.as_ptr(), d as u32),
                Module::Attention(Element::F16, d) => dfar_emulator_f16(name.as_ptr(), d as u32),
                Module::Attention(Element::F32, d) => dfar_emulator_f32(name.as_ptr(), d as u32),
                Module::Faults => dfar_emulator_faults(name.as_ptr(), 0),
            }
        };
        let kernel = kernel.ok_or_else(|| format!("there is no kernel {entry} in {module:?}"))?;
        let Launch { grid: [x, y], threads, shared_bytes } = launch;
        if x == 0 || y == 0 {
            return Ok(());
        }
        // SAFETY: every access the kernel makes through `params` is checked against this device's arrays before it
        // happens, and refused (the launch ends) where it is not inside one.
        let message = unsafe {
            let params = std::ptr::from_ref(params).cast();
            dfar_emulator_launch(self.raw.as_ptr(), kernel, params, x, y, threads, shared_bytes as usize)
        };
        if message.is_null() {
            return Ok(());
        }
        // SAFETY: not null: a zero-terminated message that lives in the device until the next launch.
        Err(format!("{entry}: {}", unsafe { CStr::from_ptr(message) }.to_string_lossy()))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: made by dfar_emulator_new, and dropped once.
        unsafe { dfar_emulator_free(self.raw.as_ptr()) }
    }
}
