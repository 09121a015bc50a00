//! The losses of 200 steps on a GPU, if there is one: compared with the CPU's, and with CUDA
//! graphs. The body is in `bodies/curves.rs`.

#[path = "bodies/curves.rs"]
mod bodies;
#[path = "common/gpu.rs"]
mod common;

use common::gpu;
use dfar::device::cpu::Cpu;
use dfar::device::cuda::Precision;
use std::sync::Arc;

#[test]
fn the_loss_decreases_as_on_the_cpu() {
    let Some(gpu) = gpu(Precision::F32) else { return };
    let batches = bodies::batches();
    let reference = bodies::curve(Arc::new(Cpu::new()), &batches);
    bodies::assert_curves_agree(&bodies::curve(Arc::new(gpu), &batches), &reference);
}

/// CUDA graphs do not change a bit of the losses. The first steps run without a graph, because
/// their kernels are not yet loaded.
#[test]
fn graphs_change_no_bit() {
    let (Some(plain), Some(captured)) = (gpu(Precision::F32), gpu(Precision::F32)) else {
        return;
    };
    let batches = bodies::batches();
    let captured = Arc::new(captured.with_graphs());
    assert_eq!(bodies::curve(captured.clone(), &batches), bodies::curve(Arc::new(plain), &batches));
    let captures = captured.captures().expect("graphs are asked for");
    eprintln!("{captures}");
    assert!(captures.updated > batches.len() / 2, "{captures}");
}

/// Products in bf16 move the losses by less than their rounding, 2^-8 a factor.
#[test]
fn the_first_losses_in_bf16_are_near_those_in_f32() {
    let (Some(plain), Some(narrow)) = (gpu(Precision::F32), gpu(Precision::Bf16)) else { return };
    let batches = &bodies::batches()[..10];
    let [plain, narrow] = [plain, narrow].map(|gpu| bodies::curve(Arc::new(gpu), batches));
    for (step, (narrow, plain)) in narrow.iter().zip(&plain).enumerate() {
        let error = (narrow - plain).abs() / plain.abs();
        assert!(error < 0.02, "step {}: {narrow}, but {plain}", step + 1);
    }
    assert_ne!(plain, narrow, "bf16 should round");
}
