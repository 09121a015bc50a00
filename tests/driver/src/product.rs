//! A matrix product as cuBLASLt defines it: column-major, f32 in memory, sums in f32.

use crate::machine::{Machine, PAGE};

/// A matrix: address, rows, columns, leading dimension, stride between products.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matrix {
    pub at: u64,
    pub rows: usize,
    pub columns: usize,
    pub leading: usize,
    pub stride: usize,
}

impl Matrix {
    /// Number of elements that `count` products reach from `at` on.
    pub fn len(&self, count: usize) -> usize {
        (count - 1) * self.stride + (self.columns - 1) * self.leading + self.rows
    }
}

/// `d = activation(alpha op(a) op(b) + beta c + bias)`
#[derive(Clone, Debug, PartialEq)]
pub struct Product {
    pub a: Matrix,
    pub b: Matrix,
    pub c: Matrix,
    pub d: Matrix,
    pub transposed: [bool; 2],
    pub alpha: f32,
    pub beta: f32,
    /// Address of one value per row of `d`; 0: none.
    pub bias: u64,
    pub relu: bool,
    /// Factors are rounded to bf16.
    pub bf16: bool,
    pub count: usize,
    pub workspace: (u64, usize),
}

/// A range of bytes, and whether it is written.
pub type Access = (&'static str, u64, usize, bool);

impl Product {
    /// All memory that the product uses.
    pub fn accesses(&self) -> Vec<Access> {
        let bytes = |matrix: &Matrix| matrix.len(self.count) * size_of::<f32>();
        let mut all = vec![("A", self.a.at, bytes(&self.a), false), ("B", self.b.at, bytes(&self.b), false)];
        if self.beta != 0.0 {
            all.push(("C", self.c.at, bytes(&self.c), false));
        }
        if self.bias != 0 {
            all.push(("the bias", self.bias, self.d.rows * size_of::<f32>(), false));
        }
        all.push(("D", self.d.at, bytes(&self.d), true));
        if self.workspace.1 > 0 {
            // Its first page stands for all: every product uses the workspace from its start.
            all.push(("the workspace", self.workspace.0, self.workspace.1.min(PAGE), true));
        }
        all
    }

    /// Computes it. All accesses are owned.
    pub fn run(&self, machine: &mut Machine) -> Result<(), String> {
        for (name, at, bytes, writes) in self.accesses() {
            if !writes && machine.unwritten(at, bytes) > 0 {
                return Err(format!("a product reads {name}, of which nothing has written some bytes"));
            }
        }
        let [m, n] = [self.d.rows, self.d.columns];
        let k = if self.transposed[0] { self.a.rows } else { self.a.columns };
        let round = |x: f32| if self.bf16 { to_bf16(x) } else { x };
        for i in 0..self.count {
            // Both packed so that the innermost loop runs along a column of D.
            let a = packed(machine, &self.a, i, self.transposed[0], round);
            let b = packed(machine, &self.b, i, self.transposed[1], round);
            let c = (self.beta != 0.0).then(|| packed(machine, &self.c, i, false, |x| x));
            let bias = (self.bias != 0).then(|| values(machine, self.bias, m));
            let mut d = vec![0.0f32; m * n];
            for (column, d) in d.chunks_exact_mut(m).enumerate() {
                for (a, &b) in a.chunks_exact(m).zip(&b[column * k..][..k]) {
                    d.iter_mut().zip(a).for_each(|(d, a)| *d += a * b);
                }
                for (row, d) in d.iter_mut().enumerate() {
                    *d *= self.alpha;
                    *d += c.as_ref().map_or(0.0, |c| self.beta * c[column * m + row]);
                    *d += bias.as_ref().map_or(0.0, |bias| bias[row]);
                    // Unlike f32::max, this keeps a NaN.
                    if self.relu && *d < 0.0 {
                        *d = 0.0;
                    }
                }
            }
            for (column, values) in d.chunks_exact(m).enumerate() {
                let at =
                    self.d.at + ((i * self.d.stride + column * self.d.leading) * size_of::<f32>()) as u64;
                let to = machine.bytes_mut(at, size_of_val(values));
                to.chunks_exact_mut(4).zip(values).for_each(|(to, x)| to.copy_from_slice(&x.to_le_bytes()));
            }
        }
        Ok(())
    }
}

fn values(machine: &Machine, at: u64, len: usize) -> Vec<f32> {
    let bytes = machine.bytes(at, len * size_of::<f32>());
    bytes.chunks_exact(4).map(|x| f32::from_le_bytes([x[0], x[1], x[2], x[3]])).collect()
}

/// `op(matrix)` of product `i`, column-major and without gaps.
fn packed(
    machine: &Machine,
    matrix: &Matrix,
    i: usize,
    transposed: bool,
    round: impl Fn(f32) -> f32,
) -> Vec<f32> {
    let at = matrix.at + (i * matrix.stride * size_of::<f32>()) as u64;
    let all = values(machine, at, matrix.len(1));
    let Matrix { rows, columns, leading, .. } = *matrix;
    if transposed {
        (0..rows)
            .flat_map(|row| (0..columns).map(move |column| (row, column)))
            .map(|(row, column)| round(all[column * leading + row]))
            .collect()
    } else {
        (0..columns)
            .flat_map(|column| (0..rows).map(move |row| (row, column)))
            .map(|(row, column)| round(all[column * leading + row]))
            .collect()
    }
}

/// Rounds to the nearest bf16, ties to even.
fn to_bf16(x: f32) -> f32 {
    if x.is_nan() {
        return x;
    }
    let bits = x.to_bits();
    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
}
