"""Training steps of SASRec and GRU4REC in PyTorch on the batches that dfar's worker wrote: ../systems.

    worker_systems.py                  a worker
    worker_systems.py reference IN OUT writes the results in float64
"""

import contextlib
import ctypes
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import protocol
import torch
from safetensors.numpy import save_file

from systems.batch import read
from systems.trainer import Trainer, reference


class Peer:
    def __init__(self, trainer):
        self.trainer, self.found = trainer, None

    def both(self):
        """A step on each batch; first, with the initial parameters, what is checked."""
        if self.found is None:
            self.found = self.trainer.check()
        else:
            self.trainer.steps()

    def results(self):
        return self.found


def keep_memory():
    """Lets glibc use freed memory again instead of returning it to the system, as PyTorch's tuning
    guide advises (with other allocators): tensors of a step are above its limit."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        for option in (-3, -1):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            library.mallopt(option, 1 << 30)


FORMS = {
    "sasrec": {
        "torch eager f32": {},
        "torch compiled f32": dict(compiled=True, split_tower=False),
        "torch instances f32": dict(instances=True, split_tower=False),
    },
    "gru4rec": {
        "torch nn.GRU f32": dict(cell="library"),
        "torch own GRU f32": {},
        "torch compiled f32": dict(compiled=True, split_tower=False),
    },
}


def load(path):
    options, parameters, batches = read(path)
    found, skipped = {}, {}
    for name, form in FORMS[options["system"]].items():
        if "instances" in form and max(b.target.size for b in batches) > 5000:
            skipped[name] = "it takes seconds for a step"
        else:
            found[name] = Peer(Trainer(options, parameters, batches, **form))
    return found, skipped


torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if sys.argv[1:2] == ["reference"]:
    save_file(reference(*read(sys.argv[2])), sys.argv[3])
else:
    keep_memory()
    protocol.serve(load)
