"""The dense formula in JAX, jitted: einsum, mask, softmax over keys and key heads, einsum."""

import buckets
import jax
import jax.numpy as jnp
import memory
import numpy as np
import protocol
from safetensors.numpy import load_file

jax.config.update("jax_platforms", "cpu")


def dense(q, k, v):
    """q: [B, T, g, d], k, v: [B, T, H, d] -> o [B, T, g, H, d]"""
    s = (
        jnp.einsum("biad,bjcd->baicj", q, k, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )
    step = np.arange(q.shape[1])
    s = jnp.where(step[None, None, :] <= step[:, None, None], s, -jnp.inf)
    p = jnp.exp(s - jax.nn.logsumexp(s, axis=(3, 4), keepdims=True)).astype(q.dtype)
    return jnp.einsum("baicj,bjcd->biacd", p, v)


def operation(lengths, heads):
    """-> o of packed q, k, v [N, H, d] and label [N], for these lengths"""
    half, groups = heads // 2, buckets.buckets(lengths)
    whole = len(groups) == 1 and groups[0].valid.all()

    def fha(q, k, v, label):
        liked = (label == 1)[:, None, None]
        own = jnp.where(liked, q[:, half:], q[:, :half])
        serves = (jnp.arange(heads) >= half)[None, :, None] == liked
        v = jnp.where(serves, v, 0)
        if whole:
            split = lambda x: x.reshape(*groups[0].valid.shape, *x.shape[1:])
            return dense(split(own), split(k), split(v)).reshape(-1, half, heads, q.shape[2])
        o = jnp.zeros((q.shape[0], half, heads, q.shape[2]), q.dtype)
        for b in groups:
            part = dense(own[b.token], k[b.token], v[b.token])
            o = o.at[b.token[b.valid]].set(part[b.valid], unique_indices=True)
        return o

    return fha


class Peer:
    def __init__(self, x, dtype):
        self.args = [jnp.asarray(x[n], dtype) for n in ("q", "k", "v")]
        self.label, self.do = jnp.asarray(x["label"]), jnp.asarray(x["do"], dtype)
        lengths, heads = np.diff(x["cu_seqlens"]).tolist(), x["q"].shape[1]
        fha = operation(lengths, heads)

        def both(q, k, v, label, do):
            o, pull = jax.vjp(lambda q, k, v: fha(q, k, v, label), q, k, v)
            return o, *pull(do)

        self._forward, self._both = jax.jit(fha), jax.jit(both)

    def forward(self):
        jax.block_until_ready(self._forward(*self.args, self.label))

    def both(self):
        self.last = jax.block_until_ready(self._both(*self.args, self.label, self.do))

    def results(self):
        return {n: np.asarray(x, np.float32) for n, x in zip(("o", "dq", "dk", "dv"), self.last)}


def load(path):
    x = load_file(path)
    scores = memory.score_bytes(np.diff(x["cu_seqlens"]).tolist(), x["q"].shape[1])
    found, skipped = {}, {}
    for precision, dtype in (("f32", jnp.float32), ("bf16", jnp.bfloat16)):
        name = f"jax jitted {precision}"
        if reason := memory.refusal(5 * scores):
            skipped[name] = reason
        else:
            found[name] = Peer(x, dtype)
    return found, skipped


protocol.serve(load)
