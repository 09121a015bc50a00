"""Padding by length for libraries without packed sequences, as ../fha/batch.py does for PyTorch."""

from dataclasses import dataclass

import numpy as np

EDGES = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass
class Bucket:
    """Sequences padded on the right to one length: the packed row of each place (any row for
    padding), and whether the place is a token."""

    token: np.ndarray  # [B, T]
    valid: np.ndarray  # [B, T] bool


def buckets(lengths):
    """One bucket if all lengths agree, else one for each edge in use."""
    lengths = np.asarray(lengths)
    starts, longest = np.cumsum(lengths) - lengths, int(lengths.max())
    edges = [] if (lengths == longest).all() else [e for e in EDGES if e < longest]
    found, low = [], 0
    for edge in [*edges, longest]:
        members = (low < lengths) & (lengths <= edge)
        if members.any():
            step = np.arange(edge)
            valid = step < lengths[members][:, None]
            start = starts[members][:, None]
            found.append(Bucket(np.where(valid, start + step, start), valid))
        low = edge
    return found
