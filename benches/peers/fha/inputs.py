"""Random inputs, golden cases, and the comparison: a peer with a wrong result is not timed."""
import functools
import glob
import json
import os

import torch

from . import reference
from .batch import Batch

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# max|x - ref| / max|ref| against float64 on the same rounded inputs. Wide enough for unfused 16-bit
# arithmetic, far too tight for a wrong mask, slot or scale.
TOLERANCE = {"f64": 1e-10, "f32": 1e-4, "f16": 1e-2, "bf16": 5e-2}


class Inputs:
    def __init__(self, batch, H, d, dtype, seed):
        draw = torch.Generator(device=batch.device).manual_seed(seed)
        random = lambda *shape: torch.randn(shape, generator=draw, device=batch.device).to(DTYPES[dtype])
        N = batch.tokens
        self.q, self.k, self.v = (random(N, H, d) for _ in range(3))
        self.do = random(N, H // 2, H, d)
        self.label = torch.randint(0, 2, (N,), generator=draw, device=batch.device, dtype=torch.uint8)

    @property
    def qkv(self):
        return self.q, self.k, self.v

    def gradient(self, peer):
        """The gradient of o; for a peer that adds the slots, their sum."""
        return self.do if peer.exact else self._summed

    @functools.cached_property
    def _summed(self):
        return self.do.sum(2, keepdim=True)

    @property
    def bytes(self):
        return sum(x.nbytes for x in (*self.qkv, self.do, self.label))


def forward(peer, x, batch, normalization):
    with torch.no_grad():
        return peer(*x.qkv, x.label, batch, normalization)


def forward_backward(peer, x, batch, normalization):
    """-> o, lse, (dq, dk, dv). New leaves, so that no gradient of an earlier call accumulates."""
    q, k, v = (t.detach().requires_grad_() for t in x.qkv)
    o, lse = peer(q, k, v, x.label, batch, normalization)
    return o, lse, torch.autograd.grad(o, (q, k, v), x.gradient(peer))


def errors(peer, x, batch, normalization, backward, sequences=None):
    """max|x - ref| / max|ref| of each output over the chosen sequences (all by default)."""
    o, lse, grads = forward_backward(peer, x, batch, normalization) if backward else \
        (*forward(peer, x, batch, normalization), ())
    got = {"o": o, **({} if lse is None else {"lse": lse}), **dict(zip(("dq", "dk", "dv"), grads))}
    if not all(bool(torch.isfinite(t).all()) for t in got.values()):
        return {"not finite": float("inf")}
    chosen = range(len(batch.lengths)) if sequences is None else sequences
    parts = [slice(batch.offsets[b], batch.offsets[b + 1]) for b in chosen if batch.lengths[b]]
    expected = [_reference(peer, x, part, normalization, backward) for part in parts]
    return {name: reference.relative_error(torch.cat([t[part].detach() for part in parts]), torch.cat([e[name] for e in expected]))
            for name, t in got.items()}


def _reference(peer, x, part, normalization, backward):
    leaves = [t[part].double().requires_grad_(backward) for t in x.qkv]
    o, lse = reference.fha_sequence(*leaves, x.label[part], normalization)
    shown = o if peer.exact else o.sum(2, keepdim=True)
    grads = torch.autograd.grad(shown, leaves, x.gradient(peer)[part].double()) if backward else ()
    return {"o": shown.detach(), "lse": lse.detach(), **dict(zip(("dq", "dk", "dv"), grads))}


SMALL = {"mixed": [20, 7, 1, 13], "uniform": [20] * 5, "around a tile": [63, 65, 128, 129], "empty sequences": [0, 5, 0, 0, 9, 0]}


def small_cases(H, d, dtype, device):
    """Yields (name, batch, inputs): random, and one batch for each single label."""
    for i, (name, lengths) in enumerate(SMALL.items()):
        batch = Batch(lengths, device)
        yield name, batch, Inputs(batch, H, d, dtype, seed=i)
    for label in (0, 1):
        batch = Batch([25, 4], device)
        x = Inputs(batch, H, d, dtype, seed=90 + label)
        x.label.fill_(label)
        yield f"all labels {label}", batch, x


def golden_cases(folder, device):
    """Yields (name, case, batch, tensors) of the golden FHA files that are causal with label mask,
    as the peers are."""
    from safetensors import safe_open
    for path in sorted(glob.glob(os.path.join(folder, "fha_*.safetensors"))):
        with safe_open(path, "pt") as f:
            case = json.loads(f.metadata()["case"])
            t = {name: f.get_tensor(name) for name in f.keys()}
        if case["causal"] and case["label_mask"] and case["heads"] % 2 == 0:
            yield os.path.basename(path)[:-12], case, Batch(case["lengths"], device), t


def golden_inputs(t, batch, dtype):
    x = Inputs.__new__(Inputs)
    x.q, x.k, x.v, x.do = (t[n].to(batch.device, DTYPES[dtype]) for n in ("q", "k", "v", "do"))
    x.label = t["label"].to(batch.device)
    return x
