#!/usr/bin/env python3
"""Runs every peer once on this machine's GPU and writes the results to a folder.

    python run.py OUT_DIR [--golden DIR] [--limit-s 1500] [-- arguments for attention.py]

OUT_DIR gets environment.json, check.txt, attention.jsonl, training.jsonl and summary.txt. A second
run with the same OUT_DIR continues where the first one stopped (--fresh starts again).
"""
import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
BROKEN_DEVICE = 75


def environment():
    import torch
    import triton
    if not torch.cuda.is_available():
        sys.exit("no CUDA GPU here; attention.py --check and training.py --check run without one")
    smi = shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv,noheader"],
                         capture_output=True, text=True)
    p = torch.cuda.get_device_properties(0)
    return dict(gpu=p.name, multiprocessors=p.multi_processor_count, memory_gib=round(p.total_memory / 2**30, 1),
                l2_mib=p.L2_cache_size / 2**20, nvidia_smi=smi.stdout.strip() if smi else None, torch=torch.__version__, triton=triton.__version__,
                cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), python=sys.version.split()[0],
                date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))


def python(script, *arguments, **kw):
    return subprocess.run([sys.executable, os.path.join(HERE, script), *map(str, arguments)], text=True, **kw)


def rows(path):
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []


def summary(attention, training):
    """The fastest exact peer of each shape, then the training steps."""
    lines = [f"{'norm':7}{'dtype':6}{'H':>2}{'d':>4}{'T':>8} {'pass':8}{'ms':>10}  best exact peer; others"]
    shapes = {}
    for r in attention:
        shapes.setdefault(tuple(r[n] for n in ("normalization", "dtype", "H", "d", "T", "pass")), []).append(r)
    for (norm, dtype, H, d, T, direction), found in shapes.items():
        timed = sorted((r for r in found if r.get("ms")), key=lambda r: r["ms"])
        exact = [r for r in timed if r["exact"]]
        if exact:
            others = " ".join(f"{r['peer']}{'' if r['exact'] else '(not exact)'}={r['ms']:.3g}" for r in timed if r is not exact[0])
            lines.append(f"{norm:7}{dtype:6}{H:>2}{d:>4}{T:>8} {direction:8}{exact[0]['ms']:10.4f}  {exact[0]['peer']}; {others}")
    lines += [f"{r['peer']:16}{r['precision']:6}{r['lengths']:7}{r['compile_mode']:16}" +
              (f"{r['ms']:10.2f} ms {r['instances_per_s']:12.0f} instances/s {r['peak_gib']:7.1f} GiB" if r.get("ms") else f" {r['error'][:80]}")
              for r in training]
    failed = [f"{r['peer']} {r['normalization']} d={r['d']} T={r['T']} {r['pass']}: {r['error'][:100]}" for r in attention if r.get("error")]
    return "\n".join(lines + ([f"{len(failed)} rows without a time:"] + failed if failed else []))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out")
    p.add_argument("--golden", help="folder of golden cases; without it, checks use only random inputs")
    p.add_argument("--limit-s", type=float, default=1e9, help="start no new row after this many seconds")
    p.add_argument("--only", choices=["check", "attention", "training"])
    p.add_argument("--fresh", action="store_true")
    p.add_argument("rest", nargs="*", help="after --, arguments for attention.py")
    a = p.parse_args()
    begun = time.monotonic()
    left = lambda: a.limit_s - (time.monotonic() - begun)
    os.makedirs(a.out, exist_ok=True)
    path = lambda name: os.path.join(a.out, name)
    if a.fresh:
        for name in ("attention.jsonl", "training.jsonl"):
            if os.path.exists(path(name)):
                os.remove(path(name))
    with open(path("environment.json"), "w") as f:
        json.dump(environment(), f, indent=1)
    if a.only in (None, "check"):
        with open(path("check.txt"), "w") as f:
            for script, arguments in (("training.py", ["--check", a.golden] if a.golden else None),
                                      ("attention.py", ["--check", *(["--golden", a.golden] if a.golden else [])])):
                if arguments:
                    code = python(script, *arguments, stdout=f, stderr=subprocess.STDOUT).returncode
                    print(f"{script} --check: {'ok' if code == 0 else f'failed ({code}), see check.txt'}", flush=True)
    if a.only in (None, "training") and not rows(path("training.jsonl")):
        python("training.py", "--out", path("training.jsonl"), "--limit-s", left(), stdout=subprocess.DEVNULL)
    if a.only in (None, "attention"):
        # A peer that breaks the CUDA context ends its process. Its row is written, so the next
        # process continues after it.
        for _ in range(6):
            code = python("attention.py", "--resume", "--out", path("attention.jsonl"), "--limit-s", left(), *a.rest,
                          stdout=subprocess.DEVNULL).returncode
            if code != BROKEN_DEVICE:
                break
    text = summary(rows(path("attention.jsonl")), rows(path("training.jsonl")))
    with open(path("summary.txt"), "w") as f:
        f.write(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
