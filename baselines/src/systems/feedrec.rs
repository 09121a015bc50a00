//! FeedRec (Wu et al., WWW 2022), for one kind of feedback in two values:
//!
//! ```text
//! seq   = Block(item[x_t] + position[t] + label[y_t])           causal
//! P     = Block_pos(seq, y = 1)     N = Block_neg(seq, y = 0)   causal, each over its own events
//! parts = [e, mean of seq, att_pos(P), att_neg(N)]
//! loss.idl = mean over prefixes of cos(att_pos(P), att_neg(N))
//! ```
//!
//! `att` is the attentive pooling of [`crate::ops::attentive`]. One pass serves all prefixes of a
//! history and all candidates.

use crate::Result;
use crate::ops::attentive::Attentive;
use crate::ops::prefix;
use crate::ops::stack::{Encoder, Stack};
use crate::system::{Backward, Context, Encoded, Part, Per, Settings, System};
use dfar::device::cpu::elementwise::add_assign;
use dfar::device::{Embedding, Interests, Lookup, Losses, Memory, Slot};
use dfar::model::parameters::Names;

/// FeedRec.
pub struct Feedrec {
    encoder: Stack,
    positive: Interest,
    negative: Interest,
}

/// The events of one label.
struct Interest {
    label: usize,
    encoder: Stack,
    pool: Attentive,
}

impl Feedrec {
    /// Names the parameters `encoder.*`, `positive.*`, `negative.*`, `pool_positive.*`,
    /// `pool_negative.*`.
    pub fn new(names: &mut Names, settings: &Settings) -> Self {
        let encoder = Stack::new(names, "encoder", settings);
        let mut interest = |label, name: &str| Interest {
            label,
            encoder: Stack::new(names, name, settings),
            pool: Attentive::new(names, &format!("pool_{name}"), settings.width),
        };
        Self { encoder, positive: interest(1, "positive"), negative: interest(0, "negative") }
    }
}

impl System for Feedrec {
    fn encode<'a>(&'a self, cx: Context<'a>) -> Result<Encoded<'a>> {
        let batch = &cx.x.batch;
        let (seq, encoder_state) = self.encoder.forward(cx, &cx.event_tables(), &batch.cu_seqlens)?;
        let mut parts = vec![Part { values: prefix::mean(cx, &seq)?, width: cx.width, per: Per::Group }];
        let mut states = Vec::with_capacity(2);
        for interest in [&self.positive, &self.negative] {
            let split = &batch.split[interest.label];
            let token = cx.device.upload(&split.token)?;
            let own = [Lookup { table: &seq, index: &token }];
            let (x, state) = interest.encoder.forward(cx, &own, &split.cu_seqlens)?;
            let (att, pool_state) = interest.pool.forward(cx, split, &x)?;
            parts.push(Part { values: att, width: cx.width, per: Per::Group });
            states.push((token, x, state, pool_state));
        }
        let backward: Backward = Box::new(move |parts, mut d_parts, grads| {
            let mut loss = cx.device.zeros(1)?;
            let [_, positive, negative] = parts else { unreachable!("there are three parts") };
            let [d_mean, d_positive, d_negative] = &mut d_parts[..] else {
                unreachable!("as many gradients")
            };
            let vectors = Interests { positive: &positive.values, negative: &negative.values };
            let gradients = Interests { positive: d_positive, negative: d_negative };
            let slot = Slot { values: &mut loss, index: 0 };
            cx.device.cosine_loss(cx.width, cx.auxiliary, vectors, gradients, slot)?;
            let mut d_seq = prefix::mean_backward(cx, d_mean)?;
            let interests = [&self.positive, &self.negative].into_iter().zip(states);
            for ((interest, (token, x, state, pool_state)), (part, d_part)) in
                interests.zip(parts[1..].iter().zip(&d_parts[1..]))
            {
                let split = &batch.split[interest.label];
                let att = [&part.values, d_part];
                let dx = interest.pool.backward(cx, split, &mut grads.dense, &x, att, pool_state)?;
                let d_own = interest.encoder.backward(cx, &mut grads.dense, state, dx)?;
                cx.device.scatter_add(cx.width, &d_own, &token, &mut d_seq)?;
            }
            let d_events = self.encoder.backward(cx, &mut grads.dense, encoder_state, d_seq)?;
            add_assign(&d_events, &mut grads.tokens);
            Ok(loss[0])
        });
        Ok(Encoded { parts, backward })
    }
}
