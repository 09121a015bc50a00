//! The auxiliary loss of DIEN (Zhou et al., AAAI 2019, equation 7, with an inner product for the
//! network): the state after an event tells the next event from a sampled one.
//!
//! ```text
//! loss = mean over neighbours (t, t + 1) of softplus(-h_t . s_(t+1)) + softplus(h_t . n_(t+1))
//! ```
//!
//! The mean is over all pairs of neighbouring events of a batch; 0 without pairs.

use dfar::device::cpu::elementwise::{add_assign, softplus};

/// `[N, D]` values for the events of packed histories: their states, embeddings, and the
/// embeddings of the sampled items; or the gradients of these.
pub struct NextEvent<F> {
    /// State after each event.
    pub state: F,
    /// The event.
    pub event: F,
    /// The sampled item. That of the first event of a history is not read.
    pub negative: F,
}

/// The loss. Adds `weight` times its gradients to `gradients`.
pub fn next_event_loss(
    width: usize,
    weight: f32,
    cu_seqlens: &[u32],
    values: NextEvent<&[f32]>,
    gradients: Option<NextEvent<&mut [f32]>>,
) -> f64 {
    let histories = || cu_seqlens.windows(2).map(|w| w[0] as usize..w[1] as usize);
    let pairs: usize = histories().map(|tokens| tokens.len().saturating_sub(1)).sum();
    let Some(weight) = (pairs > 0).then(|| weight / pairs as f32) else { return 0.0 };
    let row = |x: &[f32], t: usize| x[t * width..][..width].to_vec();
    let mut gradients = gradients;
    let mut loss = 0.0;
    for next in histories().flat_map(|tokens| tokens.skip(1)) {
        let h = row(values.state, next - 1);
        let dot = |x: &[f32]| h.iter().zip(x).map(|(h, x)| h * x).sum::<f32>();
        let (event, negative) = (row(values.event, next), row(values.negative, next));
        let (liked, sampled) = (dot(&event), dot(&negative));
        loss += softplus(f64::from(-liked)) + softplus(f64::from(sampled));
        if let Some(NextEvent { state, event: d_event, negative: d_negative }) = &mut gradients {
            let [d_liked, d_sampled] = [-sigmoid(-liked), sigmoid(sampled)].map(|d| weight * d);
            let scaled = |d: f32, x: &[f32]| x.iter().map(|x| d * x).collect::<Vec<_>>();
            let d_state = &mut state[(next - 1) * width..next * width];
            add_assign(&scaled(d_liked, &event), d_state);
            add_assign(&scaled(d_sampled, &negative), d_state);
            add_assign(&scaled(d_liked, &h), &mut d_event[next * width..][..width]);
            add_assign(&scaled(d_sampled, &h), &mut d_negative[next * width..][..width]);
        }
    }
    loss / pairs as f64
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{assert_close, differences, random, wide};
    use super::*;

    #[test]
    fn loss_and_gradients_agree_with_the_definition() {
        let (width, cu_seqlens) = (3, [0, 4, 4, 5, 8]);
        let values = [1, 2, 3].map(|seed| random(8 * width, seed));
        let naive = |at: &[Vec<f64>]| {
            let dot = |x: &[f64], t: usize, y: &[f64], u: usize| {
                (0..width).map(|j| x[t * width + j] * y[u * width + j]).sum::<f64>()
            };
            let softplus = |x: f64| x.exp().ln_1p();
            let pair =
                |t: usize| softplus(-dot(&at[0], t - 1, &at[1], t)) + softplus(dot(&at[0], t - 1, &at[2], t));
            [1, 2, 3, 6, 7].into_iter().map(pair).sum::<f64>() / 5.0
        };
        let mut gradients = [(); 3].map(|_| vec![0.0; 8 * width]);
        let [state, event, negative] = values.each_ref().map(|x| &x[..]);
        let [d_state, d_event, d_negative] = gradients.each_mut().map(|x| &mut x[..]);
        let out = NextEvent { state: d_state, event: d_event, negative: d_negative };
        let loss = next_event_loss(width, 0.5, &cu_seqlens, NextEvent { state, event, negative }, Some(out));
        let at = values.each_ref().map(|x| wide(x));
        assert!((loss - naive(&at)).abs() < 1e-6);
        for (got, want) in gradients.iter().zip(differences(&naive, &at)) {
            assert_close("gradient", got, &want.iter().map(|d| 0.5 * d).collect::<Vec<_>>(), 1e-5);
        }
    }

    #[test]
    fn histories_without_neighbours_have_no_loss() {
        let x = [1.0; 2];
        let values = NextEvent { state: &x[..], event: &x[..], negative: &x[..] };
        assert_eq!(next_event_loss(1, 1.0, &[0, 1, 1, 2], values, None), 0.0);
    }
}
