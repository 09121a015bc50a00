//! The network on the emulated GPU: the test bodies of the CPU, the golden cases, and comparison
//! with the steps of the CPU.

use crate::model_bodies as bodies;

use dfar::device::cpu::Cpu;
use dfar::device::cuda::Precision;
use dfar_emulator::gpu;
use dfar_tools::verify::{Case, cases, verify_dfar};
use std::path::Path;
use std::sync::Arc;

macro_rules! on_the_emulator {
    ($($(#[$attribute:meta])? $name:ident($($argument:expr)?))+) => {$(
        #[test]
        $(#[$attribute])?
        fn $name() {
            bodies::$name(&|| Arc::new(gpu(Precision::F32)) $(, $argument)?);
        }
    )+};
}

on_the_emulator! {
    #[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
    shared_prefixes_and_candidates_do_not_change_results()
    #[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
    gradients_match_finite_differences(9)
    lazy_and_dense_adam_agree_while_every_row_is_touched()
    threads_may_share_a_device()
    attention_by_feedback_matches_the_cpu()
    #[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
    steps_are_deterministic()
    a_non_finite_value_stops_the_step_and_is_named()
    errors_name_the_index_beyond_the_model()
    histories_without_events_or_of_one_label_score_finitely()
}

#[test]
fn the_network_matches_the_golden_cases() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden");
    let mut checked = 0;
    for path in cases(&folder).expect("golden cases should be there") {
        let case = Case::read(&path).expect("a case should be readable");
        if case.kind != "dfar" {
            continue;
        }
        let errors = verify_dfar(&case, Arc::new(gpu(Precision::F32))).expect("a case should be complete");
        assert!(errors.len() > 100, "{}: only {} tensors compared", case.name, errors.len());
        let failed: Vec<_> = errors.iter().filter(|e| !e.passes).collect();
        assert!(failed.is_empty(), "{}: {failed:?}", case.name);
        checked += 1;
    }
    assert_eq!(checked, 4);
}

#[test]
#[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
fn steps_match_the_cpu() {
    let (cpu, device) = (|| Arc::new(Cpu::new()), || Arc::new(gpu(Precision::F32)));
    bodies::steps_agree(&cpu, &device);
    // Three steps in a row, without copying the state between the devices.
    let ((losses, _), (expected, _)) = (bodies::three_steps(&device), bodies::three_steps(&cpu));
    for (found, cpu) in losses.iter().zip(&expected) {
        assert!((found - cpu).abs() < 1e-5 * cpu.abs(), "{losses:?}, but {expected:?} on the CPU");
    }
}

#[test]
fn a_run_goes_on_on_the_other_device() {
    let device = || Arc::new(gpu(Precision::F32));
    let cpu = || Arc::new(Cpu::new());
    let loss = bodies::a_run_moves(cpu(), cpu());
    for other in [
        bodies::a_run_moves(cpu(), device()),
        bodies::a_run_moves(device(), cpu()),
        bodies::a_run_moves(device(), device()),
    ] {
        assert!((other - loss).abs() < 1e-5 * loss.abs(), "{other}, but {loss} on the CPU");
    }
}

/// bf16 products, everything else in f32: close to the f32 steps but not equal.
#[test]
fn bf16_steps_and_attention_by_feedback_are_near() {
    let (losses, _) = bodies::three_steps(&|| Arc::new(gpu(Precision::Bf16)));
    let (exact, _) = bodies::three_steps(&|| Arc::new(gpu(Precision::F32)));
    for (found, exact) in losses.iter().zip(&exact) {
        let error = (found - exact).abs() / exact.abs();
        assert!(error > 0.0 && error < 2e-2, "{losses:?} in bf16, {exact:?} in f32");
    }
    let [weights, exact] =
        [Precision::Bf16, Precision::F32].map(|precision| bodies::head_pairs(&|| Arc::new(gpu(precision))));
    for (found, exact) in weights.iter().zip(&exact) {
        let error = (found - exact).abs() / exact;
        assert!(error > 0.0 && error < 1e-2, "{weights:?} in bf16, {exact:?} in f32");
    }
}
