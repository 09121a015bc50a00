//! One vector for each prefix from the vectors of its tokens: mean, sum, last. 0 for an empty
//! prefix.

use crate::system::Context;
use crate::{Floats, Result};
use dfar::batch::Lists;
use dfar::device::{Columns, Device, Output};
use dfar::model::indices::DeviceLists;

/// `[G, D]` means of the prefixes of `x: [N, D]`.
pub fn mean<D: Device>(cx: Context<D>, x: &Floats<D>) -> Result<Floats<D>> {
    let mut y = cx.device.alloc(cx.x.batch.groups() * cx.width)?;
    cx.device.prefix_mean(cx.width, cx.x.prefixes(), x, &mut y)?;
    Ok(y)
}

/// Gradient of [`mean`]: `[N, D]`.
pub fn mean_backward<D: Device>(cx: Context<D>, dy: &Floats<D>) -> Result<Floats<D>> {
    let mut dx = cx.device.alloc(cx.x.batch.tokens() * cx.width)?;
    cx.device.prefix_mean_backward(cx.width, cx.x.prefixes(), dy, &mut dx)?;
    Ok(dx)
}

/// `[G, D]` sums of the prefixes of `x: [N, D]`.
pub fn sum<D: Device>(cx: Context<D>, x: &Floats<D>) -> Result<Floats<D>> {
    let mut y = cx.device.alloc(cx.x.batch.groups() * cx.width)?;
    cx.device.prefix_mean(cx.width, cx.x.prefixes_summed(), x, &mut y)?;
    Ok(y)
}

/// Gradient of [`sum`]: `[N, D]`.
pub fn sum_backward<D: Device>(cx: Context<D>, dy: &Floats<D>) -> Result<Floats<D>> {
    let mut dx = cx.device.alloc(cx.x.batch.tokens() * cx.width)?;
    cx.device.prefix_mean_backward(cx.width, cx.x.prefixes_summed(), dy, &mut dx)?;
    Ok(dx)
}

/// `[G, D]` the last rows of the prefixes of `x: [N, D]`.
pub fn last<D: Device>(cx: Context<D>, x: &Floats<D>) -> Result<Floats<D>> {
    let mut lists = Lists { offsets: vec![0], members: Vec::new() };
    for token in cx.x.last_tokens() {
        lists.members.extend(token);
        lists.offsets.push(lists.members.len() as u32);
    }
    sums(cx, x, &lists)
}

/// Gradient of [`last`]: `[N, D]`.
pub fn last_backward<D: Device>(cx: Context<D>, dy: &Floats<D>) -> Result<Floats<D>> {
    // The groups whose prefix ends with each token.
    let last = cx.x.last_tokens();
    let mut lists = Lists { offsets: vec![0; cx.x.batch.tokens() + 1], members: Vec::new() };
    for (group, token) in last.iter().enumerate() {
        let Some(token) = token else { continue };
        lists.offsets[*token as usize + 1] += 1;
        // Tokens ascend with the groups.
        lists.members.push(group as u32);
    }
    for token in 0..cx.x.batch.tokens() {
        lists.offsets[token + 1] += lists.offsets[token];
    }
    sums(cx, dy, &lists)
}

/// The sums of the rows of `x` in each list.
fn sums<D: Device>(cx: Context<D>, x: &Floats<D>, lists: &Lists) -> Result<Floats<D>> {
    let count = lists.offsets.len() - 1;
    let lists = cx.staged(|staging| Ok(DeviceLists::stage(cx.device, staging, lists)?))?;
    let mut y = cx.device.alloc(count * cx.width)?;
    let all = Columns { width: cx.width, part: 0, parts: 1 };
    cx.device.concat_backward(all, x, Some(lists.segments()), Output::overwrite(&mut y))?;
    Ok(y)
}
