#!/usr/bin/env python3
"""Times dfar and its peers on this machine's CPU, in turn, and files a table of ratios. ../cpu.sh
makes the environment and calls this; ../README.md explains the rows.

    run.py OUT [--quick] [--only attention] [--threads 1 2] [--results DIR]
"""

import argparse
import datetime
import glob
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time

import numpy as np
import reference
import report
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from turns import Failed, Worker, environment, interleave, restrict

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, ".."))

from systems import agreement

ROOT = os.path.abspath(os.path.join(HERE, "..", "..", ".."))
HEADS, WIDTH = 2, 16
LENGTHS = (20, 50, 100, 300, 1024, 16_384)
EVENTS = (20, 100, 300)
CANDIDATES, ITEMS = 10, 10_000


class Sizes:
    """How much is measured."""

    tokens, instances, csv_rows, rounds, seconds, lengths, events = (
        16_384,
        2000,
        5_000_000,
        7,
        0.25,
        LENGTHS,
        EVENTS,
    )
    users, batch_tokens = 5000, (512, 4096)


class Quick(Sizes):
    """As little as shows that everything works."""

    tokens, instances, csv_rows, rounds, seconds, lengths, events = (
        2048,
        100,
        200_000,
        2,
        0.02,
        (20, 300),
        (20,),
    )
    users, batch_tokens = 500, (512,)


# Inputs


def skewed_lengths(tokens, longest=1024, median=60.0):
    """Log-normal lengths (sigma 1), clamped to 1..longest; their sum is exactly `tokens`."""
    random, lengths = np.random.default_rng(0), []
    while tokens:
        n = int(np.clip(random.lognormal(np.log(median), 1.0), 1, longest))
        lengths.append(min(n, tokens))
        tokens -= lengths[-1]
    return lengths


