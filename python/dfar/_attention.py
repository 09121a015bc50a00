"""Factorization-heads attention on NumPy arrays and PyTorch tensors."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

from . import _dfar

__all__ = ["fha", "fha_backward"]


class DLPackArray(Protocol):
    """An array with the DLPack interface: of JAX, PyTorch, CuPy, NumPy, ..."""

    def __dlpack__(self) -> object: ...
    def __dlpack_device__(self) -> tuple[Any, int]: ...


if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch as torch_module

    Floats = npt.NDArray[np.float32]
    Integers = npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]
    Array = Floats | DLPackArray
    Indices = Integers | DLPackArray
    Tensor = torch_module.Tensor
    Normalization = Literal["joint", "masked"]


# Device types of DLPack. Host memory pinned by CUDA or ROCm is as good as the CPU's.
_ON_CPU = (1, 3, 11)
_DEVICES = {2: "CUDA", 4: "OpenCL", 7: "Vulkan", 8: "Metal", 10: "ROCm", 13: "CUDA (managed)",
            14: "oneAPI"}


def _array(name: str, x: Any) -> Any:
    """The argument as a NumPy array over the same memory, if it has the DLPack interface."""
    import numpy as np

    if isinstance(x, np.ndarray) or not hasattr(x, "__dlpack_device__"):
        return x
    kind, index = x.__dlpack_device__()
    if int(kind) not in _ON_CPU:
        device = _DEVICES.get(int(kind), f"of DLPack type {int(kind)}")
        raise NotImplementedError(
            f"{name} is on device {index} ({device}), but dfar.fha reads arrays on the CPU and "
            f"PyTorch tensors; pass a copy of {name} on the CPU"
        )
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} cannot be read through DLPack: {error}") from error


@overload
def fha(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, label: Tensor | None, *,
    normalization: Normalization = ..., causal: bool = ..., label_mask: bool = ...,
    scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def fha(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, label: Tensor | None, *,
    normalization: Normalization = ..., causal: bool = ..., label_mask: bool = ...,
    scale: float | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def fha(
    q: Array, k: Array, v: Array, cu_seqlens: Indices, label: Indices | None, *,
    normalization: Normalization = ..., causal: bool = ..., label_mask: bool = ...,
    scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Floats: ...
@overload
def fha(
    q: Array, k: Array, v: Array, cu_seqlens: Indices, label: Indices | None, *,
    normalization: Normalization = ..., causal: bool = ..., label_mask: bool = ...,
    scale: float | None = ..., return_lse: Literal[True],
) -> tuple[Floats, Floats]: ...
def fha(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens: Any,
    label: Any,
    *,
    normalization: Normalization = "joint",
    causal: bool = True,
    label_mask: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Factorization-heads attention over packed sequences.

    Letters in shapes: ``N`` tokens of all sequences, ``B`` sequences, ``H`` heads, ``d`` width of a
    head. The first half of the heads serves skipped tokens, the second half liked ones. Every query
    head attends to all key heads, in one softmax over (token, key head).

    Args:
        q, k, v: ``[N, H, d]`` float32, C-contiguous: projected tokens, the sequences end to end.
            They are read in place, without a copy: NumPy arrays, and through DLPack those of JAX
            and other libraries on the CPU. ``H`` is even, or 1 with ``label_mask=False``.
        cu_seqlens: ``[B + 1]`` integers: prefix sums of the sequence lengths, from 0 to ``N``. A
            length may be 0.
        label: ``[N]`` integers or bool: feedback of each token, 0 skipped, 1 liked. With
            ``label_mask=False`` it is not used and may be ``None``.
        normalization: ``"joint"``: all key heads of all visible tokens enter the softmax, and the
            label mask is applied after it. ``"masked"``: only the kept pairs enter.
        causal: token ``i`` attends only to tokens ``j <= i`` of its sequence.
        label_mask: a query head serves only the tokens of its label, a key head likewise.
        scale: factor on the scores; ``None``: ``1 / sqrt(d)``.
        return_lse: also return ``lse``.

    Returns:
        ``o``: ``[N, Q, H, d]`` float32, new. ``Q`` is ``H / 2`` with the label mask, where slot
        ``a`` is query head ``a + label * H / 2``; else ``H``. With ``return_lse``: ``(o, lse)``,
        where ``lse`` is ``[N, Q]`` float32, the natural logarithm of each softmax denominator.

    Raises:
        TypeError: an argument is not an array, or has the wrong dtype.
        ValueError: an argument has the wrong shape, layout or values. The message names it.
        NotImplementedError: an array on another device.

    PyTorch tensors are accepted too, with gradients; see :mod:`dfar.torch`. NumPy users compute
    gradients with :func:`fha_backward`.

    The memory of results that Python has freed is kept for later results: at most 256 MiB.

    The GIL is released. Results are bitwise equal for any number of threads. If another thread
    writes to ``q``, ``k`` or ``v`` during the call, the results are undefined, but nothing else is.

    Source: Lin et al., "Dual-interest Factorization-heads Attention for Sequential
    Recommendation", WWW 2023, arXiv 2302.03965, section 3.2.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(q, torch.Tensor):
        from . import torch as on_tensors

        return on_tensors.fha(
            q, k, v, cu_seqlens, label, normalization=normalization, causal=causal,
            label_mask=label_mask, scale=scale, return_lse=return_lse,
        )
    o, lse = _dfar.fha(
        _array("q", q), _array("k", k), _array("v", v), _array("cu_seqlens", cu_seqlens),
        _array("label", label), normalization, causal, label_mask, scale,
    )
    return (o, lse) if return_lse else o


def fha_backward(
    d_o: Array,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    lse: Array,
    cu_seqlens: Indices,
    label: Indices | None,
    *,
    normalization: Normalization = "joint",
    causal: bool = True,
    label_mask: bool = True,
    scale: float | None = None,
) -> tuple[Floats, Floats, Floats]:
    """The gradients of a loss with respect to ``q``, ``k`` and ``v``.

    Args:
        d_o: ``[N, Q, H, d]`` float32: gradient of the loss with respect to ``o``.
        o, lse: results of :func:`fha` for the same arguments.
        q, k, v, cu_seqlens, label, normalization, causal, label_mask, scale: as for :func:`fha`.

    Returns:
        ``(dq, dk, dv)``: ``[N, H, d]`` float32 each, new.

    Raises:
        TypeError, ValueError: as :func:`fha`.

    Probabilities are computed again from ``lse``: memory grows with ``N``, not with the square of a
    sequence's length.
    """
    return _dfar.fha_backward(
        _array("d_o", d_o), _array("q", q), _array("k", k), _array("v", v), _array("o", o),
        _array("lse", lse), _array("cu_seqlens", cu_seqlens), _array("label", label),
        normalization, causal, label_mask, scale,
    )
