//! Sums of rows by list.

use dfar::device::cpu::elementwise::add_assign;
use dfar::simd::{Kernel, Simd, dispatch};
use rayon::prelude::*;

/// Lists per task: shorter tasks cost more than they save.
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
    y.par_chunks_mut(ROWS * width).enumerate().for_each(|(chunk, y)| {
        dispatch(SumLists { width, lists, x, first: chunk * ROWS, y });
    });
}

/// [`sum_by_list`] for the lists from `first` on.
struct SumLists<'a> {
    width: usize,
    lists: Lists<'a>,
    x: &'a [f32],
    first: usize,
    y: &'a mut [f32],
}

impl Kernel for SumLists<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { width, lists, x, first, y } = self;
        for (i, y) in y.chunks_exact_mut(width).enumerate() {
            let (list, row) = (first + i, |row: usize| &x[row * width..][..width]);
            match lists {
                Lists::Same => y.copy_from_slice(row(list)),
                Lists::Ranges(offsets) => {
                    y.fill(0.0);
                    for member in offsets[list]..offsets[list + 1] {
                        add_vectors(s, row(member as usize), y);
                    }
                }
                Lists::Members(offsets, members) => {
                    y.fill(0.0);
                    for &member in &members[offsets[list] as usize..offsets[list + 1] as usize] {
                        add_vectors(s, row(member as usize), y);
                    }
                }
            }
        }
    }
}

/// `y += x` in a kernel.
#[inline(always)]
pub fn add_vectors<S: Simd>(s: S, x: &[f32], y: &mut [f32]) {
    let (mut x, mut y) = (x.chunks_exact(S::LANES), y.chunks_exact_mut(S::LANES));
    for (x, y) in (&mut x).zip(&mut y) {
        s.store(s.add(s.load(y), s.load(x)), y);
    }
    y.into_remainder().iter_mut().zip(x.remainder()).for_each(|(y, x)| *y += x);
}

/// `y[index[n]] += x[n]`, in order. An index may occur any number of times.
pub fn scatter_sum(width: usize, x: &[f32], index: &[u32], y: &mut [f32]) {
    for (x, &i) in x.chunks_exact(width).zip(index) {
        add_assign(x, &mut y[i as usize * width..][..width]);
    }
}
