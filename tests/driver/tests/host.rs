//! The library's host code on the driver: work that runs late, in any order that is allowed, gives
//! the same bits; calls that fail end in a recovery or a typed error, without a leak or a wrong
//! number.

mod common;
#[path = "../../bodies/curves.rs"]
#[allow(dead_code, reason = "the curves are for whole programs")]
mod curves;

use common::{Control, on_the_driver};
use dfar::batch::Batch;
use dfar::device::cpu::Cpu;
use dfar::device::cuda::{Captures, Cuda, CudaError, Gpu, Precision, device_count};
use dfar::device::{DeviceError, Memory};
use dfar::model::{Model, ModelError, Optimizer};
use std::collections::VecDeque;
use std::sync::Arc;

/// Enough for a graph executable to be updated: the first steps load kernels.
const STEPS: usize = 8;
const EVERY: u64 = u64::MAX;

/// [`steps_on`] a new device, with all products by the library and two steps in flight.
fn steps(
    batches: &[Batch],
    precision: Precision,
    graphs: bool,
) -> Result<(Vec<f64>, Option<Captures>), DeviceError> {
    steps_on(Gpu::new(Cuda::new(0)?, precision).with_library_products(), batches, graphs, 2)
}

/// The losses of a few steps on a device, `most` in flight, and how they were started.
fn steps_on(
    gpu: Gpu<Cuda>,
    batches: &[Batch],
    graphs: bool,
    most: usize,
) -> Result<(Vec<f64>, Option<Captures>), DeviceError> {
    let config = curves::config();
    let device = Arc::new(if graphs { gpu.with_graphs() } else { gpu });
    let network = curves::network();
    let made = Model::initialized(device.clone(), network, config.seed, config.init);
    let mut model = made.map_err(into_device_error)?;
    let mut optimizer = Optimizer::new(&model).map_err(into_device_error)?;
    let (loss, adam) = (config.loss(), config.adam());
    let (mut losses, mut in_flight) = (Vec::new(), VecDeque::new());
    for batch in batches {
        let sent = model.stager().stage(batch).and_then(|staged| model.send(staged));
        let step = sent.and_then(|sent| model.begin_step(sent, &loss, &adam, &mut optimizer, &mut ()));
        in_flight.push_back(step.map_err(into_device_error)?);
        if in_flight.len() == most {
            let step = in_flight.pop_front().expect("there are some");
            losses.push(step.finish(&mut optimizer).map_err(into_device_error)?.loss);
        }
    }
    for step in in_flight {
        losses.push(step.finish(&mut optimizer).map_err(into_device_error)?.loss);
    }
    Ok((losses, device.captures()))
}

fn into_device_error(error: ModelError) -> DeviceError {
    match error {
        ModelError::Device(error) => error,
        error => panic!("{error}"),
    }
}

fn batches() -> Vec<Batch> {
    curves::batches().into_iter().take(STEPS).collect()
}

fn losses(batches: &[Batch]) -> Vec<f64> {
    steps(batches, Precision::F32, false).expect("nothing fails").0
}

/// Lets the k-th call of `entry` fail, and `times` in a row, one run for each k; of more than
/// `most` calls, some spread evenly. `judge` gets k and what came of the run.
fn fail_every(
    entry: &str,
    [most, times]: [u64; 2],
    code: i32,
    run: impl Fn() -> Result<Vec<f64>, DeviceError>,
    mut judge: impl FnMut(u64, Result<Vec<f64>, DeviceError>),
) {
    let control = Control::new();
    let before = control.calls(entry);
    run().expect("nothing fails yet");
    let calls = control.calls(entry) - before;
    assert!(calls > 0, "{entry} should be called");
    for i in 0..calls.min(most) {
        let k = 1 + i * calls / calls.min(most);
        (0..times).for_each(|more| control.fail(entry, k + more, code));
        let result = run();
        assert!(control.forget() < times, "{entry} {k} was never called");
        judge(k, result);
        control.assert_no_fault(); // among them leaks
    }
}

const RETURN: [(&str, &str); 1] = [("DFAR_DRIVER_FAULTS", "return")];

