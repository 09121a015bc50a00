"""Factorization-heads attention on PyTorch tensors.

:func:`fha` is a custom operator (``torch.ops.dfar.fha``) with a derivative and a fake
implementation, so ``torch.compile`` takes it as one operation.

On the CPU, tensors are float32. They are read in place, through NumPy views of their memory, and
results are tensors over the engine's memory: nothing is copied except ``cu_seqlens`` and ``label``.

On an NVIDIA GPU (compute capability 8.0 or later, with NVRTC, which PyTorch brings), tensors are
float32, bfloat16 or float16, and heads 8, 16, 32, 64 or 128 wide; float32 heads of other widths are
padded. The kernels read and write the tensors of PyTorch on its current stream. **This part has
never run on a GPU**: its host code was tested on a CUDA driver for tests, its kernels in an
emulator on the CPU. ``cu_seqlens`` and ``label`` are read on the host: keep them on the CPU, or
each call waits for the GPU. Scratch memory stays with dfar, by stream. CUDA graphs cannot capture
the operation.

:class:`FactorizationHeadsAttention` has the projections; :func:`pack_padded`,
:func:`unpack_padded`, :func:`pack_nested` and :func:`unpack_nested` convert batches.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from . import _dfar

__all__ = [
    "FactorizationHeadsAttention",
    "Packed",
    "fha",
    "pack_nested",
    "pack_padded",
    "unpack_nested",
    "unpack_padded",
]

Normalization = Literal["joint", "masked"]


def _numpy(name: str, x: Tensor) -> Any:
    """The tensor's memory as a NumPy array."""
    if x.device.type != "cpu":
        raise ValueError(f"{name} is on {x.device}, but q is on the CPU; pass {name}.cpu()")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}, but must be a dense tensor")
    if x.is_conj() or x.is_neg():
        x = x.resolve_conj().resolve_neg()
    if x.dtype == torch.bfloat16:
        raise TypeError(f"{name} has dtype bfloat16, but must be float32")
    return x.detach().numpy()


def _contiguous(*named: tuple[str, Tensor]) -> None:
    for name, x in named:
        if not x.is_contiguous():
            raise ValueError(f"{name} is not contiguous; pass {name}.contiguous()")


@torch.library.custom_op("dfar::fha", mutates_args=(), device_types="cpu")
def _fha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    label: Tensor | None,
    normalization: str,
    causal: bool,
    label_mask: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    o, lse = _dfar.fha(
        _numpy("q", q), _numpy("k", k), _numpy("v", v), _numpy("cu_seqlens", cu_seqlens),
        None if label is None else _numpy("label", label), normalization, causal, label_mask, scale,
    )
    return torch.from_numpy(o), torch.from_numpy(lse)


