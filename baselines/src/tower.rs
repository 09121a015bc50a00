//! The tower: `logit = MLP([e, parts..])`, ReLU between its layers.

mod concatenated;
mod split;

pub use concatenated::Concatenated;
pub use split::Split;

use crate::system::{Context, Gradients, Part, Settings};
use crate::system_device::SystemDevice;
use crate::{Floats, Result};
use dfar::device::{Activation, Device, Output};
use dfar::model::parameters::{self, Linear, Names};

/// A way to compute the first layer, whose input is wide and repeats the vectors of candidates and
/// prefixes.
pub trait FirstLayer<D: Device> {
    /// What the backward pass reads, beside the output.
    type State;

    /// `ReLU([e, parts..] W + b)`, `[R, outputs]`. `e: [C, D]` are the candidates.
    ///
    /// # Errors
    /// Failures of the device.
    fn forward(
        cx: Context<D>,
        layer: &Linear,
        e: &Floats<D>,
        parts: &[Part<D>],
    ) -> Result<(Floats<D>, Self::State)>;

    /// Gradients of the parts from `d_h`, that of the output. Writes those of the parameters, adds
    /// that of `e` to `grads.candidates`.
    ///
    /// # Errors
    /// Failures of the device.
    fn backward(
        cx: Context<D>,
        layer: &Linear,
        pass: FirstPass<D, Self::State>,
        d_h: Floats<D>,
        grads: &mut Gradients<D>,
    ) -> Result<Vec<Floats<D>>>;
}

/// Input and output of the first layer.
pub struct FirstPass<'a, D: Device, S> {
    /// `[C, D]` the candidates.
    pub e: &'a Floats<D>,
    /// The other parts.
    pub parts: &'a [Part<D>],
    /// `[R, outputs]` the output.
    pub h: &'a Floats<D>,
    /// [`FirstLayer::State`].
    pub state: S,
}

/// The layers.
pub struct Tower([Linear; 3]);

/// Activations that the backward pass reads.
pub struct TowerState<D: SystemDevice> {
    /// `[C, D]`
    e: Floats<D>,
    first_state: <D::FirstLayer as FirstLayer<D>>::State,
    h0: Floats<D>,
    h1: Floats<D>,
    /// `[R]`
    pub logits: Floats<D>,
}

impl Tower {
    /// Names the parameters `tower.*` for an input of `D + parts` values.
    pub fn new(names: &mut Names, settings: &Settings, parts: usize) -> Self {
        Self(names.mlp("tower", settings.width + parts, settings.tower))
    }

    /// The logits of all rows.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn forward<D: SystemDevice>(&self, cx: Context<D>, parts: &[Part<D>]) -> Result<TowerState<D>> {
        let (device, rows) = (cx.device, cx.x.batch.rows());
        let [first, second, last] = &self.0;
        let e = cx.candidates()?;
        let (h0, first_state) = D::FirstLayer::forward(cx, first, &e, parts)?;
        let layer = |layer: &parameters::Linear, activation, x: &Floats<D>| -> Result<Floats<D>> {
            let mut y = device.alloc(rows * layer.outputs)?;
            device.linear(cx.p.linear(layer, activation), x, Output::overwrite(&mut y))?;
            Ok(y)
        };
        let h1 = layer(second, Activation::Relu, &h0)?;
        let logits = layer(last, Activation::None, &h1)?;
        Ok(TowerState { e, first_state, h0, h1, logits })
    }

    /// Gradients of the parts from those of the logits. Adds that of `e` to `grads.candidates`.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn backward<D: SystemDevice>(
        &self,
        cx: Context<D>,
        parts: &[Part<D>],
        state: TowerState<D>,
        mut d_logits: Floats<D>,
        grads: &mut Gradients<D>,
    ) -> Result<Vec<Floats<D>>> {
        let (device, rows) = (cx.device, cx.x.batch.rows());
        let [first, second, last] = &self.0;
        let TowerState { e, first_state, h0, h1, logits } = state;
        let mut layer = |layer: &Linear,
                         activation,
                         x: &Floats<D>,
                         y: &Floats<D>,
                         dy: &mut Floats<D>|
         -> Result<Floats<D>> {
            let mut dx = device.alloc(rows * layer.inputs)?;
            let gradients = grads.dense.linear_gradients(layer, Output::overwrite(&mut dx));
            device.linear_backward(cx.p.linear(layer, activation), x, y, dy, gradients)?;
            Ok(dx)
        };
        let mut d_h1 = layer(last, Activation::None, &h1, &logits, &mut d_logits)?;
        let d_h0 = layer(second, Activation::Relu, &h0, &h1, &mut d_h1)?;
        let pass = FirstPass { e: &e, parts, h: &h0, state: first_state };
        D::FirstLayer::backward(cx, first, pass, d_h0, grads)
    }
}
