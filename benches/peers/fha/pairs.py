"""(d) The strongest alternative: plain causal attention per pair of heads, merged by logsumexp.

Each query head attends to each key head in ordinary causal attention, on K * g heads of any fused
library: head c * g + a is query head a for key head c. Outputs are merged with weights exp(lse_c -
lse), lse = logsumexp_c lse_c. Masked with H = 2 has one pair and nothing to merge: FHA is causal
attention there, and its two output slots (one per key label) are the halves of a value of width 2d.
q and k are then padded to 2d with zeros; a library that pads d = 16 to 32 does so anyway.

Backward is exact. The library's own backward gets the *merged* out and lse, so its p = exp(s - lse)
is FHA's p. Its delta must be FHA's too, sum_c <do_c, o_c>, but a head only has <do_c, o_c>. The
rest is passed in 3 of 8 added columns, with do = 1, v = 0 and out = the missing part, split into
three terms that are exact in 16 bits.
"""
import torch
import torch.nn.functional as F

from . import heads

EXTRA = 8     # added columns: widths must be multiples of 8; 3 are used


def prepare(q, k, v, label, normalization):
    """-> q [N, K * g, w], k [N, K, w], v [N, K, w]."""
    q, k = heads.queries_keys(q, k, label, normalization)
    v = heads.pair_values(v, label, normalization)
    if v.shape[2] > q.shape[2]:
        q, k = (F.pad(x, (0, v.shape[2] - q.shape[2])) for x in (q, k))
    return q.repeat(1, k.shape[1], 1), k, v


def merge(out, lse, K, normalization):
    """out: [N, K * g, w], lse: [K * g, N] -> o [N, g, H, d], lse [N, g]."""
    lse = lse.unflatten(0, (K, -1))
    total = lse.logsumexp(0)
    out = out.unflatten(1, (K, -1))
    if K > 1:
        out = (out * (lse - total).exp().permute(2, 0, 1)[..., None]).to(out.dtype)
    return heads.pairs_to_slots(out.transpose(1, 2), normalization).contiguous(), total.t()


# Masks the leading bits of a float32 that the type can hold.
LEADING_BITS = {torch.bfloat16: -0x10000, torch.float16: -0x2000}


def split(x, dtype):
    """x as a sum of three numbers that are exact in `dtype`. Bits are masked explicitly, because
    the compiler removes a conversion to 16 bits and back."""
    if dtype not in LEADING_BITS:
        return x, torch.zeros_like(x), torch.zeros_like(x)
    parts = []
    for _ in range(3):
        parts.append((x.view(torch.int32) & LEADING_BITS[dtype]).view(torch.float32))
        x = x - parts[-1]
    return parts


def prepare_backward(do, o, lse, q, k, v, normalization):
    """Arguments of the library's backward from the merged o and lse and their gradient."""
    K = k.shape[1]
    # [N, K * g, w]
    spread = lambda x: heads.slots_to_pairs(x, normalization).transpose(1, 2).flatten(1, 2)
    do, o = spread(do), spread(o)
    lse = lse.t().repeat(K, 1)
    if K > 1:
        wide = torch.promote_types(o.dtype, torch.float32)
        seen = (do.to(wide) * o.to(wide)).sum(2).unflatten(1, (K, -1))
        rest = (seen.sum(1, keepdim=True) - seen).flatten(1)      # [N, K * g]
        parts = torch.stack(split(rest, o.dtype), 2).to(o.dtype)
        o = torch.cat([o, parts, o.new_zeros(*o.shape[:2], EXTRA - 3)], 2)
        do = torch.cat([do, do.new_ones(*do.shape[:2], 3), do.new_zeros(*do.shape[:2], EXTRA - 3)], 2)
        q, k, v = (F.pad(x, (0, EXTRA)) for x in (q, k, v))
    return do, q, k, v, o, lse


def finish_backward(dq, dk, dv, label, d, normalization):
    """The library's gradients -> dq, dk, dv [N, H, d]."""
    K = dk.shape[1]
    dq = heads.to_own(dq[..., :d].unflatten(1, (K, -1)).sum(1), label)
    if normalization == "joint":
        return dq, dk[..., :d].contiguous(), heads.keep_own(dv[..., :d], label)
    dv = torch.where(label.bool()[:, None, None], dv[..., d:2 * d], dv[..., :d])
    return dq, heads.to_own(dk[..., :d], label), heads.to_own(dv, label)


class _Pairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, label, batch, normalization, peer):
        d = q.shape[2]
        pair = peer.prepare(q, k, v, label, normalization)
        out, lse, saved = peer.engine.forward(*pair, batch, d ** -0.5)
        o, lse = peer.merge(out, lse, pair[1].shape[1], normalization)
        ctx.save_for_backward(o, lse, label, *pair)
        ctx.rest = saved, batch, d, normalization, peer
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx, do, _):
        o, lse, label, *pair = ctx.saved_tensors
        saved, batch, d, normalization, peer = ctx.rest
        do, q, k, v, o, lse = peer.prepare_backward(do, o, lse, *pair, normalization)
        args = (x.contiguous() for x in (do, q, k, v, o, lse))
        grads = peer.engine.backward(*args, saved, batch, d ** -0.5)
        return *peer.finish_backward(*grads, label, d, normalization), None, None, None, None


class Pairs:
    exact, has_lse = True, True

    def __init__(self, compiler, engine):
        self.engine, self.backend = engine, engine.backend
        self.prepare, self.merge = compiler(prepare), compiler(merge)
        self.prepare_backward, self.finish_backward = compiler(prepare_backward), compiler(finish_backward)

    def __call__(self, q, k, v, label, batch, normalization):
        return _Pairs.apply(q, k, v, label, batch, normalization, self)


class Varlen:
    """The same for Masked with H = 2, with the public API and autograd:
    torch.nn.attention.varlen.varlen_attn.

    `summed`: values of width d, so that the two output slots are added. This is NOT the same
    function (DFAR's output projection reads the slots separately); it bounds any exact use of this
    library."""
    has_lse, backend = True, "flash2 varlen_attn"

    def __init__(self, compiler, summed=False):
        self.glue = compiler(summed_inputs if summed else prepare)
        self.exact = not summed

    def __call__(self, q, k, v, label, batch, normalization):
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
        H, d = q.shape[1:]
        if (H, normalization) != (2, "masked"):
            raise NotImplementedError("only Masked with H = 2 is plain causal attention")
        q, k, v = self.glue(q, k, v, label, normalization)
        cu, n = batch.cu_seqlens, batch.max_length
        o, lse = varlen_attn(q, k, v, cu, cu, n, n, return_aux=AuxRequest(lse=True), scale=d ** -0.5, window_size=(-1, 0))
        return o.unflatten(2, (-1, d)), lse.t()


def summed_inputs(q, k, v, label, normalization):
    return heads.own(q, label), heads.own(k, label), heads.own(v, label)