@torch.library.custom_op("dfar::fha_backward", mutates_args=(), device_types="cpu")
def _fha_backward(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    label: Tensor | None,
    normalization: str,
    causal: bool,
    label_mask: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _dfar.fha_backward(
        _numpy("d_o", d_o), _numpy("q", q), _numpy("k", k), _numpy("v", v), _numpy("o", o),
        _numpy("lse", lse), _numpy("cu_seqlens", cu_seqlens),
        None if label is None else _numpy("label", label), normalization, causal, label_mask, scale,
    )
    return torch.from_numpy(dq), torch.from_numpy(dk), torch.from_numpy(dv)


def _output_shape(q: Tensor, label_mask: bool) -> tuple[int, int, int, int]:
    """The shape of ``o``; its first two dimensions are that of ``lse``."""
    tokens, heads, width = q.shape
    return tokens, heads // 2 if label_mask else heads, heads, width


_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _place(q: Tensor) -> tuple[int, int, str]:
    """Device number, current stream and dtype."""
    if q.dtype not in _DTYPES:
        raise TypeError(f"q has dtype {q.dtype}, but must be float32, bfloat16 or float16")
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("dfar.fha cannot be part of a CUDA graph: it reads its batch on the host")
    stream = torch.cuda.current_stream(q.device)
    return q.device.index, stream.cuda_stream, _DTYPES[q.dtype]


def _on_gpu(name: str, x: Tensor, like: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """The tensor as the kernels read it: where and of the type that ``like`` is, aligned."""
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, but q is on {like.device}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {x.dtype}, but must be {like.dtype}")
    if shape is not None and tuple(x.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(x.shape)}, but q needs {shape}")
    _contiguous((name, x))
    x = x.detach().resolve_neg()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _host(cu_seqlens: Tensor, label: Tensor | None) -> tuple[Any, Any]:
    """The indices as NumPy arrays; waits for them if they are on a GPU."""
    named = ("cu_seqlens", cu_seqlens), ("label", label)
    first, second = (None if x is None else _numpy(name, x.cpu()) for name, x in named)
    return first, second


@_fha.register_kernel("cuda")
def _fha_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    label: Tensor | None,
    normalization: str,
    causal: bool,
    label_mask: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device(q.device):
        place = _place(q)
        shape, out = (q.shape[0], q.shape[1], q.shape[2]), _output_shape(q, label_mask)
        qkv = [_on_gpu(name, x, q, shape) for name, x in (("q", q), ("k", k), ("v", v))]
        o, lse = q.new_empty(out), q.new_empty(out[:2], dtype=torch.float32)
        _dfar.fha_cuda(
            place, shape, ([x.data_ptr() for x in qkv], o.data_ptr(), lse.data_ptr()),
            *_host(cu_seqlens, label), normalization, causal, label_mask, scale,
        )
        return o, lse


@_fha_backward.register_kernel("cuda")
def _fha_backward_cuda(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    label: Tensor | None,
    normalization: str,
    causal: bool,
    label_mask: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device(q.device):
        place = _place(q)
        shape, out = (q.shape[0], q.shape[1], q.shape[2]), _output_shape(q, label_mask)
        qkv = [_on_gpu(name, x, q, shape) for name, x in (("q", q), ("k", k), ("v", v))]
        d_o, o = _on_gpu("d_o", d_o, q, out), _on_gpu("o", o, q, out)
        lse = _on_gpu("lse", lse, q.new_empty(0, dtype=torch.float32), out[:2])
        gradients = [torch.empty_like(x) for x in qkv]
        _dfar.fha_backward_cuda(
            place, shape, ([x.data_ptr() for x in qkv], o.data_ptr(), lse.data_ptr()),
            (d_o.data_ptr(), [x.data_ptr() for x in gradients]),
            *_host(cu_seqlens, label), normalization, causal, label_mask, scale,
        )
        return gradients[0], gradients[1], gradients[2]


@_fha.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, cu_seqlens, label, normalization, causal, label_mask, scale
):
    out = _output_shape(q, label_mask)
    return q.new_empty(out), q.new_empty(out[:2], dtype=torch.float32)


@_fha_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    d_o, q, k, v, o, lse, cu_seqlens, label, normalization, causal, label_mask, scale
):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens, label, *options = inputs
    o, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, o, lse, cu_seqlens, label)
    ctx.options = options


