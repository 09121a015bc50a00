//! Moving and adding rows: gather, scatter, segmented sums, concatenation. Prefix means are in `prefix_mean`.

use super::slices::Slices;
use super::{Cpu, Done, Doubles, Floats, Indices, prefix_mean};
use crate::device::{Columns, ConcatPart, Lookup, Output, Prefixes, Rows, SegmentSum, Segments, Slot, Store};
use rayon::prelude::*;

/// Rows per task: enough work to pay for the task, few enough to balance the threads.
const ROWS: usize = 256;

impl Rows for Cpu {
    fn gather_sum(&self, width: usize, tables: &[Lookup<&Floats, &Indices>], y: &mut Floats) -> Done {
        let tables: Vec<_> = tables.iter().map(|table| table.slices()).collect();
        y.par_chunks_mut(ROWS * width).enumerate().for_each(|(chunk, y)| {
            for (i, y) in y.chunks_exact_mut(width).enumerate() {
                let n = chunk * ROWS + i;
                for (t, Lookup { table, index }) in tables.iter().enumerate() {
                    let x = row(table, index[n] as usize, width);
                    if t == 0 { y.copy_from_slice(x) } else { add_to(x, y) }
                }
            }
        });
        Ok(())
    }

    fn scatter_add(&self, width: usize, x: &Floats, index: &Indices, y: &mut Floats) -> Done {
        let y = y.slices();
        for (x, &i) in x.chunks_exact(width).zip(index.iter()) {
            add_to(x, &mut y[i as usize * width..][..width]);
        }
        Ok(())
    }

    fn segment_sum(&self, width: usize, sum: SegmentSum<&Floats, &Indices>, y: &mut Floats) -> Done {
        let SegmentSum { sources, segments, l2, rows } = sum;
        let sources: Vec<&[f32]> = sources.iter().map(|source| source.slices()).collect();
        let (segments, rows) = (segments.slices(), rows.slices());
        let member = |m: u32| {
            let mut at = m as usize * width;
            for source in &sources {
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
                for (s, &w) in sum.iter_mut().zip(row(rows.table, rows.index[i] as usize, width)) {
                    *s = l2 as f64 * w as f64;
                }
                for &m in members(segments, i) {
                    sum.iter_mut().zip(member(m)).for_each(|(s, &x)| *s += x as f64);
                }
                y.iter_mut().zip(sum).for_each(|(y, s)| *y = *s as f32);
            },
        );
        Ok(())
    }

    fn half_square_sum(&self, width: usize, rows: Lookup<&Floats, &Indices>, sum: Slot<Doubles>) -> Done {
        let Lookup { table, index } = rows.slices();
        let square =
            |&i: &u32| row(table, i as usize, width).iter().map(|&x| x as f64 * x as f64).sum::<f64>();
        sum.values[sum.index] = 0.5 * index.iter().map(square).sum::<f64>();
        Ok(())
    }

    fn add(&self, x: &Floats, y: &mut Floats) -> Done {
        y.par_chunks_mut(1 << 14).zip(x.par_chunks(1 << 14)).for_each(|(y, x)| add_to(x, y));
        Ok(())
    }

    fn prefix_mean(&self, width: usize, prefixes: Prefixes<&Indices>, x: &Floats, mean: &mut Floats) -> Done {
        prefix_mean::forward(width, prefixes.slices(), x, mean);
        Ok(())
    }
    fn prefix_mean_backward(
        &self,
        width: usize,
        prefixes: Prefixes<&Indices>,
        dmean: &Floats,
        dx: &mut Floats,
    ) -> Done {
        prefix_mean::backward(width, prefixes.slices(), dmean, dx);
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
                None => add_to(gradient(i), dx),
                Some(segments) => {
                    members(segments, i).iter().for_each(|&n| add_to(gradient(n as usize), dx));
                }
            }
        });
        Ok(())
    }
}

fn add_to(x: &[f32], y: &mut [f32]) {
    y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
}

fn row(x: &[f32], i: usize, width: usize) -> &[f32] {
    &x[i * width..][..width]
}

fn members(segments: Segments<&[u32]>, i: usize) -> &[u32] {
    &segments.members[segments.offsets[i] as usize..segments.offsets[i + 1] as usize]
}
