//! One vector for each prefix from the vectors of its tokens: mean, sum, last. 0 for an empty
//! prefix.

use crate::system::Context;
use crate::{Floats, Result};
use dfar::device::{Memory, PrefixMean};

/// `[G, D]` means of the prefixes of `x: [N, D]`.
pub fn mean(cx: Context, x: &Floats) -> Result<Floats> {
    let mut y = cx.device.alloc(cx.x.batch.groups() * cx.width)?;
    cx.device.prefix_mean(cx.width, cx.x.prefixes(), x, &mut y)?;
    Ok(y)
}

/// Gradient of [`mean`]: `[N, D]`.
pub fn mean_backward(cx: Context, dy: &Floats) -> Result<Floats> {
    let mut dx = cx.device.alloc(cx.x.batch.tokens() * cx.width)?;
    cx.device.prefix_mean_backward(cx.width, cx.x.prefixes(), dy, &mut dx)?;
    Ok(dx)
}

/// `[G, D]` sums of the prefixes of `x: [N, D]`.
pub fn sum(cx: Context, x: &Floats) -> Result<Floats> {
    let mut y = cx.device.alloc(cx.x.batch.groups() * cx.width)?;
    cx.device.prefix_mean(cx.width, cx.x.prefixes_summed(), x, &mut y)?;
    Ok(y)
}

/// Gradient of [`sum`]: `[N, D]`.
pub fn sum_backward(cx: Context, dy: &Floats) -> Result<Floats> {
    let mut dx = cx.device.alloc(cx.x.batch.tokens() * cx.width)?;
    cx.device.prefix_mean_backward(cx.width, cx.x.prefixes_summed(), dy, &mut dx)?;
    Ok(dx)
}

/// `[G, D]` the last rows of the prefixes of `x: [N, D]`.
pub fn last(cx: Context, x: &Floats) -> Result<Floats> {
    let mut y = cx.device.zeros(cx.x.batch.groups() * cx.width)?;
    for (token, y) in cx.x.last_tokens().into_iter().zip(y.chunks_exact_mut(cx.width)) {
        if let Some(token) = token {
            y.copy_from_slice(&x[token * cx.width..][..cx.width]);
        }
    }
    Ok(y)
}

/// Gradient of [`last`]: `[N, D]`.
pub fn last_backward(cx: Context, dy: &Floats) -> Result<Floats> {
    let mut dx = cx.device.zeros(cx.x.batch.tokens() * cx.width)?;
    for (token, dy) in cx.x.last_tokens().into_iter().zip(dy.chunks_exact(cx.width)) {
        if let Some(token) = token {
            let dx = &mut dx[token * cx.width..][..cx.width];
            dx.iter_mut().zip(dy).for_each(|(dx, dy)| *dx += dy);
        }
    }
    Ok(dx)
}
