//! Sequences of steps over the rows of an input, and sums of gradients over these rows.
//!
//! Many sequences may read the same rows: the candidates of a prefix, the prefixes of a history.
//! Each task therefore sums the gradients of its own range of rows, and [`RangeSums`] adds these
//! partials in the order of the tasks.

use dfar::device::cpu::elementwise::add_assign;
use std::ops::Range;

/// Sequences of steps over the rows of an input.
#[derive(Clone, Copy, Debug)]
pub struct Sequences<'a> {
    /// `[S]` the input row of the first step of each sequence, ascending. Sequences may overlap.
    pub first: &'a [u32],
    /// `[S + 1]` prefix sums of the lengths: the steps of sequence `i` are
    /// `offsets[i]..offsets[i + 1]`.
    pub offsets: &'a [u32],
}

impl<'a> Sequences<'a> {
    /// Distinct sequences, end to end.
    pub fn packed(cu_seqlens: &'a [u32]) -> Self {
        Self { first: &cu_seqlens[..cu_seqlens.len() - 1], offsets: cu_seqlens }
    }

    /// Number of sequences `S`.
    pub fn count(&self) -> usize {
        self.first.len()
    }

    /// Number of steps of all sequences.
    pub fn steps(&self) -> usize {
        self.offsets[self.count()] as usize
    }

    /// Steps of the sequences `range`.
    pub fn steps_of(&self, range: &Range<usize>) -> Range<usize> {
        self.offsets[range.start] as usize..self.offsets[range.end] as usize
    }

    /// Number of steps of sequence `i`.
    pub fn length(&self, i: usize) -> usize {
        (self.offsets[i + 1] - self.offsets[i]) as usize
    }

    /// Input rows that the sequences `range` read; empty if they have no step.
    pub fn inputs_of(&self, range: &Range<usize>) -> Range<usize> {
        let rows = || range.clone().filter(|&i| self.length(i) > 0);
        let start = rows().next().map_or(0, |i| self.first[i] as usize);
        start..rows().map(|i| self.first[i] as usize + self.length(i)).max().unwrap_or(start)
    }

    /// Consecutive sequences, `each` at a time.
    pub fn tasks(&self, each: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let count = self.count();
        (0..count).step_by(each).map(move |start| start..(start + each).min(count))
    }

    /// Checks the lengths and the order for `inputs` input rows.
    pub fn check(&self, inputs: usize) {
        assert_eq!(self.offsets.len(), self.count() + 1, "offsets is not [S + 1]");
        assert!(self.offsets[0] == 0 && self.offsets.is_sorted(), "offsets must ascend from 0");
        assert!(self.first.is_sorted(), "first must ascend");
        assert!(self.inputs_of(&(0..self.count())).end <= inputs, "a sequence ends behind the input");
    }
}

/// A `[rows, width]` matrix to which partial results are added.
pub struct RangeSums {
    /// The sums.
    pub values: Vec<f32>,
    width: usize,
}

impl RangeSums {
    /// Zeros.
    pub fn new(rows: usize, width: usize) -> Self {
        Self { values: vec![0.0; rows * width], width }
    }

    /// Adds `partial` to the rows from `start` on.
    pub fn add(&mut self, start: usize, partial: &[f32]) {
        add_assign(partial, &mut self.values[start * self.width..][..partial.len()]);
    }
}
