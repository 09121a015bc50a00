#!/usr/bin/env python3
"""FHA with the attention operations of PyTorch, checked against float64 and then timed. README.md
explains the rows.

    python attention.py --check [--golden DIR]         correctness only, on the CPU or the GPU
    python attention.py --out rows.jsonl               check, then time everything on the GPU
"""
import argparse
import json
import sys
import time

import torch

from fha import inputs, reference, timing
from fha.batch import Batch, skewed_lengths, uniform_lengths
from fha.engines import ENGINES, without_gpu
from fha.flex import Flex
from fha.naive import Naive
from fha.pairs import Pairs, Varlen
from fha.sdpa import Sdpa

LENGTHS = (20, 50, 100, 200, 300, 1024, 4096)
TOKENS = 307_200           # divisible by every length above, and by FlexAttention's block of 128
BROKEN_DEVICE = 75         # exit code: a peer broke the CUDA context; run again with --resume
_16_BIT = ("bf16", "f16")


def peers(compiler):
    """name -> (peer, refusal), with refusal(H, d, dtype, normalization, uniform lengths) -> None or
    the reason why the peer cannot run."""
    always = lambda H, d, dtype, norm, uniform: None
    ragged = lambda H, d, dtype, norm, uniform: "same as naive_padded when all lengths agree" if uniform else None
    flex = lambda H, d, dtype, norm, uniform: None if d >= 16 else "FlexAttention needs d >= 16"
    half = lambda H, d, dtype, norm, uniform: None if dtype in _16_BIT else "16-bit types only"
    plain = lambda H, d, dtype, norm, uniform: half(H, d, dtype, norm, uniform) or (
        None if (H, norm) == (2, "masked") else "only Masked with H = 2 is plain causal attention")
    wide = lambda H, d, dtype, norm, uniform: None if d % 8 == 0 else "widths are multiples of 8"
    both = lambda *a: half(*a) or wide(*a)
    return {
        "naive_padded": (Naive(compiler, bucketed=False), always),
        "naive_bucketed": (Naive(compiler, bucketed=True), ragged),
        "sdpa_padded": (Sdpa(compiler, bucketed=False), always),
        "sdpa_bucketed": (Sdpa(compiler, bucketed=True), always),
        "sdpa_bucketed_efficient": (Sdpa(compiler, bucketed=True, backend="efficient"), wide),
        "sdpa_bucketed_cudnn": (Sdpa(compiler, bucketed=True, backend="cudnn"), both),
        "flex": (Flex(compiler), flex),
        "flex_cold": (Flex(compiler, cold=True), flex),
        "pairs_flash": (Pairs(compiler, ENGINES["flash"]), both),
        "pairs_cudnn": (Pairs(compiler, ENGINES["cudnn"]), both),
        "pairs_efficient": (Pairs(compiler, ENGINES["efficient"]), wide),
        "varlen_attn": (Varlen(compiler), plain),
        "varlen_attn_summed": (Varlen(compiler, summed=True), plain),
    }


def cpu_peers(compiler):
    """The checks without a GPU: stand-ins replace the libraries' kernels, in every precision."""
    without_gpu()
    chosen = {n: p for n, p in peers(compiler).items() if n.split("_")[0] in ("naive", "flex")
              or n in ("sdpa_padded", "sdpa_bucketed")}
    return {**chosen, **{f"pairs_{name}": (Pairs(compiler, e), lambda *a: None) for name, e in ENGINES.items()}}


def check_cases(dtype, device, golden):
    """Yields (name, normalization, batch, inputs): random, then golden ones rounded to `dtype`."""
    for H, d in ((2, 16), (4, 16)):
        for norm in ("joint", "masked"):
            for name, batch, x in inputs.small_cases(H, d, dtype, device):
                yield f"{name} H={H} d={d} {norm}", norm, batch, x
    for name, case, batch, t in inputs.golden_cases(golden, device) if golden else ():
        # Unfused 16-bit products cannot represent scores of 1e3.
        if dtype in ("f64", "f32") or "large" not in name:
            yield name, case["normalization"], batch, inputs.golden_inputs(t, batch, dtype)


