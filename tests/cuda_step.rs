//! All operations of a training step, and the whole network, on a GPU, if there is one. The bodies
//! are those of the CPU and of the emulator.

#[path = "common/gpu.rs"]
mod common;
#[path = "bodies/layers.rs"]
mod layers;
#[path = "bodies/model.rs"]
mod model;
#[path = "bodies/parts.rs"]
#[allow(dead_code)] // bodies for two devices
mod parts;
#[path = "bodies/target_attention.rs"]
#[allow(dead_code)] // bodies for the CPU
mod target_attention;

use common::gpu;
use dfar::device::cpu::Cpu;
use dfar::device::cuda::runtime::{Gemm, Runtime};
use dfar::device::cuda::{Cuda, Gpu, Precision};
use dfar::device::{Activation, Store};
use dfar_tools::verify::{Case, cases, verify_dfar};
use std::path::Path;
use std::sync::Arc;

macro_rules! on_the_gpu {
    ($($body:ident: $($name:ident)+;)+) => {$($(
        #[test]
        fn $name() {
            let Some(device) = gpu(Precision::F32) else { return };
            $body!($name, device);
        }
    )+)+};
}
fn new_device() -> Arc<Gpu<Cuda>> {
    Arc::new(gpu(Precision::F32).expect("a GPU, as before"))
}

/// Tests of single operations.
macro_rules! operation {
    ($name:ident, $device:ident) => {
        layers::$name(&$device)
    };
}
/// Tests of the network. Each call of the closure creates a new device.
macro_rules! network {
    ($name:ident, $device:ident) => {{
        drop($device);
        model::$name(&new_device)
    }};
}
/// Tests of the parts of a step.
macro_rules! step {
    ($name:ident, $device:ident) => {{
        drop($device);
        parts::$name(&new_device)
    }};
}

on_the_gpu! {
    operation: layer_norm fused_layer_norms linear nan_survives_relu label_linear gather_and_segment_sum segments_of_any_length attention
        prefix_mean recent_events_weigh_more concat rank_loss cosine_loss adam;
    network: shared_prefixes_and_candidates_do_not_change_results lazy_and_dense_adam_agree_while_every_row_is_touched
        threads_may_share_a_device attention_by_feedback_matches_the_cpu
        steps_are_deterministic a_non_finite_value_stops_the_step_and_is_named errors_name_the_index_beyond_the_model
        histories_without_events_or_of_one_label_score_finitely;
    step: an_observer_does_not_change_a_step parts_add_up_to_the_step batches_are_staged_on_any_thread
        sending_a_batch_ahead_does_not_change_results a_failed_step_does_not_lose_the_next_batch
        steps_in_flight_do_not_change_results a_refused_step_refuses_those_behind_it;
}

#[test]
fn target_attention_agrees_with_the_definition() {
    let Some(device) = gpu(Precision::F32) else { return };
    for (name, case) in target_attention::cases().into_iter().chain(target_attention::kernel_cases()) {
        let found = case.run_on(&device);
        target_attention::assert_close(&name, &found, &case.reference());
        assert!(case.run_on(&device) == found, "{name}: it should repeat bit for bit");
    }
}

#[test]
fn target_attention_in_bf16_is_as_exact_as_unfused() {
    let Some(device) = gpu(Precision::Bf16) else {
        return;
    };
    let mut errors = target_attention::InBf16::default();
    for (name, case) in target_attention::kernel_cases() {
        errors.add(&name, &case.run_on(&device), &case.reference(), &case.in_bf16());
    }
    errors.assert();
}

#[test]
fn gradients_match_finite_differences() {
    let Some(device) = gpu(Precision::F32) else { return };
    let device = Arc::new(device);
    model::gradients_match_finite_differences(&|| device.clone(), 1);
}

#[test]
fn steps_match_the_cpu() {
    let Some(device) = gpu(Precision::F32) else { return };
    let device = Arc::new(device);
    model::steps_agree(&|| Arc::new(Cpu::new()), &|| device.clone());
}

#[test]
fn the_network_matches_the_golden_cases() {
    let Some(device) = gpu(Precision::F32) else { return };
    let device = Arc::new(device);
    // In the current directory: that of the package, or of the archive of benches/first_day.sh.
    for path in cases(Path::new("tests/golden")).expect("golden cases should be there") {
        let case = Case::read(&path).expect("a case should be readable");
        if case.kind != "dfar" {
            continue;
        }
        let errors = verify_dfar(&case, device.clone()).expect("a case should be complete");
        let failed: Vec<_> = errors.iter().filter(|e| !e.passes).collect();
        assert!(failed.is_empty(), "{}: {failed:?}", case.name);
    }
}

/// cuBLASLt does not document whether its ReLU keeps NaN.
#[test]
fn nan_survives_the_relu_of_the_library() {
    for precision in [Precision::F32, Precision::Bf16] {
        let Some(gpu) = gpu(precision) else { return };
        layers::nan_survives_relu(&gpu.with_library_products());
    }
}

/// Products in both precisions with a row, a column or a sum of one, at addresses that are only
/// 4-byte aligned.
#[test]
fn products_of_any_shape_and_alignment() {
    for precision in [Precision::F32, Precision::Bf16] {
        let Some(gpu) = gpu(precision) else { return };
        for shape in [[1, 1, 1], [5, 1, 3], [3, 7, 1], [1, 9, 33], [17, 1, 64], [300, 5, 2]] {
            for [a_transposed, b_transposed] in [[false, false], [false, true], [true, false], [true, true]] {
                check_product(&gpu, precision, shape, a_transposed, b_transposed);
            }
        }
    }
}

/// Compares one product with its definition. Values are small integers, exact also in bf16.
fn check_product(gpu: &Gpu<Cuda>, precision: Precision, shape: [usize; 3], at: bool, bt: bool) {
    let [m, n, k] = shape;
    // One value more at the start: the matrices begin 4 bytes later.
    let values =
        |len: usize, step: usize| -> Vec<f32> { (0..=len).map(|i| ((i * step) % 11) as f32 - 5.0).collect() };
    let (a, b) = (values(m * k, 7), values(k * n, 5));
    let [da, db, dc] = [&a, &b, &vec![9.0; m * n + 1]].map(|x| gpu.copy_of(x).expect("there is memory"));
    let gemm = Gemm {
        shape,
        a: da.pointer() + 4,
        a_transposed: at,
        b: db.pointer() + 4,
        b_transposed: bt,
        c: dc.pointer() + 4,
        store: Store::Overwrite,
        bias: 0,
        activation: Activation::None,
        precision,
    };
    // SAFETY: each array has one value more than its matrix.
    unsafe { gpu.runtime().gemm(&gemm) }.expect("a product should run");
    let found = dc.to_vec().expect("readable");
    for (row, column) in (0..m).flat_map(|row| (0..n).map(move |column| (row, column))) {
        let a = |i: usize| a[1 + if at { i * m + row } else { row * k + i }];
        let b = |i: usize| b[1 + if bt { column * k + i } else { i * n + column }];
        let expected: f32 = (0..k).map(|i| a(i) * b(i)).sum();
        assert_eq!(found[1 + row * n + column], expected, "{precision:?} {shape:?} {at} {bt}");
    }
    assert_eq!(found[0], 9.0, "nothing before the matrix should be written");
}
