//! THA4Rec: SASRec with talking heads (Shazeer et al., 2020) in its blocks.
//!
//! ```text
//! l'_g = sum_h l_h ML[h, g]      w_g = softmax over j <= i of l'_g      w'_h = sum_g w_g MW[g, h]
//! ```
//!
//! `l_h` are the logits of head `h`, and `w'_h` weighs its values. `ML` and `MW` start as the
//! identity, with which it is SASRec. [`crate::ops::talking_heads`] computes it.

use super::sasrec::Sasrec;
use crate::ops::talking_stack::TalkingStack;
use crate::system::Settings;
use dfar::model::parameters::Names;

/// Names the parameters `encoder.*`, with `encoder.mix_logits` and `encoder.mix_weights`.
pub fn tha4rec(names: &mut Names, settings: &Settings) -> Sasrec<TalkingStack> {
    Sasrec { encoder: TalkingStack::new(names, "encoder", settings), pool: settings.pool }
}
