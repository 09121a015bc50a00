//! Memory, copies and training steps on the emulated device.

use crate::model_bodies as bodies;

use dfar::batch::Batch;
use dfar::device::cuda::array::Staging;
use dfar::device::cuda::runtime::Runtime;
use dfar::device::cuda::{CudaError, Gpu, Precision};
use dfar::model::{AdamOptions, Model, ModelConfig, ModelError, Optimizer};
use dfar_emulator::{Emulated, gpu};
use std::collections::VecDeque;
use std::sync::Arc;

#[test]
fn memory_given_back_is_used_again_and_counts_as_unwritten() {
    let gpu = gpu(Precision::F32);
    let first = gpu.copy_of(&[1.0f32; 100]).expect("there is memory");
    let at = first.pointer();
    drop(first);
    let second = gpu.array::<f32>(100).expect("there is memory");
    assert_eq!(second.pointer(), at);
    let error = second.to_vec().expect_err("it is uninitialized");
    assert!(error.to_string().contains("never written"), "{error}");
}

#[test]
fn tables_that_do_not_fit_are_refused_with_the_numbers() {
    let device = Arc::new(gpu(Precision::F32));
    let config = ModelConfig::new(20_000_000, 100);
    let check = |result: Result<(), ModelError>, copies: usize| match result {
        Err(ModelError::Device(error)) => {
            let error = CudaError::of(&error).expect("an error of CUDA");
            let CudaError::NoRoom { parameters, needed, free, .. } = *error else { panic!("{error}") };
            assert!(parameters > 20_000_000 * 32 && needed == parameters * 4 * copies && free == 1 << 30);
            assert!(error.to_string().contains("of the device's 1.00 GiB are free"), "{error}");
            assert_eq!(error.exit_code(), 4);
        }
        other => panic!("{other:?}"),
    };
    check(Model::check_room(&*device, &config, false), 3);
    check(Model::check_room(&*device, &config, true), 5);
    check(Model::from_tensors(device, config, &[]).map(|_| ()), 1);
}

#[test]
fn staged_arrays_arrive_in_one_copy_and_apart() {
    let gpu = gpu(Precision::F32);
    let mut staging = Staging::new(gpu.runtime()).expect("there is memory");
    // Larger in total than the initial staging buffer.
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

    // An access behind a staged array is caught as for an array with its own allocation.
    let mut host = [0; 8];
    // SAFETY: the emulator checks the access before it executes it.
    let behind = unsafe { gpu.runtime().read(long.pointer_at(long.len()), &mut host) };
    let error = behind.expect_err("out of bounds").to_string();
    assert!(error.contains("not inside one array"), "{error}");

    // The shared allocation is freed with the last array, and reused after the host has
    // synchronised.
    let at = bytes.pointer();
    drop((bytes, long));
    assert_eq!(last.to_vec().expect("it is still there"), [0.5]);
    drop((last, none));
    let send_again = || {
        let mut again = Staging::new(gpu.runtime()).expect("there is memory");
        let parts = (again.add(&[1u8, 2, 3]), again.add(&values), again.add(&[0.5f64]));
        again.send().expect("there is memory");
        parts.0.expect("there is memory")
    };
    let second = send_again();
    assert_ne!(second.pointer(), at);
    second.to_vec().expect("it was sent");
    assert_eq!(send_again().pointer(), at);
}

/// A copy may run ahead of all work in flight, so its destination must be idle landing memory.
#[test]
fn a_copy_goes_to_idle_memory_alone() {
    let gpu = gpu(Precision::F32);
    let runtime = gpu.runtime();
    let part = 0..4;
    let send = |at| {
        // SAFETY: the emulator checks the copy before it executes it.
        unsafe { runtime.send(at, vec![7; 4], std::slice::from_ref(&part)) }
    };
    let refused = |at| send(at).expect_err("it is not idle").to_string();
    let pooled = runtime.allocate(4).expect("there is memory");
    assert!(refused(pooled).contains("not idle landing memory"));
    let landing = runtime.allocate_landing(4).expect("there is memory");
    send(landing).expect("it is idle");
    // Later work may use it.
    assert!(refused(landing).contains("not idle landing memory"));
    // SAFETY: allocated above with the same sizes, each by the matching function.
    unsafe {
        runtime.free(pooled, 4);
        runtime.free_landing(landing, 4);
    }
}

