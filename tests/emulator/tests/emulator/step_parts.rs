//! A training step timed by parts on the emulated GPU, with the test bodies of the CPU.

#[macro_use]
#[path = "../../../bodies/parts.rs"]
mod bodies;

use dfar::device::cuda::Precision;
use dfar::train::Config;
use dfar_emulator::gpu;
use dfar_tools::limits::gpu::Card;
use dfar_tools::train::steps::{self, Batches, Peak};
use std::sync::Arc;

test_every_body!(|| Arc::new(gpu(Precision::F32)));

#[test]
fn parts_stand_beside_their_floors() {
    let config = Config { width: 8, max_length: 6, batch_rows: 20, workers: 2, ..Config::default() };
    let peak = Peak { limits: Card::H200.datasheet(), precision: Precision::F32 };
    let (device, batches) = (Arc::new(gpu(Precision::F32)), Batches::uniform(&config));
    let profile = steps::measure(&device, &batches, &config, 3, Some(&peak)).expect("sound steps");
    assert_eq!((profile.steps, profile.instances, profile.tokens), (2, 2 * 20, 2 * 12));
    for row in &profile.parts {
        // The emulator is slower than any GPU.
        let (seconds, floor) = (row.seconds.expect("timed"), row.floor.expect("counted").seconds);
        assert!(floor > 0.0 && seconds > floor, "{row:?}");
    }
    let text = profile.to_string();
    for word in ["x floor", "share of peak", "between steps", "instances/s"] {
        assert!(text.contains(word), "{word} in\n{text}");
    }
}
