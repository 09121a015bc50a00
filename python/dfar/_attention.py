"""Factorization-heads attention on NumPy arrays and PyTorch tensors."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal, overload

from . import _dfar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch as torch_module

    Floats = npt.NDArray[np.float32]
    Integers = npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]
    Tensor = torch_module.Tensor
    Normalization = Literal["joint", "masked"]

__all__ = ["fha", "fha_backward"]


@overload
def fha(
    q: Floats, k: Floats, v: Floats, cu_seqlens: Integers, label: Integers | None, *,
    normalization: Normalization = ..., causal: bool = ..., label_mask: bool = ...,
    scale: float | None = ..., return_lse: Literal[False] = ...,
) -> Floats: ...
@overload
def fha(
    q: Floats, k: Floats, v: Floats, cu_seqlens: Integers, label: Integers | None, *,
    normalization: Normalization = ..., causal: bool = ..., label_mask: bool = ...,
    scale: float | None = ..., return_lse: Literal[True],
) -> tuple[Floats, Floats]: ...
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
    """Factorization-heads attention over packed sequences, on the CPU.

    Letters in shapes: ``N`` tokens of all sequences, ``B`` sequences, ``H`` heads, ``d`` width of a
    head. The first half of the heads serves skipped tokens, the second half liked ones. Every query
    head attends to all key heads, in one softmax over (token, key head).

    Args:
        q, k, v: ``[N, H, d]`` float32, C-contiguous: projected tokens, the sequences end to end.
            They are read in place, without a copy. ``H`` is even, or 1 with ``label_mask=False``.
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
        NotImplementedError: a tensor on a GPU.

    PyTorch tensors are accepted too, with gradients; see :mod:`dfar.torch`. NumPy users compute
    gradients with :func:`fha_backward`.

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
    o, lse = _dfar.fha(q, k, v, cu_seqlens, label, normalization, causal, label_mask, scale)
    return (o, lse) if return_lse else o


def fha_backward(
    d_o: Floats,
    q: Floats,
    k: Floats,
    v: Floats,
    o: Floats,
    lse: Floats,
    cu_seqlens: Integers,
    label: Integers | None,
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
        d_o, q, k, v, o, lse, cu_seqlens, label, normalization, causal, label_mask, scale
    )
