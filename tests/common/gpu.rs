//! The GPU of the tests, if there is one.

use dfar::device::cuda::{Cuda, Gpu, Precision};
use std::io::Write;

/// The first GPU; without one, prints why `test` is skipped.
pub fn gpu(test: &str, precision: Precision) -> Option<Gpu<Cuda>> {
    match Cuda::new(0).and_then(|cuda| cuda.require_libraries().map(|()| cuda)) {
        Ok(cuda) => Some(Gpu::new(cuda, precision)),
        Err(error) => {
            // Not `eprintln!`: the test harness hides its output if the test passes.
            let _ = writeln!(std::io::stderr(), "{test}: skipped: {error}");
            None
        }
    }
}
