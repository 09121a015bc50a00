"""Training steps of DFAR in PyTorch on the CPU: ../dfar with every history shared by its candidates.

The batch is ready before the clock starts, and the model is ../dfar/model.py with its losses,
per-tensor clipping and Adam: ../training.py does the same on a GPU.
"""

import argparse
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import numpy as np
import protocol
import torch

import training
from dfar.model import Dfar, clip_each, loss


class Peer:
    def __init__(self, a, precision, compiled):
        torch.manual_seed(0)
        self.model = Dfar(a.items, a.events, a.width, a.heads)
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=1e-3, eps=1e-8, fused=True)
        self.loss = torch.compile(loss, dynamic=False) if compiled else loss
        self.data = training.batches(a, True, False, 4, torch.device("cpu"))
        self.bf16, self.steps = precision == "bf16", 0

    def both(self):
        batch = self.data[self.steps % len(self.data)]
        self.steps += 1
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            self.total, *_ = self.loss(self.model, *batch, training.WEIGHTS)
        self.total.backward()
        clip_each([p.grad for p in self.parameters], 2.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def results(self):
        return {"loss": np.array([float(self.total)], np.float32)}


def load(path):
    with open(path) as f:
        a = argparse.Namespace(**json.load(f))
    modes = [(mode, precision) for precision in ("f32", "bf16") for mode in ("eager", "compiled")]
    return {f"torch {mode} {p}": Peer(a, p, mode == "compiled") for mode, p in modes}, {}


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
protocol.serve(load)
