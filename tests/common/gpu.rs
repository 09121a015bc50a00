//! The GPU that tests run on, where there is one.

use dfar::device::cuda::{Cuda, Gpu, Precision};

/// The first GPU, or a word on why `test` is skipped.
pub fn gpu(test: &str, precision: Precision) -> Option<Gpu<Cuda>> {
    match Cuda::new(0).and_then(|cuda| cuda.require_libraries().map(|()| cuda)) {
        Ok(cuda) => Some(Gpu::new(cuda, precision)),
        Err(error) => {
            eprintln!("{test}: skipped: {error}");
            None
        }
    }
}
