//! Every operation of `trait Device` on the emulated GPU; the bodies are those of the CPU's tests.

#[path = "../../bodies/layers.rs"]
mod bodies;

use dfar::device::cuda::Precision;

macro_rules! on_the_emulator {
    ($($name:ident)+) => {$(
        #[test]
        fn $name() {
            bodies::$name(&dfar_emulator::gpu(Precision::F32));
        }
    )+};
}

on_the_emulator! {
    layer_norm
    fused_layer_norms
    linear
    label_linear
    gather_and_segment_sum
    segments_of_every_length
    attention
    prefix_mean
    concat
    rank_loss
    cosine_loss
    target_attention
    adam
}
