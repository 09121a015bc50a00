"""Measures the package against the engine itself and against PyTorch. Prints Markdown lines.

    cargo build --release -p dfar -p dfar-python --bins
    python python/bench.py [--bin target/release]

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
            [bin / "dfar-bench", "attention", "--lengths", str(length), "--tokens", str(tokens),
             "--no-naive", "--json", file.name],
            check=True, capture_output=True,
        )
        text = Path(file.name).read_text()
    rows = json.loads(text) if text.startswith("[") else [json.loads(x) for x in text.splitlines()]
    return {row["pass"]: round(row["fused_ms"], 3) for row in rows}


def attention(bin: Path) -> None:
    for length in (100, 1024):
        x = arguments(length, 16384)
        o, lse = dfar.fha(*x, return_lse=True)
        d_o = np.ones_like(o)
        before = engine(bin, length, 16384)
        forward = shortest(lambda: dfar.fha(*x))
        backward = shortest(lambda: dfar.fha_backward(d_o, *x[:3], o, lse, *x[3:]))
        after = engine(bin, length, 16384)
        print(f"| fha, T = {length} | {forward:.3f} | {backward:.3f} | engine: {before} {after} |")


def torch_forms() -> None:
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    import dfar.torch

    torch.set_num_threads(os.cpu_count() or 1)
    length, tokens = 100, 16384
    q, k, v, cu_seqlens, label = map(torch.from_numpy, arguments(length, tokens))
    sequences = len(cu_seqlens) - 1

    def padded(x: torch.Tensor) -> torch.Tensor:
        # [B, T, H, d] -> [B, 1, T * H, d]: the keys of a sequence are all (token, head) pairs.
        return x.view(sequences, 1, length * HEADS, WIDTH)

    token = torch.arange(length).repeat_interleave(HEADS)
    head = torch.arange(HEADS).repeat(length)
    causal = token[None, :] <= torch.arange(length)[:, None]
    kept = head[None, :] == label.view(sequences, length).repeat_interleave(HEADS, 1)

    def one_softmax() -> torch.Tensor:
        """The query head of each token's label; values of dropped pairs are zeroed before."""
        own = label.view(sequences, length, 1, 1).long().expand(-1, -1, 1, WIDTH)
        queries = q.view(sequences, length, HEADS, WIDTH).gather(2, own).view(sequences, 1, length, WIDTH)
        # One output for each key head: values side by side, zero where the pair is dropped.
        slots = torch.zeros(sequences, length, HEADS, HEADS, WIDTH)
        values = v.view(sequences, length, HEADS, WIDTH) * kept.view(sequences, length, HEADS, 1)
        for b in range(HEADS):
            slots[:, :, b, b] = values[:, :, b]
        values = slots.view(sequences, 1, length * HEADS, HEADS * WIDTH)
        return F.scaled_dot_product_attention(queries, padded(k), values, attn_mask=causal)

    expected = dfar.torch.fha(q, k, v, cu_seqlens, label)
    found = one_softmax().view(expected.shape)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max() + 1e-5
    ours = shortest(lambda: dfar.torch.fha(q, k, v, cu_seqlens, label))
    times = {}
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH):
        try:
            with sdpa_kernel(backend):
                times[backend.name] = shortest(one_softmax)
        except RuntimeError:
            times[backend.name] = float("nan")
    times["default"] = shortest(one_softmax)
    best = min(t for t in times.values() if t == t)
    print(f"| forward, T = 100, tensors | dfar {ours:.3f} | torch {times} | {best / ours:.1f}x |")

    for x in (q, k, v):
        x.requires_grad_()

    def both(call: Callable[[], torch.Tensor]) -> Callable[[], None]:
        return lambda: call().sum().backward()

    ours = shortest(both(lambda: dfar.torch.fha(q, k, v, cu_seqlens, label)))
    theirs = shortest(both(one_softmax))
    print(f"| forward + backward | dfar {ours:.3f} | torch default {theirs:.3f} | {theirs / ours:.1f}x |")


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
    root = Path(__file__).resolve().parents[1]
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
