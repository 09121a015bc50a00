//! A CUDA driver for tests: stands for `libcuda`, NVRTC and cuBLASLt on a machine without a GPU.
//!
//! One library under several file names (`tests/driver/run` makes them), found by the loader like
//! the real ones. The host code of `src/device/cuda` and cudarc run unchanged; kernels run in the
//! emulator of `tests/emulator`. A *fault* is a use that a real driver need not notice: it is
//! printed, and ends the process, unless `DFAR_DRIVER_FAULTS=return`; the call then returns a code.
//! Faults are
//! - a handle of the wrong kind, or of an object that was destroyed, and what is left over when the
//!   context is released;
//! - a call on a thread without a current context;
//! - a launch beyond the limits of the device, the kernel's `__launch_bounds__`, or the dynamic
//!   shared memory that was opted into;
//! - an access out of bounds or to freed memory, by a kernel, a copy, a fill or a product; a read
//!   of memory that nothing has written;
//! - an access that no stream order, event or synchronisation puts behind an earlier one;
//! - pinned memory changed or freed before its copy has run;
//! - a call that a capture does not allow.
//!
//! **What it cannot show:** which products the real cuBLASLt supports; the order of memory accesses
//! on the chip, inside a kernel; what ptxas makes of the kernels (registers, spills); any speed.
//! Its device has the limits of an H100 and no other likeness to one; the name says that it is no
//! GPU.
//!
//! Variables: `DFAR_DRIVER_SEED` (when work runs: `state.rs`), `DFAR_DRIVER_FAULTS`,
//! `DFAR_DRIVER_MEMORY_MIB`, `DFAR_DRIVER_VERSION` (12090), `DFAR_DRIVER_CACHE`, `CXX`.

#![allow(clippy::missing_safety_doc, reason = "the contracts are those of NVIDIA's headers")]
#![allow(clippy::too_many_arguments, reason = "as in NVIDIA's headers")]

mod blas;
mod clock;
mod code;
mod control;
mod cuda;
mod handles;
mod machine;
mod memory;
mod nvrtc;
mod product;
mod state;
mod streams;

use code::{Code, Done, Failure, fault};
use state::State;
use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};

static STATE: Mutex<Option<State>> = Mutex::new(None);

thread_local! {
    /// The context that is current on this thread; 0: none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

fn lock() -> MutexGuard<'static, Option<State>> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a call needs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Needs {
    /// cuInit.
    Driver,
    /// A current context, and no kernel that ended badly.
    Context,
    /// As `Context`; also allowed after a kernel ended badly, to clean up.
    CleanUp,
}

/// Carries out a call of the driver.
fn enter(name: &str, needs: Needs, act: impl FnOnce(&mut State) -> Done) -> i32 {
    let mut guard = lock();
    let Some(state) = guard.as_mut() else { return Code::NOT_INITIALIZED.0 };
    if let Some(planted) = state.count(name) {
        return planted;
    }
    let result = ready(state, needs).and_then(|()| act(state));
    match result {
        Ok(()) => Code::SUCCESS.0,
        Err(failure) => report(name, failure).0,
    }
}

fn ready(state: &mut State, needs: Needs) -> Done {
    if needs == Needs::Driver {
        return Ok(());
    }
    let current = CURRENT.get();
    if current == 0 {
        return fault(Code::INVALID_CONTEXT, "no context is current on this thread");
    }
    if let Err(error) = state.contexts.get(current) {
        return fault(Code::INVALID_CONTEXT, format!("the current context: {error}"));
    }
    if needs == Needs::Context { state.healthy() } else { Ok(()) }
}

/// Prints a fault and ends the process, or returns the code of the call.
fn report(name: &str, failure: Failure) -> Code {
    match failure {
        Failure::Answer(code) => code,
        Failure::Fault(code, message) => {
            eprintln!("dfar test driver: {name}: {message}");
            if std::env::var_os("DFAR_DRIVER_FAULTS").is_none_or(|value| value != "return") {
                std::process::abort();
            }
            control::note_fault(format!("{name}: {message}"));
            code
        }
    }
}
