//! The network as a whole on the emulated GPU: the bodies of the CPU's tests, the oracle's cases, and the same steps as on the
//! CPU.

#[path = "../../bodies/model.rs"]
mod bodies;

use dfar::device::cpu::Cpu;
use dfar::device::cuda::Precision;
use dfar::verify::{Case, cases, verify_dfar};
use dfar_emulator::gpu;
use std::path::Path;
use std::sync::Arc;

macro_rules! on_the_emulator {
    ($($name:ident($($argument:expr)?))+) => {$(
        #[test]
        fn $name() {
            bodies::$name(&|| Arc::new(gpu(Precision::F32)) $(, $argument)?);
        }
    )+};
}

on_the_emulator! {
    shared_prefixes_and_candidates_change_nothing()
    gradients_are_derivatives_of_the_loss(3)
    lazy_and_dense_adam_agree_while_every_row_is_touched()
    steps_repeat_bit_for_bit()
    a_non_finite_value_stops_the_step_and_is_named()
    what_does_not_fit_is_refused_by_name()
    histories_without_events_or_of_one_label_score_finitely()
}

#[test]
fn the_network_agrees_with_the_oracle() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../golden");
    let mut checked = 0;
    for path in cases(&folder).expect("golden cases should be there") {
        let case = Case::read(&path).expect("a case should be readable");
        if case.kind != "dfar" {
            continue;
        }
        let errors = verify_dfar(&case, Arc::new(gpu(Precision::F32))).expect("a case should be complete");
        assert!(errors.len() > 100, "{}: only {} tensors compared", case.name, errors.len());
        let failed: Vec<_> = errors.iter().filter(|e| !e.passes()).collect();
        assert!(failed.is_empty(), "{}: {failed:?}", case.name);
        checked += 1;
    }
    assert_eq!(checked, 4);
}

/// A run started on one device goes on on the other: three steps here and there end close by.
#[test]
fn steps_are_those_of_the_cpu() {
    let (losses, tensors) = bodies::three_steps(&|| Arc::new(gpu(Precision::F32)));
    let (cpu_losses, cpu_tensors) = bodies::three_steps(&|| Arc::new(Cpu::new()));
    for (found, cpu) in losses.iter().zip(&cpu_losses) {
        assert!((found - cpu).abs() < 1e-5 * cpu.abs(), "{losses:?}, but {cpu_losses:?} on the CPU");
    }
    for (found, cpu) in tensors.iter().zip(&cpu_tensors) {
        // Adam divides a gradient by its own size: where it is next to nothing, its rounding moves a value by the rate.
        let far = found.values.iter().zip(&cpu.values).filter(|(x, y)| (**x - **y).abs() > 1e-4).count();
        assert!(
            far * 50 <= found.values.len(),
            "{}: {far} of {} values differ",
            found.name,
            found.values.len()
        );
    }
}

/// Products in bf16 with everything else in f32: near the f32 steps, and not the same.
#[test]
fn bf16_steps_are_near() {
    let (losses, _) = bodies::three_steps(&|| Arc::new(gpu(Precision::Bf16)));
    let (exact, _) = bodies::three_steps(&|| Arc::new(gpu(Precision::F32)));
    for (found, exact) in losses.iter().zip(&exact) {
        let error = (found - exact).abs() / exact.abs();
        assert!(error > 0.0 && error < 2e-2, "{losses:?} in bf16, {exact:?} in f32");
    }
}
