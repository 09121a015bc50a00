"""`dfar.torch`: the operator, its derivative, the module, packing."""

from __future__ import annotations

from pathlib import Path

import golden
import numpy as np
import pytest

torch = pytest.importorskip("torch")

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


def test_a_tensor_on_a_gpu_is_refused() -> None:
    q, k, v, cu_seqlens, label = inputs([4, 3], grad=False)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        far = torch.empty(q.shape, device="cuda")
        with pytest.raises(NotImplementedError, match="q is on cuda"):
            dfar.torch.fha(far, k, v, cu_seqlens, label)


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
