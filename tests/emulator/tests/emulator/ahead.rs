//! A training run on a lagging device sends batches ahead, and gives the same results as a run on a
//! device that executes at once.

use dfar::data::Dataset;
use dfar::data::synthetic::{self, SyntheticOptions};
use dfar::device::cuda::{Gpu, Precision};
use dfar::train::run::Run;
use dfar::train::{Config, Event, Fit, Outcome};
use dfar_emulator::Emulated;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

#[test]
#[cfg_attr(not(feature = "sweep"), ignore = "takes long: --features sweep")]
fn a_run_sends_batches_ahead_and_stays_the_same() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.dfar");
    let options =
        SyntheticOptions { users: 12, items: 20, events_per_user: 8.0, ..SyntheticOptions::default() };
    synthetic::write(&options, &path).expect("the log should be written");
    let data = Dataset::open(&path).expect("the log should be readable");
    let config = Config { epochs: 1, width: 8, max_length: 6, batch_tokens: 12, ..Config::default() };

    let run = |name: &str, runtime: Emulated, stop: u64| {
        let device = Arc::new(Gpu::new(runtime, Precision::F32));
        let run = Run::create(&folder.path().join(name)).expect("a new folder");
        let mut fit = Fit::start(device.clone(), &data, config.clone(), &run).expect("a sound start");
        let (before, mut losses, mut overlapped) = (device.runtime().copies().overlapped, Vec::new(), 0);
        let outcome = fit.run(&mut |event| {
            if let Event::Step { loss, steps, .. } = event {
                losses.push(*loss);
                overlapped = device.runtime().copies().overlapped - before;
                if steps == stop {
                    return ControlFlow::Break(());
                }
                // Time for the next batches to become ready.
                thread::sleep(Duration::from_millis(20));
            }
            ControlFlow::Continue(())
        });
        (outcome.expect("a sound run"), losses, overlapped, fit.model().tensors().expect("the device works"))
    };
    let (outcome, expected, none, parameters) = run("at once", Emulated::default(), 0);
    assert_eq!((outcome, none), (Outcome::Finished, 0));
    let steps = expected.len();
    assert!(steps > 8, "{steps} steps");
    let (outcome, losses, overlapped, found) = run("behind", Emulated::lagging(), 0);
    assert!(outcome == Outcome::Finished && losses == expected && found == parameters);
    // Each step sends a table; each batch but the first is sent ahead if it was ready in time,
    // which a very busy machine may prevent for some.
    assert!((steps + steps / 2..2 * steps).contains(&overlapped), "{overlapped} in {steps} steps");

    // Interrupted after a batch was sent ahead and a step begun, the run has taken exactly the
    // reported steps: also the one in flight.
    let (outcome, losses, ..) = run("stopped", Emulated::lagging(), 3);
    assert_eq!((outcome, losses.as_slice()), (Outcome::Interrupted, &expected[..4]));
}
