//! Caser (Tang & Wang, WSDM 2018), without user embedding and without a layer before the tower:
//!
//! ```text
//! s_t   = item[x_t]                                                     0 before the oldest event
//! o_h   = max over t of ReLU([s_t | s_(t-1) | .. | s_(t-h+1)] F_h + b_h)         h = 1, 2, 3
//! v_k   = sum over j < min(L, L_v) of G[k, j] s_(L-j)                            k = 0, .., 3
//! parts = [e, v_0, .., v_3, o_1, o_2, o_3]
//! ```
//!
//! Both convolutions are causal: one pass serves all prefixes of a history, for which the maximum
//! is a running one. The candidate enters in the tower alone.
//! [`convolution`](crate::ops::convolution) has the operations.

use crate::ops::convolution::{
    Prefixes, Vertical, running_max, running_max_backward, windows, windows_backward,
};
use crate::system::{Backward, Context, Encoded, Part, Per, Settings, System};
use crate::{Floats, Indices, Result};
use dfar::device::{Activation, Dense, Memory, Output};
use dfar::model::parameters::{Id, Initial, Linear, Names, glorot};

/// Caser.
pub struct Caser {
    /// Filters of height 1, 2, ..
    horizontal: Vec<Linear>,
    vertical: Id,
    filters: usize,
}

/// What the backward pass of the filters of one height reads.
struct Horizontal {
    windows: Floats,
    /// `[N, filters]` behind the ReLU.
    y: Floats,
    /// `[G, filters]` token of each maximum.
    token: Indices,
}

impl Caser {
    /// Names the parameters `horizontal.*` and `vertical.w`.
    pub fn new(names: &mut Names, settings: &Settings) -> Self {
        let Settings { width, horizontal, heights, vertical, .. } = *settings;
        let length = settings.vertical_length();
        let filters = |h: usize, names: &mut Names| {
            let name = format!("horizontal.{}", h - 1);
            names.linear(&name, h * width, horizontal, glorot(h * width, horizontal))
        };
        let horizontal = (1..=heights).map(|h| filters(h, names)).collect();
        let start = Initial::Uniform(1.0 / (length as f32).sqrt());
        let id = names.tensor("vertical.w", &[vertical, length], start);
        Self { horizontal, vertical: id, filters: vertical }
    }

    /// Width of its parts together.
    pub fn parts(settings: &Settings) -> usize {
        settings.vertical * settings.width + settings.heights * settings.horizontal
    }

    fn vertical<'a>(&self, cx: Context<'a>) -> Vertical<'a> {
        Vertical { width: cx.width, filters: self.filters, w: &cx.p[self.vertical] }
    }

    /// `o_h: [G, filters]`.
    fn horizontal(&self, cx: Context, layer: &Linear, events: &[f32]) -> Result<(Floats, Horizontal)> {
        let (device, batch) = (cx.device, &cx.x.batch);
        let mut beside = device.alloc(batch.tokens() * layer.inputs)?;
        windows(&batch.cu_seqlens, cx.width, layer.inputs / cx.width, events, &mut beside);
        let mut y = device.alloc(batch.tokens() * layer.outputs)?;
        device.linear(cx.p.linear(layer, Activation::Relu), &beside, Output::overwrite(&mut y))?;
        let mut max: Floats = device.alloc(batch.groups() * layer.outputs)?;
        let mut token: Indices = device.alloc(max.len())?;
        running_max(prefixes(cx), layer.outputs, &y, &mut max, &mut token);
        Ok((max, Horizontal { windows: beside, y, token }))
    }
}

impl System for Caser {
    fn encode<'a>(&'a self, cx: Context<'a>) -> Result<Encoded<'a>> {
        let (device, batch) = (cx.device, &cx.x.batch);
        let events = cx.events()?;
        let width = self.filters * cx.width;
        let mut values: Floats = device.alloc(batch.groups() * width)?;
        self.vertical(cx).forward(prefixes(cx), &events, &mut values);
        let mut parts = vec![Part { values, width, per: Per::Group }];
        let mut states = Vec::new();
        for layer in &self.horizontal {
            let (values, state) = self.horizontal(cx, layer, &events)?;
            parts.push(Part { values, width: layer.outputs, per: Per::Group });
            states.push(state);
        }
        let backward: Backward = Box::new(move |_, d_parts, grads| {
            let d_vertical = &mut grads.dense[self.vertical];
            self.vertical(cx).backward(prefixes(cx), &events, &d_parts[0], &mut grads.tokens, d_vertical);
            for ((layer, state), d_max) in self.horizontal.iter().zip(states).zip(&d_parts[1..]) {
                let Horizontal { windows, y, token } = state;
                let mut dy = device.alloc(y.len())?;
                running_max_backward(prefixes(cx), layer.outputs, &token, d_max, &mut dy);
                let mut d_windows = device.alloc(windows.len())?;
                let gradients = grads.dense.linear_gradients(layer, Output::overwrite(&mut d_windows));
                let activated = cx.p.linear(layer, Activation::Relu);
                device.linear_backward(activated, &windows, &y, &mut dy, gradients)?;
                let height = layer.inputs / cx.width;
                windows_backward(&batch.cu_seqlens, cx.width, height, &d_windows, &mut grads.tokens);
            }
            Ok(0.0)
        });
        Ok(Encoded { parts, backward })
    }
}

fn prefixes(cx: Context<'_>) -> Prefixes<'_> {
    let batch = &cx.x.batch;
    Prefixes {
        cu_seqlens: &batch.cu_seqlens,
        group_offsets: &batch.group_offsets,
        group_length: &batch.group_length,
    }
}
