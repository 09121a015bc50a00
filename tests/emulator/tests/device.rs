//! The model's operations on the emulated device.

use dfar::device::DeviceError;
use dfar::device::cuda::{CudaError, Precision};
use dfar::model::{Model, ModelConfig, ModelError};
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
