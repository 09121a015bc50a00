//! Rows padded to whole vectors, as the matrix products of the CPU engine want them.

use std::borrow::Cow;

/// Values of the widest vector.
const LINE: usize = 16;

/// `width` rounded up to whole vectors.
pub fn padded(width: usize) -> usize {
    width.next_multiple_of(LINE)
}

/// Rows of `width` values as rows of `wide` values, padded with zeros.
pub fn pad_columns(x: &[f32], width: usize, wide: usize) -> Cow<'_, [f32]> {
    if width == wide {
        return x.into();
    }
    let mut out = vec![0.0; x.len() / width * wide];
    for (x, out) in x.chunks_exact(width).zip(out.chunks_exact_mut(wide)) {
        out[..width].copy_from_slice(x);
    }
    out.into()
}

/// The inverse of [`pad_columns`].
pub fn unpad_columns(x: &[f32], width: usize, wide: usize, out: &mut [f32]) {
    for (x, out) in x.chunks_exact(wide).zip(out.chunks_exact_mut(width)) {
        out.copy_from_slice(&x[..width]);
    }
}

/// The transpose of a row-major `[rows, columns]` matrix, with rows `wide` apart, padded with
/// zeros.
pub fn transpose_padded(x: &[f32], columns: usize, wide: usize) -> Vec<f32> {
    let mut out = vec![0.0; columns * wide];
    for (i, row) in x.chunks_exact(columns).enumerate() {
        for (j, x) in row.iter().enumerate() {
            out[j * wide + i] = *x;
        }
    }
    out
}
