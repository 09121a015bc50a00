//! The GPU that tests run on, where there is one.

use dfar::device::cuda::{Cuda, Gpu, Precision};
use std::io::Write;

/// The first GPU, or a word on why `test` is skipped.
pub fn gpu(test: &str, precision: Precision) -> Option<Gpu<Cuda>> {
    match Cuda::new(0).and_then(|cuda| cuda.require_libraries().map(|()| cuda)) {
        Ok(cuda) => Some(Gpu::new(cuda, precision)),
        Err(error) => {
            // Not by a macro of print: a test that passes would keep it to itself.
            let _ = writeln!(std::io::stderr(), "{test}: skipped: {error}");
            None
        }
    }
}
