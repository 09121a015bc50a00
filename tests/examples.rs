//! The examples run, and their own assertions hold.

#[path = "../examples/attention.rs"]
mod attention;
#[path = "../examples/read_dfar.rs"]
mod read_dfar;
#[path = "../examples/train_and_score.rs"]
mod train_and_score;
#[path = "../examples/training_loop.rs"]
mod training_loop;

#[test]
fn attention_agrees_with_a_naive_loop() {
    attention::main().unwrap();
}

#[test]
fn a_model_learns_a_log_in_memory() {
    train_and_score::main().unwrap();
}

#[test]
fn a_training_loop_raises_the_validation_auc() {
    training_loop::main().unwrap();
}

#[test]
fn a_dfar_file_is_read() {
    read_dfar::main().unwrap();
}
