//! Rows padded to whole vectors, as the matrix products of the CPU engine want them.

use dfar::device::cpu::elementwise::{pad_rows, transpose};
use std::borrow::Cow;

/// Rows of `width` values as rows of `wide` values, padded with zeros.
pub fn pad_columns(x: &[f32], width: usize, wide: usize) -> Cow<'_, [f32]> {
    if width == wide {
        return x.into();
    }
    let mut out = vec![0.0; x.len() / width * wide];
    pad_rows(x, width, wide, &mut out);
    out.into()
}

/// The transpose of a row-major `[rows, columns]` matrix, with rows `wide` apart, padded with
/// zeros.
pub fn transpose_padded(x: &[f32], columns: usize, wide: usize) -> Vec<f32> {
    let mut out = vec![0.0; columns * wide];
    transpose(x, columns, wide, &mut out);
    out
}
