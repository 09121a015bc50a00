//! The loss of 200 steps on a GPU, beside the CPU's, where there is one; the body is in `bodies/curves.rs`.

#[path = "bodies/curves.rs"]
mod bodies;

use dfar::device::cpu::Cpu;
use dfar::device::cuda::{Cuda, Gpu, Precision};
use std::sync::Arc;

#[test]
fn the_loss_falls_as_on_the_cpu() {
    let cuda = Cuda::new(0).and_then(|cuda| cuda.require_libraries().map(|()| cuda));
    let gpu = match cuda {
        Ok(cuda) => Arc::new(Gpu::new(cuda, Precision::F32)),
        Err(error) => return eprintln!("the_loss_falls_as_on_the_cpu: skipped: {error}"),
    };
    let batches = bodies::batches();
    let reference = bodies::curve(Arc::new(Cpu::new()), &batches);
    bodies::assert_curves_agree(&bodies::curve(gpu, &batches), &reference);
}
