//! Tests of all systems, in one program.

mod encoders;
mod golden;
