//! The systems against the float64 cases of the oracle: logits, losses, every gradient, Adam.

use crate::skip::skip;
use dfar::device::Precision;
use dfar::device::cpu::Cpu;
use dfar_baselines::verify::verify;
use dfar_baselines::{Kind, Settings, SystemDevice};
use dfar_tools::verify::{Outcome, VerifyError, cases};
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn cpu() -> Arc<Cpu> {
    Arc::new(Cpu::new())
}

/// Number of cases that the device computes, all of which pass.
fn check<D: SystemDevice>(device: &Arc<D>, folder: &Path) -> usize {
    let mut checked = 0;
    for path in cases(folder).expect("there should be cases") {
        let report = verify(device, &path).unwrap_or_else(|error| panic!("{error}"));
        let Outcome::Checked(errors) = &report.outcome else {
            let kind = Kind::ALL.into_iter().find(|kind| report.case.starts_with(kind.name()));
            assert!(kind.is_some_and(|kind| !D::computes(kind)), "{} was not compared", report.case);
            continue;
        };
        assert!(errors.len() > 10, "{}: only {} tensors compared", report.case, errors.len());
        for error in errors {
            assert!(error.passes, "{}: {error:?}", report.case);
        }
        checked += 1;
    }
    checked
}

#[test]
fn the_systems_agree_with_the_oracle() {
    assert!(check(&cpu(), &root().join("tests/golden")) >= 8);
}

#[test]
fn din_and_sasrec_agree_with_the_oracle_in_the_emulator() {
    let gpu = Arc::new(dfar_emulator::gpu(Precision::F32));
    assert!(check(&gpu, &root().join("tests/golden")) >= 2);
    let all = root().join("../../shared/golden/baselines");
    if all.exists() {
        assert!(check(&gpu, &all) >= 6);
    }
}

#[test]
fn the_systems_agree_with_all_cases_of_the_oracle() {
    let folder = root().join("../../shared/golden/baselines");
    if !folder.exists() {
        return skip(format_args!("{} is not there", folder.display()));
    }
    assert!(check(&cpu(), &folder) >= 23);
}

#[test]
fn a_wrong_gradient_is_noticed_and_a_broken_file_is_named() {
    let path = root().join("tests/golden/sasrec_small.safetensors");
    let mut bytes = std::fs::read(&path).expect("the case should be there");
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).expect("a header");
    let (start, end) = metadata.info("grad.encoder.v.w").expect("the gradient is there").data_offsets;
    let at = 8 + header;
    let values: Vec<f64> = bytes[at + start..at + end]
        .chunks_exact(8)
        .map(|value| f64::from_le_bytes(value.try_into().expect("8 bytes")))
        .collect();
    let largest = values.iter().fold(0f64, |m, v| m.max(v.abs()));
    bytes[at + start..at + start + 8].copy_from_slice(&(values[0] + 2e-4 * largest).to_le_bytes());
    let folder = tempfile::tempdir().expect("a folder");
    let altered = folder.path().join("altered.safetensors");
    std::fs::write(&altered, &bytes).expect("a file");
    let report = verify(&cpu(), &altered).expect("it is still a case");
    let Outcome::Checked(errors) = &report.outcome else { panic!("not compared") };
    let failed: Vec<_> = errors.iter().filter(|e| !e.passes).map(|e| &e.tensor[..]).collect();
    assert_eq!(failed, ["grad.encoder.v.w"]);

    std::fs::write(&altered, &bytes[..bytes.len() / 2]).expect("a file");
    let error = verify(&cpu(), &altered).expect_err("half a file is no case");
    assert!(matches!(error, VerifyError::Format { .. }) && error.to_string().contains("altered.safetensors"));
}

/// Sizes of untrusted files: refused, with the name of the field.
#[test]
fn impossible_sizes_are_refused() {
    let bytes =
        std::fs::read(root().join("tests/golden/caser_small.safetensors")).expect("the case is there");
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("x.safetensors");
    for (from, to, reason) in [
        ("heights\\\": 3", "heights\\\": 0", "heights = 0"),
        ("heads\\\": 2", "heads\\\": 3", "width = 8: must be a multiple of the number of heads"),
        ("items\\\": 40", "items\\\": 41", "tensor item: expected shape [41, 8]"),
        ("steps\\\": 2", "steps\\\": 9", "step_losses"),
        ("candidates\\\": 3", "candidates\\\": 4", "candidate"),
    ] {
        let mut bytes = bytes.clone();
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes());
        let at = at.unwrap_or_else(|| panic!("{from} should be in the file"));
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        std::fs::write(&path, bytes).expect("a file");
        let error = verify(&cpu(), &path).expect_err(to).to_string();
        assert!(error.contains(reason) && error.contains("x.safetensors"), "{to}: {error}");
    }
}

#[test]
fn sizes_that_are_too_large_are_refused() {
    let untouched = Settings { items: 40, ..Settings::default() };
    for settings in [
        Settings { width: usize::MAX, ..untouched.clone() },
        Settings { max_length: 1 << 21, ..untouched.clone() },
        Settings { vertical_length: 1 << 21, ..untouched.clone() },
    ] {
        let error = settings.check().expect_err("the size is too large").to_string();
        assert!(error.contains("is too large"), "{error}");
    }
}
