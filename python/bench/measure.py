"""Measures the package against the engine itself and against PyTorch. Prints a Markdown table.

    cargo build --release -p dfar -p dfar-python --bins
    python python/bench/measure.py [--bin target/release] [--threads N] [--quick]

Each time is the shortest of many calls, in milliseconds. The two sides of a row are measured in
turns, so that both see the same load. The engine's own times are those of `dfar-bench attention`
and `dfar-train score`. The last column is what the package should reach.
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

HEADS, WIDTH, TOKENS = 2, 16, 16384

Calls = dict[str, Callable[[], object]]
Times = dict[str, float]


class Setup:
    """How calls are measured."""

    def __init__(self, bin: Path, threads: int, rounds: int, seconds: float) -> None:
        self.bin, self.threads, self.rounds, self.seconds = bin, threads, rounds, seconds

    def shortest(self, call: Callable[[], object]) -> float:
        call()
        best, end = float("inf"), time.perf_counter() + self.seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        return 1e3 * best

    def in_turns(self, calls: Calls, others: Callable[[], Times] = dict) -> Times:
        """The shortest times of the calls and, measured between them, of `others`."""
        best: Times = {}
        for _ in range(self.rounds):
            times = others() | {name: self.shortest(call) for name, call in calls.items()}
            best = {name: min(ms, best.get(name, ms)) for name, ms in times.items()}
        return best

    def engine(self, length: int) -> Times:
        """The engine's own times of both passes."""
        with tempfile.NamedTemporaryFile() as file:
            subprocess.run(
                [self.bin / "dfar-bench", "attention", "--seq-lens", str(length),
                 "--heads", str(HEADS), "--head-dim", str(WIDTH), "--batch-tokens", str(TOKENS),
                 "--threads", str(self.threads), "--no-naive", "--json", file.name],
                check=True, capture_output=True,
            )
            text = Path(file.name).read_text()
        rows = json.loads(text) if text.startswith("[") else [json.loads(x) for x in text.splitlines()]
        return {f"engine {row['pass']}": row["fused_ms"] for row in rows}


def row(what: str, ours: float, theirs: Times, ratio: float, target: str) -> None:
    other = ", ".join(f"{name} {ms:.3f}" for name, ms in theirs.items())
    print(f"| {what} | {ours:.3f} | {other} | {ratio:.2f} | {target} |", flush=True)


