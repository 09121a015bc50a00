//! SASRec (Kang & McAuley, ICDM 2018):
//!
//! ```text
//! seq   = Block(item[x_t] + position[t])        causal, plain heads
//! parts = [e, pool(seq)]                        pool: mean over the prefix, or its last position
//! ```
//!
//! One pass serves all prefixes of a history and all candidates.

use crate::Result;
use crate::ops::prefix;
use crate::ops::stack::{Encoder, Stack};
use crate::system::{Backward, Context, Encoded, Part, Per, Settings, System};
use dfar::device::Device;
use dfar::model::parameters::Names;

/// How a prefix becomes one vector.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// The mean of its positions.
    #[default]
    Mean,
    /// Its last position.
    Last,
}

/// SASRec; with another encoder, THA4Rec.
pub struct Sasrec<E = Stack> {
    pub(super) encoder: E,
    pub(super) pool: Pool,
}

impl Sasrec {
    /// Names the parameters `encoder.*`.
    pub fn new(names: &mut Names, settings: &Settings) -> Self {
        Self { encoder: Stack::new(names, "encoder", settings), pool: settings.pool }
    }
}

impl<D: Device, E: Encoder<D>> System<D> for Sasrec<E> {
    fn encode<'a>(&'a self, cx: Context<'a, D>) -> Result<Encoded<'a, D>> {
        let (seq, state) = self.encoder.forward(cx, &cx.event_tables(), &cx.x.batch.cu_seqlens)?;
        let pooled = match self.pool {
            Pool::Mean => prefix::mean(cx, &seq)?,
            Pool::Last => prefix::last(cx, &seq)?,
        };
        let backward: Backward<D> = Box::new(move |_, d_parts, grads| {
            let d_seq = match self.pool {
                Pool::Mean => prefix::mean_backward(cx, &d_parts[0])?,
                Pool::Last => prefix::last_backward(cx, &d_parts[0])?,
            };
            let d_events = self.encoder.backward(cx, &mut grads.dense, state, d_seq)?;
            cx.device.add(&d_events, &mut grads.tokens)?;
            Ok(0.0)
        });
        let parts = vec![Part { values: pooled, width: cx.width, per: Per::Group }];
        Ok(Encoded { parts, backward })
    }
}