def check(device, compiler, golden, only):
    """Every peer on small random and golden inputs; True if all agree with float64."""
    good = True

    def report(name, ok, text):
        nonlocal good
        good &= ok
        print(f"{'ok  ' if ok else 'FAIL'} {name:24} {text}", flush=True)

    if golden:
        for name, case, batch, t in inputs.golden_cases(golden, "cpu"):
            leaves = [t[n].double().requires_grad_() for n in ("q", "k", "v")]
            o, lse = reference.fha(*leaves, t["label"], batch, case["normalization"])
            got = {"o": o, "lse": lse, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(o, leaves, t["do"].double())))}
            worst = max(reference.relative_error(got[n].detach(), t[n]) for n in got)
            report("reference", worst < 1e-11, f"{name}: {worst:.1e}")
    on_cpu = device.type == "cpu"
    for name, (peer, allowed) in (cpu_peers if on_cpu else peers)(compiler).items():
        if only and name not in only:
            continue
        # On the CPU, FlexAttention has a forward pass only.
        backward = not (on_cpu and name.startswith("flex"))
        for dtype in ("f64", "f32", "bf16") if on_cpu else ("f32", "bf16", "f16"):
            if name.startswith("flex") and dtype == "f64":
                continue
            worst, cases = {}, 0
            for where, norm, batch, x in check_cases(dtype, device, golden):
                if allowed(x.q.shape[1], x.q.shape[2], dtype, norm, batch.uniform):
                    continue
                try:
                    found = inputs.errors(peer, x, batch, norm, backward)
                except Exception as e:
                    found = {f"{type(e).__name__}: {str(e).splitlines()[0][:120]}": float("inf")}
                cases += 1
                for output, e in found.items():
                    if e >= worst.get(output, (0.0,))[0]:
                        worst[output] = e, where
            if not cases:
                continue
            bad = [(k, *w) for k, w in worst.items() if not w[0] <= inputs.TOLERANCE[dtype]]
            text = "; ".join(f"{k} {e:.1e} at {w}" for k, e, w in bad) if bad else \
                " ".join(f"{k} {e:.1e}" for k, (e, _) in worst.items())
            report(name, not bad, f"{dtype} {cases} cases: {text}{'' if backward else ' (forward only)'}")
    return good


