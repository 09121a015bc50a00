//! The attention operation by sequence length, fused and naive: `cargo bench --bench attention`. It
//! is timed on the CPU and, if there is one, on a GPU. GPU times come from CUDA events, because the
//! host's clock does not measure work that the GPU has yet to finish.

use criterion::{
    BenchmarkGroup, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main,
    measurement::WallTime,
};
use dfar::attention::{AttentionError, FhaOptions};
use dfar::device::cuda::kernel::Value;
use dfar::device::cuda::{Cuda, CudaError, Gpu, Precision};
use dfar_tools::attention::batch::{Batch, Pass};
use dfar_tools::attention::gpu::{Fused, NaiveForm};
use dfar_tools::limits::gpu::time;
use half::bf16;
use std::time::Duration;

type Run = fn(&mut Batch) -> Result<(), AttentionError>;

fn quick<'a>(c: &'a mut Criterion, name: &str) -> BenchmarkGroup<'a, WallTime> {
    let mut group = c.benchmark_group(name);
    group.warm_up_time(Duration::from_millis(200)).measurement_time(Duration::from_secs(1)).sample_size(10);
    group
}

fn cpu(c: &mut Criterion) {
    let passes: [(&str, [(&str, Run); 2]); 2] = [
        ("forward", [("fused", Batch::forward), ("naive", Batch::naive_forward)]),
        ("backward", [("fused", Batch::backward), ("naive", Batch::naive_backward)]),
    ];
    for (pass, forms) in passes {
        let mut group = quick(c, &format!("attention/{pass}"));
        for length in [20, 50, 100, 200, 300, 1024] {
            let mut batch = Batch::new(FhaOptions::new(2, 16), length, 4096);
            batch.forward().expect("the options are valid");
            group.throughput(Throughput::Elements(batch.tokens() as u64));
            for (form, run) in forms {
                group.bench_function(BenchmarkId::new(form, length), |b| b.iter(|| run(&mut batch)));
            }
        }
    }
}

/// Tokens per batch, enough to fill a GPU.
const TOKENS: usize = 1 << 18;

fn cuda(c: &mut Criterion) {
    // The naive form computes products in the precision of the fused form's tensors.
    for precision in [Precision::F32, Precision::Bf16] {
        let gpu = match Cuda::new(0) {
            Ok(cuda) => Gpu::new(cuda, precision),
            Err(error) => {
                println!("attention on a GPU: SKIPPED, nothing was measured: {error}");
                return;
            }
        };
        let measured = match precision {
            Precision::F32 => on_gpu(c, &gpu, "f32", |x| x),
            Precision::Bf16 => on_gpu(c, &gpu, "bf16", bf16::from_f32),
        };
        measured.unwrap_or_else(|error| panic!("attention on the GPU in {}: {error}", precision.name()));
    }
}

fn on_gpu<T: Value>(
    c: &mut Criterion,
    gpu: &Gpu<Cuda>,
    name: &str,
    narrow: fn(f32) -> T,
) -> Result<(), CudaError> {
    for length in [20, 50, 100, 200, 300, 1024, 4096] {
        let host = Batch::new(FhaOptions::new(2, 16), length, TOKENS);
        let mut fused = Fused::new(gpu, &host, narrow, 0)?;
        // The naive form stores all scores in memory.
        let mut naive = if length <= 1024 { Some(NaiveForm::new(gpu, &host, length)?) } else { None };
        for pass in Pass::ALL {
            let mut group = quick(c, &format!("attention/cuda/{name}/{}", pass.name()));
            group.throughput(Throughput::Elements(host.tokens() as u64));
            group.bench_function(BenchmarkId::new("fused", length), |b| {
                b.iter_custom(|count| seconds(time(gpu, count, || fused.run(pass))));
            });
            if let Some(naive) = &mut naive {
                group.bench_function(BenchmarkId::new("naive", length), |b| {
                    b.iter_custom(|count| seconds(time(gpu, count, || naive.run(pass))));
                });
            }
        }
    }
    Ok(())
}

fn seconds(time: Result<f64, CudaError>) -> Duration {
    Duration::from_secs_f64(time.expect("what ran once runs again"))
}

criterion_group!(benches, cpu, cuda);
criterion_main!(benches);
