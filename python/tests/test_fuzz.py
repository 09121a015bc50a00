"""Bad, odd and changing arguments never crash: a call returns the documented shapes, or raises.

`DFAR_FUZZ=10000` sets the number of calls of each test.
"""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from hypothesis.extra import numpy as arrays  # noqa: E402

import dfar  # noqa: E402

COUNT = int(os.environ.get("DFAR_FUZZ", "300"))
NAMES = ("q", "k", "v", "cu_seqlens", "label", "d_o", "o", "lse")

small = st.integers(0, 5)
odd_floats = st.sampled_from([0.0, -0.0, 1.0, 1e4, -1e4, np.inf, -np.inf, np.nan, 1e-40])


@st.composite
def good(draw):
    """Arguments that are right, with unusual values in q."""
    lengths = draw(st.lists(small, min_size=1, max_size=4))
    heads, width = 2 * draw(st.integers(1, 2)), draw(st.sampled_from([1, 3, 4, 8]))
    tokens = sum(lengths)
    q = draw(arrays.arrays(np.float32, (tokens, heads, width), elements=odd_floats.map(np.float32)))
    label = draw(arrays.arrays(np.uint8, tokens, elements=st.integers(0, 1)))
    return [q, q.copy(), q[::1], np.cumsum([0, *lengths]).astype(np.uint32), label]


anything = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3),
    st.lists(st.floats(), max_size=3),
    arrays.arrays(
        st.one_of(
            arrays.scalar_dtypes(), st.sampled_from([np.dtype("f4"), np.dtype("u4"), np.dtype("i8"),
                                                     np.dtype("u1"), np.dtype("O")]),
        ),
        arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
        fill=st.nothing(),
    ),
)


@st.composite
def wrong(draw, value):
    """Another value for an argument: a view of it, a cast of it, or anything."""
    try:
        return draw(changed(value))
    except (IndexError, OverflowError, TypeError, ValueError):
        # NumPy refuses the change, of an array that was changed before.
        return draw(anything)


@st.composite
def changed(draw, value):
    kind = draw(st.integers(0, 7))
    if not isinstance(value, np.ndarray) or kind == 0:
        return draw(anything)
    if kind == 1:
        return value.astype(draw(st.sampled_from(["f8", "f2", ">f4", "i4", "u2", "c8", "O"])))
    if kind == 2:
        return np.asfortranarray(value)
    if kind == 3:
        return value[:: draw(st.sampled_from([2, -1]))]
    if kind == 4:
        return value[..., None] if draw(st.booleans()) else value.reshape(-1)
    if kind == 5:
        return value[: draw(small)]
    if kind == 6:
        # Not aligned for its type.
        raw = np.zeros(value.nbytes + 1, np.uint8)[1:]
        return raw.view(value.dtype).reshape(value.shape) if value.nbytes else value
    value = value.copy()
    if value.size:
        other = draw(st.sampled_from([0, 1, 2, 3, 200, 255, 2**31, 2**32 - 1]))
        value.flat[draw(st.integers(0, value.size - 1))] = other % (2 ** (8 * value.itemsize) or 1)
    return value


@settings(max_examples=COUNT, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True)
@given(st.data())
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_call_returns_or_raises_with_the_name_of_an_argument(data) -> None:
    arguments = data.draw(good())
    options = {
        "normalization": data.draw(st.sampled_from(["joint", "masked", "", "Joint"])),
        "causal": data.draw(st.booleans()),
        "label_mask": data.draw(st.booleans()),
        "scale": data.draw(st.one_of(st.none(), st.floats())),
    }
    backward = data.draw(st.booleans())
    if backward:
        mask = options["label_mask"]
        q = arguments[0]
        slots = q.shape[1] // (2 if mask else 1)
        o = np.ones((q.shape[0], slots, *q.shape[1:]), np.float32)
        arguments += [o, o.copy(), np.ones(o.shape[:2], np.float32)]
    for place in data.draw(st.lists(st.integers(0, len(arguments) - 1), max_size=2)):
        arguments[place] = data.draw(wrong(arguments[place]))
    try:
        if backward:
            *shared, d_o, o, lse = arguments
            found = dfar.fha_backward(d_o, *shared[:3], o, lse, *shared[3:], **options)
            assert [g.shape for g in found] == [arguments[0].shape] * 3
        else:
            o, lse = dfar.fha(*arguments, return_lse=True, **options)
            tokens, heads, width = arguments[0].shape
            slots = heads // 2 if options["label_mask"] else heads
            assert o.shape == (tokens, slots, heads, width) and lse.shape == (tokens, slots)
    except (TypeError, ValueError, OverflowError) as error:
        assert any(name in str(error) for name in (*NAMES, *options)), error


