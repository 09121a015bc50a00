//! The network against the golden cases: loss, logits, all gradients, and the parameters after
//! Adam.

use dfar_tools::verify::{CpuEngine, Outcome, cases, verify};
use std::path::Path;

fn check(folder: &Path) -> usize {
    let mut checked = 0;
    for path in cases(folder).unwrap() {
        if !path.file_name().unwrap().to_string_lossy().starts_with("dfar_") {
            continue;
        }
        let report = verify(&path, &CpuEngine).unwrap();
        let Outcome::Checked(errors) = &report.outcome else { panic!("{} was not compared", report.case) };
        assert!(errors.len() > 100, "{}: only {} tensors compared", report.case, errors.len());
        for error in errors {
            assert!(error.passes, "{}: {error:?}", report.case);
        }
        checked += 1;
    }
    checked
}

#[test]
fn the_network_matches_the_golden_cases() {
    assert_eq!(check(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")), 4);
}

#[test]
fn a_wrong_reference_fails_the_comparison() {
    // One gradient value is changed by 2e-4 of the largest; the comparison must fail.
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dfar_small.safetensors");
    let mut bytes = std::fs::read(&golden).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let start = metadata.info("grad.encoder.q.w").unwrap().data_offsets;
    let at = 8 + header + start.0;
    let values: Vec<f64> = bytes[at..8 + header + start.1]
        .chunks_exact(8)
        .map(|b| f64::from_le_bytes(b.try_into().unwrap()))
        .collect();
    let largest = values.iter().fold(0f64, |m, v| m.max(v.abs()));
    bytes[at..at + 8].copy_from_slice(&(values[0] + 2e-4 * largest).to_le_bytes());
    let folder = tempfile::tempdir().unwrap();
    let altered = folder.path().join("dfar_altered.safetensors");
    std::fs::write(&altered, bytes).unwrap();
    let report = verify(&altered, &CpuEngine).unwrap();
    let Outcome::Checked(errors) = &report.outcome else { panic!("not compared") };
    let failed: Vec<_> = errors.iter().filter(|e| !e.passes).map(|e| &e.tensor[..]).collect();
    assert_eq!(failed, ["grad.encoder.q.w"]);
}
