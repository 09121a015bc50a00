//! The attention engine allocates only in its first call. This is the only test of its file,
//! because the counter counts the allocations of all threads of the process.

mod common;

use common::Batch;
use dfar::attention::{FhaOptions, Gradients, backward, forward};
use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

struct Counting;
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all calls are forwarded unchanged to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: guaranteed by the caller.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: guaranteed by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn a_second_call_allocates_nothing() {
    let options = FhaOptions::new(2, 16);
    // 1100 tokens take the two-pass backward of long sequences.
    let batch = Batch::random(&options, &[20, 300, 0, 1, 1100, 64], 1);
    let n = batch.tokens();
    let (mut o, mut lse) = (vec![0.0; options.output_len(n)], vec![0.0; options.lse_len(n)]);
    let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![0.0; batch.q.len()]);
    let mut call = || {
        forward(&options, batch.inputs(), &mut o, &mut lse).expect("inputs should be accepted");
        let gradients = Gradients { dq: &mut dq, dk: &mut dk, dv: &mut dv };
        backward(&options, batch.inputs(), &o, &lse, &batch.d_o, gradients)
            .expect("inputs should be accepted");
    };
    // One thread: among several, the one that grows its scratch for the longest sequence is random.
    let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().expect("a thread should start");
    pool.install(|| {
        call();
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        call();
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0, "allocations of the second call");
    });
}
