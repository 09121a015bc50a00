//! DIN (Zhou et al., KDD 2018):
//!
//! ```text
//! s_t   = item[x_t]                                    no position
//! a_t   = s_t W;   w = softmax_t MLP([a_t, e, a_t - e, a_t * e])
//! parts = [e, sum_t w_t s_t, sum_t s_t]
//! ```
//!
//! A score depends on the event and the candidate, not on the prefix: it is computed once for all
//! prefixes with the candidate. The sum is a running one.

use crate::Result;
use crate::ops::prefix;
use crate::ops::target::{InputGradients, Target};
use crate::system::{Backward, Context, Encoded, Part, Per, Settings, System};
use dfar::device::{
    Activation, Buffer, Device, Linear, LinearGradients, Output, Segments, TargetIndex, TargetInputs,
};
use dfar::model::parameters::{Id, Initial, Names};

/// DIN.
pub struct Din {
    w: Id,
    target: Target,
}

impl Din {
    /// Names the parameters `target.w`, `target.mlp.*`.
    pub fn new(names: &mut Names, settings: &Settings) -> Self {
        let w = names.tensor("target.w", &[settings.width; 2], Initial::Mlp);
        Self { w, target: Target::new(names, "target.mlp", settings) }
    }
}

impl<D: Device> System<D> for Din {
    fn encode<'a>(&'a self, cx: Context<'a, D>) -> Result<Encoded<'a, D>> {
        let batch = &cx.x.batch;
        let projection = Linear {
            w: &cx.p[self.w],
            bias: None,
            activation: Activation::None,
            inputs: cx.width,
            outputs: cx.width,
        };
        let s = cx.events()?;
        let mut a = cx.device.alloc(s.len())?;
        cx.device.linear(projection, &s, Output::overwrite(&mut a))?;
        let r = cx.candidates()?;
        let index = TargetIndex {
            cu_seqlens: &batch.cu_seqlens[..],
            pair_offsets: &batch.pair_offsets,
            score_offsets: &batch.score_offsets,
            rows: Segments { offsets: &batch.pair_rows.offsets[..], members: &batch.pair_rows.members },
            row_length: &batch.row_length,
        };
        let (att, pass) = self.target.forward(cx, index, TargetInputs { s: &s, a: &a, r: &r })?;
        let parts = vec![
            Part { values: att, width: cx.width, per: Per::Row },
            Part { values: prefix::sum(cx, &s)?, width: cx.width, per: Per::Group },
        ];
        let backward: Backward<D> = Box::new(move |parts, d_parts, grads| {
            let att = [&parts[0].values, &d_parts[0]];
            let inputs = TargetInputs { s: &s, a: &a, r: &r };
            let InputGradients { mut ds, mut da, dr } =
                self.target.backward(cx, inputs, &pass, att, &mut grads.dense)?;
            let dw = &mut grads.dense[self.w];
            let gradients = LinearGradients { dx: Some(Output::add(&mut ds)), dw, dbias: None };
            cx.device.linear_backward(projection, &s, &a, &mut da, gradients)?;
            cx.device.add(&ds, &mut grads.tokens)?;
            cx.device.add(&prefix::sum_backward(cx, &d_parts[1])?, &mut grads.tokens)?;
            cx.device.add(&dr, &mut grads.candidates)?;
            Ok(0.0)
        });
        Ok(Encoded { parts, backward })
    }
}
