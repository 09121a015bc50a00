"""(b) scaled_dot_product_attention over concatenated key heads: T queries, T * K keys, and an
explicit staircase mask.

Keys are in token-major order (key j, head c at j * K + c), so query i sees the first (i + 1) * K.
"""
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import heads
from .batch import pad, unpad

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH}


def staircase(T, K, device):
    """[T, T * K] bool."""
    key = torch.arange(T * K, device=device) // K
    return key[None, :] <= torch.arange(T, device=device)[:, None]


class Sdpa:
    """`bucketed`: buckets of similar length and one mask [T, T * K] broadcast over the batch
    (padding needs no mask: it follows every real token). Otherwise the common form: the longest
    length, and a mask [B, 1, T, T * K]. `one_width` pads queries and keys with zeros to the width of
    the values: PyTorch's flash kernel for the CPU takes one width only."""
    exact, has_lse = True, False

    def __init__(self, compiler, bucketed, backend=None, one_width=False):
        self.glue, self.values = compiler(heads.queries_keys), compiler(heads.wide_values)
        self.one_width = one_width
        self.bucketed, self.forced, self.backend = bucketed, backend, backend or "unknown"
        self.masks = {}

    def mask(self, bucket, K, device):
        """The mask, cached between calls like FlexAttention's BlockMask."""
        key = (id(bucket), K)
        if key not in self.masks:
            T = bucket.shape[1]
            mask = staircase(T, K, device)
            if not self.bucketed:
                mask = mask[None, None] & bucket.valid.repeat_interleave(K, 1)[:, None, None, :]
            self.masks = {**self.masks, key: (bucket, mask)} if self.bucketed else {key: (bucket, mask)}
        return self.masks[key][1]

    def __call__(self, q, k, v, label, batch, normalization):
        g, H, d = q.shape[1] // 2, q.shape[1], q.shape[2]
        q, k = self.glue(q, k, label, normalization)
        v = self.values(v, label, normalization)
        if self.one_width:
            q, k = (F.pad(x, (0, v.shape[2] - d)) for x in (q, k))
        buckets, outs = batch.buckets(self.bucketed), []
        for b in buckets:
            query = pad(q, b).transpose(1, 2)
            key, value = (pad(x, b).flatten(1, 2)[:, None].expand(-1, g, -1, -1) for x in (k, v))
            outs.append(self.attend(query, key, value, self.mask(b, k.shape[1], q.device), d ** -0.5).transpose(1, 2))
        return unpad(outs, buckets, batch.tokens).unflatten(2, (H, d)), None

    def attend(self, q, k, v, mask, scale):
        if self.forced:
            with sdpa_kernel(BACKENDS[self.forced]):
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        if q.is_cuda and self.backend == "unknown":
            self.backend = "auto:" + SDPBackend(torch._fused_sdp_choice(q, k, v, mask)).name.lower()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
