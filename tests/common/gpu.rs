//! The GPU of the tests, if there is one.

#[path = "skip.rs"]
mod skip;

use dfar::device::cuda::{Cuda, Gpu, Precision};
use skip::skip;

/// The first GPU. Without one, prints that the test is skipped; if `DFAR_REQUIRE_GPU` is set, fails.
pub fn gpu(precision: Precision) -> Option<Gpu<Cuda>> {
    match Cuda::new(0).and_then(|cuda| cuda.require_libraries().map(|()| cuda)) {
        Ok(cuda) => Some(Gpu::new(cuda, precision)),
        Err(error) => {
            assert!(std::env::var_os("DFAR_REQUIRE_GPU").is_none(), "{error}");
            skip(error);
            None
        }
    }
}
