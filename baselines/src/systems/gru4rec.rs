//! GRU4REC (Hidasi et al., ICLR 2016), with the tower and the loss of all systems:
//!
//! ```text
//! h     = GRU(item[x_1], .., item[x_L])
//! parts = [e, h_L]
//! ```
//!
//! One pass serves all prefixes of a history and all candidates. [`gru`](crate::ops::gru) has the
//! equations of the cell.

use crate::ops::cell::{Cell, Steps};
use crate::ops::gru::States;
use crate::ops::prefix;
use crate::ops::sequences::Sequences;
use crate::system::{Backward, Context, Encoded, Part, Per, Settings, System};
use crate::{Floats, Result};
use dfar::device::Memory;
use dfar::device::cpu::elementwise::add_assign;
use dfar::model::parameters::Names;

/// GRU4REC.
pub struct Gru4rec {
    gru: Cell,
}

impl Gru4rec {
    /// Names the parameters `gru.*`.
    pub fn new(names: &mut Names, settings: &Settings) -> Self {
        Self { gru: Cell::new(names, "gru", settings.width) }
    }
}

impl System for Gru4rec {
    fn encode<'a>(&'a self, cx: Context<'a>) -> Result<Encoded<'a>> {
        let events = cx.events()?;
        let inputs = self.gru.inputs(cx, &events)?;
        let mut states = cx.device.alloc(events.len())?;
        self.gru.forward(cx, steps(cx, &inputs), States { every: Some(&mut states), last: None });
        let last = prefix::last(cx, &states)?;
        let backward: Backward = Box::new(move |_, d_parts, grads| {
            let d_states = prefix::last_backward(cx, &d_parts[0])?;
            let d_states = States { every: Some(&d_states[..]), last: None };
            let kept = (&events, &states);
            let (d_events, _) =
                self.gru.backward(cx, &mut grads.dense, steps(cx, &inputs), kept, d_states)?;
            add_assign(&d_events, &mut grads.tokens);
            Ok(0.0)
        });
        let parts = vec![Part { values: last, width: cx.width, per: Per::Group }];
        Ok(Encoded { parts, backward })
    }
}

fn steps<'a>(cx: Context<'a>, inputs: &'a Floats) -> Steps<'a> {
    Steps { sequences: Sequences::packed(&cx.x.batch.cu_seqlens), inputs, gate: None }
}
