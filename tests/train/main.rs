//! Training: what is drawn, and runs that are stopped and resumed.

mod draw;
mod resume;
