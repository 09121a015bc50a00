"""The PyTorch peers of ../fha on the CPU, eager and compiled."""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import memory
import protocol
import torch
from safetensors.torch import load_file

from fha import inputs
from fha.batch import Batch
from fha.engines import FlashCpu
from fha.naive import Naive
from fha.pairs import Pairs
from fha.sdpa import Sdpa


class Peer:
    def __init__(self, peer, x, batch):
        self.peer, self.x, self.batch = peer, x, batch

    def forward(self):
        inputs.forward(self.peer, self.x, self.batch, "joint")

    def both(self):
        self.last = inputs.forward_backward(self.peer, self.x, self.batch, "joint")

    def results(self):
        o, _, grads = self.last
        tensors = zip(("o", "dq", "dk", "dv"), (o, *grads))
        return {name: x.detach().float().contiguous().numpy() for name, x in tensors}


EAGER = "--eager" in sys.argv  # compiles nothing, for checks of many small cases


def peers():
    """name -> (peer, copies of the score matrix that it holds at once, forward and backward)"""
    eager, compiled = (lambda f: f), (lambda f: f if EAGER else torch.compile(f, dynamic=False))
    return {
        "torch eager": (Naive(eager, bucketed=True), 8),
        "torch compiled": (Naive(compiled, bucketed=True), 5),
        "torch sdpa": (Sdpa(compiled, bucketed=True), 6),
        "torch sdpa, one width": (Sdpa(compiled, bucketed=True, one_width=True), 2),
        "torch pairs": (Pairs(compiled, FlashCpu), 0),
    }


def load(path):
    t = load_file(path)
    lengths = t["cu_seqlens"].diff().tolist()
    batch, found, skipped = Batch(lengths, torch.device("cpu")), {}, {}
    scores = memory.score_bytes(lengths, t["q"].shape[1])
    for precision, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
        x = inputs.Inputs.__new__(inputs.Inputs)
        x.q, x.k, x.v, x.do = (t[n].to(dtype) for n in ("q", "k", "v", "do"))
        x.label = t["label"]
        for name, (peer, copies) in peers().items():
            name = f"{name} {precision}"
            if reason := memory.refusal(copies * scores):
                skipped[name] = reason
            else:
                found[name] = Peer(peer, x, batch)
    return found, skipped


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
torch._dynamo.config.recompile_limit = 256
torch._dynamo.config.accumulated_recompile_limit = 4096
protocol.serve(load)
