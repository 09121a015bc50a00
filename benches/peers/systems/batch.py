"""The batches that dfar's worker wrote (baselines/examples/peer.rs), padded. Needs NumPy only."""

import dataclasses
import json
from dataclasses import dataclass

import numpy as np


@dataclass
class Batch:
    """B histories padded on the right to T events, G groups (prefixes) of C candidates each. Items are
    indices into `touched`."""

    touched: np.ndarray  # [U] rows of the item table that the batch reads
    items: np.ndarray  # [B, T], 0 for padding
    lengths: np.ndarray  # [B]
    history: np.ndarray  # [G] the history of each group
    length: np.ndarray  # [G] the length of its prefix, 0 to T
    pair: np.ndarray  # [P] the candidates of all histories, those of a history once
    candidate: np.ndarray  # [G, C] indices into `pair`
    target: np.ndarray  # [G, C]

    def __post_init__(self):
        T = self.items.shape[1]
        self.seen = (self.length > 0).astype(np.float32)[:, None]
        # The place of each group's last event in [B * T]; any for an empty prefix.
        self.last = np.where(self.length > 0, self.history * T + self.length - 1, 0)


def pack(x):
    """From the packed tensors of one batch."""
    lengths = np.diff(x["cu_seqlens"])
    items, T = x["item"], max(1, int(lengths.max()))
    touched, place = np.unique(np.concatenate([items, x["pair_item"]]), return_inverse=True)
    padded = np.zeros((len(lengths), T), np.int64)
    padded[np.arange(T) < lengths[:, None]] = place[: len(items)]
    sizes = np.diff(x["row_offsets"])
    if (sizes != sizes[0]).any():
        raise ValueError("the groups differ in their number of candidates")
    return Batch(
        touched,
        padded,
        lengths,
        np.repeat(np.arange(len(lengths)), np.diff(x["group_offsets"])),
        x["group_length"],
        place[len(items) :],
        x["row_pair"].reshape(-1, sizes[0]),
        x["target"].reshape(-1, sizes[0]),
    )


def by_instance(b):
    """The usual form: every candidate with its own copy of the history, cut to the prefix."""
    C, T = b.target.shape[1], b.items.shape[1]
    lengths, rows = np.repeat(b.length, C), np.arange(b.target.size)
    items = np.where(np.arange(T) < lengths[:, None], b.items[np.repeat(b.history, C)], 0)
    return dataclasses.replace(
        b,
        items=items,
        lengths=lengths,
        history=rows,
        length=lengths,
        pair=b.pair[b.candidate.ravel()],
        candidate=rows[:, None],
        target=b.target.reshape(-1, 1),
    )


def read(path):
    """-> options, parameters by name, batches"""
    from safetensors import safe_open

    with safe_open(path, "np") as f:
        options = json.loads(f.metadata()["options"])
        tensors = {name: f.get_tensor(name) for name in f.keys()}
    of = lambda prefix: {n[len(prefix) :]: x for n, x in tensors.items() if n.startswith(prefix)}
    whole = lambda x: x.astype(np.int64) if x.dtype == np.uint32 else x
    packed = [{n: whole(x) for n, x in of(f"{i}.").items()} for i in range(options["batches"])]
    return options, of("param."), [pack(x) for x in packed]
