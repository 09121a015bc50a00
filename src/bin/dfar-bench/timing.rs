//! The shortest of many runs.

use std::time::{Duration, Instant};

/// The shortest of many runs of `f`, after one to warm up: at least three, and more until `budget`
/// is spent. The shortest is what the machine can do when nothing else runs on it.
pub fn shortest(budget: Duration, mut f: impl FnMut()) -> Duration {
    f();
    let start = Instant::now();
    let mut shortest = Duration::MAX;
    let mut runs = 0;
    while runs < 3 || start.elapsed() < budget {
        let run = Instant::now();
        f();
        shortest = shortest.min(run.elapsed());
        runs += 1;
    }
    shortest
}
