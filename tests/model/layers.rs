//! All operations of `Device` on the CPU; the bodies are in `bodies/layers.rs`.

#[macro_use]
#[path = "../bodies/layers.rs"]
mod bodies;

use dfar::device::cpu::Cpu;

test_every_body!(Cpu::new());
