"""Bad and odd arguments never crash: a call returns the documented shapes, or raises.

`DFAR_FUZZ=10000` sets the number of calls.
"""

from __future__ import annotations

import os

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
