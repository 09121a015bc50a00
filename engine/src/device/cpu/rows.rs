//! Addition and concatenation of rows.

use super::elementwise::add_assign;
use super::slices::Slices;
use super::{Cpu, Done, Floats, Indices};
use crate::device::{Columns, ConcatPart, Output, Rows, Segments, Store};
use rayon::prelude::*;

/// Rows per task: enough work to pay for the task, few enough to balance the threads.
pub const ROWS: usize = 256;

impl Rows for Cpu {
    fn add(&self, x: &Floats, y: &mut Floats) -> Done {
        assert_eq!(x.len(), y.len(), "x and y differ in length");
        y.par_chunks_mut(1 << 14).zip(x.par_chunks(1 << 14)).for_each(|(y, x)| add_assign(x, y));
        Ok(())
    }

    fn concat(&self, width: usize, parts: &[ConcatPart<&Floats, &Indices>], y: &mut Floats) -> Done {
        let parts: Vec<_> = parts.iter().map(|part| part.slices()).collect();
        let stride = parts.len() * width;
        y.par_chunks_mut(ROWS * stride).enumerate().for_each(|(chunk, y)| {
            for (i, y) in y.chunks_exact_mut(stride).enumerate() {
                let n = chunk * ROWS + i;
                for (ConcatPart { values, index }, y) in parts.iter().zip(y.chunks_exact_mut(width)) {
                    y.copy_from_slice(row(values, index.map_or(n, |index| index[n] as usize), width));
                }
            }
        });
        Ok(())
    }

    fn concat_backward(
        &self,
        columns: Columns,
        dy: &Floats,
        segments: Option<Segments<&Indices>>,
        dx: Output<&mut Floats>,
    ) -> Done {
        let Columns { width, part, parts } = columns;
        let (dy, segments) = (dy.slices(), segments.slices());
        let Output { values: dx, store } = dx;
        let gradient = |n: usize| &dy[(n * parts + part) * width..][..width];
        dx.par_chunks_mut(width).enumerate().with_min_len(64).for_each(|(i, dx)| {
            if store == Store::Overwrite {
                dx.fill(0.0);
            }
            match segments {
                None => add_assign(gradient(i), dx),
                Some(segments) => {
                    members(segments, i).iter().for_each(|&n| add_assign(gradient(n as usize), dx));
                }
            }
        });
        Ok(())
    }
}

/// Row `i` of `x`.
pub fn row(x: &[f32], i: usize, width: usize) -> &[f32] {
    &x[i * width..][..width]
}

/// Members of segment `i`.
pub fn members(segments: Segments<&[u32]>, i: usize) -> &[u32] {
    &segments.members[segments.offsets[i] as usize..segments.offsets[i + 1] as usize]
}
