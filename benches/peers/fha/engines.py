"""Plain causal attention with its logsumexp, forward and backward, from PyTorch's own libraries.

One interface over packed tensors, so that pairs.py does not depend on the library:

    forward(q [N, h, w], k [N, K, w], v [N, K, w], batch, scale)
        -> out [N, h, w], lse [h, N] float32, saved
    backward(do, q, k, v, out, lse, saved, batch, scale) -> dq, dk, dv

Query head i attends to key head i // (h // K). `backward` computes p = exp(scale * q.k - lse) and
delta = <do, out> from the given `out` and `lse`, so the caller may pass those of a larger softmax.
"""
import torch

from .batch import pad, unpad

aten = torch.ops.aten


def _repeat(x, times):
    return x if times == 1 else x.repeat_interleave(times, 1)


def _sum_groups(x, times):
    return x if times == 1 else x.unflatten(1, (-1, times)).sum(2)


class FlashVarlen:
    """FlashAttention-2 in PyTorch, the kernel of torch.nn.attention.varlen.varlen_attn."""
    backend = "flash2 varlen"

    @staticmethod
    def forward(q, k, v, batch, scale):
        cu, n = batch.cu_seqlens, batch.max_length
        out, lse, rng, unused, _ = aten._flash_attention_forward(
            q, k, v, cu, cu, n, n, 0.0, True, return_debug_mask=False, scale=scale)
        return out, lse, (rng, unused)

    @staticmethod
    def backward(do, q, k, v, out, lse, saved, batch, scale):
        cu, n = batch.cu_seqlens, batch.max_length
        return aten._flash_attention_backward(do, q, k, v, out, lse, cu, cu, n, n, 0.0, True, *saved, scale=scale)


class EfficientVarlen:
    """The memory-efficient (CUTLASS) kernel: the only one of these that takes float32."""
    backend = "efficient varlen"
    CAUSAL_FROM_TOP_LEFT = 1

    @classmethod
    def forward(cls, q, k, v, batch, scale):
        cu, n, times = batch.cu_seqlens, batch.max_length, q.shape[1] // k.shape[1]
        out, lse, seed, offset, *_ = aten._efficient_attention_forward(
            q[None], _repeat(k, times)[None], _repeat(v, times)[None], None, cu, cu, n, n, 0.0,
            cls.CAUSAL_FROM_TOP_LEFT, True, scale=scale)
        row, column = cls._places(batch)
        return out[0], lse[row, :, column].t().contiguous(), (seed, offset, lse.shape)

    @classmethod
    def backward(cls, do, q, k, v, out, lse, saved, batch, scale):
        cu, n, times = batch.cu_seqlens, batch.max_length, q.shape[1] // k.shape[1]
        seed, offset, shape = saved
        # The kernel pads rows past a sequence with +inf.
        padded = lse.new_full(shape, torch.inf)
        row, column = cls._places(batch)
        padded[row, :, column] = lse.t()
        dq, dk, dv, _ = aten._efficient_attention_backward(
            do[None], q[None], _repeat(k, times)[None], _repeat(v, times)[None], None, out[None], cu, cu, n, n, padded,
            0.0, seed, offset, cls.CAUSAL_FROM_TOP_LEFT, False, scale=scale)
        return dq[0], _sum_groups(dk[0], times), _sum_groups(dv[0], times)

    @staticmethod
    def _places(batch):
        """Sequence and position of every token, for the kernel's lse [sequences, heads,
        positions]."""
        if "places" not in batch._cache:
            row = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
            column = torch.arange(batch.tokens) - torch.tensor(batch.offsets)[row]
            batch._cache["places"] = row.to(batch.device), column.to(batch.device)
        return batch._cache["places"]


