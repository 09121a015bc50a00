"""Selects each token's heads by its label: the pointwise work around the attention of every peer.

Only the heads of a token's own group matter, so peers have `g = H/2` query heads and `K` key heads:
K = g own heads for Masked, K = H for Joint, whose denominator includes all key heads. All functions
map packed tensors to packed tensors, and torch.compile can fuse each into a single pass.
"""
import torch


def own(x, label):
    """[N, H, d] -> [N, H/2, d]: the heads of each token's own group."""
    g = x.shape[1] // 2
    return torch.where(label.bool()[:, None, None], x[:, g:], x[:, :g])


def to_own(x, label):
    """The transpose of `own`: [N, H/2, d] -> [N, H, d], zero in the other group."""
    positive = label.bool()[:, None, None]
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.cat([torch.where(positive, zero, x), torch.where(positive, x, zero)], 1)


def keep_own(x, label):
    """[N, H, d] with the heads of the other group set to zero."""
    group = torch.arange(x.shape[1], device=x.device) >= x.shape[1] // 2
    return torch.where((group[None] == label.bool()[:, None])[:, :, None], x, torch.zeros((), dtype=x.dtype, device=x.device))


def by_label(x, label):
    """[N, g, d] -> [N, g, 2 * d]: values in the half of their token's label, zeros in the other."""
    positive = label.bool()[:, None, None]
    zero = torch.zeros((), dtype=x.dtype, device=x.device)
    return torch.cat([torch.where(positive, zero, x), torch.where(positive, x, zero)], 2)


def queries_keys(q, k, label, normalization):
    """-> queries [N, g, d], keys [N, K, d]."""
    return own(q, label), own(k, label) if normalization == "masked" else k


def pair_values(v, label, normalization):
    """Values for attention by pairs of heads: [N, g, 2d] by label (Masked) or [N, H, d] (Joint)."""
    return by_label(own(v, label), label) if normalization == "masked" else keep_own(v, label)


def pairs_to_slots(x, normalization):
    """[..., g queries, K keys, width of pair_values] -> [..., g, H, d]: one slot per key head."""
    if normalization == "joint":
        return x
    g, K, two_d = x.shape[-3:]
    return x.unflatten(-1, (2, two_d // 2)).transpose(-3, -2).flatten(-3, -2)


def slots_to_pairs(x, normalization):
    """The inverse of `pairs_to_slots`."""
    if normalization == "joint":
        return x
    return x.unflatten(-2, (2, x.shape[-2] // 2)).transpose(-3, -2).flatten(-2)


def wide_values(v, label, normalization):
    """Values for attention over concatenated key heads, which sums over the heads: every key head
    writes its own slot of a row of H * d, so that the sum keeps the pairs separate.
    -> [N, K, H * d]."""
    x = pair_values(v, label, normalization)
    K = x.shape[1]
    eye = torch.eye(K, dtype=x.dtype, device=x.device)
    return pairs_to_slots(x[:, :, None] * eye[None, :, :, None], normalization).flatten(2)
