"""`dfar.torch`: the operator, its derivative, the module, packing."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import types
from pathlib import Path

import golden
import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch._dynamo.testing  # noqa: E402

import dfar  # noqa: E402
import dfar.torch  # noqa: E402


def inputs(lengths, heads=2, width=8, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lengths)
    q, k, v = (
        torch.randn(tokens, heads, width, generator=generator).requires_grad_(grad) for _ in range(3)
    )
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return q, k, v, cu_seqlens, torch.randint(0, 2, (tokens,), generator=generator).byte()


@pytest.mark.parametrize("path", golden.cases(), ids=lambda path: path.stem)
def test_autograd_agrees_with_the_float64_oracle(path: Path) -> None:
    case, x = golden.load(path)
    t = {name: torch.from_numpy(x[name].copy()) for name in ("q", "k", "v", "do", "label")}
    cu_seqlens = torch.from_numpy(x["cu_seqlens"].astype(np.int32))
    for name in "qkv":
        t[name].requires_grad_()
    o, lse = dfar.fha(
        t["q"], t["k"], t["v"], cu_seqlens, t["label"], return_lse=True, **golden.options(case)
    )
    assert golden.error(o.detach().numpy(), x["o"]) < golden.FORWARD
    assert golden.error(lse.numpy(), x["lse"]) < golden.FORWARD
    o.backward(t["do"])
    for name in "qkv":
        assert golden.error(t[name].grad.numpy(), x[f"d{name}"]) < golden.GRADIENT, name


def test_gradients_agree_with_differences() -> None:
    # In f32, with the directional derivative of a smooth function of the output.
    q, k, v, cu_seqlens, label = inputs([5, 0, 9], heads=4)
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(q.shape, generator=generator) for _ in range(3)]

    def loss(step: float) -> torch.Tensor:
        x = [a + step * d for a, d in zip((q, k, v), direction)]
        return dfar.torch.fha(*x, cu_seqlens, label).double().sin().sum()

    loss(0.0).backward()
    found = sum((a.grad.double() * d).sum() for a, d in zip((q, k, v), direction))
    with torch.no_grad():
        expected = (loss(1e-2) - loss(-1e-2)) / 2e-2
    assert abs(found - expected) < 1e-3 * abs(expected)


@pytest.mark.parametrize("label_mask", [True, False])
def test_opcheck_accepts_both_operators(label_mask: bool) -> None:
    q, k, v, cu_seqlens, label = inputs([4, 7])
    options = ("joint", True, label_mask, 0.5)
    torch.library.opcheck(torch.ops.dfar.fha.default, (q, k, v, cu_seqlens, label, *options))
    with torch.no_grad():
        o, lse = torch.ops.dfar.fha(q, k, v, cu_seqlens, label, *options)
    detached = [x.detach() for x in (torch.ones_like(o), q, k, v, o, lse)]
    torch.library.opcheck(
        torch.ops.dfar.fha_backward.default, (*detached, cu_seqlens, label, *options)
    )


def test_compile_takes_it_as_one_operation() -> None:
    graphs = []

    def keep(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    q, k, v, cu_seqlens, label = inputs([4, 7], grad=False)
    compiled = torch.compile(
        lambda q: dfar.torch.fha(q * 2, k, v, cu_seqlens, label).sum(), backend=keep, fullgraph=True
    )
    expected = dfar.torch.fha(q * 2, k, v, cu_seqlens, label).sum()
    assert torch.equal(compiled(q), expected)
    assert len(graphs) == 1 and sum("dfar.fha" in name for name in graphs[0]) == 1


def test_a_compiled_function_has_the_same_gradients() -> None:
    q, k, v, cu_seqlens, label = inputs([4, 7])

    def loss(q: torch.Tensor) -> torch.Tensor:
        return (dfar.torch.fha(q, k, v, cu_seqlens, label) ** 2).sum()

    (expected,) = torch.autograd.grad(loss(q), q)
    (found,) = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(q), q)
    assert torch.equal(found, expected)


def model() -> torch.nn.Module:
    """Attention between layers that inductor fuses."""
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.item = torch.nn.Embedding(50, 16)
            self.attention = dfar.torch.FactorizationHeadsAttention(16, 4)
            self.out = torch.nn.Linear(16, 1)

        def forward(self, items, *arguments, **options):
            x = self.item(items)
            return self.out(torch.nn.functional.gelu(x + self.attention(x, *arguments, **options)))

    return Model()


@pytest.fixture
def inductor():
    """The backend, which counts the graphs that it compiles."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"torch.compile with inductor needs a C++ compiler: {compiler} is not there")
    torch.compiler.reset()
    return torch._dynamo.testing.CompileCounterWithBackend("inductor")


