//! Precision of matrix products.

use serde::{Deserialize, Serialize};

/// Precision of the factors of matrix products. Sums, and values in memory, are f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32 factors.
    #[default]
    F32,
    /// Factors rounded to bf16: on the tensor cores of a GPU, or by AMX or AVX512-BF16 on a CPU.
    Bf16,
}

impl Precision {
    /// Name in the `--precision` flag.
    pub const fn name(self) -> &'static str {
        match self {
            Precision::F32 => "f32",
            Precision::Bf16 => "bf16",
        }
    }
}
