//! Every operation of `trait Device` on the emulated GPU; the bodies are those of the CPU's tests.

#[macro_use]
#[path = "../../bodies/layers.rs"]
mod bodies;

use dfar::device::cuda::Precision;

test_every_body!(dfar_emulator::gpu(Precision::F32));
