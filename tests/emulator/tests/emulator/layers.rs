//! Every operation of `trait Device` on the emulated GPU, with the test bodies of the CPU.

#[macro_use]
#[path = "../../../bodies/layers.rs"]
mod bodies;

use dfar::device::cuda::Precision;

test_every_body!(dfar_emulator::gpu(Precision::F32));
