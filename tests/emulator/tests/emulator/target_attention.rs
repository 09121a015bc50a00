//! Target attention on the emulated GPU, against the float64 definition, with the cases of the
//! CPU's tests.

#[path = "../../../bodies/target_attention.rs"]
#[allow(dead_code)] // cases of shapes that are not compiled here
mod bodies;

use bodies::{Case, InBf16, assert_close, kernel_cases};
use dfar::device::cuda::plan::target_shape::Shape;
use dfar::device::cuda::{CudaError, Element, Precision};
use dfar::device::{Memory, TargetAttention};
use dfar_emulator::gpu;

#[test]
fn in_f32_it_agrees_with_the_definition() {
    let device = gpu(Precision::F32);
    for (name, case) in kernel_cases() {
        assert_close(&name, &case.run_on(&device), &case.reference());
    }
}

#[test]
fn in_bf16_it_is_as_exact_as_the_unfused_computation() {
    let device = gpu(Precision::Bf16);
    let mut errors = InBf16::default();
    for (name, case) in kernel_cases() {
        errors.add(&name, &case.run_on(&device), &case.reference(), &case.in_bf16());
    }
    errors.assert();
}

/// The grid depends on the device only, and the order of summation on the grid and the batch.
#[test]
fn it_repeats_bit_for_bit() {
    let case = Case::random(32, [80, 40], &[40, 3, 70, 16], 9, 2, 7);
    for precision in [Precision::F32, Precision::Bf16] {
        assert!(case.run_on(&gpu(precision)) == case.run_on(&gpu(precision)));
    }
}

#[test]
fn widths_without_a_kernel_are_refused() {
    let device = gpu(Precision::F32);
    let refused = |width, hidden| {
        let case = Case::random(width, hidden, &[3], 2, 1, 1);
        let mut staging = device.staging().unwrap();
        match device.target_plan(&mut staging, case.shape(), case.index()) {
            Err(error) => error,
            Ok(_) => panic!("{width}, {hidden:?} was taken"),
        }
    };
    let error = refused(129, [80, 40]);
    assert!(matches!(CudaError::of(&error), Some(CudaError::TargetWidth { width: 129, .. })), "{error}");
    let error = refused(64, [1024, 512]);
    let available = 163 << 10;
    assert!(
        matches!(CudaError::of(&error), Some(CudaError::SharedMemory { available: found, .. }) if *found == available),
        "{error}"
    );
    let shape = Shape::of(64, [80, 40]).unwrap();
    assert!(shape.backward(Element::F32).shared_bytes <= 163 << 10, "twice the paper's width fits an A100");
}
