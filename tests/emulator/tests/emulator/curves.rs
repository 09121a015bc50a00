//! The loss over 200 steps on the emulated GPU, compared with the CPU.

use crate::curves_bodies as bodies;

use dfar::device::cpu::Cpu;
use dfar::device::cuda::Precision;
use dfar_emulator::gpu;
use std::sync::Arc;

#[test]
#[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
fn the_loss_decreases_as_on_the_cpu() {
    let batches = bodies::batches();
    let reference = bodies::curve(Arc::new(Cpu::new()), &batches);
    bodies::assert_curves_agree(&bodies::curve(Arc::new(gpu(Precision::F32)), &batches), &reference);
}
