//! Arguments on buffers as arguments on slices: the engine computes on slices.

use super::CpuBuffer;
use crate::device::{
    ConcatPart, Element, Interests, LabelLinear, LabelLinearGradients, LayerNorm, LayerNormGradients, Linear,
    LinearGradients, Lookup, Output, Prefixes, Recency, Segments, TargetGradients, TargetInputs, TargetState,
    TargetWeights,
};

/// Buffers as slices.
pub trait Slices {
    /// The same arguments, on slices.
    type Slices;
    /// Borrows the values of every buffer.
    fn slices(self) -> Self::Slices;
}

impl<'a, T: Element> Slices for &'a CpuBuffer<T> {
    type Slices = &'a [T];
    fn slices(self) -> &'a [T] {
        self
    }
}

impl<'a, T: Element> Slices for &'a mut CpuBuffer<T> {
    type Slices = &'a mut [T];
    fn slices(self) -> &'a mut [T] {
        self
    }
}

impl<F: Slices> Slices for Option<F> {
    type Slices = Option<F::Slices>;
    fn slices(self) -> Self::Slices {
        self.map(F::slices)
    }
}

impl<F: Slices> Slices for Output<F> {
    type Slices = Output<F::Slices>;
    fn slices(self) -> Self::Slices {
        Output { values: self.values.slices(), store: self.store }
    }
}

impl<F: Slices, U: Slices> Slices for Lookup<F, U> {
    type Slices = Lookup<F::Slices, U::Slices>;
    fn slices(self) -> Self::Slices {
        Lookup { table: self.table.slices(), index: self.index.slices() }
    }
}

impl<U: Slices> Slices for Segments<U> {
    type Slices = Segments<U::Slices>;
    fn slices(self) -> Self::Slices {
        Segments { offsets: self.offsets.slices(), members: self.members.slices() }
    }
}

impl<U: Slices> Slices for Prefixes<U> {
    type Slices = Prefixes<U::Slices>;
    fn slices(self) -> Self::Slices {
        let Self { cu_seqlens, group_offsets, count, divisor, recency } = self;
        Prefixes {
            cu_seqlens: cu_seqlens.slices(),
            group_offsets: group_offsets.slices(),
            count: count.slices(),
            divisor: divisor.slices(),
            recency: recency
                .map(|Recency { half_life, position }| Recency { half_life, position: position.slices() }),
        }
    }
}

impl<F: Slices, U: Slices> Slices for ConcatPart<F, U> {
    type Slices = ConcatPart<F::Slices, U::Slices>;
    fn slices(self) -> Self::Slices {
        ConcatPart { values: self.values.slices(), index: self.index.slices() }
    }
}

impl<F: Slices> Slices for Linear<F> {
    type Slices = Linear<F::Slices>;
    fn slices(self) -> Self::Slices {
        let Self { w, bias, activation, inputs, outputs } = self;
        Linear { w: w.slices(), bias: bias.slices(), activation, inputs, outputs }
    }
}

impl<F: Slices> Slices for LinearGradients<F> {
    type Slices = LinearGradients<F::Slices>;
    fn slices(self) -> Self::Slices {
        let Self { dx, dw, dbias } = self;
        LinearGradients { dx: dx.slices(), dw: dw.slices(), dbias: dbias.slices() }
    }
}

impl<F: Slices, U: Slices> Slices for LabelLinear<F, U> {
    type Slices = LabelLinear<F::Slices, U::Slices>;
    fn slices(self) -> Self::Slices {
        let Self { w, bias, tokens_by_label, inputs, outputs } = self;
        let tokens_by_label = tokens_by_label.map(U::slices);
        LabelLinear { w: w.slices(), bias: bias.slices(), tokens_by_label, inputs, outputs }
    }
}

impl<F: Slices> Slices for LabelLinearGradients<F> {
    type Slices = LabelLinearGradients<F::Slices>;
    fn slices(self) -> Self::Slices {
        let Self { dx, dw, dbias } = self;
        LabelLinearGradients { dx: dx.slices(), dw: dw.slices(), dbias: dbias.slices() }
    }
}

impl<F: Slices> Slices for LayerNorm<F> {
    type Slices = LayerNorm<F::Slices>;
    fn slices(self) -> Self::Slices {
        let Self { width, gamma, beta } = self;
        LayerNorm { width, gamma: gamma.slices(), beta: beta.slices() }
    }
}

impl<F: Slices> Slices for LayerNormGradients<F> {
    type Slices = LayerNormGradients<F::Slices>;
    fn slices(self) -> Self::Slices {
        let Self { dx, dgamma, dbeta } = self;
        LayerNormGradients { dx: dx.slices(), dgamma: dgamma.slices(), dbeta: dbeta.slices() }
    }
}

impl<F: Slices> Slices for Interests<F> {
    type Slices = Interests<F::Slices>;
    fn slices(self) -> Self::Slices {
        Interests { positive: self.positive.slices(), negative: self.negative.slices() }
    }
}

impl<F: Slices> Slices for TargetInputs<F> {
    type Slices = TargetInputs<F::Slices>;
    fn slices(self) -> Self::Slices {
        TargetInputs { s: self.s.slices(), a: self.a.slices(), r: self.r.slices() }
    }
}

impl<F: Slices> Slices for TargetWeights<F> {
    type Slices = TargetWeights<F::Slices>;
    fn slices(self) -> Self::Slices {
        self.map(F::slices)
    }
}

impl<F: Slices> Slices for TargetState<F> {
    type Slices = TargetState<F::Slices>;
    fn slices(self) -> Self::Slices {
        TargetState { e: self.e.slices(), lse: self.lse.slices(), att: self.att.slices() }
    }
}

impl<F: Slices> Slices for TargetGradients<F> {
    type Slices = TargetGradients<F::Slices>;
    fn slices(self) -> Self::Slices {
        let Self { ds, da, dr, weights } = self;
        TargetGradients { ds: ds.slices(), da: da.slices(), dr: dr.slices(), weights: weights.slices() }
    }
}
