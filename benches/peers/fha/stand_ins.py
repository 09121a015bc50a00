"""CPU stand-ins with the signatures, layouts and contracts of PyTorch's GPU attention operations.

With them, `--check` runs every line of engines.py and pairs.py without a GPU. Before each timing,
the real operations are checked on the GPU. Backward computes p from the given lse and delta from
the given out, as the libraries do.
"""
import torch


def _wide(*tensors):
    return [t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors]


def _scores(q, k, scale):
    s = torch.einsum("...id,...jd->...ij", q, k) * scale
    return s.masked_fill(~torch.ones(s.shape[-2:], dtype=torch.bool, device=s.device).tril(), -torch.inf)


def _forward(q, k, v, scale):
    """[..., T, w] -> out, lse [..., T]"""
    dtype = q.dtype
    q, k, v = _wide(q, k, v)
    s = _scores(q, k, scale)
    lse = s.logsumexp(-1)
    return ((s - lse[..., None]).exp() @ v).to(dtype), lse


def _backward(do, q, k, v, out, lse, scale):
    dtype = q.dtype
    do, q, k, v, out = _wide(do, q, k, v, out)
    p = (_scores(q, k, scale) - lse[..., None]).exp()
    ds = p * (do @ v.mT - (do * out).sum(-1, keepdim=True)) * scale
    return [x.to(dtype) for x in (ds @ k, ds.mT @ q, p.mT @ do)]


def _spans(cu):
    return [slice(a, b) for a, b in zip(cu.tolist(), cu.tolist()[1:]) if b > a]


def _flash_attention_forward(q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, *, return_debug_mask, scale):
    assert causal and dropout == 0.0 and q.shape[2] == k.shape[2] == v.shape[2]
    times = q.shape[1] // k.shape[1]
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], q.shape[0], dtype=torch.promote_types(q.dtype, torch.float32))
    for part in _spans(cu_q):
        heads = [x[part].transpose(0, 1) for x in (q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))]
        o, lse[:, part] = _forward(*heads, scale)
        out[part] = o.transpose(0, 1)
    return out, lse, torch.zeros(2), torch.zeros(()), torch.zeros(())


def _flash_attention_backward(do, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, rng, unused, *, scale):
    assert lse.is_contiguous() and all(x.shape[2] == q.shape[2] for x in (do, k, v, out))
    times = q.shape[1] // k.shape[1]
    dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)
    for part in _spans(cu_q):
        heads = [x[part].transpose(0, 1) for x in (do, q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), out)]
        for whole, g in zip((dq, dk, dv), _backward(*heads, lse[:, part], scale)):
            whole[part] = g.transpose(0, 1)
    return dq, *(x.unflatten(1, (-1, times)).sum(2) for x in (dk, dv))


def _efficient_attention_forward(q, k, v, bias, cu_q, cu_k, max_q, max_k, dropout, mask_type, want_lse, *, scale):
    assert q.shape[0] == 1 and q.shape[2] == k.shape[2] == v.shape[2] and mask_type == 1
    out, parts = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype), _spans(cu_q)
    lse = torch.full((len(cu_q) - 1, q.shape[2], -(-max_q // 32) * 32), torch.inf,
                     dtype=torch.promote_types(q.dtype, torch.float32))
    rows = [b for b, n in enumerate(cu_q.diff().tolist()) if n]
    for b, part in zip(rows, parts):
        o, stats = _forward(*(x[0, part].transpose(0, 1) for x in (q, k, v)), scale)
        out[0, part], lse[b, :, :stats.shape[1]] = o.transpose(0, 1), stats
    return out, lse, torch.zeros(()), torch.zeros(()), max_q, max_k


def _efficient_attention_backward(do, q, k, v, bias, out, cu_q, cu_k, max_q, max_k, lse, dropout, seed, offset, mask_type,
                                  bias_grad, *, scale):
    grads = [torch.empty_like(x) for x in (q, k, v)]
    rows = [b for b, n in enumerate(cu_q.diff().tolist()) if n]
    for b, part in zip(rows, _spans(cu_q)):
        heads = [x[0, part].transpose(0, 1) for x in (do, q, k, v, out)]
        for whole, g in zip(grads, _backward(*heads, lse[b, :, :part.stop - part.start], scale)):
            whole[0, part] = g.transpose(0, 1)
    return *grads, torch.zeros(())


def _scaled_dot_product_cudnn_attention(q, k, v, bias, want_lse, dropout, causal, debug, *, scale):
    assert causal and q.shape[1] == k.shape[1] == v.shape[1]
    out, lse = _forward(q, k, v, scale)
    zero = torch.zeros(())
    return out, lse[..., None], None, None, q.shape[2], k.shape[2], zero, zero, None


def _scaled_dot_product_cudnn_attention_backward(do, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout,
                                                 causal, *, scale):
    assert lse.dim() == 4 and lse.is_contiguous()
    return _backward(do, q, k, v, out, lse[..., 0], scale)