#[test]
fn the_test_driver_is_not_mistaken_for_a_gpu() {
    on_the_driver(&[], || {
        assert_eq!(device_count().expect("a driver"), 1);
        let error = Cuda::new(1).expect_err("there is one");
        assert!(matches!(error, CudaError::NoDevice { ordinal: 1, found: 1 }));
        let cuda = Cuda::new(0).expect("it opens");
        assert!(format!("{cuda:?}").contains("dfar test driver (no GPU)"), "{cuda:?}");
    });
}

fn the_same_bits(seed: &str) {
    on_the_driver(&[("DFAR_DRIVER_SEED", seed)], || {
        let batches = batches();
        let (plain, _) = steps(&batches, Precision::F32, false).expect("nothing fails");
        let (captured, captures) = steps(&batches, Precision::F32, true).expect("nothing fails");
        assert_eq!(plain, captured, "graphs change no bit");
        assert!(captures.expect("asked for").updated > 0);
        let reference = curves::curve(Arc::new(Cpu::new()), &batches);
        assert!(plain.iter().zip(&reference).all(|(a, b)| (a - b).abs() <= curves::TOLERANCE * b.abs()));
        let (bf16, _) = steps(&batches, Precision::Bf16, true).expect("nothing fails");
        // Products that share launches, plainly and in graphs.
        let shared = [(false, 1), (true, 1), (false, 2), (true, 2), (false, 3)].map(|(graphs, most)| {
            let gpu = Gpu::new(Cuda::new(0).expect("a driver"), Precision::F32);
            steps_on(gpu, &batches, graphs, most).expect("nothing fails").0
        });
        assert!(shared.iter().all(|losses| *losses == shared[0]), "graphs, steps in flight: {shared:?}");
        let close = |(a, b): (&f64, &f64)| (a - b).abs() <= curves::TOLERANCE * b.abs();
        assert!(shared[0].iter().zip(&plain).all(close), "{shared:?} {plain:?}");
        assert!(bf16.iter().zip(&plain).all(|(a, b)| (a - b).abs() < 0.05 * b.abs()), "{bf16:?} {plain:?}");
    });
}

#[test]
fn work_that_runs_at_once() {
    the_same_bits("0");
}

#[test]
fn work_that_runs_as_late_as_possible() {
    the_same_bits("1");
}

#[test]
fn work_that_runs_in_any_order() {
    the_same_bits("20261126");
}

/// Once: the pool is emptied and the allocation tried again. Twice: a typed error.
#[test]
fn a_failed_allocation_is_recovered_or_typed() {
    on_the_driver(&RETURN, || {
        let batches = &batches()[..1];
        let expected = losses(batches);
        let run = || Ok(steps(batches, Precision::F32, false)?.0);
        fail_every("cuMemAllocAsync", [60, 1], 2, run, |k, result| {
            assert_eq!(result.unwrap_or_else(|error| panic!("allocation {k}: {error}")), expected);
        });
        fail_every("cuMemAllocAsync", [10, 2], 2, run, |k, result| {
            let error = result.expect_err("the second attempt fails too");
            let typed = matches!(CudaError::of(&error), Some(CudaError::OutOfMemory { bytes }) if *bytes > 0);
            assert!(typed, "allocation {k}: {error}");
        });
    });
}

/// A second model of a process: the memory of the first lies idle in the pool.
#[test]
fn memory_given_back_is_room_for_another_model() {
    on_the_driver(&[], || {
        let gpu = Gpu::new(Cuda::new(0).expect("the driver has a device"), Precision::F32);
        // 600 MiB of the device's 1 GiB.
        let parameters = 150 << 20;
        drop(gpu.alloc::<f32>(parameters).expect("it is free"));
        gpu.check_room(parameters, 1).expect("it is free again");
        // Of another size: the pool is emptied for it.
        drop(gpu.alloc::<f32>(parameters / 4 * 5).expect("the pool makes room"));
        let error = gpu.check_room(2 * parameters, 1).expect_err("the device is smaller");
        assert!(matches!(CudaError::of(&error), Some(CudaError::NoRoom { .. })), "{error}");
    });
}