def arguments(length: int) -> tuple[np.ndarray, ...]:
    """Sequences of one length, as in `dfar-bench attention`."""
    random = np.random.default_rng(1)
    count = max(1, TOKENS // length)
    q, k, v = (
        random.uniform(-1.7, 1.7, (count * length, HEADS, WIDTH)).astype(np.float32) for _ in range(3)
    )
    cu_seqlens = np.arange(0, (count + 1) * length, length, dtype=np.uint32)
    return q, k, v, cu_seqlens, random.integers(0, 2, count * length).astype(np.uint8)


def on_arrays(setup: Setup, length: int) -> None:
    x = arguments(length)
    state = dfar.fha(*x, return_lse=True)
    d_o = np.ones_like(state[0])

    def backward(o: np.ndarray, lse: np.ndarray) -> object:
        return dfar.fha_backward(d_o, *x[:3], o, lse, *x[3:])

    calls: Calls = {
        "forward": lambda: dfar.fha(*x),
        "backward": lambda: backward(*state),
        "forward + backward": lambda: backward(*dfar.fha(*x, return_lse=True)),
    }
    times = setup.in_turns(calls, lambda: setup.engine(length))
    times["engine forward + backward"] = times["engine forward"] + times["engine backward"]
    for name in calls:
        engine = times[f"engine {name}"]
        row(f"arrays, T = {length}, {name}", times[name], {"engine": engine}, times[name] / engine,
            "at most 1.05 times the engine's")


def on_tensors(setup: Setup) -> None:
    """Against the engine, and against forms of `scaled_dot_product_attention`, whose inputs are
    prepared outside the measurement."""
    import torch
    import torch.nn.functional as F

    import dfar.torch

    torch.set_num_threads(setup.threads or os.cpu_count() or 1)
    length = 100
    q, k, v, cu_seqlens, label = map(torch.from_numpy, arguments(length))
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
    forms = {
        "ours": (lambda q, k, v: dfar.torch.fha(q, k, v, cu_seqlens, label), [q, k, v]),
        **{
            name: (lambda *x: F.scaled_dot_product_attention(*x, attn_mask=causal, scale=WIDTH**-0.5), x)
            for name, x in (("unfused", [queries, keys, values]), ("fused", [*wide, values]))
        },
    }
    expected = dfar.torch.fha(q, k, v, cu_seqlens, label)
    for name, (form, x) in forms.items():
        difference = (form(*x).view(expected.shape) - expected).abs().max()
        assert difference < 1e-5 * expected.abs().max(), name

    def report(what: str, calls: Calls, engine: Callable[[Times], float]) -> None:
        times = setup.in_turns(calls, lambda: setup.engine(length))
        ours, pure, what = times["ours"], engine(times), f"tensors, T = {length}, {what}"
        row(what, ours, {"engine": pure}, ours / pure, "at most 1.05 times the engine's")
        theirs = {f"torch {name}": times[name] for name in forms if name != "ours"}
        row(what, ours, theirs, min(theirs.values()) / ours, "at least 5 times faster than the best")

    report(
        "forward",
        {name: lambda form=form, x=x: form(*x) for name, (form, x) in forms.items()},
        lambda times: times["engine forward"],
    )

    def both(form: Callable[..., torch.Tensor], x: list[torch.Tensor]) -> Callable[[], object]:
        x = [tensor.detach().requires_grad_() for tensor in x]
        d_o = torch.ones_like(form(*x))
        return lambda: torch.autograd.grad(form(*x), x, d_o)

    report(
        "forward + backward",
        {name: both(form, x) for name, (form, x) in forms.items()},
        lambda times: times["engine forward"] + times["engine backward"],
    )


def scoring(setup: Setup) -> None:
    """The command starts, opens the run and the data set, and writes a file. Python opens them too,
    or has them open."""
    with tempfile.TemporaryDirectory() as folder:
        data = dfar.synthetic(f"{folder}/x.dfar", users=1000, items=500, events_per_user=50)
        run = dfar.train(data, {"epochs": 1, "patience": 0}, f"{folder}/run", progress=False)
        command = [setup.bin / "dfar-train", "score", "--run", run.dir, "--all-users", "--exclude-seen",
                   "--top", "10", "--output", f"{folder}/scores.csv", "--quiet",
                   "--threads", str(setup.threads)]
        times = setup.in_turns({
            "opened": lambda: dfar.Run.open(run.dir).recommend(k=10),
            "open": lambda: run.recommend(k=10, data=data),
            "command": lambda: subprocess.run(command, check=True),
        })
    theirs = {"command": times["command"]}
    for name, what in (("opened", "with opening the run"), ("open", "of an open run")):
        row(f"1,000 users, all of 500 items, {what}", times[name], theirs,
            times[name] / times["command"], "at most 1.1 times the command's")


def main() -> None:
    parser = argparse.ArgumentParser()
    root = Path(__file__).resolve().parents[2]
    parser.add_argument("--bin", type=Path, default=root / "target" / "release")
    parser.add_argument("--threads", type=int, default=0, help="of both sides; 0: one per core")
    parser.add_argument("--quick", action="store_true", help="to see that it works")
    given = parser.parse_args()
    dfar.set_threads(given.threads)
    setup = Setup(given.bin, given.threads, *((1, 0.1) if given.quick else (6, 1.0)))
    versions = f"Python {sys.version.split()[0]}, NumPy {np.__version__}"
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {versions}")
    print(f"{TOKENS} tokens, {HEADS} heads of {WIDTH}; load {os.getloadavg()}\n")
    print("| | dfar in Python, ms | compared with, ms | ratio | target |\n|---|--:|---|--:|---|")
    for length in (100, 1024):
        on_arrays(setup, length)
    try:
        on_tensors(setup)
    except ImportError:
        print("| tensors | | torch is not installed | | |")
    scoring(setup)
    print(f"\nload {os.getloadavg()}")


if __name__ == "__main__":
    main()
