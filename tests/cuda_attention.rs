//! The attention operation on a GPU, if there is one; otherwise, the library's errors.

#[path = "common/gpu.rs"]
mod common;

use common::gpu;
use dfar::attention::{FhaOptions, Inputs};
use dfar::device::cuda::driver::compile::Cache;
use dfar::device::cuda::driver::nvrtc::Nvrtc;
use dfar::device::cuda::kernel::Arch;
use dfar::device::cuda::plan::tile::HEAD_DIMS;
use dfar::device::cuda::{Cuda, CudaError, Element, Precision, device_count, ops};
use dfar_tools::verify::{Case, Fha, cases, compare, compare_gradients};
use std::io::Write;
use std::path::Path;

#[test]
fn a_missing_gpu_is_a_typed_error() {
    match device_count() {
        Ok(count) => {
            let error = Cuda::new(count).expect_err("there are only so many");
            assert!(
                matches!(error, CudaError::NoDevice { ordinal, found } if ordinal == count && found == count)
            );
        }
        Err(CudaError::NoDriver) => {
            let error = Cuda::new(0).expect_err("there is no driver");
            assert!(matches!(error, CudaError::NoDriver), "{error}");
            assert_eq!(dfar::Error::from(error).exit_code(), 4);
        }
        Err(error) => assert!(matches!(error, CudaError::Driver { .. }), "{error}"),
    }
}

#[test]
fn compiled_modules_are_kept() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = Cache::in_folder(folder.path());
    let module = ops::attention::module(Element::Bf16, 16);
    match Nvrtc::get() {
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "compiled_modules_are_kept: skipped: {error}");
            let error = cache.load(module, Arch::OLDEST).expect_err("nothing can compile it");
            assert!(matches!(error, CudaError::NoNvrtc { .. } | CudaError::OldNvrtc { .. }), "{error}");
        }
        Ok(_) => {
            let code = cache.load(module, Arch::OLDEST).expect("it should compile");
            let entry = std::fs::read_dir(folder.path())
                .expect("readable")
                .next()
                .expect("an entry")
                .expect("readable");
            let written = std::fs::read(entry.path()).expect("readable");
            assert_eq!(cache.load(module, Arch::OLDEST).expect("it is kept"), code);
            std::fs::write(entry.path(), &written[..written.len() / 2]).expect("writable");
            assert_eq!(cache.load(module, Arch::OLDEST).expect("it should compile again"), code);
            assert_eq!(
                std::fs::read(entry.path()).expect("readable"),
                written,
                "the entry should be whole again"
            );

            let error =
                cache.load(module, Arch { major: 1, minor: 0 }).expect_err("there is no such machine");
            assert!(
                matches!(&error, CudaError::Compile { arch, options, .. } if arch == "sm_10" && !options.is_empty())
            );
        }
    }
}

#[test]
fn golden_cases_in_f32() {
    let Some(cuda) = gpu(Precision::F32) else { return };
    // In the current directory: that of the package, or of the archive of benches/first_day.sh.
    for path in cases(Path::new("tests/golden")).expect("golden cases should be there") {
        let case = Case::read(&path).expect("a case should be readable");
        if case.kind != "fha" {
            continue;
        }
        let fha = Fha::new(&case).expect("a case should be complete");
        let n = fha.label.len();
        let (mut o, mut lse) = (vec![0.0; fha.options.output_len(n)], vec![0.0; fha.options.lse_len(n)]);
        let forward = cuda.forward(&fha.options, fha.inputs(), &mut o, &mut lse);
        if !HEAD_DIMS.contains(&fha.options.head_dim) {
            assert!(matches!(forward, Err(CudaError::HeadDim { .. })));
            continue;
        }
        forward.expect("forward should run");
        let run = || {
            let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![0.0f32; fha.qkv[0].len()]);
            cuda.backward(&fha.options, fha.inputs(), &o, &lse, &fha.d_o, [&mut dq, &mut dk, &mut dv])
                .expect("backward should run");
            [dq, dk, dv]
        };
        let [dq, dk, dv] = run();
        let mut errors = vec![compare("o", &o, &fha.o), compare("lse", &lse, &fha.lse)];
        let [rq, rk, rv] = &fha.gradients;
        errors.extend(compare_gradients(&[("dq", &dq, rq), ("dk", &dk, rk), ("dv", &dv, rv)]));
        assert!(errors.iter().all(|e| e.passes), "{}: {errors:?}", case.name);
        assert!(run() == [dq, dk, dv], "{}: backward should repeat bit for bit", case.name);
    }
}

#[test]
fn refused_arguments_write_nothing() {
    let Some(cuda) = gpu(Precision::F32) else { return };
    let x = [0.0f32; 3 * 32];
    let inputs = Inputs { q: &x, k: &x, v: &x[..32], cu_seqlens: &[0, 3], label: &[0, 1, 0] };
    let (mut o, mut lse) = (vec![5.0; 96], vec![5.0; 3]);
    let error = cuda.forward(&FhaOptions::new(2, 16), inputs, &mut o, &mut lse).expect_err("v is short");
    assert!(matches!(error, CudaError::Attention(_)), "{error}");
    assert!(o.iter().chain(&lse).all(|&x| x == 5.0));
}