def random_inputs(lengths):
    random, N = np.random.default_rng(1), sum(lengths)
    values = lambda *shape: random.uniform(-1.7, 1.7, shape).astype(np.float32)
    q, k, v = (values(N, HEADS, WIDTH) for _ in range(3))
    return {
        "q": q,
        "k": k,
        "v": v,
        "do": values(N, HEADS // 2, HEADS, WIDTH),
        "label": random.integers(0, 2, N).astype(np.uint8),
        "cu_seqlens": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    }


def spread(lengths, count=6):
    """Sequences to compare: the first, the last, the longest, some between."""
    last = len(lengths) - 1
    return sorted({int(np.argmax(lengths)), *(last * i // (count - 1) for i in range(count))})


# Workers


def attention_workers(a, *arguments):
    commands = {
        name: [sys.executable, os.path.join(HERE, f"worker_{name}.py"), *arguments]
        for name in ("dfar", "torch", "jax")
    }
    if a.candle:
        commands["candle"] = [a.candle]
    return commands


def start(commands, threads, log, path):
    """-> {peer: worker}, {peer or library: reason}: every worker with the inputs of `path`."""
    peers, absent, workers = {}, {}, []
    for name, command in commands.items():
        worker = Worker(command, threads, log)
        workers.append(worker)
        try:
            answer = worker.ask(do="load", path=path)
        except Failed as e:
            absent[name] = str(e)
            continue
        absent.update(answer["skipped"])
        peers.update({peer: worker for peer in answer["peers"]})
    return peers, absent, workers


def checked(peers, folder, judge):
    """-> {peer: error}, {peer: reason}: the worst relative error of those that agree with float64, and
    why the others do not. `judge(peer, results)` -> all errors by name, and those above the
    tolerance."""
    good, bad = {}, {}
    path = os.path.join(folder, "results.safetensors")
    for peer, worker in peers.items():
        try:
            seconds = worker.ask(do="check", peer=peer, path=path)["seconds"]
        except Failed as e:
            bad[peer] = str(e)
            continue
        print(f"{peer}: first call, with compilation: {seconds:.1f} s", flush=True)
        errors, above = judge(peer, load_file(path))
        if above:
            bad[peer] = "wrong: " + ", ".join(f"{n} {e:.1e}" for n, e in list(above.items())[:5])
        else:
            good[peer] = max(errors.values())
    return good, bad


def golden(a, log, folder):
    """Every peer on the golden cases that are causal, Joint and with label mask. Returns lines."""
    lines = [
        "# Relative errors against the float64 cases of tests/golden. over: above the tolerance. PyTorch is not",
        "# compiled here (its compiled form is checked before it is timed). Scores of `large_scores` reach 1e3:",
        "# f32 products cannot hold them; dfar computes them with compensated products.",
    ]
    for path in sorted(glob.glob(os.path.join(ROOT, "tests", "golden", "fha_*.safetensors"))):
        with safe_open(path, "np") as f:
            case = json.loads(f.metadata()["case"])
            t = {name: f.get_tensor(name) for name in f.keys()}
        if not (case["causal"] and case["label_mask"] and case["normalization"] == "joint"):
            continue
        lengths, name = np.array(case["lengths"]), os.path.basename(path)[4:-12]
        if (lengths == 0).any():
            continue  # the dense peers have no empty sequences
        x = {n: np.ascontiguousarray(t[n], np.float32) for n in ("q", "k", "v", "do")}
        x["label"], x["cu_seqlens"] = t["label"].astype(np.uint8), t["cu_seqlens"].astype(np.int64)
        inputs = os.path.join(folder, "golden.safetensors")
        save_file(x, inputs)
        peers, absent, workers = start(attention_workers(a, "--eager"), max(a.threads), log, inputs)
        results = os.path.join(folder, "results.safetensors")
        for peer, worker in peers.items():
            try:
                worker.ask(do="check", peer=peer, path=results)
                wanted = {n: t[n].astype(np.float64) for n in ("o", "dq", "dk", "dv")}
                errors, above = reference.judge(
                    load_file(results), slice(None), wanted, peer.split()[-1]
                )
                word, text = (
                    "over" if above else "ok  ",
                    " ".join(f"{n} {e:.1e}" for n, e in errors.items()),
                )
            except Failed as e:
                word, text = "fail", str(e)
            lines.append(f"{word} {name:16} {peer:28} {text}")
        lines += [f"skip {name:16} {peer:28} {reason}" for peer, reason in absent.items()]
        for worker in workers:
            worker.close()
    return lines


# Attention


def attention(a, out, log, folder):
    cases = [(str(T), [T] * max(1, a.size.tokens // T)) for T in a.size.lengths]
    cases.append(("skewed", skewed_lengths(a.size.tokens)))
    for case, lengths in cases:
        shape = dict(op="attention", case=case, tokens=sum(lengths))
        keys = [dict(shape, threads=threads) for threads in a.threads]
        if all(map(out.done, keys)):
            continue
        x, path = random_inputs(lengths), os.path.join(folder, "inputs.safetensors")
        save_file(x, path)
        rows, wanted = reference.expected(x, spread(lengths))
        for threads, key in zip(a.threads, keys):
            if out.done(key):
                continue
            peers, absent, workers = start(attention_workers(a), threads, log, path)
            judge = lambda peer, x: reference.judge(x, rows, wanted, peer.split()[-1])
            errors, bad = checked(peers, folder, judge)
            for peer, reason in {**absent, **bad}.items():
                out.row(key, peer=peer, error=reason)
            for direction in ("forward", "both"):
                measures, fewer = {}, {}
                for peer in errors:
                    warm = {"do": "warm", "peer": peer, "pass": direction}
                    try:
                        peers[peer].ask(**warm)  # may compile
                        seconds = peers[peer].ask(**warm)["seconds"]
                    except Failed as e:
                        out.row(key, peer=peer, error=str(e), **{"pass": direction})
                        continue
                    if seconds > 2:
                        fewer[peer] = 1 if seconds > 20 else 3
                    measures[peer] = lambda peer=peer, direction=direction: peers[peer].ask(
                        do="time", peer=peer, seconds=a.size.seconds, **{"pass": direction}
                    )["times"]
                for peer, row in interleave(measures, a.size.rounds, fewer).items():
                    out.row(key, peer=peer, max_rel_err=errors[peer], **{"pass": direction}, **row)
            for worker in workers:
                worker.close()
            out.finish(key)


# Training


def dfar_step(a, events, threads, precision):
    """Seconds per step of `dfar-bench train` on uniform batches: three steps after a first one."""
    command = [
        os.path.join(a.bin, "dfar-bench"),
        "train",
        "--uniform",
        "--max-length",
        events,
        "--negatives",
        CANDIDATES - 1,
        "--batch-rows",
        a.size.instances,
        "--batches",
        4,
        "--threads",
        threads,
        "--precision",
        precision,
        "--json",
    ]
    try:
        text = subprocess.run(
            [str(x) for x in command],
            check=True,
            capture_output=True,
            text=True,
            env=environment(threads),
            preexec_fn=lambda: restrict(threads),
        ).stdout
    except subprocess.CalledProcessError as e:
        raise Failed(e.stderr.strip()[:300]) from None
    steps = json.loads(text)["steps"]
    return [steps["seconds"] / steps["steps"]]


def torch_steps(worker, peer):
    """Seconds per step, like `dfar_step` the mean of three."""
    request = {"do": "time", "peer": peer, "pass": "step", "seconds": 0.0}
    return [sum(worker.ask(**request)["times"][0] for _ in range(3)) / 3]


def training(a, out, log, folder):
    for events in a.size.events:
        for threads in a.threads:
            key = dict(
                op="training",
                case=str(events),
                threads=threads,
                instances=a.size.instances,
                **{"pass": "step"},
            )
            if out.done(key):
                continue
            config = os.path.join(folder, "training.json")
            results = os.path.join(folder, "loss.safetensors")
            shape = {"events": events, "batch": a.size.instances, "candidates": CANDIDATES}
            report.write_json(config, {**shape, "width": 32, "heads": 2, "items": ITEMS})
            command = {"torch": [sys.executable, os.path.join(HERE, "worker_train.py")]}
            peers, absent, workers = start(command, threads, log, config)
            measures = {
                f"dfar {p}": lambda p=p: dfar_step(a, events, threads, p) for p in ("f32", "bf16")
            }
            first = None
            for peer, worker in peers.items():
                try:
                    worker.ask(do="check", peer=peer, path=results)
                    worker.ask(do="warm", peer=peer, **{"pass": "step"})
                except Failed as e:
                    absent[peer] = str(e)
                    continue
                # All peers begin with the same parameters and batch.
                loss = float(load_file(results)["loss"][0])
                first = loss if first is None else first
                if not abs(loss - first) <= 1e-2 * abs(first):
                    absent[peer] = f"wrong: loss {loss}, {first} in the first peer"
                    continue
                measures[peer] = lambda worker=worker, peer=peer: torch_steps(worker, peer)
            for peer, reason in absent.items():
                out.row(key, peer=peer, error=reason)
            for peer, row in interleave(measures, min(a.size.rounds, 5)).items():
                out.row(key, peer=peer, **row)
            for worker in workers:
                worker.close()
            out.finish(key)


# Compared systems


SYSTEMS = {"sasrec": "SASRec", "gru4rec": "GRU4REC"}
BATCHES = 2


def synthetic_data(a, folder):
    path = os.path.join(folder, "synthetic.dfar")
    if os.path.exists(path):
        return path
    command = [os.path.join(a.bin, "dfar-data"), "synth", "--users", a.size.users, "-q", "-o", path]
    subprocess.run([str(x) for x in command], check=True)
    return path


def float64(inputs, folder, log):
    """The results in float64 of what dfar's worker wrote."""
    path = os.path.join(folder, "float64.safetensors")
    program = os.path.join(HERE, "worker_systems.py")
    subprocess.run(
        [sys.executable, program, "reference", inputs, path], check=True, stdout=log, stderr=log,
        env=environment(1),
    )
    return load_file(path)


def seconds_of_turns(worker, peer, seconds, turns):
    """A measure for `interleave`, which also adds the shortest call of the turn to `turns`."""
    def measure():
        times = worker.ask(do="time", peer=peer, seconds=seconds, **{"pass": "step"})["times"]
        turns.append(min(times))
        return times

    return measure


def per_step(row, turns, batches):
    """The row of one call, a step on each batch, as that of a step; with the quartiles of the turns."""
    low, high = np.quantile(turns, (0.25, 0.75))
    times = dict(ms=row["ms"], median_ms=row["median_ms"], low_ms=1e3 * low, high_ms=1e3 * high)
    return {**row, **{n: float(ms) / batches for n, ms in times.items()}}


def system_case(a, out, log, folder, data, system, tokens, threads, key):
    config, inputs = (os.path.join(folder, f"systems.{x}") for x in ("json", "safetensors"))
    report.write_json(
        config,
        {
            "data": data,
            "system": system,
            "max_length": 50,
            "negatives": CANDIDATES - 1,
            "negative_pool": 30,
            "batch_tokens": tokens,
            "batches": BATCHES,
            "inputs": inputs,
        },
    )
    # dfar's worker writes the batches that the others read.
    ours = {"dfar": [os.path.join(a.bin, "examples", "peer")]}
    peers, absent, workers = start(ours, threads, log, config)
    if peers:
        theirs = {"torch": [sys.executable, os.path.join(HERE, "worker_systems.py")]}
        found, more, others = start(theirs, threads, log, inputs)
        peers, absent, workers = {**peers, **found}, {**absent, **more}, workers + others
        for peer in [peer for peer in peers if a.without and a.without in peer]:
            absent[peer] = f"left out by --without {a.without}"
            del peers[peer]
        expected = float64(inputs, folder, log)
        errors, bad = checked(peers, folder, lambda _, x: agreement.judge(x, expected))
        if "dfar f32" not in errors:
            bad.update({peer: "not compared: dfar is wrong" for peer in errors})
            errors = {}
        absent.update(bad)
        targets = load_file(inputs)
        batches = sum(n.endswith(".target") for n in targets)
        rows = sum(x.size for n, x in targets.items() if n.endswith(".target")) / batches
        measures, turns, fewer = {}, {}, {}
        for peer in errors:
            seconds = peers[peer].ask(do="warm", peer=peer, **{"pass": "step"})["seconds"]
            if seconds > 2:
                fewer[peer] = 1 if seconds > 20 else 3
            turns[peer] = []
            measures[peer] = seconds_of_turns(peers[peer], peer, a.size.seconds, turns[peer])
        rounds = a.rounds or a.size.rounds
        for peer, row in (interleave(measures, rounds, fewer) if measures else {}).items():
            if "ms" in row:
                row = per_step(row, turns[peer], batches)
                row.update(rows=rows, instances_per_s=1e3 * rows / row["median_ms"])
            out.row(key, peer=peer, max_rel_err=errors[peer], **row)
    for peer, reason in absent.items():
        out.row(key, peer=peer, error=reason)
    for worker in workers:
        worker.close()
    out.finish(key)


def systems(a, out, log, folder):
    for data in a.data or [None]:
        name = os.path.splitext(os.path.basename(data))[0] if data else "synthetic"
        for tokens in a.batch_tokens or a.size.batch_tokens:
            for system, title in SYSTEMS.items():
                for threads in a.threads:
                    case = f"{title}, {name}, {tokens} tokens"
                    key = dict(op="systems", case=case, threads=threads, **{"pass": "step"})
                    if not out.done(key):
                        path = os.path.abspath(data) if data else synthetic_data(a, folder)
                        system_case(a, out, log, folder, path, system, tokens, threads, key)


# Import


def write_log(path, rows):
    """A log in order of time: users of uneven activity, popular items, ratings of 1 to 5."""
    import polars as pl

    random = np.random.default_rng(3)
    users, items = max(1, rows // 80), max(1, rows // 200)
    activity = random.lognormal(0.0, 1.0, users)
    user = random.choice(users, rows, p=activity / activity.sum())
    item = np.minimum(random.zipf(1.2, rows), items)
    time = 1_600_000_000 + np.cumsum(random.integers(0, 3, rows))
    pl.DataFrame(
        {"user": user + 100_000, "item": item, "rating": random.integers(1, 6, rows), "time": time}
    ).write_csv(path)


def launched(command, threads, folder):
    """-> what it printed, what it used"""
    output = os.path.join(folder, "output.txt")
    command = [sys.executable, "-S", "-E", os.path.join(HERE, "launch.py"), output, *command]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment(threads),
        preexec_fn=lambda: restrict(threads),
    )
    used = json.loads(run.stdout)
    if used["status"]:
        raise Failed(f"exit status {used['status']}: {run.stderr.strip()[-300:]}")
    with open(output) as f:
        return f.read(), used


def import_log(a, out, log, folder):
    import reading

    path, rows = os.path.join(folder, "log.csv"), a.size.csv_rows
    cases = [(task, threads) for task in reading.TASKS for threads in a.threads]
    keys = [
        dict(op="import", case=f"{rows} rows", threads=threads, **{"pass": task})
        for task, threads in cases
    ]
    if all(map(out.done, keys)):
        return
    write_log(path, rows)
    for (task, threads), key in zip(cases, keys):
        if out.done(key):
            continue
        used, seen = {}, {}

        def record(peer, seconds, use, counts):
            best = used.setdefault(peer, dict(cpu_s=use["cpu_s"], peak_mib=use["peak_mib"]))
            used[peer] = {n: min(best[n], use[n]) for n in best}
            seen[peer] = counts
            return [seconds]

        def ours():
            made = os.path.join(folder, "log.dfar")
            command = [
                os.path.join(a.bin, "dfar-data"),
                "import",
                "--format",
                "csv",
                "--input",
                path,
                "--output",
                made,
                "--user-column",
                "user",
                "--item-column",
                "item",
                "--time-column",
                "time",
                "--label-column",
                "rating",
                "--positive-above",
                "3",
                "--k-core",
                "0",
                "--keep-repeats",
                "--quiet",
            ]
            _, use = launched(command, threads, folder)
            text, _ = launched(
                [os.path.join(a.bin, "dfar-data"), "info", made, "--json"], threads, folder
            )
            data = json.loads(text)
            counts = {
                "users": data["users"],
                "items": data["items"],
                "rows": data["positive"] + data["negative"],
                "liked": data["positive"],
                "longest": data["history_length"][-1]["events"],
            }
            return record("dfar", use["seconds"], use, counts)

        def theirs(peer):
            text, use = launched(
                [sys.executable, os.path.join(HERE, "reading.py"), peer, task, path],
                threads,
                folder,
            )
            found = json.loads(text)
            return record(peer, found.pop("seconds"), use, found)

        measures = {
            "dfar": ours,
            **{peer: lambda peer=peer: theirs(peer) for peer in reading.PEERS},
        }
        for peer, row in interleave(measures, min(a.size.rounds, 5)).items():
            expected = seen.get("dfar", {})
            differs = {n: v for n, v in seen.get(peer, {}).items() if expected.get(n, v) != v}
            if differs:
                row = {"error": f"wrong: {differs}, where dfar has {expected}"}
            elif peer in used:
                row.update(used[peer], rows_per_cpu_s=rows / used[peer]["cpu_s"])
            out.row(key, peer=peer, **row)
        out.finish(key)
    os.remove(path)


# Files


class Out:
    """OUT/rows.jsonl. A case that is complete is not measured again."""

    def __init__(self, folder):
        self.path = os.path.join(folder, "rows.jsonl")
        self.rows, self.pending = report.read_rows(self.path), []

    def done(self, key):
        return any(all(row.get(n) == v for n, v in key.items()) for row in self.rows)

    def row(self, key, **fields):
        row = {**key, **fields, "load": round(os.getloadavg()[0], 2)}
        self.pending.append(row)
        shown = f"{row['ms']:.3f} ms" if "ms" in row else row["error"]
        print(
            f"{row['op']} {row['case']}, {row['threads']} threads, {row.get('pass', '')}: {row['peer']}: {shown}",
            flush=True,
        )

    def finish(self, key):
        with open(self.path, "a") as f:
            f.writelines(json.dumps(row) + "\n" for row in self.pending)
        self.rows += self.pending
        self.pending = []


def command_output(*command):
    try:
        return subprocess.run(
            command, check=True, capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine():
    """Processor, its vector instructions, cores."""
    try:
        with open("/proc/cpuinfo") as f:
            text = f.read()
    except OSError:
        return dict(
            processor=platform.processor() or platform.machine(), features=[], cores=os.cpu_count()
        )
    name = re.search(r"model name\s*:\s*(.*)", text)
    flags = set((re.search(r"(?:flags|Features)\s*:\s*(.*)", text) or [0, ""])[1].split())
    features = [
        f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve") if f in flags
    ]
    return dict(
        processor=name[1] if name else platform.machine(),
        features=features,
        cores=len(os.sched_getaffinity(0)),
    )


def versions(a):
    found = {}
    for package in ("torch", "jax", "jaxlib", "numpy", "pandas", "polars", "pyarrow"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    with open(os.path.join(HERE, "..", "candle", "Cargo.toml")) as f:
        found["candle"] = re.search(r'candle-core = "=(.*)"', f.read())[1] if a.candle else None
    return {
        **found,
        "python": platform.python_version(),
        "rustc": command_output("rustc", "--version"),
    }


def describe(a):
    dirty = (
        "-dirty" if command_output("git", "status", "--porcelain", "--untracked-files=no") else ""
    )
    return dict(
        machine=machine(),
        versions=versions(a),
        commit=command_output("git", "rev-parse", "--short", "HEAD") + dirty,
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        quick=a.quick,
        load_before=[round(x, 2) for x in os.getloadavg()],
    )


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    report.arguments(p)
    p.add_argument(
        "--bin",
        default=os.path.join(ROOT, "target", "release"),
        help="folder of dfar-bench, dfar-data and examples/peer",
    )
    p.add_argument("--candle", help="the program of ../candle; without it, candle is skipped")
    a = p.parse_args()
    a.size = Quick if a.quick else Sizes
    a.threads = a.threads or sorted({1, machine()["cores"]})
    os.makedirs(a.out, exist_ok=True)
    out, described, begun = Out(a.out), describe(a), time.monotonic()
    about = os.path.join(a.out, "environment.json")
    if os.path.exists(about):
        with open(about) as f:
            before = json.load(f)
        if [before[n] for n in ("commit", "versions", "machine", "quick")] != [
            described[n] for n in ("commit", "versions", "machine", "quick")
        ]:
            sys.exit(
                f"{a.out} has rows of commit {before['commit']} or of other versions: choose another folder"
            )
        described = before
    report.write_json(about, described)
    with (
        open(os.path.join(a.out, "workers.log"), "a") as log,
        tempfile.TemporaryDirectory() as folder,
    ):
        if not a.only or a.only == "check":
            lines = golden(a, log, folder)
            print("\n".join(lines), flush=True)
            with open(os.path.join(a.out, "golden.txt"), "w") as f:
                f.write("\n".join(lines) + "\n")
        for name, measure in (
            ("attention", attention),
            ("training", training),
            ("systems", systems),
            ("import", import_log),
        ):
            if a.only in (None, name):
                measure(a, out, log, folder)
    described.update(
        load_after=[round(x, 2) for x in os.getloadavg()], seconds=round(time.monotonic() - begun)
    )
    report.write_json(about, described)
    report.write(a.out, a.out)
    if a.results and not a.quick:
        print("filed:", report.file(a.out, a.results))


if __name__ == "__main__":
    main()
