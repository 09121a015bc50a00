//! The whole network on the CPU; the bodies are in `bodies/model.rs`.

#[path = "bodies/model.rs"]
mod bodies;

use dfar::device::cpu::Cpu;
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
