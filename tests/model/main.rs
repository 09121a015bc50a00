//! The network on the CPU: its operations, its steps, what goes into it and the metrics of what
//! comes out.

mod batch;
mod golden;
mod launches;
mod layers;
mod metrics;
mod network;
#[path = "../common/skip.rs"]
mod skip;
mod step_parts;
mod target_attention;
