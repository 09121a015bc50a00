"""`dfar.fha` and `dfar.fha_backward` on NumPy arrays."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import golden
import numpy as np
import pytest

import dfar


@pytest.mark.parametrize("path", golden.cases(), ids=lambda path: path.stem)
def test_the_golden_cases_hold_within_the_bounds_of_the_specification(path: Path) -> None:
    case, x = golden.load(path)
    options = golden.options(case)
    o, lse = dfar.fha(
        x["q"], x["k"], x["v"], x["cu_seqlens"], x["label"], return_lse=True, **options
    )
    assert golden.error(o, x["o"]) < golden.FORWARD
    assert golden.error(lse, x["lse"]) < golden.FORWARD
    gradients = dfar.fha_backward(
        x["do"], x["q"], x["k"], x["v"], o, lse, x["cu_seqlens"], x["label"], **options
    )
    for name, gradient in zip(("dq", "dk", "dv"), gradients):
        assert golden.error(gradient, x[name]) < golden.GRADIENT, name


def inputs(lengths: list[int], heads: int = 2, width: int = 8, seed: int = 0):
    """Random arguments of `dfar.fha`."""
    random = np.random.default_rng(seed)
    tokens = sum(lengths)
    q, k, v = random.standard_normal((3, tokens, heads, width), dtype=np.float32)
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.uint32)
    return q, k, v, cu_seqlens, random.integers(0, 2, tokens).astype(np.uint8)


def test_lse_is_returned_only_on_request_and_shapes_are_the_documented_ones() -> None:
    arguments = inputs([3, 0, 5], heads=4)
    o = dfar.fha(*arguments)
    assert isinstance(o, np.ndarray) and o.shape == (8, 2, 4, 8) and o.dtype == np.float32
    o, lse = dfar.fha(*arguments, label_mask=False, return_lse=True)
    assert o.shape == (8, 4, 4, 8) and lse.shape == (8, 4)


def test_no_label_is_needed_without_a_label_mask() -> None:
    q, k, v, cu_seqlens, label = inputs([4, 3])
    found = dfar.fha(q, k, v, cu_seqlens, None, label_mask=False)
    assert np.array_equal(found, dfar.fha(q, k, v, cu_seqlens, label, label_mask=False))
    with pytest.raises(TypeError, match="label is None"):
        dfar.fha(q, k, v, cu_seqlens, None)


@pytest.mark.parametrize("dtype", [np.uint32, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize("labels", [np.uint8, np.bool_, np.int64, np.int8])
def test_integer_types_of_the_indices_do_not_matter(dtype: type, labels: type) -> None:
    q, k, v, cu_seqlens, label = inputs([4, 3])
    found = dfar.fha(q, k, v, cu_seqlens.astype(dtype), label.astype(labels))
    assert np.array_equal(found, dfar.fha(q, k, v, cu_seqlens, label))


def test_a_batch_without_tokens_gives_empty_results() -> None:
    q, k, v, cu_seqlens, label = inputs([0, 0])
    o, lse = dfar.fha(q, k, v, cu_seqlens, label, return_lse=True)
    assert o.shape == (0, 1, 2, 8) and lse.shape == (0, 1)
    gradients = dfar.fha_backward(o, q, k, v, o, lse, cu_seqlens, label)
    assert [g.shape for g in gradients] == [(0, 2, 8)] * 3


def test_inputs_are_read_in_place() -> None:
    # A read-only view into the middle of a larger array: a copy would be needed only for a layout
    # that is refused. The engine's own address of the data is that of the view.
    q, k, v, cu_seqlens, label = inputs([300, 200])
    whole = np.zeros((3, 600, 2, 8), np.float32)
    views = []
    for place, x in enumerate((q, k, v)):
        whole[place, 50:550] = x
        view = whole[place, 50:550]
        view.setflags(write=False)
        views.append(view)
    before = [view.ctypes.data for view in views]
    found = dfar.fha(*views, cu_seqlens, label)
    assert np.array_equal(found, dfar.fha(q, k, v, cu_seqlens, label))
    assert [view.ctypes.data for view in views] == before
    assert dfar._dfar.address(views[0]) == views[0].ctypes.data


class Exporter:
    """An array of another library: nothing but the DLPack interface."""

    def __init__(self, array: np.ndarray, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.device = array, device

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device


def test_arrays_of_other_libraries_are_read_in_place() -> None:
    arguments = inputs([4, 3])
    q = arguments[0]
    seen = dfar._attention._array("q", Exporter(q))
    assert dfar._dfar.address(seen) == q.ctypes.data
    others = [Exporter(x) for x in arguments]
    o, lse = dfar.fha(*others, return_lse=True)
    assert isinstance(o, np.ndarray) and np.array_equal(o, dfar.fha(*arguments))
    d_o = np.ones_like(o)
    expected = dfar.fha_backward(d_o, *arguments[:3], o, lse, *arguments[3:])
    found = dfar.fha_backward(Exporter(d_o), *others[:3], Exporter(o), Exporter(lse), *others[3:])
    assert all(np.array_equal(a, b) for a, b in zip(found, expected))


@pytest.mark.parametrize("place", range(5))
def test_an_array_on_another_device_is_refused_by_name(place: int) -> None:
    arguments: list = list(inputs([4, 3]))
    arguments[place] = Exporter(arguments[place], (2, 1))
    name = ("q", "k", "v", "cu_seqlens", "label")[place]
    with pytest.raises(NotImplementedError, match=rf"^{name} is on device 1 \(CUDA\)"):
        dfar.fha(*arguments)


def test_an_array_that_dlpack_cannot_express_is_refused_by_name() -> None:
    q, *others = inputs([4, 3])
    with pytest.raises(TypeError, match="^k cannot be read through DLPack"):
        dfar.fha(q, Exporter(q.astype("U3")), *others[1:])
    with pytest.raises(TypeError, match="^q has dtype float64"):
        dfar.fha(Exporter(q.astype(np.float64)), *others)


def test_jax_arrays_are_read_in_place() -> None:
    jax = pytest.importorskip("jax")
    arguments = inputs([4, 3])
    others = [jax.device_put(x, jax.devices("cpu")[0]) for x in arguments]
    seen = dfar._attention._array("q", others[0])
    assert dfar._dfar.address(seen) == others[0].unsafe_buffer_pointer()
    assert np.array_equal(dfar.fha(*others), dfar.fha(*arguments))


def test_without_a_gpu_its_kernels_are_refused_with_the_reason() -> None:
    *_, cu_seqlens, label = inputs([4, 3])
    given = (cu_seqlens, label, "joint", True, True, None)
    place, shape, tensors = (99, 0, "float32"), (7, 2, 8), ([256] * 3, 256, 256)
    with pytest.raises(RuntimeError, match="no NVIDIA driver found|device 99 does not exist"):
        dfar._dfar.fha_cuda(place, shape, tensors, *given)
    with pytest.raises(RuntimeError, match="no NVIDIA driver found|device 99 does not exist"):
        dfar._dfar.fha_backward_cuda(place, shape, tensors, (256, [256] * 3), *given)
    for bad, exception, words in [
        (((0, 0, "float64"), shape, tensors), TypeError, "q has dtype float64"),
        ((place, (8, 2, 8), tensors), ValueError, "8"),
        ((place, (7, 3, 8), tensors), ValueError, "3"),
        ((place, shape, ([256, 257, 256], 256, 256)), ValueError, "k is at address 0x101"),
    ]:
        with pytest.raises(exception, match=words):
            dfar._dfar.fha_cuda(*bad, *given)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    arguments = inputs([700, 20, 900, 1500])
    found = {}
    try:
        for count in (1, 2, 3):
            dfar.set_threads(count)
            assert dfar.threads() == count
            found[count] = dfar.fha(*arguments)
    finally:
        dfar.set_threads(0)
    assert np.array_equal(found[1], found[2]) and np.array_equal(found[1], found[3])


def packed(x: np.ndarray) -> np.ndarray:
    """The values of ``x`` as a field of 9-byte records."""
    records = np.zeros(len(x), dtype=[("before", "u1"), ("x", "<i8")])
    records["x"] = x
    return records["x"]


BAD = [
    # (argument, its value from the good one, the exception, words of the message)
    ("q", lambda x: x.astype(np.float64), TypeError, "q has dtype float64, but must be float32"),
    ("k", lambda x: x.astype(np.float16), TypeError, "k has dtype float16"),
    ("v", lambda x: x.astype(">f4"), TypeError, "v has dtype .*other byte order"),
    ("q", lambda x: x.tolist(), TypeError, "q must be a NumPy array, not list"),
    ("k", lambda x: None, TypeError, "k must be a NumPy array, not NoneType"),
    ("q", lambda x: x[0], ValueError, r"q has shape \(2, 8\), but must be \[N, H, d\]"),
    ("k", lambda x: x[:-1], ValueError, r"k has shape \(6, 2, 8\), but q needs \(7, 2, 8\)"),
    ("v", lambda x: x[:, :, ::2], ValueError, "v is not C-contiguous"),
    ("v", lambda x: np.asfortranarray(x), ValueError, "v is not C-contiguous"),
    ("k", lambda x: x[::-1], ValueError, "k is not C-contiguous"),
    ("cu_seqlens", lambda x: x.astype(np.float32), TypeError, "cu_seqlens has dtype float32"),
    ("cu_seqlens", lambda x: x[None], ValueError, r"cu_seqlens has shape \(1, 3\)"),
    ("cu_seqlens", lambda x: list(x), TypeError, "cu_seqlens must be a NumPy array"),
    ("cu_seqlens", lambda x: x[:0], ValueError, "cu_seqlens is empty"),
    ("cu_seqlens", lambda x: x + 1, ValueError, "cu_seqlens starts at 1"),
    ("cu_seqlens", lambda x: np.array([0, 5, 4, 7]), ValueError, "cu_seqlens decreases at sequence 1"),
    ("cu_seqlens", lambda x: np.array([0, -1, 7]), ValueError, r"cu_seqlens\[1\] is -1"),
    ("cu_seqlens", lambda x: np.array([0, 8]), ValueError, "cu_seqlens ends at 8, but q, k and v"),
    ("cu_seqlens", packed, ValueError, "cu_seqlens is not aligned for its dtype"),
    ("label", packed, ValueError, "label is not aligned for its dtype"),
    ("label", lambda x: x + 1, ValueError, r"label\[.\] is 2, but must be 0 \(skipped\) or 1"),
    ("label", lambda x: x[:-1], ValueError, "label has 6 values"),
    ("label", lambda x: x.astype(np.float32), TypeError, "label has dtype float32"),
    ("label", lambda x: x.astype(object), TypeError, "label has dtype object"),
    ("normalization", lambda x: "softmax", ValueError, "normalization is 'softmax'"),
    ("normalization", lambda x: 3, TypeError, "normalization"),
    ("causal", lambda x: "yes", TypeError, "causal"),
    ("label_mask", lambda x: 2, TypeError, "label_mask"),
    ("scale", lambda x: float("nan"), ValueError, "scale is NaN"),
    ("scale", lambda x: 1e300, ValueError, "scale is inf"),
    ("scale", lambda x: "1", TypeError, "scale"),
]


@pytest.mark.parametrize(("name", "change", "exception", "words"), BAD)
def test_a_bad_argument_raises_with_its_name(name, change, exception, words) -> None:
    names = ("q", "k", "v", "cu_seqlens", "label")
    good = dict(zip(names, inputs([4, 3])))
    good |= {"normalization": "joint", "causal": True, "label_mask": True, "scale": 0.5}
    with pytest.raises(exception, match=words):
        dfar.fha(**good | {name: change(good[name])})


def test_odd_heads_and_empty_heads_are_refused() -> None:
    for heads, width, words in [(3, 8, "heads is 3"), (0, 8, "heads is 0"), (2, 0, "head_dim is 0")]:
        q = np.zeros((2, heads, width), np.float32)
        with pytest.raises(ValueError, match=f"q has a shape.*{words}"):
            dfar.fha(q, q, q, np.array([0, 2]), np.array([0, 1]))


def test_the_backward_pass_names_its_own_arguments() -> None:
    arguments = inputs([4, 3])
    o, lse = dfar.fha(*arguments, return_lse=True)
    for place, name in [(0, "d_o"), (4, "o"), (5, "lse")]:
        x = [o, *arguments[:3], o, lse, *arguments[3:]]
        x[place] = x[place][:-1]
        with pytest.raises(ValueError, match=f"^{name} has shape"):
            dfar.fha_backward(*x)
        x[place] = np.zeros((7, 1), np.int32)
        with pytest.raises(TypeError, match=f"^{name} has dtype int32"):
            dfar.fha_backward(*x)


def test_arrays_that_change_during_the_call_do_not_crash() -> None:
    q, k, v, cu_seqlens, label = inputs([2000, 2000])
    stop = threading.Event()

    def scribble() -> None:
        while not stop.is_set():
            cu_seqlens[1] = 4_000_000_000
            label[:] = 255
            q[:] = np.nan
            cu_seqlens[1], label[:] = 2000, 1

    thread = threading.Thread(target=scribble)
    thread.start()
    try:
        for _ in range(30):
            try:
                assert dfar.fha(q, k, v, cu_seqlens, label).shape == (4000, 1, 2, 8)
            except ValueError as error:
                assert "cu_seqlens" in str(error) or "label" in str(error)
    finally:
        stop.set()
        thread.join()


def test_the_gil_is_released() -> None:
    arguments = inputs([6000], heads=4, width=32)
    done = threading.Event()
    thread = threading.Thread(target=lambda: (dfar.fha(*arguments), done.set()))
    thread.start()
    turns = 0
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_computes() -> None:
    program = """
import os, numpy as np, dfar
q = np.ones((2000, 2, 8), np.float32)
arguments = q, q, q, np.array([0, 1000, 2000]), np.ones(2000, np.uint8)
expected = dfar.fha(*arguments)
child = os.fork()
if child == 0:
    os._exit(0 if np.array_equal(dfar.fha(*arguments), expected) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


def test_the_memory_of_a_freed_result_serves_the_next_and_no_other() -> None:
    arguments = inputs([50] * 40, width=16)
    seen = dfar.fha(*arguments)
    expected = seen.copy()
    view = seen[3:5, 0]
    at = seen.ctypes.data
    # A view keeps the memory, so the next result has its own.
    del seen
    other = dfar.fha(*inputs([50] * 40, width=16, seed=1))
    assert other.ctypes.data != at and np.array_equal(view, expected[3:5, 0])
    del view
    again = dfar.fha(*arguments)
    assert again.ctypes.data == at and np.array_equal(again, expected)
    # A slightly smaller result fits the same memory; a much smaller one has its own.
    del again
    assert dfar.fha(*inputs([50] * 39, width=16)).ctypes.data == at
    assert dfar.fha(*inputs([50] * 20, width=16)).ctypes.data != at
    other[0] = 0.0  # a result may be written
