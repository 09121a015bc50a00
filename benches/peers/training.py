#!/usr/bin/env python3
"""A DFAR training step in PyTorch on padded batches: instances/s, histories shared or not.

    python training.py --check GOLDEN_DIR   compare losses, logits, gradients with golden cases
    python training.py --out rows.jsonl     time the paper's size on the GPU
"""
import argparse
import json
import statistics
import sys
import time

import torch

from dfar import golden
from dfar.model import Dfar, clip_each, loss

WEIGHTS = {"bpr": 0.3, "idl": 0.2, "embed_l2": 1e-6}


def batches(a, shared, mixed, count, device):
    """Random batches of a.batch instances with histories of a.events events, or 1 to a.events."""
    draw = torch.Generator(device=device).manual_seed(0)
    integers = lambda high, *shape: torch.randint(0, high, shape, generator=draw, device=device)
    groups = a.batch // a.candidates
    target = torch.zeros(groups, a.candidates, device=device)
    target[:, 0] = 1
    out = []
    for _ in range(count):
        lengths = integers(a.events, groups) + 1 if mixed else torch.full((groups,), a.events, device=device)
        batch = (integers(a.items, groups, a.events), integers(2, groups, a.events), lengths,
                 integers(a.items, groups, a.candidates), target)
        out.append(golden.share(batch, shared))
    return out


def time_step(a, shared, mixed, precision, mode, device):
    """-> fields of a row"""
    torch.compiler.reset()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if precision == "f32" else "high")
    model = Dfar(a.items, a.events, a.width, a.heads, a.normalization).to(device)
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, lr=1e-3, eps=1e-8, fused=device.type == "cuda")
    f = torch.compile(loss, dynamic=False, mode=mode) if not a.no_compile else loss
    data = batches(a, shared, mixed, 4, device)
    with torch.no_grad():
        eager = float(loss(model, *data[0], WEIGHTS)[0])

    def step(batch):
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            total, _, _ = f(model, *batch, WEIGHTS)
        total.backward()
        clip_each([p.grad for p in parameters], 2.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.detach()

    start = time.perf_counter()
    first = float(step(data[0]))
    compile_s = time.perf_counter() - start
    if not abs(first - eager) <= 1e-2 * abs(eager):
        raise ArithmeticError(f"wrong loss, not timed: {first} compiled, {eager} eager")
    for batch in data[1:]:
        step(batch)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times, begun = [], time.perf_counter()
    while len(times) < 5 or (time.perf_counter() - begun < a.seconds and len(times) < 50):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        # Several steps in a row, so that the host runs ahead of the device.
        for batch in data:
            last = step(batch)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(data))
    ms, last = statistics.median(times), float(last)
    if not last == last or abs(last) == float("inf"):
        raise ArithmeticError(f"loss went from {first} to {last}")
    return dict(ms=ms, instances_per_s=a.batch / ms * 1e3, compile_s=round(compile_s, 1), first_loss=first, last_loss=last,
                peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 2))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", metavar="GOLDEN_DIR")
    p.add_argument("--out", help="file of JSON lines (they also go to stdout)")
    p.add_argument("--events", type=int, default=300)
    p.add_argument("--candidates", type=int, default=10)
    p.add_argument("--width", type=int, default=32)
    p.add_argument("--heads", type=int, default=2)
    p.add_argument("--batch", type=int, default=2000, help="instances (candidates) per step")
    p.add_argument("--items", type=int, default=100_000)
    p.add_argument("--normalization", default="joint", choices=["joint", "masked"])
    p.add_argument("--precision", nargs="+", default=["tf32", "bf16"], choices=["f32", "tf32", "bf16"])
    p.add_argument("--lengths", nargs="+", default=["full"], choices=["full", "mixed"])
    p.add_argument("--compile-mode", nargs="+", default=["default"], choices=["default", "reduce-overhead", "max-autotune"])
    p.add_argument("--no-compile", action="store_true")
    p.add_argument("--seconds", type=float, default=5.0, help="time to measure a row")
    p.add_argument("--limit-s", type=float, default=1e9, help="start no new row after this many seconds")
    a = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if a.check:
        sys.exit(0 if golden.check(a.check, device) else 1)
    if device.type == "cpu":
        sys.exit("timing needs a CUDA GPU; --check GOLDEN_DIR runs without one")
    deadline = time.monotonic() + a.limit_s
    out = open(a.out, "a") if a.out else None
    for mode in a.compile_mode:
        for precision in a.precision:
            for lengths in a.lengths:
                for shared in (True, False):
                    if time.monotonic() > deadline:
                        sys.exit("time limit reached")
                    row = dict(peer="dfar_shared" if shared else "dfar_instances", precision=precision, lengths=lengths, compile_mode=mode,
                               events=a.events, candidates=a.candidates, width=a.width, heads=a.heads, batch=a.batch, items=a.items,
                               normalization=a.normalization)
                    try:
                        row.update(time_step(a, shared, lengths == "mixed", precision, mode, device))
                    except Exception as e:
                        row.update(ms=None, error=f"{type(e).__name__}: {str(e)[:300]}")
                    line = json.dumps(row)
                    print(line, flush=True)
                    if out:
                        print(line, file=out, flush=True)
                    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