# Overwrites parts of the arguments with their first values or with garbage, all the time. Another
# process, because a thread would have to wait for the GIL while dfar checks and copies.
WRITER = """
import mmap, os, sys
import numpy as np
half = int(sys.argv[2])
with open(sys.argv[1], "r+b") as file:
    shared = mmap.mmap(file.fileno(), 2 * half + 16)
head = np.frombuffer(shared, np.int64, 2, 2 * half)
live, first = (np.frombuffer(shared, np.uint8, half, at) for at in (0, half))
parent, random = os.getppid(), np.random.default_rng(0)
garbage = np.frombuffer(random.bytes(2 * half), np.uint8)
while os.getppid() == parent:
    for place, bytes, good, other in zip(*random.integers(0, half, (4, 256))):
        size = int(head[0])
        if size:
            start, bytes = place % size, 1 + bytes % 64
            end = min(start + bytes, size)
            live[start:end] = first[start:end] if good % 2 else garbage[other : other + end - start]
            head[1] += 1
"""


class Hostile:
    """Memory that another process writes to."""

    BYTES = 1 << 20

    def __init__(self, path) -> None:
        path.write_bytes(bytes(2 * self.BYTES + 16))
        with path.open("r+b") as file:
            self.shared = mmap.mmap(file.fileno(), 2 * self.BYTES + 16)
        self.head = np.frombuffer(self.shared, np.int64, 2, 2 * self.BYTES)
        self.writer = subprocess.Popen([sys.executable, "-c", WRITER, path, str(self.BYTES)])

    def arrays(self, values: list[np.ndarray]) -> list[np.ndarray]:
        """Copies of the arrays in this memory. Nothing is overwritten before `begin`."""
        self.head[0] = 0
        copies, at = [], 0
        for value in values:
            for start in (at, self.BYTES + at):
                copy = np.frombuffer(self.shared, value.dtype, value.size, start).reshape(value.shape)
                copy[...] = value
                copies.append(copy)
            at += -(-value.nbytes // 16) * 16
        self.size = at
        return copies[::2]

    def begin(self) -> None:
        self.head[0] = self.size


@pytest.fixture
def hostile(tmp_path):
    memory = Hostile(tmp_path / "shared")
    memory.arrays([np.zeros(1024)])
    memory.begin()
    end = time.monotonic() + 60
    while memory.head[1] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    yield memory
    memory.writer.kill()
    memory.writer.wait()


def test_arguments_that_change_under_the_call_never_crash(hostile) -> None:
    choose, values = random.Random(0), np.random.default_rng(0)
    returned = raised = changed = 0
    # On a busy machine the writer may rarely run during a call: then there are more calls.
    end = time.monotonic() + 60
    while returned + raised < COUNT or (raised == 0 and time.monotonic() < end):
        lengths = [choose.randrange(60) for _ in range(choose.randint(1, 6))]
        heads, width, tokens = 2 * choose.randint(1, 2), choose.choice([3, 8, 16]), sum(lengths)
        options = {"normalization": choose.choice(["joint", "masked"]), "causal": choose.random() < 0.5}
        qkv = values.standard_normal((3, tokens, heads, width), np.float32)
        starts = np.cumsum([0, *lengths]).astype(choose.choice([np.uint32, np.int64]))
        arguments = [*qkv, starts, values.integers(0, 2, tokens, choose.choice([np.uint8, np.bool_]))]
        o = values.standard_normal((tokens, heads // 2, heads, width), np.float32)
        backward = choose.random() < 0.5
        if backward:
            arguments += [o, o, o[..., 0, 0].copy()]
        shared = hostile.arrays(arguments)
        # Some arguments stay, so that calls with good indices come to the engine.
        hit = [choose.random() < 0.5 for _ in shared]
        mixed = [a if is_hit else b for a, b, is_hit in zip(shared, arguments, hit)]
        before = int(hostile.head[1])
        hostile.begin()
        try:
            if backward:
                *front, d_o, out, lse = mixed
                found = dfar.fha_backward(d_o, *front[:3], out, lse, *front[3:], **options)
                assert [x.shape for x in found] == [qkv[0].shape] * 3
            else:
                found = dfar.fha(*mixed, return_lse=True, **options)
                assert [x.shape for x in found] == [o.shape, o.shape[:2]]
            returned += 1
        except ValueError as error:
            assert any(name in str(error) for name in ("cu_seqlens", "label")), error
            raised += 1
        changed += hostile.head[1] > before
    assert hostile.writer.poll() is None and changed > 0
    assert returned > COUNT // 4 and raised > 0, (returned, raised)
