//! The whole network on the CPU; the bodies are in `bodies/model.rs`.

#[path = "../bodies/model.rs"]
mod bodies;

use crate::skip::skip;
use dfar::batch::Batch;
use dfar::device::cpu::Cpu;
use dfar::model::{Model, ModelConfig};
use std::sync::Arc;

macro_rules! on_the_cpu {
    ($($name:ident($($argument:expr)?))+) => {$(
        #[test]
        fn $name() {
            bodies::$name(&|| Arc::new(Cpu::new()) $(, $argument)?);
        }
    )+};
}

on_the_cpu! {
    shared_prefixes_and_candidates_do_not_change_results()
    gradients_match_finite_differences(1)
    lazy_and_dense_adam_agree_while_every_row_is_touched()
    steps_are_deterministic()
    a_non_finite_value_stops_the_step_and_is_named()
    errors_name_the_index_beyond_the_model()
    histories_without_events_or_of_one_label_score_finitely()
}

#[test]
fn steps_are_bitwise_equal_for_any_number_of_threads() {
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| bodies::three_steps(&|| Arc::new(Cpu::new())))
    };
    let one = run(1);
    assert!(one == run(2) && one == run(5));
}

/// Threads keep scratch memory between calls. A NaN that one model leaves there reaches no other.
#[test]
fn nan_stays_in_its_model() {
    let batch = Batch::pack(&bodies::histories(&[12, 3, 9], 9)).unwrap();
    // Rows of 40 values end in the middle of a cache line, rows of 48 do not.
    let with = |attention| ModelConfig { attention, ..bodies::config() };
    let model = bodies::model_of_order_one(Arc::new(Cpu::new()), with([80, 40]));
    let mut tensors = bodies::model_of_order_one(Arc::new(Cpu::new()), with([80, 48])).tensors().unwrap();
    tensors.iter_mut().for_each(|tensor| tensor.values.fill(f32::NAN));
    let broken = Model::from_tensors(Arc::new(Cpu::new()), with([80, 48]), &tensors).unwrap();
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
    pool.install(|| {
        let expected = (model.score(&batch).unwrap(), model.gradients(&batch, &bodies::LOSS).unwrap());
        assert!(expected.0.iter().all(|score| score.is_finite()));
        broken.gradients(&batch, &bodies::LOSS).unwrap_err();
        assert!(model.gradients(&batch, &bodies::LOSS).unwrap() == expected.1);
        assert!(broken.score(&batch).unwrap().iter().all(|score| score.is_nan()));
        assert!(model.score(&batch).unwrap() == expected.0);
    });
}

/// The CPU in bf16; `None`, with a line that says so, where the processor lacks it.
fn bf16() -> Option<impl Fn() -> Arc<Cpu>> {
    if let Err(error) = Cpu::bf16() {
        skip(error);
        return None;
    }
    Some(|| Arc::new(Cpu::bf16().expect("bf16 is available")))
}

/// bf16 products, everything else in f32: close to the f32 steps but not equal.
#[test]
fn bf16_steps_are_near_and_the_same_for_any_number_of_threads() {
    let Some(bf16) = bf16() else { return };
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| bodies::three_steps(&bf16))
    };
    let found = run(1);
    assert!(found == run(2) && found == run(5));
    let (exact, _) = bodies::three_steps(&|| Arc::new(Cpu::new()));
    for (found, exact) in found.0.iter().zip(&exact) {
        let error = (found - exact).abs() / exact.abs();
        assert!(error > 0.0 && error < 2e-2, "{found} in bf16, {exact} in f32");
    }
}

#[test]
fn in_bf16_a_non_finite_value_stops_the_step_and_empty_histories_score_finitely() {
    let Some(bf16) = bf16() else { return };
    bodies::a_non_finite_value_stops_the_step_and_is_named(&bf16);
    bodies::histories_without_events_or_of_one_label_score_finitely(&bf16);
}
