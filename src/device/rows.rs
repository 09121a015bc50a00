//! Operations on rows of matrices: gather, scatter, segmented sums, prefix means, concatenation.

use super::{DeviceError, Floats, Indices, Memory, Output, Slot};

/// Rows of a table: row `n` of the lookup is row `index[n]` of `table`.
#[derive(Clone, Copy, Debug)]
pub struct Lookup<F, U> {
    /// `[.., width]`
    pub table: F,
    /// `[n]`
    pub index: U,
}

/// Lists of row numbers in CSR form: the members of segment `i` are `members[offsets[i]..offsets[i + 1]]`.
#[derive(Clone, Copy, Debug)]
pub struct Segments<U> {
    /// `[segments + 1]`
    pub offsets: U,
    /// `[offsets[segments]]`
    pub members: U,
}

/// The gradient of table rows: `y[i] = l2 * table[index[i]] + sum over the members m of segment i of x[m]`, where
/// `x` is the concatenation of `sources` along the rows.
#[derive(Clone, Copy, Debug)]
pub struct SegmentSum<'a, F, U> {
    /// Matrices `[.., width]`. Member `m` is row `m` of the first source, or row `m - rows(first)` of the second, ...
    pub sources: &'a [F],
    /// One segment per output row.
    pub segments: Segments<U>,
    /// Weight of the L2 penalty.
    pub l2: f32,
    /// The penalised rows, one per output row.
    pub rows: Lookup<F, U>,
}

/// Prefixes of packed sequences, grouped by sequence. The prefix of group `g` of sequence `b`
/// (`group_offsets[b]..group_offsets[b + 1]`) is the first `count[g]` rows of the sequence.
#[derive(Clone, Copy, Debug)]
pub struct Prefixes<U> {
    /// `[B + 1]` prefix sums of the sequence lengths.
    pub cu_seqlens: U,
    /// `[B + 1]` groups of each sequence.
    pub group_offsets: U,
    /// `[G]` rows of each prefix, ascending within a sequence.
    pub count: U,
    /// `[G]` divisor of each mean. A divisor of 0 gives a mean of 0.
    pub divisor: U,
}

/// One part of a concatenated row.
#[derive(Clone, Copy, Debug)]
pub struct ConcatPart<F, U> {
    /// `[.., width]`
    pub values: F,
    /// `[rows]` the row of `values` for each output row; `None` for the identity.
    pub index: Option<U>,
}

/// The columns `part * width..(part + 1) * width` of rows of `parts * width` values.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// Width of one part.
    pub width: usize,
    /// Index of the part.
    pub part: usize,
    /// Number of parts.
    pub parts: usize,
}

/// Operations on rows.
pub trait Rows: Memory {
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

    /// `y += x`
    fn add(&self, x: &Floats<Self>, y: &mut Floats<Self>) -> Result<(), DeviceError>;

    /// `mean[g] = (sum of the rows of prefix g) / divisor[g]`. `x: [N, width]`, `mean: [G, width]`.
    fn prefix_mean(
        &self,
        width: usize,
        prefixes: Prefixes<&Indices<Self>>,
        x: &Floats<Self>,
        mean: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;

    /// Gradient of [`Rows::prefix_mean`]. Overwrites all of `dx`.
    fn prefix_mean_backward(
        &self,
        width: usize,
        prefixes: Prefixes<&Indices<Self>>,
        dmean: &Floats<Self>,
        dx: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;

    /// `y[row] = [part_0[index_0[row]], part_1[index_1[row]], ...]`. `y: [rows, parts * width]`.
    fn concat(
        &self,
        width: usize,
        parts: &[ConcatPart<&Floats<Self>, &Indices<Self>>],
        y: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;

    /// Gradient of [`Rows::concat`] for one part: `dx[i] = sum over the members m of segment i of dy[m, columns]`.
    /// Without segments, `dx[i] = dy[i, columns]`. `dy: [rows, parts * width]`.
    fn concat_backward(
        &self,
        columns: Columns,
        dy: &Floats<Self>,
        segments: Option<Segments<&Indices<Self>>>,
        dx: Output<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;
}
