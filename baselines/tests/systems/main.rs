//! Tests of all systems, in one program.

mod compare;
mod encoders;
mod golden;
mod overfit;
#[path = "../../../tests/common/skip.rs"]
mod skip;
