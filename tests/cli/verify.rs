//! `dfar-bench verify` on good, bad and broken cases.

use crate::skip::skip;
use dfar_tools::verify::{
    Case, CpuEngine, Difference, GRADIENT_TOLERANCE, Outcome, Report, Summary, VerifyError, compare,
    compare_gradients, relative_error, verify,
};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{name}.safetensors"))
}

fn command(arguments: &[&str], folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dfar-bench"));
    command.arg("verify").arg(folder).args(arguments);
    command
}

fn run(arguments: &[&str], folder: &Path) -> Output {
    command(arguments, folder).output().expect("dfar-bench should start")
}

fn folder_with(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder should be made");
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).expect("a file should be written");
    }
    folder
}

/// The bytes of a good case.
fn good() -> Vec<u8> {
    std::fs::read(golden("fha_tiny")).expect("the case should be there")
}

#[test]
fn good_cases_pass() {
    let folder = folder_with(&[("a.safetensors", &good()), ("notes.txt", b"not a case")]);
    let output = run(&[], folder.path());
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.ends_with("1 passed, 0 failed, 0 skipped\n"), "{text}");

    let output = run(&["--json"], folder.path());
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).expect("it should print JSON");
    assert_eq!((&json["passed"], &json["failed"]), (&1.into(), &0.into()));
    let tensors = json["cases"][0]["outcome"]["checked"].as_array().expect("a checked case lists tensors");
    let names: Vec<&str> = tensors.iter().filter_map(|t| t["tensor"].as_str()).collect();
    assert_eq!(names, ["o", "lse", "dq", "dk", "dv"]);
}

/// A run that compares nothing has verified nothing.
#[test]
fn skipped_cases_alone_do_not_pass() {
    let report = |outcome| Report { case: "case".to_owned(), outcome, differs: None };
    let skipped = || report(Outcome::Skipped("not on this device".to_owned()));
    assert!(!Summary::new(vec![skipped()]).passes());
    assert!(Summary::new(vec![skipped(), report(Outcome::Checked(Vec::new()))]).passes());
}

/// Repeated runs give the same bits; a run that does not fails the case, and is named.
#[test]
fn repeated_runs_are_compared_bit_by_bit() {
    let dfar = std::fs::read(golden("dfar_small")).expect("the case should be there");
    let folder = folder_with(&[("a.safetensors", &good()), ("b.safetensors", &dfar)]);
    let output = run(&["--repeat", "3"], folder.path());
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.ends_with("2 passed, 0 failed, 0 skipped\neach case computed 3 times\n"), "{text}");

    let mut report = verify(&golden("fha_tiny"), &CpuEngine).expect("the case is good");
    let mut other = report.clone();
    report.compare_run(&other, 2);
    assert!(report.differs.is_none() && report.passes());
    let Outcome::Checked(tensors) = &mut other.outcome else { panic!("the case is checked") };
    tensors[3].crc32 ^= 1;
    report.compare_run(&other, 7);
    assert_eq!(report.differs, Some(Difference { run: 7, tensor: "dk".into() }));
    assert!(!report.passes() && report.to_string().contains("run 7 has other bits than run 1  FAILED"));
}

#[test]
fn in_bf16_a_case_is_judged_by_the_unfused_computation_in_bf16() {
    let folder = folder_with(&[("a.safetensors", &good())]);
    let arguments = ["--precision", "bf16"];
    let mut refused = command(&arguments, folder.path());
    let refused = refused.env("DFAR_SIMD", "portable").output().expect("dfar-bench should start");
    let text = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{text}");
    assert!(text.contains("need AVX512-BF16") && text.contains("use --precision f32"), "{text}");
    if let Err(error) = dfar::device::cpu::Cpu::bf16() {
        return skip(format_args!("the rest: {error}"));
    }
    // Networks are compared in f32 only.
    for (names, summary) in [
        (&["fha_tiny", "fha_masked", "fha_paper"][..], "3 passed, 0 failed, 0 skipped\n"),
        (&["fha_tiny", "dfar_small"], "1 passed, 0 failed, 1 skipped\n"),
    ] {
        let folder = tempfile::tempdir().expect("a folder should be made");
        for name in names {
            let copy = folder.path().join(name).with_extension("safetensors");
            std::fs::copy(golden(name), copy).expect("the case should be there");
        }
        let output = run(&arguments, folder.path());
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{names:?}: {text}");
        assert!(text.ends_with(summary), "{names:?}: {text}");
    }
}

/// A small change of one value of the last tensor is detected, and the exit code is 1.
#[test]
fn a_wrong_result_fails() {
    let mut bytes = good();
    let case = Case::read(&golden("fha_tiny")).expect("the case should be readable");
    let v = case.f64s("o", &[None; 4]).expect("o is there");
    let (index, old) =
        v.iter().enumerate().max_by(|a, b| a.1.abs().total_cmp(&b.1.abs())).expect("o has values");
    let (old, new) = (old.to_le_bytes(), (v[index] * 1.0001).to_le_bytes());
    let at = bytes.windows(8).position(|w| w == old).expect("the value should be in the file");
    bytes[at..at + 8].copy_from_slice(&new);
    let folder = folder_with(&[("a.safetensors", &bytes), ("b.safetensors", &good())]);
    let output = run(&[], folder.path());
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("FAILED") && text.ends_with("1 passed, 1 failed, 0 skipped\n"), "{text}");
}

