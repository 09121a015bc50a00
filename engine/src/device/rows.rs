//! Addition, and concatenation of rows.

use super::{DeviceError, Floats, Indices, Memory, Output, Segments};

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

/// Operations on rows of activations.
pub trait Rows: Memory {
    /// `y += x`
    fn add(&self, x: &Floats<Self>, y: &mut Floats<Self>) -> Result<(), DeviceError>;

    /// `y[row] = [part_0[index_0[row]], part_1[index_1[row]], ...]`. `y: [rows, parts * width]`.
    fn concat(
        &self,
        width: usize,
        parts: &[ConcatPart<&Floats<Self>, &Indices<Self>>],
        y: &mut Floats<Self>,
    ) -> Result<(), DeviceError>;

    /// Gradient of [`Rows::concat`] for one part:
    /// `dx[i] = sum over the members m of segment i of dy[m, columns]`. Without segments,
    /// `dx[i] = dy[i, columns]`. `dy: [rows, parts * width]`.
    fn concat_backward(
        &self,
        columns: Columns,
        dy: &Floats<Self>,
        segments: Option<Segments<&Indices<Self>>>,
        dx: Output<&mut Floats<Self>>,
    ) -> Result<(), DeviceError>;
}
