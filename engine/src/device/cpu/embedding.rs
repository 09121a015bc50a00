//! Embedding tables: gathering rows, and the gradients of rows.

use super::elementwise::add_assign;
use super::rows::{ROWS, members, row};
use super::slices::Slices;
use super::{Cpu, Done, Doubles, Floats, Indices};
use crate::device::{Embedding, Lookup, SegmentSum, Slot};
use rayon::prelude::*;

impl Embedding for Cpu {
    fn gather_sum(&self, width: usize, tables: &[Lookup<&Floats, &Indices>], y: &mut Floats) -> Done {
        let tables: Vec<_> = tables.iter().map(|table| table.slices()).collect();
        y.par_chunks_mut(ROWS * width).enumerate().for_each(|(chunk, y)| {
            for (i, y) in y.chunks_exact_mut(width).enumerate() {
                let n = chunk * ROWS + i;
                for (t, Lookup { table, index }) in tables.iter().enumerate() {
                    let x = row(table, index[n] as usize, width);
                    if t == 0 { y.copy_from_slice(x) } else { add_assign(x, y) }
                }
            }
        });
        Ok(())
    }

    fn scatter_add(&self, width: usize, x: &Floats, index: &Indices, y: &mut Floats) -> Done {
        let y = y.slices();
        for (x, &i) in x.chunks_exact(width).zip(index.iter()) {
            add_assign(x, &mut y[i as usize * width..][..width]);
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
}
