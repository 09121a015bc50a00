//! Numbers, tolerances and central differences for the tests of the operations.

use rand::{RngExt, SeedableRng};

/// Values in `-1..1`.
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// The same values in f64.
pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

/// Checks `max|got - want| <= tolerance * max|want|`, or `tolerance` for small values.
pub fn assert_close(name: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len(), "{name}: length");
    let scale = want.iter().fold(1e-3f64, |max, x| max.max(x.abs()));
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(got) - want).abs() / scale;
        assert!(error <= tolerance, "{name}[{i}] = {got}, not {want}");
    }
}

/// Central differences of `f` with respect to every value of every tensor.
pub fn differences(f: &dyn Fn(&[Vec<f64>]) -> f64, at: &[Vec<f64>]) -> Vec<Vec<f64>> {
    const H: f64 = 1e-5;
    let mut moved = at.to_vec();
    let mut out: Vec<Vec<f64>> = at.iter().map(|x| vec![0.0; x.len()]).collect();
    for tensor in 0..at.len() {
        for i in 0..at[tensor].len() {
            let value = at[tensor][i];
            moved[tensor][i] = value + H;
            let above = f(&moved);
            moved[tensor][i] = value - H;
            out[tensor][i] = (above - f(&moved)) / (2.0 * H);
            moved[tensor][i] = value;
        }
    }
    out
}
