"""Random inputs, golden cases, and the gate: a peer that is wrong is not timed."""
import glob
import json
import os

import torch

from . import reference
from .batch import Batch

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
# max|x - ref| / max|ref| against float64 on the same rounded inputs. Wide enough for unfused 16-bit arithmetic,
# far too tight for a wrong mask, slot or scale.
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

    @property
    def bytes(self):
        return sum(x.nbytes for x in (*self.qkv, self.do, self.label))


def forward(peer, x, batch, normalization):
    with torch.no_grad():
        return peer(*x.qkv, x.label, batch, normalization)


def forward_backward(peer, x, batch, normalization):
    """-> o, lse, (dq, dk, dv). Fresh leaves, so that nothing of an earlier call is accumulated or kept."""
    q, k, v = (t.detach().requires_grad_() for t in x.qkv)
    o, lse = peer(q, k, v, x.label, batch, normalization)
    do = x.do if peer.exact else x.do.sum(2, keepdim=True)
    return o, lse, torch.autograd.grad(o, (q, k, v), do)


def errors(peer, x, batch, normalization, backward, sequences=None):
    """Largest relative error of each output on the chosen sequences (all by default)."""
    got = forward_backward(peer, x, batch, normalization) if backward else (*forward(peer, x, batch, normalization), ())
    o, lse, grads = got
    worst = {}
    for b in range(len(batch.lengths)) if sequences is None else sequences:
        part = slice(batch.offsets[b], batch.offsets[b + 1])
        if batch.lengths[b] == 0:
            continue
        leaves = [t[part].double().requires_grad_(backward) for t in x.qkv]
        ref_o, ref_lse = reference.fha_sequence(*leaves, x.label[part], normalization)
        do = x.do[part].double()
        if not peer.exact:
            do = do.sum(2, keepdim=True).expand_as(ref_o)
        ref_grads = torch.autograd.grad(ref_o, leaves, do) if backward else ()
        shown = ref_o if peer.exact else ref_o.sum(2, keepdim=True)
        pairs = {"o": (o, shown), **({"lse": (lse, ref_lse)} if lse is not None else {}),
                 **{n: (a, r) for n, a, r in zip(("dq", "dk", "dv"), grads, ref_grads)}}
        for name, (a, ref) in pairs.items():
            worst[name] = max(worst.get(name, 0.0), reference.relative_error(a[part].detach(), ref.detach()))
    complete = all(bool(torch.isfinite(a).all()) for a in (o, *grads))
    return worst if complete else {**worst, "not finite": float("inf")}


SMALL = {"mixed": [20, 7, 1, 13], "paper": [20] * 5, "around a tile": [63, 64, 65, 127, 128, 129], "long": [300, 2],
         "empty sequences": [0, 5, 0, 0, 9, 0]}


def small_cases(H, d, dtype, device):
    """(name, batch, inputs): random, with one batch of each single label."""
    for i, (name, lengths) in enumerate(SMALL.items()):
        batch = Batch(lengths, device)
        yield name, batch, Inputs(batch, H, d, dtype, seed=i)
    for label in (0, 1):
        batch = Batch([25, 4], device)
        x = Inputs(batch, H, d, dtype, seed=90 + label)
        x.label.fill_(label)
        yield f"all labels {label}", batch, x


def golden_cases(folder, device):
    """(name, case, batch, tensors) of every golden FHA file that peers can express: causal, label mask on."""
    from safetensors import safe_open
    for path in sorted(glob.glob(os.path.join(folder, "fha_*.safetensors"))):
        with safe_open(path, "pt") as f:
            case = json.loads(f.metadata()["case"])
            t = {name: f.get_tensor(name) for name in f.keys()}
        if case["causal"] and case["label_mask"]:
            yield os.path.basename(path)[:-12], case, Batch(case["lengths"], device), t


def golden_inputs(t, batch, dtype):
    x = Inputs.__new__(Inputs)
    x.q, x.k, x.v, x.do = (t[n].to(batch.device, DTYPES[dtype]) for n in ("q", "k", "v", "do"))
    x.label = t["label"].to(batch.device)
    return x
