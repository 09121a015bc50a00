//! The parameters of a GRU cell: `NAME.w [D, 3D]`, `NAME.u [D, 3D]`, `NAME.b [3D]`, columns in the
//! order reset, update, new. The steps are those of [`gru`](super::gru).

use super::gru::{Recurrence, RecurrenceGradients, States};
use super::sequences::Sequences;
use crate::system::Context;
use crate::{Floats, Result, Tensors};
use dfar::device::{Activation, Dense, Memory, Output};
use dfar::model::parameters::{Id, Initial, Linear, Names, glorot};

/// A cell by its parameters.
pub struct Cell {
    input: Linear,
    u: Id,
}

/// What a cell reads.
#[derive(Clone, Copy)]
pub struct Steps<'a> {
    /// The sequences.
    pub sequences: Sequences<'a>,
    /// `[N, 3D]`, see [`Cell::inputs`].
    pub inputs: &'a Floats,
    /// `[steps]` attention weights: an AUGRU. `None`: a GRU.
    pub gate: Option<&'a [f32]>,
}

impl Cell {
    /// Names the parameters. Each third of a matrix is Glorot uniform on its own. The biases of
    /// reset and update start at 1 and -1: a new cell keeps most of its state.
    pub fn new(names: &mut Names, name: &str, width: usize) -> Self {
        let (shape, start) = ([width, 3 * width], glorot(width, width));
        let w = names.tensor(format!("{name}.w"), &shape, start);
        let u = names.tensor(format!("{name}.u"), &shape, start);
        let b = names.tensor(format!("{name}.b"), &[3 * width], Initial::Thirds([1.0, -1.0, 0.0]));
        Self { input: Linear { w, b, inputs: width, outputs: 3 * width }, u }
    }

    /// The input product `x W + b` of all events: `[N, 3D]`.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn inputs(&self, cx: Context, x: &Floats) -> Result<Floats> {
        let mut y = cx.device.alloc(x.len() * 3)?;
        cx.device.linear(cx.p.linear(&self.input, Activation::None), x, Output::overwrite(&mut y))?;
        Ok(y)
    }

    /// Writes the states that `states` asks for.
    pub fn forward(&self, cx: Context, steps: Steps, states: States<&mut [f32]>) {
        self.recurrence(cx, steps).forward(states);
    }

    /// Gradients `[N, D]` of the events `x` and `[steps]` of the gate (empty without one), from
    /// those of the states. `states` are the states of all steps. Writes the gradients of the
    /// parameters.
    ///
    /// # Errors
    /// Failures of the device.
    pub fn backward(
        &self,
        cx: Context,
        grads: &mut Tensors,
        steps: Steps,
        (x, states): (&Floats, &Floats),
        d_states: States<&[f32]>,
    ) -> Result<(Floats, Floats)> {
        let device = cx.device;
        let mut d_inputs: Floats = device.alloc(steps.inputs.len())?;
        let mut d_gate: Floats = device.alloc(steps.gate.map_or(0, <[f32]>::len))?;
        let gradients = RecurrenceGradients {
            dx: &mut d_inputs,
            du: &mut grads[self.u],
            dgate: steps.gate.is_some().then_some(&mut d_gate[..]),
        };
        self.recurrence(cx, steps).backward(states, d_states, gradients);
        let mut dx = device.alloc(x.len())?;
        let gradients = grads.linear_gradients(&self.input, Output::overwrite(&mut dx));
        let layer = cx.p.linear(&self.input, Activation::None);
        device.linear_backward(layer, x, steps.inputs, &mut d_inputs, gradients)?;
        Ok((dx, d_gate))
    }

    fn recurrence<'a>(&self, cx: Context<'a>, steps: Steps<'a>) -> Recurrence<'a> {
        let Steps { sequences, inputs, gate } = steps;
        Recurrence { width: cx.width, sequences, x: inputs, u: &cx.p[self.u], gate }
    }
}
