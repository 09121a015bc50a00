"""Worker processes, and the turns in which they are timed."""

import contextlib
import json
import os
import select
import statistics
import subprocess


class Failed(Exception):
    """A worker said why it could not do something, or ended."""


def environment(threads):
    """The number of threads for libraries that do not count the processors of the process."""
    names = (
        "OMP_NUM_THREADS",
        "MKL_NUM_THREADS",
        "OPENBLAS_NUM_THREADS",
        "RAYON_NUM_THREADS",
        "POLARS_MAX_THREADS",
    )
    # Workarounds for old versions of OpenBLAS make a current NumPy slow.
    kept = {
        k: v for k, v in os.environ.items() if k not in ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
    }
    return {**kept, **{name: str(threads) for name in names}}


def restrict(threads):
    """Binds this process and its children to `threads` processors."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-threads:])


class Worker:
    """A process that speaks protocol.py. It is idle between requests."""

    def __init__(self, command, threads, log):
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            bufsize=1,
            env=environment(threads),
            preexec_fn=lambda: restrict(threads),
        )

    def ask(self, limit_s=900, **request):
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
        except OSError:
            raise Failed("the worker has ended") from None
        if not select.select([self.process.stdout], [], [], limit_s)[0]:
            self.process.kill()
            raise Failed(f"no answer within {limit_s} s")
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"the worker ended with {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def close(self):
        with contextlib.suppress(OSError):  # an ended worker leaves a broken pipe
            self.process.stdin.close()
        self.process.stdout.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def interleave(measures, rounds, fewer={}):
    """Times peers in turn: `measures` maps a name to a function that returns the seconds of one or
    more calls. Each round calls every function once and begins with another one; `fewer` has the rounds
    of those that take part in some only.
    -> {name: {"ms", "median_ms", "calls"} or {"error"}}: the shortest call, and the median of the
    rounds' shortest."""
    names, found, failed = list(measures), {}, {}
    for turn in range(rounds):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            if name in failed or turn >= fewer.get(name, rounds):
                continue
            try:
                found.setdefault(name, []).append(measures[name]())
            except Failed as e:
                failed[name] = str(e)
    rows = {name: {"error": reason} for name, reason in failed.items()}
    for name in names:
        if name not in failed:
            shortest = [min(times) for times in found[name]]
            rows[name] = {
                "ms": 1e3 * min(shortest),
                "median_ms": 1e3 * statistics.median(shortest),
                "calls": sum(map(len, found[name])),
            }
    return rows
