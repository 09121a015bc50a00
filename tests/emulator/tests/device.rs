//! The model's operations on the emulated device.

#[path = "../../bodies/model.rs"]
mod bodies;

use dfar::batch::Batch;
use dfar::device::DeviceError;
use dfar::device::cuda::runtime::{Runtime, Staging};
use dfar::device::cuda::{CudaError, Precision};
use dfar::model::{Model, ModelConfig, ModelError, Optimizer};
use dfar_emulator::gpu;
use std::sync::Arc;

#[test]
fn memory_given_back_is_used_again_and_counts_as_unwritten() {
    let gpu = gpu(Precision::F32);
    let first = gpu.copy_of(&[1.0f32; 100]).expect("there is memory");
    let at = first.pointer();
    drop(first);
    let second = gpu.array::<f32>(100).expect("there is memory");
    assert_eq!(second.pointer(), at);
    let error = second.to_vec().expect_err("nobody wrote it");
    assert!(error.to_string().contains("never written"), "{error}");
}

#[test]
fn tables_that_do_not_fit_are_refused_with_the_numbers() {
    let device = Arc::new(gpu(Precision::F32));
    let config = ModelConfig::new(20_000_000, 100);
    let check = |result: Result<(), ModelError>, copies: usize| match result {
        Err(ModelError::Device(DeviceError::Cuda(error))) => {
            let CudaError::NoRoom { parameters, needed, free, .. } = error else { panic!("{error}") };
            assert!(parameters > 20_000_000 * 32 && needed == parameters * 4 * copies && free == 1 << 30);
            assert!(error.to_string().contains("of the device's 1.00 GiB are free"), "{error}");
            assert_eq!(error.exit_code(), 4);
        }
        other => panic!("{other:?}"),
    };
    check(Model::check_room(&*device, &config, false), 3);
    check(Model::check_room(&*device, &config, true), 4);
    check(Model::from_tensors(device, config, &[]).map(|_| ()), 1);
}

#[test]
fn staged_arrays_arrive_in_one_copy_and_apart() {
    let gpu = gpu(Precision::F32);
    let mut staging = Staging::new(gpu.runtime()).expect("there is memory");
    // Together more than a staging begins with.
    let values: Vec<u32> = (0..300_000).collect();
    let bytes = staging.add(&[1u8, 2, 3]).expect("there is memory");
    let none = staging.add::<f64>(&[]).expect("there is memory");
    let long = staging.add(&values).expect("there is memory");
    let last = staging.add(&[0.5f64]).expect("there is memory");
    let before = gpu.runtime().copies().to_device;
    staging.send().expect("there is memory");
    assert_eq!(gpu.runtime().copies().to_device, before + 1);
    assert_eq!(bytes.to_vec().expect("it was sent"), [1, 2, 3]);
    assert_eq!((none.pointer(), none.to_vec().expect("it is empty")), (0, vec![]));
    assert!(long.to_vec().expect("it was sent") == values);
    assert_eq!(last.to_vec().expect("it was sent"), [0.5]);
    for at in [bytes.pointer(), long.pointer(), last.pointer()] {
        assert_eq!(at % 256, 0);
    }

    // An access behind an array is caught as if the array were an allocation of its own.
    let mut host = [0; 8];
    // SAFETY: the emulator judges the access before it makes it.
    let behind = unsafe { gpu.runtime().read(long.pointer_at(long.len()), &mut host) };
    let error = behind.expect_err("nobody's memory").to_string();
    assert!(error.contains("not inside one array"), "{error}");

    // The memory is given back with the last of them, whole.
    let at = bytes.pointer();
    drop((bytes, long));
    assert_eq!(last.to_vec().expect("it is still there"), [0.5]);
    drop((last, none));
    let mut again = Staging::new(gpu.runtime()).expect("there is memory");
    let parts = (again.add(&[1u8, 2, 3]), again.add(&values), again.add(&[0.5f64]));
    again.send().expect("there is memory");
    assert_eq!(parts.0.expect("there is memory").pointer(), at);
}

#[test]
#[should_panic(expected = "before its staging was sent")]
fn a_staged_array_cannot_be_used_before_it_is_sent() {
    let gpu = gpu(Precision::F32);
    let mut staging = Staging::new(gpu.runtime()).expect("there is memory");
    let array = staging.add(&[1u32]).expect("there is memory");
    array.pointer();
}

/// What one training step copies: the batch and the optimiser's table up, the losses down.
#[test]
fn a_step_copies_its_batch_once_and_its_losses_back() {
    let device = Arc::new(gpu(Precision::F32));
    let mut model = bodies::lively(device.clone(), bodies::config());
    let mut optimizer = Optimizer::new(&model).expect("there is memory");
    for lengths in [&[12, 3, 9][..], &[5], &[1, 1, 12, 7]] {
        let batch = Batch::pack(&bodies::histories(lengths, 9)).expect("the histories are sound");
        let before = device.runtime().copies();
        model.train_step(&batch, &bodies::LOSS, &bodies::ADAM, &mut optimizer).expect("a sound step");
        let after = device.runtime().copies();
        assert_eq!(after.to_device - before.to_device, 2, "to the device");
        assert_eq!(after.to_host - before.to_host, 1, "to the host");
    }
}
