//! Every operation of `trait Device` on the emulated GPU, with the test bodies of the CPU.

#[macro_use]
#[path = "../../../bodies/layers.rs"]
mod bodies;

use dfar::device::cuda::Precision;

test_every_body!(dfar_emulator::gpu(Precision::F32));

/// Products that do not share launches.
mod by_library {
    use super::{Precision, bodies};
    use dfar_emulator::gpu;

    test_every_body!(gpu(Precision::F32).with_library_products(); linear label_linear target_attention);
}
