"""dfar as a Python user calls it: the package's operation on NumPy arrays."""

import os

import dfar
import numpy as np
import protocol
from safetensors.numpy import load_file


class Dfar:
    def __init__(self, x):
        self.args = [x[n] for n in ("q", "k", "v")]
        self.where = x["cu_seqlens"].astype(np.uint32), x["label"]
        self.do = x["do"]

    def forward(self):
        return dfar.fha(*self.args, *self.where, return_lse=True)

    def both(self):
        o, lse = self.forward()
        self.last = o, *dfar.fha_backward(self.do, *self.args, o, lse, *self.where)

    def results(self):
        return dict(zip(("o", "dq", "dk", "dv"), self.last))


def load(path):
    return {"dfar f32": Dfar(load_file(path))}, {}


dfar.set_threads(int(os.environ["OMP_NUM_THREADS"]))
protocol.serve(load)
