//! Tables, figures and the final JSON of a run.
