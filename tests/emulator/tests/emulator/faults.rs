//! The emulator detects each kind of fault: one kernel with each fault, and one without.

use dfar::device::cuda::kernel::{Kernel, Launch};
use dfar_emulator::{Device, FAULTS};

fn kernel(entry: &'static str) -> Kernel {
    Kernel { module: FAULTS, entry }
}

fn run(entry: &'static str, threads: u32) -> Result<(), String> {
    let device = Device::new();
    let data = device.output::<f32>(64);
    let launch = |entry: &'static str, threads| {
        let launch = Launch { grid: [1, 1], threads, shared_bytes: 256 };
        device.launch(kernel(entry), launch, &data.pointer())
    };
    launch("fill", 32).expect("filling should be sound");
    launch(entry, threads)
}

#[test]
fn a_sound_kernel_passes() {
    run("sound", 64).expect("nothing is wrong with it");
}

#[test]
fn planted_faults_are_caught() {
    for (entry, threads, words) in [
        ("global_out_of_bounds", 32, "out-of-bounds write of 4 bytes of global memory"),
        ("global_before_the_start", 32, "out-of-bounds read of 4 bytes of global memory"),
        ("shared_out_of_bounds", 64, "out-of-bounds write of 4 bytes of shared memory"),
        ("global_unwritten", 32, "read of 4 bytes of uninitialized global memory"),
        ("shared_unwritten", 32, "read of 4 bytes of uninitialized shared memory"),
        ("copy_not_awaited", 32, "read of 4 bytes of uninitialized shared memory"),
        ("race_between_warps", 64, "race: read of 4 bytes of shared memory, accessed by thread"),
        ("race_inside_a_warp", 32, "race: read of 4 bytes of shared memory, accessed by thread"),
        ("write_after_read", 64, "race: write of 4 bytes of shared memory, accessed by thread"),
        ("divergent_barrier", 64, "divergence: thread 32 is at __syncthreads"),
        ("divergent_barrier_of_warps", 64, "divergence: thread 0 is at __syncthreads"),
        ("divergent_warp", 32, "divergence: thread 0 is at a warp operation"),
        ("misaligned_matrix", 32, "misaligned"),
    ] {
        let message = run(entry, threads).expect_err(entry);
        assert!(message.contains(words), "{entry}: {message}");
    }
}

#[test]
fn an_input_cannot_be_written() {
    let device = Device::new();
    let data = device.input(&[0.0f32; 64]);
    let launch = Launch { grid: [1, 1], threads: 32, shared_bytes: 0 };
    let message = device.launch(kernel("fill"), launch, &data.pointer()).expect_err("it writes");
    assert!(message.contains("write of 4 bytes to an input"), "{message}");
}

#[test]
fn what_no_thread_wrote_cannot_be_read_back() {
    let device = Device::new();
    let data = device.output::<f32>(64);
    let launch = Launch { grid: [1, 1], threads: 32, shared_bytes: 0 };
    device.launch(kernel("fill"), launch, &data.pointer()).expect("filling should be sound");
    let message = device.read(&data).expect_err("half of it was filled");
    assert!(message.contains("128 of 256 bytes were never written"), "{message}");
}
