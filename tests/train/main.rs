//! Training: what is drawn, and runs that are stopped, killed and resumed.

mod draw;
mod kill;
mod resume;
