//! What tests ask of the driver, beside CUDA's own calls.

use crate::lock;
use std::ffi::{CStr, c_char};
use std::sync::{Mutex, PoisonError};

static FAULTS: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Keeps a fault for [`dfar_driver_fault`].
pub fn note_fault(message: String) {
    FAULTS.lock().unwrap_or_else(PoisonError::into_inner).push(message);
}

/// # Safety
/// `name` is a zero-terminated string.
unsafe fn text(name: *const c_char) -> String {
    // SAFETY: guaranteed by the caller.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// Makes the `nth` call of an entry point from now on return `result` and do nothing.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dfar_driver_fail(entry: *const c_char, nth: u64, result: i32) {
    // SAFETY: guaranteed by the caller.
    let name = unsafe { text(entry) };
    if let Some(state) = lock().as_mut() {
        state.planted.push((name, nth.max(1), result));
    }
}

/// Forgets the failures that have not happened. Returns their number.
#[unsafe(no_mangle)]
pub extern "C" fn dfar_driver_forget() -> u64 {
    lock().as_mut().map_or(0, |state| std::mem::take(&mut state.planted).len() as u64)
}

/// Number of calls of an entry point so far.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dfar_driver_calls(entry: *const c_char) -> u64 {
    // SAFETY: guaranteed by the caller.
    let name = unsafe { text(entry) };
    lock().as_mut().and_then(|state| state.calls.get(&name).copied()).unwrap_or(0)
}

/// Takes the oldest fault: copies it to `buffer`, at most `bytes` with a zero behind it, and
/// returns its length. 0: there is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn dfar_driver_fault(buffer: *mut u8, bytes: usize) -> usize {
    let mut faults = FAULTS.lock().unwrap_or_else(PoisonError::into_inner);
    if faults.is_empty() || bytes == 0 {
        return 0;
    }
    let message = faults.remove(0);
    let length = message.len().min(bytes - 1);
    // SAFETY: the caller gives a buffer of this size.
    unsafe {
        std::ptr::copy_nonoverlapping(message.as_ptr(), buffer, length);
        buffer.add(length).write(0);
    }
    length
}
