"""Measures the package against the engine itself and against PyTorch. Prints Markdown lines.

    cargo build --release -p dfar -p dfar-python --bins
    python python/bench/measure.py [--bin target/release]

Each time is the shortest of many calls. The engine's own times are those of `dfar-bench attention`
and `dfar-train score`, run before and after the Python calls.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import dfar

HEADS, WIDTH = 2, 16


def shortest(call: Callable[[], object], seconds: float = 3.0) -> float:
    """The shortest time of a call, in milliseconds."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return 1e3 * best


def arguments(length: int, tokens: int) -> tuple[np.ndarray, ...]:
    """Sequences of one length, as in `dfar-bench attention`."""
    random = np.random.default_rng(1)
    count = max(1, tokens // length)
    q, k, v = (
        random.uniform(-1.7, 1.7, (count * length, HEADS, WIDTH)).astype(np.float32) for _ in range(3)
    )
    cu_seqlens = np.arange(0, (count + 1) * length, length, dtype=np.uint32)
    return q, k, v, cu_seqlens, random.integers(0, 2, count * length).astype(np.uint8)


def engine(bin: Path, length: int, tokens: int) -> dict[str, float]:
    """The engine's own times, in milliseconds."""
    with tempfile.NamedTemporaryFile() as file:
        subprocess.run(
            [bin / "dfar-bench", "attention", "--seq-lens", str(length), "--batch-tokens", str(tokens),
             "--no-naive", "--json", file.name],
            check=True, capture_output=True,
        )
        text = Path(file.name).read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(x) for x in text.splitlines()]
    return {row["pass"]: round(row["fused_ms"], 3) for row in rows}


def attention(bin: Path) -> None:
    """In turns, so that both see the same load."""
    for length in (100, 1024):
        x = arguments(length, 16384)
        o, lse = dfar.fha(*x, return_lse=True)
        d_o = np.ones_like(o)
        ours = {"forward": float("inf"), "backward": float("inf")}
        theirs = dict(ours)
        for _ in range(6):
            for name, ms in engine(bin, length, 16384).items():
                theirs[name] = min(theirs[name], ms)
            forward = shortest(lambda: dfar.fha(*x), 1.0)
            backward = shortest(lambda: dfar.fha_backward(d_o, *x[:3], o, lse, *x[3:]), 1.0)
            ours = {"forward": min(ours["forward"], forward), "backward": min(ours["backward"], backward)}
        for name, ms in ours.items():
            ratio = ms / theirs[name]
            print(f"| fha {name}, T = {length} | Python {ms:.3f} ms | engine {theirs[name]} ms | {ratio:.3f} |")


def torch_forms() -> None:
    """Against `scaled_dot_product_attention`, whose inputs are prepared outside the measurement."""
    import torch
    import torch.nn.functional as F

    import dfar.torch

    torch.set_num_threads(os.cpu_count() or 1)
    length, tokens = 100, 16384
    q, k, v, cu_seqlens, label = map(torch.from_numpy, arguments(length, tokens))
    sequences = len(cu_seqlens) - 1
    labels = label.view(sequences, length, 1, 1).long()
    # Queries [B, 1, T, d]: the head of each token's label. Keys [B, 1, T * H, d]: all (token, head)
    # pairs, in one softmax. Values [B, 1, T * H, H * d]: one slot for each key head, zero where the
    # label mask drops the pair.
    queries = q.view(sequences, length, HEADS, WIDTH).gather(2, labels.expand(-1, -1, 1, WIDTH))
    queries = queries.view(sequences, 1, length, WIDTH).contiguous()
    keys = k.view(sequences, 1, length * HEADS, WIDTH)
    head = torch.arange(HEADS).view(1, 1, HEADS, 1)
    kept = v.view(sequences, length, HEADS, WIDTH) * (head == labels)
    values = torch.zeros(sequences, length, HEADS, HEADS, WIDTH)
    for slot in range(HEADS):
        values[:, :, slot, slot] = kept[:, :, slot]
    values = values.view(sequences, 1, length * HEADS, HEADS * WIDTH)
    token = torch.arange(length).repeat_interleave(HEADS)
    causal = token[None, :] <= torch.arange(length)[:, None]
    # PyTorch's fused kernel needs queries, keys and values of one width.
    wide = [F.pad(x, (0, HEADS * WIDTH - WIDTH)) for x in (queries, keys)]
    forms = {"unfused": [queries, keys, values], "fused": [*wide, values]}

    def theirs(x: list[torch.Tensor]) -> torch.Tensor:
        return F.scaled_dot_product_attention(*x, attn_mask=causal, scale=WIDTH**-0.5)

    expected = dfar.torch.fha(q, k, v, cu_seqlens, label)
    for name, x in forms.items():
        difference = (theirs(x).view(expected.shape) - expected).abs().max()
        assert difference < 1e-5 * expected.abs().max(), name
    ours = shortest(lambda: dfar.torch.fha(q, k, v, cu_seqlens, label))
    times = {name: round(shortest(lambda x=x: theirs(x)), 3) for name, x in forms.items()}
    ratio = min(times.values()) / ours
    print(f"| forward, T = 100, tensors | dfar {ours:.3f} | torch {times} | {ratio:.1f}x |")

    def both(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
        return lambda: call().sum().backward()

    for x in (q, k, v, *(y for x in forms.values() for y in x)):
        x.requires_grad_()
    ours = shortest(both(lambda: dfar.torch.fha(q, k, v, cu_seqlens, label)))
    times = {name: round(shortest(both(lambda x=x: theirs(x))), 3) for name, x in forms.items()}
    ratio = min(times.values()) / ours
    print(f"| forward + backward | dfar {ours:.3f} | torch {times} | {ratio:.1f}x |")


def scoring(bin: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = dfar.synthetic(f"{folder}/x.dfar", users=1000, items=500, events_per_user=50)
        run = dfar.train(data, {"epochs": 1, "patience": 0}, f"{folder}/run", progress=False)
        ours = shortest(lambda: run.recommend(k=10, data=data), 10)
        command = [bin / "dfar-train", "score", "--run", run.dir, "--all-users", "--exclude-seen",
                   "--top", "10", "--output", f"{folder}/scores.csv", "--quiet"]
        theirs = shortest(lambda: subprocess.run(command, check=True), 10)
        whole = shortest(lambda: dfar.Run.open(run.dir).recommend(k=10), 10)
        print(f"| 1,000 users, 500 items | recommend {ours:.1f} | with opening {whole:.1f} | command {theirs:.1f} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--bin", type=Path, default=root / "target" / "release")
    bin = parser.parse_args().bin
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()}")
    attention(bin)
    scoring(bin)
    try:
        torch_forms()
    except ImportError:
        print("torch is not installed")
    print(f"load {os.getloadavg()}, Python {sys.version.split()[0]}, NumPy {np.__version__}")


if __name__ == "__main__":
    main()