def assert_same(module, compiled, *arguments, **options) -> None:
    """Results and gradients of all parameters, which differ by rounding only."""

    def passes(call):
        module.zero_grad()
        result = call(*arguments, **options)
        result.square().sum().backward()
        return [result.detach(), *(p.grad.clone() for p in module.parameters())]

    for found, expected in zip(passes(compiled), passes(module)):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def packed_batch(lengths: list[int]) -> tuple[torch.Tensor, ...]:
    tokens = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.randint(0, 50, (tokens,)), torch.randint(0, 2, (tokens,)), cu_seqlens


def test_inductor_compiles_both_passes_of_a_model_once_for_all_numbers_of_tokens(inductor) -> None:
    module = model()
    compiled = torch.compile(module, backend=inductor, fullgraph=True)
    for lengths in ([20, 7], [5, 19, 3], [2, 0, 48, 8]):
        batch = packed_batch(lengths)
        for x in batch:
            torch._dynamo.mark_dynamic(x, 0)
        assert_same(module, compiled, *batch)
    assert inductor.frame_count == 1


def test_inductor_compiles_a_padded_batch_without_breaks(inductor) -> None:
    module = model()
    compiled = torch.compile(module, backend=inductor, fullgraph=True)
    batch = torch.randint(0, 50, (3, 6)), torch.randint(0, 2, (3, 6))
    assert_same(module, compiled, *batch, lengths=torch.tensor([6, 0, 4]))
    assert_same(module, compiled, *batch, lengths=torch.tensor([1, 6, 6]))
    assert inductor.frame_count == 1
    assert_same(module, compiled, *batch)


def test_a_compiled_padded_batch_takes_any_shape() -> None:
    module = dfar.torch.FactorizationHeadsAttention(16, 4)
    count = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(module, backend=count, fullgraph=True, dynamic=True)
    for batch in range(3, 15):
        longest = 4 + batch % 5
        x, label = torch.randn(batch, longest, 16), torch.randint(0, 2, (batch, longest))
        lengths = torch.randint(0, longest + 1, (batch,))
        expected = module(x, label, lengths=lengths)
        assert torch.allclose(compiled(x, label, lengths=lengths), expected, atol=1e-5)
    assert count.frame_count == 1


def test_inductor_compiles_the_packing_helpers_without_breaks(inductor) -> None:
    def pack_and_back(padded, lengths):
        packed = dfar.torch.pack_padded(padded * 2, lengths)
        return dfar.torch.unpack_padded(*packed, padded.shape[1])

    padded, lengths = torch.randn(3, 5, 2), torch.tensor([2, 0, 5])
    # The number of tokens depends on values, which older versions of PyTorch do not capture.
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(pack_and_back, backend=inductor, fullgraph=True)(padded, lengths)
    assert torch.equal(found, pack_and_back(padded, lengths))