#[test]
#[should_panic(expected = "before its staging was sent")]
fn a_staged_array_cannot_be_used_before_it_is_sent() {
    let gpu = gpu(Precision::F32);
    let mut staging = Staging::new(gpu.runtime()).expect("there is memory");
    let array = staging.add(&[1u32]).expect("there is memory");
    array.pointer();
}

/// A training step copies the batch and the optimizer's table to the device, and the losses back.
#[test]
fn a_step_copies_its_batch_once_and_its_losses_back() {
    let device = Arc::new(gpu(Precision::F32));
    let mut model = bodies::model_of_order_one(device.clone(), bodies::config());
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

/// On a lagging device, the next batch arrives before the current step executes. The steps give the
/// same bits, so no batch overwrites one that is still to be read.
#[test]
fn batches_sent_ahead_overtake_the_steps_before_and_change_nothing() {
    let batches: Vec<_> = [&[12, 3, 9][..], &[5], &[1, 1, 12, 7], &[12, 3, 9], &[5], &[2]]
        .iter()
        .map(|lengths| Batch::pack(&bodies::histories(lengths, 9)).expect("the histories are sound"))
        .collect();
    for (dense_embeddings, later) in [(false, 0), (true, 0), (false, 1), (true, 1)] {
        let adam = AdamOptions { dense_embeddings, ..bodies::ADAM };
        let mut plain = bodies::model_of_order_one(Arc::new(gpu(Precision::F32)), bodies::config());
        let mut optimizer = Optimizer::new(&plain).expect("there is memory");
        let expected: Vec<_> = batches
            .iter()
            .map(|batch| plain.train_step(batch, &bodies::LOSS, &adam, &mut optimizer).expect("a sound step"))
            .collect();

        let device = Arc::new(Gpu::new(Emulated::lagging(), Precision::F32));
        let mut model = bodies::model_of_order_one(device.clone(), bodies::config());
        let mut optimizer = Optimizer::new(&model).expect("there is memory");
        let stager = model.stager();
        let mut staged = batches.iter().map(|batch| stager.stage(batch).expect("the batch fits"));
        // Synchronises, so that the first copy has no work to overtake.
        model.tensors().expect("the device works");
        let before = device.runtime().copies();
        let mut sent = staged.next().map(|batch| model.send(batch).expect("there is memory"));
        let (mut losses, mut in_flight) = (Vec::new(), VecDeque::new());
        while let Some(batch) = sent.take() {
            let pending = model.begin_step(batch, &bodies::LOSS, &adam, &mut optimizer, &mut ());
            in_flight.push_back(pending.expect("a sound step"));
            sent = staged.next().map(|batch| model.send(batch).expect("there is memory"));
            let later = if sent.is_some() { later } else { 0 };
            while in_flight.len() > later {
                let pending = in_flight.pop_front().expect("it is longer");
                losses.push(pending.finish(&mut optimizer).expect("a sound step"));
            }
        }
        let after = device.runtime().copies();
        assert_eq!(losses, expected);
        assert!(model.tensors().expect("the device works") == plain.tensors().expect("the device works"));
        let steps = batches.len();
        assert_eq!(after.to_device - before.to_device, 2 * steps, "to the device");
        assert_eq!(after.to_host - before.to_host, steps, "to the host");
        // Every table, and every batch but the first.
        assert_eq!(after.overlapped - before.overlapped, 2 * steps - 1);
    }
}
