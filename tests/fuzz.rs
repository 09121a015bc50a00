//! The fuzz targets on stable Rust: over the stored corpus (`fuzz/corpus`) and deterministic
//! mutations of it. The default is a few hundred mutations; with `DFAR_FUZZ_SECONDS=60`, as in
//! `.ci/run`, each target runs for 60 seconds.

#[path = "../fuzz/bodies.rs"]
mod bodies;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

/// Bytes that parsers treat specially: separators, quotes, signs, zeros, ones.
const INTERESTING: &[u8] = b"\0\x01\x7f\x80\xff\n\r\t,;:\"'|-+.eE0129{}[] ";

/// One to four changes of `bytes`. The first byte selects a format and is mostly kept.
fn mutated(mut bytes: Vec<u8>, other: &[u8], rng: &mut ChaCha8Rng) -> Vec<u8> {
    for _ in 0..rng.random_range(1..=4) {
        let at = rng.random_range(0..=bytes.len());
        let end = rng.random_range(at..=bytes.len().min(at + 64));
        match rng.random_range(0..7) {
            0 if at < bytes.len() => bytes[at] ^= 1 << rng.random_range(0..8),
            1 if at < bytes.len() => bytes[at] = INTERESTING[rng.random_range(0..INTERESTING.len())],
            2 => bytes.insert(at, INTERESTING[rng.random_range(0..INTERESTING.len())]),
            3 => drop(bytes.drain(at..end)),
            4 => bytes.truncate(at),
            5 => {
                let copy = bytes[at..end].to_vec();
                bytes.splice(at..at, copy);
            }
            _ => {
                let from = rng.random_range(0..=other.len());
                let part = other[from..other.len().min(from + 64)].to_vec();
                bytes.splice(at..end, part);
            }
        }
    }
    bytes
}

fn run(target: &str, mutations: u64, body: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut paths: Vec<_> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let corpus: Vec<Vec<u8>> = paths.iter().map(|path| std::fs::read(path).unwrap()).collect();
    assert!(corpus.len() >= 2, "the corpus of {target} should be there");
    for bytes in &corpus {
        body(bytes);
    }
    let seconds = std::env::var("DFAR_FUZZ_SECONDS").ok().and_then(|text| text.parse().ok());
    let kept = std::env::temp_dir().join(format!("dfar-fuzz-{target}-{}", std::process::id()));
    let (start, budget) = (Instant::now(), seconds.map(Duration::from_secs));
    for seed in 0u64.. {
        if budget.map_or(seed >= mutations, |budget| start.elapsed() >= budget) {
            println!("{target}: {seed} mutations");
            break;
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (first, second) = (rng.random_range(0..corpus.len()), rng.random_range(0..corpus.len()));
        let bytes = mutated(corpus[first].clone(), &corpus[second], &mut rng);
        // Written before: an abort ends the process.
        std::fs::write(&kept, &bytes).unwrap();
        if catch_unwind(AssertUnwindSafe(|| body(&bytes))).is_err() {
            panic!("{target}, mutation {seed}: a panic; the bytes are in {}", kept.display());
        }
    }
    let _ = std::fs::remove_file(kept);
}

#[test]
fn a_data_set_of_any_bytes_is_read_or_refused() {
    run("dataset", 1000, bodies::dataset);
}

#[test]
fn a_log_of_any_bytes_is_imported_or_refused() {
    run("import", 200, bodies::import);
}

#[test]
fn json_of_any_bytes_is_imported_or_refused() {
    run("json", 200, bodies::import);
}

#[test]
fn an_archive_of_any_bytes_is_imported_or_refused() {
    run("archive", 200, bodies::import);
}

/// Parquet and Arrow IPC.
#[cfg(feature = "parquet")]
#[test]
fn a_columnar_file_of_any_bytes_is_imported_or_refused() {
    run("columnar", 200, bodies::import);
}
