"""FHA in float64, dense and literal: the reference for every peer before it is timed."""
import torch


def own_heads(H, label):
    """[T, H/2] indices of the heads that serve each token."""
    return torch.arange(H // 2, device=label.device) + label.long()[:, None] * (H // 2)


def fha_sequence(q, k, v, label, normalization):
    """One causal sequence with label mask. q, k, v: [T, H, d] -> o [T, H/2, H, d], lse [T, H/2]."""
    T, H, d = q.shape
    own = own_heads(H, label)
    serves = torch.zeros(T, H, dtype=torch.bool, device=q.device).scatter_(1, own, True)
    q = q.gather(1, own[:, :, None].expand(-1, -1, d))
    s = torch.einsum("iad,jbd->iajb", q, k) * d ** -0.5
    inside = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()[:, None, :, None]
    if normalization == "masked":
        inside = inside & serves[None, None]
    s = s.masked_fill(~inside, -torch.inf)
    lse = s.flatten(2).logsumexp(2)
    p = (s - lse[:, :, None, None]).exp() * serves
    return torch.einsum("iajb,jbd->iabd", p, v), lse


def fha(q, k, v, label, batch, normalization):
    outs = [fha_sequence(q[a:b], k[a:b], v[a:b], label[a:b], normalization)
            for a, b in zip(batch.offsets, batch.offsets[1:]) if b > a]
    return torch.cat([o for o, _ in outs]), torch.cat([lse for _, lse in outs])


def relative_error(x, ref):
    """max|x - ref| / max|ref|; infinite if a value is non-finite."""
    if x.shape != ref.shape or not bool(torch.isfinite(x).all()):
        return float("inf")
    return float((x.double() - ref).abs().max() / ref.abs().max().clamp_min(1e-30)) if ref.numel() else 0.0
