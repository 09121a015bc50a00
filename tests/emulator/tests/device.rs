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

#[test]
fn rows_are_added() {
    let gpu = gpu(Precision::F32);
    for len in [0, 1, 3, 4, 1000, 1026] {
        let host: Vec<f32> = (0..len).map(|i| i as f32).collect();
        let x = gpu.copy_of(&host).expect("there is memory");
        let mut y = gpu.copy_of(&vec![0.5f32; len]).expect("there is memory");
        gpu.add_rows(&x, &mut y).expect("the kernel should be sound");
        assert!(y.to_vec().expect("written").iter().enumerate().all(|(i, &y)| y == i as f32 + 0.5), "{len}");
    }
}
