"""`fha_cuda` on the CUDA driver for tests (docs/testing-cuda.md), which runs kernels on the CPU.

Runs after `tests/driver/run true`; otherwise it is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import ctypes
import sys
import dfar
import numpy as np

cuda = ctypes.CDLL("libcuda.so.1")
word, size, place = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
for name, *types in [
    ("cuCtxSetCurrent", word), ("cuMemAllocAsync", place, size, word), ("cuMemFreeAsync", word, word),
    ("cuMemcpyHtoDAsync_v2", word, place, size, word),
    ("cuMemcpyDtoHAsync_v2", place, word, size, word),
]:
    getattr(cuda, name).argtypes = types

def call(name, *arguments):
    assert getattr(cuda, name)(*arguments) == 0, name

call("cuInit", 0)
context, made = word(), word()
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
call("cuCtxSetCurrent", context.value)
call("cuStreamCreate", ctypes.byref(made), 1)
stream = made.value if sys.argv[1] == "made" else 0

def empty(values):
    at = word()
    call("cuMemAllocAsync", ctypes.byref(at), 4 * values, stream)
    return at.value

def to_gpu(x):
    at = empty(x.size)
    call("cuMemcpyHtoDAsync_v2", at, x.ctypes.data, x.nbytes, stream)
    return at

def error(at, expected):
    x = np.empty_like(expected)
    call("cuMemcpyDtoHAsync_v2", x.ctypes.data, at, x.nbytes, stream)
    return np.abs(x - expected).max() / np.abs(expected).max()

random = np.random.default_rng(0)
qkv = random.standard_normal((3, 40, 4, 8), dtype=np.float32)
indices = np.array([0, 10, 40]), random.integers(0, 2, 40)
o, lse = dfar.fha(*qkv, *indices, return_lse=True)
d_o = random.standard_normal(o.shape, dtype=np.float32)
gradients = dfar.fha_backward(d_o, *qkv, o, lse, *indices)

here, options = (0, stream, "float32"), ("joint", True, True, None)
tensors = [to_gpu(x) for x in qkv], empty(o.size), empty(lse.size)
dfar._dfar.fha_cuda(here, qkv[0].shape, tensors, *indices, *options)
given, written = to_gpu(d_o), [empty(x.size) for x in qkv]
dfar._dfar.fha_backward_cuda(here, qkv[0].shape, tensors, (given, written), *indices, *options)
# In the order of the stream, as PyTorch frees: the driver ends the process if anything is behind.
for at in (*tensors[0], given):
    call("cuMemFreeAsync", at, stream)
assert error(tensors[1], o) < 1e-5 and error(tensors[2], lse) < 1e-5
assert all(error(at, x) < 5e-5 for at, x in zip(written, gradients))
print("done")
"""


@pytest.mark.parametrize("stream", ["default", "made"])
@pytest.mark.parametrize("seed", [0, 1, 20261127])
def test_tensors_of_another_library_are_computed_on_its_stream(seed: int, stream: str) -> None:
    root = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("CARGO_TARGET_DIR", root / "target")) / "test-driver"
    if not (folder / "libcuda.so.1").exists():
        pytest.skip("the CUDA driver for tests is not built: tests/driver/run true")
    variables = {
        "LD_LIBRARY_PATH": str(folder), "DFAR_DRIVER_CACHE": str(folder / "modules"),
        "DFAR_CACHE_DIR": str(folder / "cache"), "DFAR_DRIVER_SEED": str(seed),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, stream], env=os.environ | variables, capture_output=True, text=True,
        timeout=300,
    )
    assert done.returncode == 0 and done.stdout == "done\n", done.stderr