class CudnnDense:
    """cuDNN's fused attention on length-bucketed batches; equal lengths need no padding or copy."""
    backend = "cudnn dense causal"

    @staticmethod
    def forward(q, k, v, batch, scale):
        times, buckets, outs, lses, saved = q.shape[1] // k.shape[1], batch.buckets(True), [], [], []
        for b in buckets:
            args = [pad(x, b).transpose(1, 2) for x in (q, _repeat(k, times), _repeat(v, times))]
            out, lse, cu_q, cu_k, n_q, n_k, seed, offset, _ = aten._scaled_dot_product_cudnn_attention(
                *args, None, True, 0.0, True, False, scale=scale)
            outs.append(out.transpose(1, 2))
            lses.append(lse.reshape(out.shape[:3]).transpose(1, 2))
            saved.append((lse.shape, seed, offset, cu_q, cu_k, n_q, n_k))
        return unpad(outs, buckets, batch.tokens), unpad(lses, buckets, batch.tokens).t().contiguous(), saved

    @staticmethod
    def backward(do, q, k, v, out, lse, saved, batch, scale):
        times, buckets, grads = q.shape[1] // k.shape[1], batch.buckets(True), []
        for b, (shape, seed, offset, cu_q, cu_k, n_q, n_k) in zip(buckets, saved):
            grad = pad(do, b) if b.whole else pad(do, b) * b.valid[:, :, None, None].to(do.dtype)
            query, key, value, o = (pad(x, b).transpose(1, 2) for x in (q, _repeat(k, times), _repeat(v, times), out))
            stats = pad(lse.t(), b)
            # Sets p = 0 for padded queries, which have no softmax and could overflow.
            if not b.whole:
                stats = torch.where(b.valid[:, :, None], stats, 1e30)
            stats = stats.transpose(1, 2).contiguous().reshape(shape)
            grads.append([x.transpose(1, 2) for x in aten._scaled_dot_product_cudnn_attention_backward(
                grad.transpose(1, 2), query, key, value, o, stats, seed, offset, None, cu_q, cu_k, n_q, n_k, 0.0, True,
                scale=scale)])
        dq, dk, dv = (unpad(list(parts), buckets, batch.tokens) for parts in zip(*grads))
        return dq, _sum_groups(dk, times), _sum_groups(dv, times)


class FlashCpu:
    """The flash kernel of scaled_dot_product_attention on the CPU, on length-bucketed batches."""
    backend = "flash cpu"

    @staticmethod
    def forward(q, k, v, batch, scale):
        times, buckets, outs, lses = q.shape[1] // k.shape[1], batch.buckets(True), [], []
        for b in buckets:
            args = [pad(x, b).transpose(1, 2) for x in (q, _repeat(k, times), _repeat(v, times))]
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args, 0.0, True, scale=scale)
            outs.append(out.transpose(1, 2))
            lses.append(lse.transpose(1, 2))
        return unpad(outs, buckets, batch.tokens), unpad(lses, buckets, batch.tokens).t(), None

    @staticmethod
    def backward(do, q, k, v, out, lse, saved, batch, scale):
        times, buckets, grads = q.shape[1] // k.shape[1], batch.buckets(True), []
        for b in buckets:
            grad = pad(do, b) if b.whole else pad(do, b) * b.valid[:, :, None, None].to(do.dtype)
            args = [pad(x, b).transpose(1, 2) for x in (q, _repeat(k, times), _repeat(v, times), out)]
            stats = pad(lse.t(), b)
            # As for cuDNN.
            if not b.whole:
                stats = torch.where(b.valid[:, :, None], stats, 1e30)
            grads.append([x.transpose(1, 2) for x in torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad.transpose(1, 2), *args, stats.transpose(1, 2), 0.0, True, scale=scale)])
        dq, dk, dv = (unpad(list(parts), buckets, batch.tokens) for parts in zip(*grads))
        return dq, _sum_groups(dk, times), _sum_groups(dv, times)


def without_gpu():
    """Replaces the GPU's operations by the CPU stand-ins, for checks."""
    global aten
    from . import stand_ins
    aten = stand_ins


ENGINES = {"flash": FlashVarlen, "cudnn": CudnnDense, "efficient": EfficientVarlen, "flash_cpu": FlashCpu}
