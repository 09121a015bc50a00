//! The parts of a training step on the CPU; the bodies are in `bodies/parts.rs`.

#[macro_use]
#[path = "../bodies/parts.rs"]
mod bodies;

use dfar::device::cpu::Cpu;
use std::sync::Arc;

test_every_body!(|| Arc::new(Cpu::new()));
