//! Embedding tables: gathering rows, and the gradients of rows.

use super::{DeviceError, Floats, Indices, Memory, Slot};

/// Rows of a table: row `n` of the lookup is row `index[n]` of `table`.
#[derive(Clone, Copy, Debug)]
pub struct Lookup<F, U> {
    /// `[.., width]`
    pub table: F,
    /// `[n]`
    pub index: U,
}

/// Lists of row numbers in CSR form: the members of segment `i` are
/// `members[offsets[i]..offsets[i + 1]]`.
#[derive(Clone, Copy, Debug)]
pub struct Segments<U> {
    /// `[segments + 1]`
    pub offsets: U,
    /// `[offsets[segments]]`
    pub members: U,
}

/// The gradient of table rows:
/// `y[i] = l2 * table[index[i]] + sum over the members m of segment i of x[m]`, where `x` is the
/// concatenation of `sources` along the rows.
#[derive(Clone, Copy, Debug)]
pub struct SegmentSum<'a, F, U> {
    /// Matrices `[.., width]`. Member `m` is row `m` of the first source, or row `m - rows(first)`
    /// of the second, ...
    pub sources: &'a [F],
    /// One segment per output row.
    pub segments: Segments<U>,
    /// Weight of the L2 penalty.
    pub l2: f32,
    /// The penalised rows, one per output row.
    pub rows: Lookup<F, U>,
}

/// Operations on rows of tables.
pub trait Embedding: Memory {
    /// `y[n] = sum over the tables of table[index[n]]`. `y: [N, width]`.
    fn gather_sum(
        &self,
        width: usize,
        tables: &[Lookup<&Floats<Self>, &Indices<Self>>],
        y: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;

    /// `y[index[n]] += x[n]`. An index must not occur twice.
    fn scatter_add(
        &self,
        width: usize,
        x: &Floats<Self>,
        index: &Indices<Self>,
        y: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;

    /// Writes a [`SegmentSum`] to `y: [segments, width]`.
    fn segment_sum(
        &self,
        width: usize,
        sum: SegmentSum<&Floats<Self>, &Indices<Self>>,
        y: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;

    /// Half the sum of squares of `rows`.
    fn half_square_sum(
        &self,
        width: usize,
        rows: Lookup<&Floats<Self>, &Indices<Self>>,
        sum: Slot<Self::Buffer<f64>>,
    ) -> Result<(), DeviceError>;
}
