"""A packed batch (dfar's layout), and padded or length-bucketed views for dense operations.

Packed tensors are [N, heads, width]; sequence b owns rows cu_seqlens[b] .. cu_seqlens[b+1].
All of this depends only on the lengths. It is built once per batch, outside the timed region, which
favours the peers.
"""
from dataclasses import dataclass

import torch

BUCKET_EDGES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384)


@dataclass
class Bucket:
    """Sequences padded on the right to one length. `token[b, t]` is the packed row (for padding,
    any valid row)."""
    token: torch.Tensor      # [B, T] int64
    valid: torch.Tensor      # [B, T] bool
    rows: torch.Tensor       # [n] int64: packed rows of the real tokens, in the order of `valid`
    place: torch.Tensor      # [n] int64: their positions in the flattened [B * T]
    whole: bool              # no padding and every token of the batch: padding is a reshape

    @property
    def shape(self):
        return self.token.shape


class Batch:
    def __init__(self, lengths, device):
        self.lengths = [int(n) for n in lengths]
        self.tokens = sum(self.lengths)
        self.max_length = max(self.lengths)
        offsets = torch.tensor([0, *self.lengths]).cumsum(0)
        self.offsets = offsets.tolist()
        self.cu_seqlens = offsets.to(device=device, dtype=torch.int32)
        self.device = device
        self.uniform = len(set(self.lengths)) == 1
        self._cache = {}

    def buckets(self, bucketed):
        """One bucket of the longest length, or one per edge in use; none for length 0."""
        if bucketed not in self._cache:
            edges = [e for e in BUCKET_EDGES if e < self.max_length] if bucketed and not self.uniform else []
            groups, low = [], 0
            for edge in [*edges, self.max_length]:
                members = [b for b, n in enumerate(self.lengths) if low < n <= edge]
                if members:
                    groups.append(self._bucket(members, max(self.lengths[b] for b in members) if not edges else edge))
                low = edge
            self._cache[bucketed] = groups
        return self._cache[bucketed]

    def _bucket(self, members, T):
        start = torch.tensor([self.offsets[b] for b in members])
        length = torch.tensor([self.lengths[b] for b in members])
        step = torch.arange(T)
        valid = step[None, :] < length[:, None]
        token = torch.where(valid, start[:, None] + step, start[:, None])
        rows, place = token[valid], valid.flatten().nonzero().squeeze(1)
        whole = bool(valid.all()) and rows.numel() == self.tokens and members == list(range(len(self.lengths)))
        move = lambda x: x.to(self.device)
        return Bucket(move(token), move(valid), move(rows), move(place), whole)


class _Pad(torch.autograd.Function):
    """Packed rows -> [B, T, ...]. Gradients of padding are dropped, so backward is a gather too."""
    @staticmethod
    def forward(ctx, x, bucket):
        ctx.bucket, ctx.rows = bucket, x.shape[0]
        return x[bucket.token]

    @staticmethod
    def backward(ctx, grad):
        b = ctx.bucket
        out = grad.new_zeros(ctx.rows, *grad.shape[2:])
        return out.index_copy_(0, b.rows, grad.flatten(0, 1)[b.place]), None


def pad(x, bucket):
    """[N, ...] -> [B, T, ...]: a view when the whole batch has one length."""
    return x.unflatten(0, tuple(bucket.shape)) if bucket.whole else _Pad.apply(x, bucket)


def unpad(parts, buckets, tokens):
    """[B, T, ...] of each bucket -> [N, ...]."""
    if buckets[0].whole:
        return parts[0].flatten(0, 1)
    packed = parts[0].new_zeros(tokens, *parts[0].shape[2:])
    for x, b in zip(parts, buckets):
        packed = packed.index_copy(0, b.rows, x.flatten(0, 1)[b.place])
    return packed


def uniform_lengths(T, tokens):
    return [T] * (tokens // T)


def skewed_lengths(tokens, seed=0, longest=1024, median=60.0):
    """Log-normal lengths (sigma 1), clamped to 1..longest; their sum is exactly `tokens`."""
    draw = torch.Generator().manual_seed(seed)
    lengths = []
    while tokens:
        n = int((torch.randn((), generator=draw) + torch.tensor(median).log()).exp().clamp(1, longest))
        lengths.append(min(n, tokens))
        tokens -= lengths[-1]
    return lengths