def spread(lengths, count=8):
    """Sequences of the timed batch to compare: the first, the last, the longest, some between."""
    last = len(lengths) - 1
    return sorted({max(range(last + 1), key=lengths.__getitem__), *(last * i // (count - 1) for i in range(count))})


def time_one(peer, sets, batch, norm, dtype, backward):
    """-> fields of a row. Raises if the peer is wrong or fails."""
    step = (lambda x: inputs.forward_backward(peer, x, batch, norm)) if backward else \
        (lambda x: inputs.forward(peer, x, batch, norm))
    start = time.perf_counter()
    step(sets[0])
    torch.cuda.synchronize()
    compile_s = time.perf_counter() - start
    found = inputs.errors(peer, sets[0], batch, norm, backward, spread(batch.lengths))
    worst = max(found.values())
    row = dict(max_rel_err=worst, compile_s=round(compile_s, 2), backend=peer.backend, lse=peer.has_lse, exact=peer.exact)
    if not worst <= inputs.TOLERANCE[dtype]:
        raise ArithmeticError(f"wrong result, not timed: {found}")
    row["ms_eager"] = timing.eager_ms(step, sets)
    try:
        row["ms"], row["timer"] = timing.graph_ms(step, sets), "graph"
    except Exception as e:
        torch.cuda.synchronize()
        row["ms"], row["timer"] = row["ms_eager"], f"eager (no graph: {str(e).splitlines()[0][:100]})"
    return row


def key(row):
    return tuple(row[n] for n in ("peer", "T", "d", "H", "dtype", "normalization", "pass", "tokens"))


def run(a, device):
    done = set()
    if a.resume:
        try:
            done = {key(json.loads(line)) for line in open(a.out)}
        except FileNotFoundError:
            pass
    out = open(a.out, "a" if a.resume else "w") if a.out else None
    deadline = time.monotonic() + a.limit_s
    cases = [(str(T), uniform_lengths(T, a.tokens)) for T in a.T] + ([] if a.no_skewed else [("skewed", skewed_lengths(a.tokens))])

    def emit(row):
        line = json.dumps(row)
        print(line, flush=True)
        if out:
            print(line, file=out, flush=True)

    for dtype in a.dtype:
        for d in a.d:
            for H in a.H:
                for norm in a.normalization:
                    torch.compiler.reset()
                    table = {n: p for n, p in peers(a.compiler).items() if not a.peers or n in a.peers}
                    for T, lengths in cases:
                        batch, sets = Batch(lengths, device), None
                        for name, (peer, allowed) in table.items():
                            if allowed(H, d, dtype, norm, batch.uniform):
                                continue
                            for direction in a.passes:
                                row = dict(peer=name, T=T, d=d, H=H, dtype=dtype, normalization=norm, **{"pass": direction},
                                           tokens=batch.tokens, sequences=len(lengths))
                                if key(row) in done:
                                    continue
                                if time.monotonic() > deadline:
                                    print("time limit reached; run again with --resume", file=sys.stderr)
                                    return
                                if sets is None:
                                    first = inputs.Inputs(batch, H, d, dtype, 0)
                                    sets = [first] + [inputs.Inputs(batch, H, d, dtype, i) for i in
                                                      range(1, timing.sets_past_cache(first.bytes, device))]
                                try:
                                    row.update(time_one(peer, sets, batch, norm, dtype, direction == "fwd+bwd"))
                                except torch.cuda.OutOfMemoryError:
                                    row.update(ms=None, error="out of memory")
                                except Exception as e:
                                    row.update(ms=None, error=f"{type(e).__name__}: {str(e)[:300]}")
                                emit(row)
                                try:
                                    torch.cuda.synchronize()
                                    torch.cuda.empty_cache()
                                except Exception:
                                    sys.exit(BROKEN_DEVICE)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--check", action="store_true", help="correctness only")
    p.add_argument("--golden", help="folder of golden cases (fha_*.safetensors)")
    p.add_argument("--out", help="file of JSON lines (they also go to stdout)")
    p.add_argument("--resume", action="store_true", help="append to --out, skipping the rows it already has")
    p.add_argument("--limit-s", type=float, default=1e9, help="start no new row after this many seconds")
    p.add_argument("--T", type=int, nargs="+", default=LENGTHS)
    p.add_argument("--d", type=int, nargs="+", default=[16, 32])
    p.add_argument("--H", type=int, nargs="+", default=[2])
    p.add_argument("--dtype", nargs="+", default=["bf16"], choices=["f32", "bf16", "f16"])
    p.add_argument("--normalization", nargs="+", default=["joint", "masked"], choices=["joint", "masked"])
    p.add_argument("--passes", nargs="+", default=["fwd", "fwd+bwd"], choices=["fwd", "fwd+bwd"])
    p.add_argument("--peers", nargs="+", help="only these rows")
    p.add_argument("--tokens", type=int, default=TOKENS)
    p.add_argument("--no-skewed", action="store_true")
    p.add_argument("--compile", action="store_true", help="with --check: compiled as in timing (minutes per peer)")
    p.add_argument("--no-compile", action="store_true", help="time everything eager")
    a = p.parse_args()
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.accumulated_recompile_limit = 4096
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    eager = a.no_compile or (a.check and not a.compile)
    a.compiler = (lambda f: f) if eager else (lambda f: torch.compile(f, dynamic=False))
    if a.check:
        sys.exit(0 if check(device, a.compiler, a.golden, a.peers) else 1)
    if device.type == "cpu":
        sys.exit("timing needs a CUDA GPU; --check runs without one")
    run(a, device)


if __name__ == "__main__":
    main()
