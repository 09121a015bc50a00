"""(c) FlexAttention over concatenated key heads of the packed batch. The mask_mod combines the
document mask and the causal staircase.

Query i of the packed batch attends to key r = j * K + c if tokens i and j share a sequence and
j <= i. The BlockMask is built from cu_seqlens in a few small tensor operations; `create_block_mask`
would evaluate the mask on every pair of 300,000 tokens. `cold` rebuilds it in every call.
"""
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from . import heads

BLOCK = 128


def mask_mod(document, K):
    def visible(b, h, q_idx, kv_idx):
        token = kv_idx // K
        return (document[q_idx] == document[token]) & (token <= q_idx)
    return visible


def documents(batch):
    """[N]: the sequence of every token."""
    lengths = batch.cu_seqlens.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=batch.device, dtype=torch.int32), lengths,
                                   output_size=batch.tokens)


def block_mask(batch, K):
    """The BlockMask of the whole packed batch, with full and partial blocks separate."""
    N, device = batch.tokens, batch.device
    document = documents(batch)
    rows, cols = -(-N // BLOCK), -(-N * K // BLOCK)
    first = torch.arange(rows, device=device) * BLOCK
    last = (first + BLOCK - 1).clamp(max=N - 1)
    start = batch.cu_seqlens.long()[document]      # first token of every token's sequence
    # A row of blocks sees the keys from the start of its first token's sequence to its last token.
    low, high = start[first] * K // BLOCK, (last * K + K - 1) // BLOCK
    # A block is full if all queries of the row are in one sequence, and all keys too, none after
    # the first query.
    one = document[first] == document[last]
    full_low = -(-(start[last] * K) // BLOCK)
    full_high = (first + 1) * K // BLOCK - 1
    full_high = torch.where(one & ((last - first + 1) == BLOCK), full_high, full_low - 1)
    full_count = (full_high - full_low + 1).clamp(min=0)
    col = torch.arange(cols, device=device)
    full = full_low[:, None] + col
    # Partial blocks are low .. high without the full range, which the index skips.
    partial = low[:, None] + col
    partial = torch.where(partial >= full_low[:, None], partial + full_count[:, None], partial)
    shape = lambda x: x.to(torch.int32)[None, None]
    return BlockMask.from_kv_blocks(
        shape(high - low + 1 - full_count), shape(partial.clamp(max=cols - 1)).contiguous(),
        shape(full_count), shape(full.clamp(max=cols - 1)).contiguous(),
        BLOCK_SIZE=BLOCK, mask_mod=mask_mod(document, K), seq_lengths=(N, N * K))


class Flex:
    exact, has_lse, backend = True, True, "triton"

    def __init__(self, compiler, cold=False):
        self.glue, self.values = compiler(heads.queries_keys), compiler(heads.wide_values)
        self.attend = compiler(flex_attention)
        self.cold, self.kept = cold, (None, None, None)

    def __call__(self, q, k, v, label, batch, normalization):
        H, d = q.shape[1:]
        q, k = self.glue(q, k, label, normalization)
        v, K = self.values(v, label, normalization), k.shape[1]
        if self.cold:
            mask = block_mask(batch, K)
        else:
            if self.kept[0] is not batch or self.kept[1] != K:
                self.kept = batch, K, block_mask(batch, K)
            mask = self.kept[2]
        o, aux = self.attend(q.transpose(0, 1)[None], k.flatten(0, 1)[None, None], v.flatten(0, 1)[None, None],
                             block_mask=mask, enable_gqa=q.shape[1] > 1, return_aux=AuxRequest(lse=True))
        return o[0].transpose(0, 1).unflatten(2, (H, d)), aux.lse[0].transpose(0, 1)
