//! A step by its parts on the CPU; the bodies are in `bodies/parts.rs`.

#[path = "bodies/parts.rs"]
mod bodies;

use dfar::device::cpu::Cpu;
use std::sync::Arc;

macro_rules! on_the_cpu {
    ($($name:ident)+) => {$(
        #[test]
        fn $name() {
            bodies::$name(&|| Arc::new(Cpu::new()));
        }
    )+};
}

on_the_cpu! {
    watching_a_step_changes_nothing
    parts_make_up_the_step
    a_batch_staged_for_another_model_is_refused
    a_batch_sent_ahead_changes_nothing
    a_batch_sent_behind_a_failing_step_is_not_lost
    batches_are_staged_on_any_thread
}