#[test]
fn a_failed_product_is_tried_with_another_algorithm() {
    on_the_driver(&RETURN, || {
        let batches = &batches()[..1];
        for (status, most, times) in [(7, 20, 1), (14, EVERY, 1), (15, EVERY, 2)] {
            let expected = steps(batches, Precision::Bf16, false).expect("nothing fails").0;
            let run = || Ok(steps(batches, Precision::Bf16, false)?.0);
            fail_every("cublasLtMatmul", [most, times], status, run, |k, result| {
                let found = result.unwrap_or_else(|error| panic!("product {k}: {error}"));
                // The last resort has f32 factors.
                let close = found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 0.05 * b.abs());
                assert!(
                    if times == 1 { found == expected } else { close },
                    "product {k}: {found:?}, {expected:?}"
                );
            });
        }
        let run = || Ok(steps(batches, Precision::F32, false)?.0);
        fail_every("cublasLtMatmul", [20, 2], 14, run, |k, result| {
            let error = result.expect_err("nothing works");
            let typed = matches!(CudaError::of(&error), Some(CudaError::Blas { status: 14, .. }));
            assert!(typed, "product {k}: {error}");
        });
    });
}

#[test]
fn any_call_that_fails_is_a_typed_error() {
    on_the_driver(&RETURN, || {
        let batches = &batches()[..1];
        let expected = losses(batches);
        for (entry, code) in [
            ("cuLaunchKernel", 1),
            ("cuMemcpyHtoDAsync_v2", 1),
            ("cuMemcpyDtoHAsync_v2", 1),
            ("cuMemsetD8Async", 1),
            ("cuModuleLoadData", 2),
            ("cuModuleGetFunction", 500),
            ("cuFuncSetAttribute", 1),
            ("cuMemHostAlloc", 2),
            ("cuEventCreate", 2),
            ("cuEventRecord", 400),
            ("cuStreamWaitEvent", 400),
            ("cuStreamCreate", 2),
            ("cuStreamSynchronize", 719),
            ("cublasLtCreate", 1),
        ] {
            let run = || Ok(steps(batches, Precision::F32, false)?.0);
            fail_every(entry, [8, 1], code, run, |k, result| match result {
                Ok(found) => assert_eq!(found, expected, "{entry} {k}"),
                Err(error) => {
                    let error = CudaError::of(&error).unwrap_or_else(|| panic!("{entry} {k}: {error:?}"));
                    assert!(!matches!(error, CudaError::OutOfMemory { bytes: 0 }), "{entry} {k}: 0 bytes");
                }
            });
        }
    });
}

#[test]
fn a_refused_graph_runs_without_one() {
    on_the_driver(&RETURN, || {
        let batches = batches();
        let expected = losses(&batches);
        for (entry, code) in [
            ("cuGraphExecUpdate_v2", 910),
            ("cuStreamBeginCapture_v2", 900),
            ("cuStreamEndCapture", 901),
            ("cuGraphInstantiateWithFlags", 2),
            ("cuGraphGetNodes", 1),
            ("cuGraphLaunch", 1),
        ] {
            let run = || Ok(steps(&batches, Precision::F32, true)?.0);
            fail_every(entry, [5, 1], code, run, |k, result| {
                let found = result.unwrap_or_else(|error| panic!("{entry} {k}: {error}"));
                assert_eq!(found, expected, "{entry} {k}");
            });
        }
    });
}

#[test]
fn a_newer_cublaslt_that_cannot_be_used_is_followed_by_an_older_one() {
    on_the_driver(&[("DFAR_DRIVER_VERSION", "13000"), RETURN[0]], || {
        losses(&batches()[..1]);
        let control = Control::new();
        control.fail("cublasLtCreate", 1, 1);
        let error = steps(&batches()[..1], Precision::F32, false).expect_err("none is left");
        assert!(error.to_string().contains("cublasLt.so"), "{error}");
    });
}

/// Two devices in one process share a context: one may be made while the other captures.
#[test]
fn devices_of_several_threads_do_not_disturb_each_other() {
    on_the_driver(&[("DFAR_DRIVER_SEED", "5")], || {
        let batches = batches();
        let expected = losses(&batches);
        std::thread::scope(|scope| {
            for graphs in [true, false, true, false] {
                let (batches, expected) = (&batches, &expected);
                scope.spawn(move || {
                    let (found, captures) = steps(batches, Precision::F32, graphs).expect("nothing fails");
                    assert_eq!(&found, expected);
                    assert!(captures.is_none_or(|captures| captures.updated > 0));
                });
            }
        });
    });
}
