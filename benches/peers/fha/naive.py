"""(a) The formula: products, where, softmax over keys and key heads, in torch.compile, padded."""
import torch

from . import heads
from .batch import pad, unpad


def dense(q, k, v):
    """q: [B, T, g, d], k: [B, T, K, d], v: [B, T, K, w] -> o [B, T, g, K, w], lse [B, T, g]. The
    softmax is in float32 or wider."""
    s = torch.einsum("biad,bjcd->baicj", q, k)
    s = s.to(torch.promote_types(s.dtype, torch.float32)) * q.shape[-1] ** -0.5
    step = torch.arange(q.shape[1], device=q.device)
    s = torch.where(step[None, None, :] <= step[:, None, None], s, -torch.inf)
    lse = s.flatten(3).logsumexp(3)
    p = (s - lse[..., None, None]).exp().to(q.dtype)
    return torch.einsum("baicj,bjcw->biacw", p, v), lse.transpose(1, 2)


class Naive:
    exact, has_lse, backend = True, True, "einsum"

    def __init__(self, compiler, bucketed):
        self.glue, self.values, self.dense = (compiler(f) for f in (heads.queries_keys, heads.pair_values, dense))
        self.bucketed = bucketed

    def __call__(self, q, k, v, label, batch, normalization):
        q, k = self.glue(q, k, label, normalization)
        v = self.values(v, label, normalization)
        buckets = batch.buckets(self.bucketed)
        outs = []
        for b in buckets:
            outs.append(self.dense(pad(q, b), pad(k, b), pad(v, b)))
        o, lse = (unpad(list(parts), buckets, batch.tokens) for parts in zip(*outs))
        return heads.pairs_to_slots(o, normalization), lse
