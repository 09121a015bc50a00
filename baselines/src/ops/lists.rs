//! Sums of rows by list.

use rayon::prelude::*;

/// Rows per task, at least: shorter tasks cost more than they save.
const ROWS: usize = 64;

/// The members of each list of rows.
#[derive(Clone, Copy)]
pub enum Lists<'a> {
    /// List `i` holds `i` alone.
    Same,
    /// List `i` holds `offsets[i]..offsets[i + 1]`.
    Ranges(&'a [u32]),
    /// List `i` holds `members[offsets[i]..offsets[i + 1]]`.
    Members(&'a [u32], &'a [u32]),
}

impl Lists<'_> {
    /// Number of lists, of `rows` rows in all.
    pub fn len(&self, rows: usize) -> usize {
        match self {
            Self::Same => rows,
            Self::Ranges(offsets) | Self::Members(offsets, _) => offsets.len() - 1,
        }
    }
}

/// `y[i] = sum of x[row] over the rows of list i`.
pub fn sum_by_list(width: usize, lists: Lists, x: &[f32], y: &mut [f32]) {
    let row = |row: usize| &x[row * width..][..width];
    let add = |y: &mut [f32], x: &[f32]| y.iter_mut().zip(x).for_each(|(y, x)| *y += x);
    y.par_chunks_mut(width).with_min_len(ROWS).enumerate().for_each(|(i, y)| match lists {
        Lists::Same => y.copy_from_slice(row(i)),
        Lists::Ranges(offsets) => {
            y.fill(0.0);
            (offsets[i]..offsets[i + 1]).for_each(|r| add(y, row(r as usize)));
        }
        Lists::Members(offsets, members) => {
            y.fill(0.0);
            let members = &members[offsets[i] as usize..offsets[i + 1] as usize];
            members.iter().for_each(|&r| add(y, row(r as usize)));
        }
    });
}

/// `y += x`
pub fn add(x: &[f32], y: &mut [f32]) {
    dfar::device::cpu::elementwise::add_assign(x, y);
}

/// `y[index[n]] += x[n]`, in order. An index may occur any number of times.
pub fn scatter_sum(width: usize, x: &[f32], index: &[u32], y: &mut [f32]) {
    for (x, &i) in x.chunks_exact(width).zip(index) {
        add(x, &mut y[i as usize * width..][..width]);
    }
}
