//! The model's operations on the emulated device.

use dfar::device::cuda::Precision;
use dfar_emulator::gpu;

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
