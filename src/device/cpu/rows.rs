//! Moving and adding rows: gather, scatter, segmented sums, concatenation.

use crate::device::{Segments, Store};
use rayon::prelude::*;

/// Rows one task handles: enough work to pay for the task, few enough to balance.
const ROWS: usize = 256;

/// See [`crate::device::Device::gather_sum`].
pub fn gather_sum(width: usize, tables: &[(&[f32], &[u32])], y: &mut [f32]) {
    y.par_chunks_mut(ROWS * width).enumerate().for_each(|(chunk, y)| {
        for (i, y) in y.chunks_exact_mut(width).enumerate() {
            let n = chunk * ROWS + i;
            for (t, (table, index)) in tables.iter().enumerate() {
                let x = row(table, index[n] as usize, width);
                if t == 0 { y.copy_from_slice(x) } else { add_to(x, y) }
            }
        }
    });
}

/// See [`crate::device::Device::scatter_add`].
pub fn scatter_add(width: usize, x: &[f32], index: &[u32], y: &mut [f32]) {
    for (x, &i) in x.chunks_exact(width).zip(index) {
        add_to(x, &mut y[i as usize * width..][..width]);
    }
}

/// See [`crate::device::Device::segment_sum`].
#[allow(clippy::too_many_arguments)]
pub fn segment_sum(
    width: usize,
    sources: &[&[f32]],
    segments: Segments<[u32]>,
    l2: f32,
    table: &[f32],
    rows: &[u32],
    y: &mut [f32],
) {
    let member = |m: u32| {
        let mut at = m as usize * width;
        for source in sources {
            if at < source.len() {
                return &source[at..at + width];
            }
            at -= source.len();
        }
        unreachable!("segment member {m} lies past the last source")
    };
    // f64: a segment may have as many members as the batch has tokens.
    y.par_chunks_mut(width).enumerate().with_min_len(16).for_each_init(
        || vec![0f64; width],
        |sum, (i, y)| {
            for (s, &w) in sum.iter_mut().zip(row(table, rows[i] as usize, width)) {
                *s = l2 as f64 * w as f64;
            }
            for &m in members(&segments, i) {
                sum.iter_mut().zip(member(m)).for_each(|(s, &x)| *s += x as f64);
            }
            y.iter_mut().zip(sum).for_each(|(y, s)| *y = *s as f32);
        },
    );
}

/// See [`crate::device::Device::half_square_sum`].
pub fn half_square_sum(width: usize, table: &[f32], rows: &[u32]) -> f64 {
    let square = |&i: &u32| row(table, i as usize, width).iter().map(|&x| x as f64 * x as f64).sum::<f64>();
    0.5 * rows.iter().map(square).sum::<f64>()
}

/// See [`crate::device::Device::concat`].
pub fn concat(width: usize, parts: &[(&[f32], Option<&[u32]>)], y: &mut [f32]) {
    let stride = parts.len() * width;
    y.par_chunks_mut(ROWS * stride).enumerate().for_each(|(chunk, y)| {
        for (i, y) in y.chunks_exact_mut(stride).enumerate() {
            let n = chunk * ROWS + i;
            for ((x, index), y) in parts.iter().zip(y.chunks_exact_mut(width)) {
                y.copy_from_slice(row(x, index.map_or(n, |index| index[n] as usize), width));
            }
        }
    });
}

/// See [`crate::device::Device::concat_backward`].
pub fn concat_backward(
    width: usize,
    part: usize,
    parts: usize,
    dy: &[f32],
    segments: Option<Segments<[u32]>>,
    dx: &mut [f32],
    store: Store,
) {
    let gradient = |n: usize| &dy[(n * parts + part) * width..][..width];
    dx.par_chunks_mut(width).enumerate().with_min_len(64).for_each(|(i, dx)| {
        if store == Store::Overwrite {
            dx.fill(0.0);
        }
        match &segments {
            None => add_to(gradient(i), dx),
            Some(segments) => members(segments, i).iter().for_each(|&n| add_to(gradient(n as usize), dx)),
        }
    });
}

/// `y += x`
pub fn add(x: &[f32], y: &mut [f32]) {
    y.par_chunks_mut(1 << 14).zip(x.par_chunks(1 << 14)).for_each(|(y, x)| add_to(x, y));
}

fn add_to(x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

fn row(x: &[f32], i: usize, width: usize) -> &[f32] {
    &x[i * width..][..width]
}

fn members<'a>(segments: &Segments<'a, [u32]>, i: usize) -> &'a [u32] {
    &segments.members[segments.offsets[i] as usize..segments.offsets[i + 1] as usize]
}
