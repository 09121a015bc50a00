//! The shortest of many runs.

use std::time::{Duration, Instant};

/// The shortest of many runs of `f`, after a warm-up run: at least three, and more until `budget`
/// is spent. The shortest run is the least disturbed by other programs.
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
