//! Every operation of `trait Device` on the CPU; the bodies are in `bodies/layers.rs`.

#[path = "bodies/layers.rs"]
mod bodies;

use dfar::device::cpu::Cpu;

macro_rules! on_the_cpu {
    ($($name:ident)+) => {$(
        #[test]
        fn $name() {
            bodies::$name(&Cpu::new());
        }
    )+};
}

on_the_cpu! {
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
