//! Operations that only the compared systems need. Work is cut into chunks that do not depend on
//! the number of threads, so results are bitwise equal for any number of threads.

pub mod attentive;
pub mod candidate_attention;
pub mod candidate_stack;
pub mod cell;
pub mod convolution;
pub mod gru;
pub mod lists;
pub mod next_event;
pub mod prefix;
pub mod prefix_attention;
mod rows;
pub mod sequences;
pub mod stack;
pub mod talking_heads;
pub mod talking_stack;
pub mod target;
#[cfg(test)]
mod testing;