/// The place of a value of a tensor in a case.
fn place(case: &[u8], tensor: &str, index: usize) -> usize {
    let header = 8 + u64::from_le_bytes(case[..8].try_into().expect("8 bytes")) as usize;
    let json: serde_json::Value = serde_json::from_slice(&case[8..header]).expect("the header is JSON");
    assert_eq!(json[tensor]["dtype"], "F64");
    header + json[tensor]["data_offsets"][0].as_u64().expect("an offset") as usize + 8 * index
}

/// Adam may amplify a rounding error of a gradient, but an embedding that the batch does not read
/// has none.
#[test]
fn an_embedding_that_is_not_read_must_not_move() {
    let mut bytes = std::fs::read(golden("dfar_small")).expect("the case should be there");
    let case = Case::read(&golden("dfar_small")).expect("the case should be readable");
    let gradient = case.f64s("grad.item", &[None; 2]).expect("it is there");
    let still = gradient.chunks(8).position(|row| row.iter().all(|&g| g == 0.0)).expect("an unread item");
    let at = place(&bytes, "after.item", 8 * still);
    let moved = f64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes")) + 1e-3;
    bytes[at..at + 8].copy_from_slice(&moved.to_le_bytes());
    let folder = folder_with(&[("a.safetensors", &bytes)]);
    let text = String::from_utf8_lossy(&run(&[], folder.path()).stdout).into_owned();
    assert!(text.lines().any(|line| line.contains("after.item") && line.contains("FAILED")), "{text}");
}

#[test]
fn a_non_finite_error_fails_also_in_json() {
    let mut bytes = good();
    let at = place(&bytes, "o", 0);
    bytes[at..at + 8].copy_from_slice(&f64::NAN.to_le_bytes());
    let folder = folder_with(&[("a.safetensors", &bytes)]);
    let json: serde_json::Value =
        serde_json::from_slice(&run(&["--json"], folder.path()).stdout).expect("it should print JSON");
    let passes = |i: usize| json["cases"][0]["outcome"]["checked"][i]["passes"].as_bool();
    assert_eq!((passes(0), passes(1)), (Some(false), Some(true)), "{json}");
}

#[test]
fn broken_files_are_errors() {
    let write = |bytes: &[u8]| folder_with(&[("x.safetensors", bytes)]);
    let read = |bytes: &[u8]| {
        let folder = write(bytes);
        verify(&folder.path().join("x.safetensors"), &CpuEngine).expect_err("it should be refused")
    };
    // `from` and `to` have the same length, so that no offset in the file changes.
    let with = |from: &str, to: &str| {
        let mut bytes = good();
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|w| w == from.as_bytes());
        let at = at.unwrap_or_else(|| panic!("{from} should be in the file"));
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        read(&bytes)
    };
    let bytes = good();
    for end in [0, 7, 8, 100, bytes.len() - 1] {
        assert!(matches!(read(&bytes[..end]), VerifyError::Format { .. }), "cut to {end} bytes");
    }
    assert!(matches!(read(&[0xff; 64]), VerifyError::Format { .. }));
    assert!(matches!(with("\"case\"", "\"cast\""), VerifyError::NotACase { .. }));
    assert!(matches!(with("\\\"fha\\\"", "\\\"fxx\\\""), VerifyError::Kind { kind, .. } if kind == "fxx"));
    assert!(matches!(with("\\\"heads\\\"", "\\\"beads\\\""), VerifyError::Metadata { .. }));
    assert!(
        matches!(with("\"label\"", "\"lebal\""), VerifyError::Missing { tensor, .. } if tensor == "label")
    );
    assert!(matches!(with("\\\"heads\\\": 2", "\\\"heads\\\": 4"), VerifyError::Shape { .. }));
    assert!(matches!(with("\\\"heads\\\": 2", "\\\"heads\\\": 0"), VerifyError::Shape { .. }));

    let output = run(&[], write(&bytes[..100]).path());
    assert_eq!(output.status.code(), Some(3));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.starts_with("error: ") && text.contains("x.safetensors"), "{text}");
    assert_eq!(run(&[], folder_with(&[]).path()).status.code(), Some(3));
    assert_eq!(run(&[], Path::new("/no/such/folder")).status.code(), Some(3));
}

#[test]
fn errors_are_measured_as_documented() {
    assert_eq!(relative_error(&[1.0, 2.0], &[1.0, 2.5], 2.5), 0.2);
    assert_eq!(relative_error(&[], &[], 0.0), 0.0);
    assert_eq!(relative_error(&[0.0], &[0.0], 0.0), 0.0);
    assert_eq!(relative_error(&[1e-30], &[0.0], 0.0), f64::INFINITY);
    assert_eq!(relative_error(&[f32::NEG_INFINITY], &[f64::NEG_INFINITY], 1.0), 0.0);
    for bad in [f32::NAN, f32::INFINITY] {
        assert_eq!(relative_error(&[bad, 0.0], &[1.0, 0.0], 1.0), f64::INFINITY);
        assert!(!compare("o", &[bad], &[1.0]).passes);
    }
    // A gradient of 0 next to one of 1: a rounding error of 1 passes, ten times that does not.
    let zero = |x: f32| compare_gradients(&[("dq", &[x], &[0.0]), ("dv", &[1.0], &[1.0])])[0].passes;
    assert!(zero(1e-7) && !zero(1.2e-6));
    // A gradient of 1/100 next to one of 1 is judged by its own scale.
    let small = |x: f32| &compare_gradients(&[("dq", &[x], &[0.01]), ("dv", &[1.0], &[1.0])])[0].error * 1.0;
    assert!((small(0.01 * 1.001) - 1e-3).abs() < 1e-6);
    assert!(small(0.01) < GRADIENT_TOLERANCE);
}