def _differentiate(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_o is None:
        return (None,) * 9
    q, k, v, o, lse, cu_seqlens, label = ctx.saved_tensors
    gradients = torch.ops.dfar.fha_backward(
        d_o.contiguous(), q, k, v, o, lse, cu_seqlens, label, *ctx.options
    )
    return (*gradients, *(None,) * 6)


_fha.register_autograd(_differentiate, setup_context=_save)
# Under autocast, projections on the CPU are bfloat16, which the engine does not compute in.
_fha.register_autocast("cpu", torch.float32)


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
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, label: Tensor | None, *,
    normalization: Normalization = ..., causal: bool = ..., label_mask: bool = ...,
    scale: float | None = ..., return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def fha(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    label: Tensor | None,
    *,
    normalization: Normalization = "joint",
    causal: bool = True,
    label_mask: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Factorization-heads attention over packed sequences, with gradients.

    Arguments, shapes and results are those of :func:`dfar.fha`, as tensors on the CPU or on an
    NVIDIA GPU, with the types and limits above. ``q``, ``k`` and ``v`` are on one device and
    contiguous, and receive gradients; ``lse`` has none. The derivative is itself not
    differentiable.

    Raises:
        TypeError, ValueError: as :func:`dfar.fha`.
        NotImplementedError: ``q`` is on another kind of device; an input has a tangent (forward-mode
            differentiation).
        RuntimeError: the GPU, its driver or NVRTC cannot be used; a CUDA graph is being captured.
    """
    named = [("q", q), ("k", k), ("v", v), ("cu_seqlens", cu_seqlens)]
    named += [] if label is None else [("label", label)]
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor like q, not {type(x).__name__}")
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise NotImplementedError(
            f"q is on {q.device}, but dfar.torch computes on the CPU and on NVIDIA GPUs"
        )
    for name, x in named[1:3]:
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")
    if q.device.type == "cuda":
        # Once for both passes.
        cu_seqlens, label = cu_seqlens.cpu(), None if label is None else label.cpu()
    if q.dim() != 3:
        raise ValueError(f"q has shape {tuple(q.shape)}, but must be [N, H, d]")
    for name, option in (("causal", causal), ("label_mask", label_mask)):
        if not isinstance(option, bool):
            raise TypeError(f"{name} must be a bool, not {type(option).__name__}")
    if not isinstance(normalization, str):
        raise TypeError(f"normalization must be a str, not {type(normalization).__name__}")
    if isinstance(scale, (Tensor, str)):
        raise TypeError(f"scale must be a number without a gradient, not {type(scale).__name__}")
    _contiguous(*named[:3])
    if not torch.compiler.is_compiling():
        # The tangent would be lost without a word.
        for name, x in named[:3]:
            dual = torch.autograd.forward_ad.unpack_dual(x)  # type: ignore[no-untyped-call]
            if dual.tangent is not None:
                raise NotImplementedError(f"{name} has a tangent, but dfar.fha has no forward mode")
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1]) if q.shape[-1] else 1.0
    o, lse = torch.ops.dfar.fha(
        q, k, v, cu_seqlens, label, normalization, causal, label_mask, float(scale)
    )
    return (o, lse) if return_lse else o


class Packed(NamedTuple):
    """Sequences end to end."""

    values: Tensor
    """``[N, ...]``: the tokens of all sequences."""
    cu_seqlens: Tensor
    """``[B + 1]`` int32: prefix sums of the lengths."""


def _starts(lengths: Tensor) -> Tensor:
    return nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)


def _kept(lengths: Tensor, longest: int, device: torch.device) -> Tensor:
    """``[B, T]``: which tokens of a padded batch are no padding."""
    return torch.arange(longest, device=device) < lengths.to(device)[:, None]


def pack_padded(padded: Tensor, lengths: Tensor) -> Packed:
    """Removes the padding behind each sequence.

    Args:
        padded: ``[B, T, ...]``; tokens from ``lengths[b]`` on are padding.
        lengths: ``[B]`` integers, 0 to ``T``, on any device; ``cu_seqlens`` will be on the same.

    Raises:
        ValueError: a length is negative or above ``T``, or their number is not ``B``.
    """
    batch, longest = padded.shape[:2]
    if lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, but must be ({batch},)")
    # Not in a compiled graph, which cannot look at values: `fha` then refuses the cu_seqlens.
    if batch and not torch.compiler.is_compiling():
        if not (0 <= int(lengths.min()) and int(lengths.max()) <= longest):
            raise ValueError(f"lengths must be 0 to {longest}, the second dimension of padded")
    return Packed(padded[_kept(lengths, longest, padded.device)], _starts(lengths))


def unpack_padded(packed: Tensor, cu_seqlens: Tensor, longest: int | None = None) -> Tensor:
    """The inverse of :func:`pack_padded`: ``[B, T, ...]``, with zeros as padding.

    Args:
        packed: ``[N, ...]``.
        cu_seqlens: ``[B + 1]`` integers.
        longest: ``T``; ``None``: the longest sequence.

    Raises:
        ValueError: ``packed`` is not as long as ``cu_seqlens`` says, or a sequence is longer than
            ``longest``.
    """
    lengths = cu_seqlens.diff()
    if longest is None:
        longest = int(lengths.max()) if len(lengths) else 0
    # Not in a compiled graph, which cannot look at values.
    if len(lengths) and not torch.compiler.is_compiling():
        if int(cu_seqlens[-1]) != len(packed):
            raise ValueError(f"packed has {len(packed)} tokens, but cu_seqlens {int(cu_seqlens[-1])}")
        if int(lengths.max()) > longest:
            raise ValueError(f"longest is {longest}, but a sequence has {int(lengths.max())} tokens")
    return _unpack(packed, lengths, longest)


def _unpack(packed: Tensor, lengths: Tensor, longest: int) -> Tensor:
    kept = _kept(lengths, longest, packed.device)
    padded = packed.new_zeros(len(lengths), longest, *packed.shape[1:])
    return padded.masked_scatter(kept.reshape(kept.shape + (1,) * (packed.dim() - 1)), packed)


def pack_nested(nested: Any) -> Packed:
    """The values and offsets of a jagged nested tensor (``layout=torch.jagged``), without a copy.

    Raises:
        TypeError: the tensor is not nested, or has another layout.
    """
    if not (nested.is_nested and nested.layout == torch.jagged):
        raise TypeError("nested must be a nested tensor with layout=torch.jagged")
    if nested._ragged_idx != 1:
        raise ValueError("the sequences of nested must be its second dimension")
    if nested.lengths() is not None:
        raise ValueError("nested has holes between its sequences; pass nested.contiguous()")
    return Packed(nested.values(), nested.offsets().to(torch.int32))


def unpack_nested(packed: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The inverse of :func:`pack_nested`: a nested tensor over ``packed``, without a copy."""
    return torch.nested.nested_tensor_from_jagged(packed, cu_seqlens.to(torch.int64))


class FactorizationHeadsAttention(nn.Module):
    """Factorization-heads attention with its projections: for users of ``nn.MultiheadAttention``.

    Self-attention over sequences of ``[.., embed_dim]`` tokens with a feedback label each. There
    are projections of queries, keys and values, as in ``nn.MultiheadAttention``, and an output
    projection for each label, from the ``num_heads / 2 * embed_dim`` values of a token's heads
    (docs/mathematics.md) to ``embed_dim``.

    Args:
        embed_dim: width of a token.
        num_heads: even; a divisor of ``embed_dim``.
        bias: whether the projections have offsets.
        normalization, causal: as for :func:`dfar.fha`.

    Inputs of a call, in one of two forms:

    - ``x: [N, embed_dim]``, ``label: [N]``, ``cu_seqlens: [B + 1]``: packed;
    - ``x: [B, T, embed_dim]``, ``label: [B, T]``, ``lengths: [B]`` (``None``: all ``T``): padded.
      The result is 0 at padding.

    ``label``, ``cu_seqlens`` and ``lengths`` may stay on the CPU while ``x`` is on a GPU.

    The result has the shape of ``x``; no attention weights come with it. It depends on the label of
    the token itself, so a model must not predict that label from it. Devices and types are those of
    :func:`fha`. A padded batch in a graph of ``torch.compile`` or ``torch.export`` is not packed:
    its padding is computed.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        bias: bool = True,
        normalization: Normalization = "joint",
        causal: bool = True,
    ) -> None:
        super().__init__()
        if num_heads < 2 or num_heads % 2:
            raise ValueError(f"num_heads is {num_heads}, but must be even")
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim is {embed_dim}, but must be a multiple of num_heads")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.normalization: Normalization = normalization
        self.causal = causal
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.out_proj = nn.ModuleList(
            nn.Linear(num_heads // 2 * embed_dim, embed_dim, bias=bias) for _ in range(2)
        )
        for linear in (self.q_proj, self.k_proj, self.v_proj, *self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def extra_repr(self) -> str:
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, causal={self.causal}"

    def forward(
        self,
        x: Tensor,
        label: Tensor,
        cu_seqlens: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> Tensor:
        if x.dim() == 2:
            if cu_seqlens is None:
                raise ValueError("cu_seqlens is missing: x is packed, [N, embed_dim]")
            return self._packed(x, label, cu_seqlens)
        if x.dim() != 3:
            raise ValueError(f"x has shape {tuple(x.shape)}, but must be [N, D] or [B, T, D]")
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens is for packed x; x is padded, so give lengths")
        batch, longest = x.shape[:2]
        if label.shape != (batch, longest):
            raise ValueError(
                f"label has shape {tuple(label.shape)}, but must be ({batch}, {longest})"
            )
        if lengths is not None and lengths.shape != (batch,):
            raise ValueError(f"lengths has shape {tuple(lengths.shape)}, but must be ({batch},)")
        if lengths is None:
            starts = torch.arange(batch + 1, dtype=torch.int32) * longest
            return self._packed(x.flatten(0, 1), label.flatten(), starts).view(x.shape)
        if torch.compiler.is_compiling():
            return self._in_place(x, label, lengths)
        packed = pack_padded(x, lengths)
        labels = pack_padded(label, lengths).values
        result = self._packed(packed.values, labels, packed.cu_seqlens)
        return _unpack(result, packed.cu_seqlens.diff(), longest)

    def _in_place(self, x: Tensor, label: Tensor, lengths: Tensor) -> Tensor:
        """A padded batch without packing, whose shape would depend on values: the padding behind
        each sequence is a sequence of its own, of zeros."""
        batch, longest = label.shape
        padding = ~_kept(lengths, longest, x.device)
        # The end is a tensor too: as a number, it would be a constant of the graph.
        first = torch.arange(batch + 1, device=lengths.device) * longest
        starts = torch.stack((first[:-1], first[:-1] + lengths), 1).flatten()
        starts = torch.cat((starts, first[-1:]))
        x = x.masked_fill(padding[..., None], 0)
        label = label.masked_fill(~_kept(lengths, longest, label.device), 0)
        result = self._packed(x.flatten(0, 1), label.flatten(), starts)
        return result.view(x.shape).masked_fill(padding[..., None], 0)

    def _packed(self, x: Tensor, label: Tensor, cu_seqlens: Tensor) -> Tensor:
        heads = (-1, self.num_heads, self.embed_dim // self.num_heads)
        q, k, v = (p(x).view(heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        o = fha(
            q, k, v, cu_seqlens, label, normalization=self.normalization, causal=self.causal
        ).flatten(1)
        # The two projections of all tokens cost less than sorting tokens by label at this width.
        skipped, liked = (p(o) for p in self.out_proj)
        return torch.where(label.to(x.device).bool()[:, None], liked, skipped)