@pytest.mark.filterwarnings("ignore:NestedTensor:UserWarning")
def test_inductor_compiles_attention_on_nested_tensors_without_breaks(inductor) -> None:
    module = dfar.torch.FactorizationHeadsAttention(16, 4)

    def attention(nested, label):
        x, cu_seqlens = dfar.torch.pack_nested(nested)
        return dfar.torch.unpack_nested(module(x, label.values(), cu_seqlens), cu_seqlens)

    rows = [torch.randn(n, 16) for n in (3, 1, 4)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    label = torch.nested.nested_tensor_from_jagged(torch.randint(0, 2, (8,)), x.offsets())
    compiled = torch.compile(attention, backend=inductor, fullgraph=True)
    expected, found = attention(x, label), compiled(x, label)
    assert torch.allclose(found.values(), expected.values(), atol=1e-5)
    gradients = [torch.autograd.grad(y.values().square().sum(), x)[0] for y in (found, expected)]
    assert torch.allclose(gradients[0].values(), gradients[1].values(), atol=1e-5)


def test_a_compiled_padded_batch_ignores_its_padding_and_refuses_bad_lengths() -> None:
    torch.compiler.reset()
    module = dfar.torch.FactorizationHeadsAttention(16, 4)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    x, label, lengths = torch.randn(3, 6, 16), torch.randint(0, 2, (3, 6)), torch.tensor([6, 2, 0])
    expected = module(x, label, lengths=lengths)
    padding = torch.arange(6) >= lengths[:, None]
    odd = x.masked_fill(padding[..., None], torch.nan).requires_grad_()
    found = compiled(odd, label.masked_fill(padding, -100), lengths=lengths)
    assert torch.allclose(found, expected, atol=1e-6) and not found[padding].any()
    found.square().sum().backward()
    assert not odd.grad[padding].any()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    for bad in ([6, 2, 7], [6, 7, 2], [-1, 2, 3]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            compiled(x, label, lengths=torch.tensor(bad))


def test_export_takes_the_module() -> None:
    module = dfar.torch.FactorizationHeadsAttention(16, 4)
    x, label, lengths = torch.randn(3, 6, 16), torch.randint(0, 2, (3, 6)), torch.tensor([6, 2, 0])
    exported = torch.export.export(module, (x, label), {"lengths": lengths}).module()
    assert torch.allclose(
        exported(x, label, lengths=lengths), module(x, label, lengths=lengths), atol=1e-6
    )


def test_autocast_on_the_cpu_keeps_the_operation_in_float32() -> None:
    q, k, v, cu_seqlens, label = inputs([4, 7])
    expected = dfar.torch.fha(q.bfloat16().float(), k, v, cu_seqlens, label)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dfar.torch.fha(q.bfloat16(), k, v, cu_seqlens, label)
        module = dfar.torch.FactorizationHeadsAttention(16, 4)
        result = module(torch.randn(11, 16), label, cu_seqlens)
    assert torch.equal(found, expected)
    result.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())


def test_tensors_are_read_in_place() -> None:
    q = inputs([4, 7], grad=False)[0]
    assert dfar._dfar.address(dfar.torch._numpy("q", q)) == q.data_ptr()
    assert dfar._dfar.address(dfar.torch._numpy("q", q[2:])) == q[2:].data_ptr()


BAD = [
    ("q", lambda x: x.double(), TypeError, "q has dtype float64"),
    ("k", lambda x: x.bfloat16(), TypeError, "k has dtype bfloat16"),
    ("v", lambda x: x.transpose(0, 2), ValueError, "v is not contiguous"),
    ("k", lambda x: x.detach().numpy(), TypeError, "k must be a tensor like q, not ndarray"),
    ("q", lambda x: x[0], ValueError, "q has shape"),
    ("cu_seqlens", lambda x: x + 1, ValueError, "cu_seqlens starts at 1"),
    ("label", lambda x: x * 0 + 2, ValueError, r"label\[0\] is 2"),
    ("label", lambda x: x.float(), TypeError, "label has dtype float32"),
]


@pytest.mark.parametrize(("name", "change", "exception", "words"), BAD)
def test_a_bad_argument_raises_with_its_name(name, change, exception, words) -> None:
    good = dict(zip(("q", "k", "v", "cu_seqlens", "label"), inputs([4, 3], grad=False)))
    with pytest.raises(exception, match=words):
        dfar.torch.fha(**good | {name: change(good[name])})


def test_tensors_on_different_devices_are_refused_by_name() -> None:
    q, k, v, cu_seqlens, label = inputs([4, 3], grad=False)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        far = torch.empty(q.shape, device="cuda")
        with pytest.raises(ValueError, match="k is on cpu, but q is on cuda"):
            dfar.torch.fha(far, k, v, cu_seqlens, label)
        with pytest.raises(ValueError, match="v is on cuda.*, but q is on cpu"):
            dfar.torch.fha(q, k, far, cu_seqlens, label)
        xpu = torch.empty(q.shape, device="xpu")
        with pytest.raises(NotImplementedError, match="q is on xpu"):
            dfar.torch.fha(xpu, xpu, xpu, cu_seqlens, label)
    with pytest.raises(ValueError, match="cu_seqlens is on meta, but q is on the CPU"):
        dfar.torch._numpy("cu_seqlens", cu_seqlens.to("meta"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_tensors_on_a_gpu_have_the_shapes_and_types_of_the_results(dtype) -> None:
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(7, 4, 8, device="cuda", dtype=dtype)
        cu_seqlens, label = (torch.empty(n, dtype=torch.int32, device="cuda") for n in (3, 7))
        o, lse = dfar.torch.fha(q, q, q, cu_seqlens, label, return_lse=True)
        assert o.shape == (7, 2, 4, 8) and o.dtype == dtype and o.device.type == "cuda"
        assert lse.shape == (7, 2) and lse.dtype == torch.float32 and lse.device == o.device
        options = ("joint", True, True, 0.5)
        # Not by autograd, whose engine needs the GPU.
        gradients = torch.ops.dfar.fha_backward(o, q, q, q, o, lse, cu_seqlens, label, *options)
        for gradient in gradients:
            assert (gradient.shape, gradient.dtype, gradient.device) == (q.shape, dtype, q.device)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_labels_and_lengths_of_a_batch_on_a_gpu_may_be_on_the_cpu(device: str) -> None:
    with torch._subclasses.FakeTensorMode():
        with torch.device("cuda"):
            module = dfar.torch.FactorizationHeadsAttention(16, 4)
            x, packed = torch.empty(3, 6, 16), torch.empty(9, 16)
        integers = {"device": device, "dtype": torch.int64}
        label, labels = torch.empty(3, 6, **integers), torch.empty(9, **integers)
        lengths, cu_seqlens = torch.empty(3, **integers), torch.empty(4, **integers)
        # Not `pack_padded` and `unpack_padded`, which look at values.
        for result in (
            module(x, label),
            module._in_place(x, label, lengths),
            dfar.torch._unpack(module(packed, labels, cu_seqlens), cu_seqlens.diff(), 6),
        ):
            assert result.shape == x.shape and result.device.type == "cuda"


def memory(at: int, *shape: int) -> np.ndarray:
    """The f32 values at an address."""
    values = (ctypes.c_float * math.prod(shape)).from_address(at)
    return np.frombuffer(values, np.float32).reshape(shape)


@pytest.fixture
def gpu(monkeypatch):
    """Stands for the kernels of a GPU: computes on the CPU at the addresses that it gets."""
    places = []

    def forward(place, shape, tensors, cu_seqlens, label, *options):
        qkv, o, lse = tensors
        n, h, d = shape
        result = dfar._dfar.fha(*(memory(at, n, h, d) for at in qkv), cu_seqlens, label, *options)
        for at, x in zip((o, lse), result):
            memory(at, *x.shape)[...] = x
        places.append(place)

    def backward(place, shape, tensors, gradients, cu_seqlens, label, *options):
        qkv, o, lse = tensors
        n, h, d = shape
        q = h // 2 if options[2] else h
        result = dfar._dfar.fha_backward(
            memory(gradients[0], n, q, h, d), *(memory(at, n, h, d) for at in qkv),
            memory(o, n, q, h, d), memory(lse, n, q), cu_seqlens, label, *options,
        )
        for at, x in zip(gradients[1], result):
            memory(at, *x.shape)[...] = x
        places.append(place)

    monkeypatch.setattr(dfar._dfar, "fha_cuda", forward)
    monkeypatch.setattr(dfar._dfar, "fha_backward_cuda", backward)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    stream = types.SimpleNamespace(cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    return places


@pytest.mark.parametrize("label_mask", [True, False])
def test_the_kernels_of_a_gpu_get_the_tensors_and_the_stream(gpu, label_mask: bool) -> None:
    *qkv, cu_seqlens, label = inputs([4, 7], heads=4, grad=False)
    options = ("joint", True, label_mask, 0.5)
    if not label_mask:
        label = None
    expected = torch.ops.dfar.fha(*qkv, cu_seqlens, label, *options)
    # Misaligned by a row's start that 16 bytes do not divide: copied.
    shifted = torch.empty(qkv[1].numel() + 1)[1:].view_as(qkv[1]).copy_(qkv[1])
    assert shifted.data_ptr() % 16 != 0
    found = dfar.torch._fha_cuda(qkv[0], shifted, qkv[2], cu_seqlens, label, *options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert gpu == [(None, 7, "float32")]
    d_o = torch.randn(expected[0].shape)
    expected = torch.ops.dfar.fha_backward(d_o, *qkv, *found, cu_seqlens, label, *options)
    gradients = dfar.torch._fha_backward_cuda(d_o, *qkv, *found, cu_seqlens, label, *options)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected)) and len(gpu) == 2


BAD_ON_GPU = [
    (0, lambda x: x.double(), TypeError, "q has dtype torch.float64"),
    (1, lambda x: x.bfloat16(), TypeError, "k has dtype torch.bfloat16, but must be torch.float32"),
    (1, lambda x: x[:-1], ValueError, r"k has shape \(6, 2, 8\), but q needs \(7, 2, 8\)"),
    (2, lambda x: x.transpose(0, 2).transpose(0, 2)[:, :, ::2], ValueError, "v has shape"),
    (2, lambda x: x.mT.contiguous().mT, ValueError, "v is not contiguous"),
    (2, lambda x: x.to("meta"), ValueError, "v is on meta, but q is on cpu"),
]


@pytest.mark.parametrize(("place", "change", "exception", "words"), BAD_ON_GPU)
def test_a_bad_tensor_never_reaches_the_kernels(gpu, place, change, exception, words) -> None:
    good = list(inputs([4, 3], grad=False))
    good[place] = change(good[place])
    with pytest.raises(exception, match=words):
        dfar.torch._fha_cuda(*good, "joint", True, True, 0.5)
    assert not gpu


def test_a_cuda_graph_is_refused(gpu, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="CUDA graph"):
        dfar.torch._fha_cuda(*inputs([4, 3], grad=False), "joint", True, True, 0.5)


def test_padded_batches_round_trip() -> None:
    padded = torch.randn(3, 5, 2)
    lengths = torch.tensor([2, 0, 5])
    packed = dfar.torch.pack_padded(padded, lengths)
    assert packed.cu_seqlens.tolist() == [0, 2, 2, 7] and packed.values.shape == (7, 2)
    again = dfar.torch.unpack_padded(*packed)
    assert torch.equal(again[0, :2], padded[0, :2]) and torch.equal(again[2], padded[2])
    assert not again[0, 2:].any() and not again[1].any()
    for bad in (torch.tensor([2, 0]), torch.tensor([2, 0, 6]), torch.tensor([-1, 0, 5])):
        with pytest.raises(ValueError, match="lengths"):
            dfar.torch.pack_padded(padded, bad)


def test_nested_tensors_round_trip_without_a_copy() -> None:
    rows = [torch.randn(n, 2) for n in (3, 1, 4)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged)
    packed = dfar.torch.pack_nested(nested)
    assert packed.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert packed.values.data_ptr() == nested.values().data_ptr()
    again = dfar.torch.unpack_nested(*packed)
    assert all(torch.equal(a, b) for a, b in zip(again.unbind(), rows))
    with pytest.raises(TypeError, match="jagged"):
        dfar.torch.pack_nested(rows[0])
    with pytest.raises(ValueError, match="second dimension"):
        dfar.torch.pack_nested(nested.unsqueeze(-1).transpose(1, 2))


def test_unpacking_refuses_tokens_that_have_no_place() -> None:
    with pytest.raises(ValueError, match="longest is 2"):
        dfar.torch.unpack_padded(torch.arange(5.0), torch.tensor([0, 3, 5]), 2)
    with pytest.raises(ValueError, match="packed has 9 tokens"):
        dfar.torch.unpack_padded(torch.arange(9.0), torch.tensor([0, 2, 5]))


def test_options_that_would_be_lost_are_refused() -> None:
    q, k, v = torch.randn(3, 7, 2, 4)
    cu_seqlens, label = torch.tensor([0, 4, 7]), torch.tensor([1, 0, 1, 1, 0, 0, 1])

    def fha(q, **options):
        return dfar.torch.fha(q, k, v, cu_seqlens, label, **options)

    with pytest.raises(NotImplementedError, match="q has a tangent"):
        torch.func.jvp(fha, (q,), (torch.ones_like(q),))
    for name, value in [
        ("scale", torch.tensor(0.5, requires_grad=True)),
        ("scale", "1"),
        ("causal", None),
        ("label_mask", 1),
        ("normalization", None),
    ]:
        with pytest.raises(TypeError, match=name):
            fha(q, **{name: value})


def test_the_module_gives_padded_and_packed_batches_the_same_results() -> None:
    torch.manual_seed(0)
    module = dfar.torch.FactorizationHeadsAttention(16, 4)
    x, label = torch.randn(3, 6, 16), torch.randint(0, 2, (3, 6))
    lengths = torch.tensor([6, 2, 4])
    padded = module(x, label, lengths=lengths)
    assert padded.shape == x.shape and not padded[1, 2:].any()
    packed = dfar.torch.pack_padded(x, lengths)
    labels = dfar.torch.pack_padded(label, lengths).values
    found = module(packed.values, labels, packed.cu_seqlens)
    assert torch.equal(found, dfar.torch.pack_padded(padded, lengths).values)
    assert torch.equal(module(x, label), module(x, label, lengths=torch.tensor([6, 6, 6])))
    for bad in (torch.tensor([6, 2]), torch.tensor([6, 2, 7])):
        with pytest.raises(ValueError, match="lengths"):
            module(x, label, lengths=bad)


def test_the_module_learns() -> None:
    # The target is the label of the token before, which a token cannot know by itself.
    torch.manual_seed(0)
    x, label = torch.randn(8, 10, 16), torch.randint(0, 2, (8, 10))
    target = torch.nn.functional.pad(label, (1, 0))[:, :-1].float()
    module = torch.nn.ModuleList(
        [dfar.torch.FactorizationHeadsAttention(16, 2), torch.nn.Linear(16, 1)]
    )
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    losses = []
    for _ in range(150):
        logits = module[1](x + module[0](x, label)).squeeze(-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0], losses[::30]
    assert all(p.grad is not None for p in module.parameters())


def test_a_causal_module_ignores_later_tokens() -> None:
    torch.manual_seed(0)
    module = dfar.torch.FactorizationHeadsAttention(16, 2)
    x, label = torch.randn(1, 6, 16), torch.randint(0, 2, (1, 6))
    changed = x.clone()
    changed[0, 4:] += 1
    assert torch.equal(module(x, label)[0, :4], module(changed, label)[0, :4])


def test_the_operator_accepts_double_precision_nowhere() -> None:
    with pytest.raises(TypeError, match="q has dtype float64"):
        q = torch.ones(2, 2, 4, dtype=torch.float64)
        dfar.torch.fha(q, q, q, torch.tensor([0, 2]), torch.tensor([0, 1]))
