"""The golden cases: inputs, and the float64 results of an independent program."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

DTYPES = {"F64": "<f8", "F32": "<f4", "U32": "<u4", "U8": "u1"}
FOLDER = Path(os.environ.get("DFAR_GOLDEN", Path(__file__).resolve().parents[2] / "tests" / "golden"))

# The bounds of docs/mathematics.md: max|x - ref| / max|ref| of a tensor.
FORWARD, GRADIENT = 1e-5, 5e-5


def load(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The options of a case, and its tensors by name."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    case = json.loads(header.pop("__metadata__")["case"])
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        values = np.frombuffer(data[8 + length + start : 8 + length + end], DTYPES[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return case, tensors


def cases() -> list[Path]:
    """The files of the attention operation."""
    found = sorted(FOLDER.glob("fha_*.safetensors"))
    assert found, f"no cases in {FOLDER}"
    return found


def options(case: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `dfar.fha` for a case."""
    return {name: case[name] for name in ("normalization", "causal", "label_mask", "scale")}


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """max|x - ref| / max|ref|."""
    assert found.shape == expected.shape
    if expected.size == 0:
        return 0.0
    return float(np.abs(found.astype(np.float64) - expected).max() / (np.abs(expected).max() or 1.0))
