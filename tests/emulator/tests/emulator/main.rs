//! The kernels and the CUDA host code on the emulated GPU. One program for all files, because each
//! program compiles the model and the training loop for this device again.

#[path = "../../../bodies/curves.rs"]
mod curves_bodies;
#[path = "../../../bodies/model.rs"]
mod model_bodies;

mod ahead;
mod attention;
mod curves;
mod device;
mod faults;
mod graphs;
mod layers;
mod model;
mod naive_attention;
mod step_parts;
mod target_attention;
