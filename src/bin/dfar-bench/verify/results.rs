//! The results of the attention operation on a case.

use dfar::attention::FhaOptions;

/// Results of the attention operation; 16-bit results are widened to f32.
#[derive(Clone, Debug, PartialEq)]
pub struct Results {
    /// `[N, Q, K, d]`
    pub o: Vec<f32>,
    /// `[N, Q]`
    pub lse: Vec<f32>,
    /// `dq`, `dk`, `dv`: `[N, H, d]` each.
    pub gradients: [Vec<f32>; 3],
}

impl Results {
    /// Zeros of the shapes that follow from `options` and `tokens`.
    pub fn zeros(options: &FhaOptions, tokens: usize) -> Self {
        let width = tokens * options.heads * options.head_dim;
        Self {
            o: vec![0.0; options.output_len(tokens)],
            lse: vec![0.0; options.lse_len(tokens)],
            gradients: [(); 3].map(|()| vec![0.0; width]),
        }
    }
}
