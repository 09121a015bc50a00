#!/usr/bin/env python3
"""Measures how time and memory grow with sequence length, users, vocabulary and threads.

    benches/scaling.py OUT [--quick] [--programs DIR]

Needs the release programs (cargo build --release) and nothing but Python; with matplotlib it also
draws. OUT gets scaling.json, scaling.md and scaling.svg. `exponent` compares a row with the one
before: log(time ratio) / log(size ratio). 1 is proportional to the size, 2 quadratic. Times are
processor seconds, user and system, of whole commands on one thread, except for `threads`.
"""
import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LAUNCH = os.path.join(ROOT, "benches", "peers", "cpu", "launch.py")


def run(*command):
    """Runs a command; returns its processor seconds, wall seconds and peak memory in MiB."""
    with tempfile.NamedTemporaryFile("r") as output:
        # A process of its own, whose memory does not count as the command's.
        launched = subprocess.run([sys.executable, "-S", "-E", LAUNCH, output.name, *command],
                                  capture_output=True, text=True)
        usage = json.loads(launched.stdout)
        if usage["status"]:
            sys.exit(f"{' '.join(command)}: exit code {usage['status']}\n{launched.stderr}")
        return {name: usage[name] for name in ("cpu_s", "seconds", "peak_mib")}, output.read()


class Programs:
    def __init__(self, folder):
        self.data, self.train, self.bench = (os.path.join(folder, f"dfar-{name}") for name in ("data", "train", "bench"))


def by_length(programs, scratch, quick):
    """The attention operation; `size` is the length. Time of one call on 16,384 tokens or one sequence."""
    for length in [20, 64, 256, 1024] if quick else [20, 64, 256, 1024, 4096, 16384]:
        table = os.path.join(scratch, "attention.json")
        usage, _ = run(programs.bench, "attention", "--seq-lens", str(length), "--no-naive", "--threads", "1",
                       "--json", table)
        with open(table) as file:
            for row in json.load(file):
                yield {"job": f"attention {row['pass']}", "size": length, "cpu_s": row["fused_ms"] / 1e3,
                       "peak_mib": usage["peak_mib"]}


def synthetic(programs, scratch, users, items=500, events=None):
    """A generated data set."""
    path = os.path.join(scratch, f"{users}-{items}.dfar")
    usage, _ = run(programs.data, "synth", "--users", str(users), "--items", str(items), "--quiet", "--output", path,
                   *(["--events", str(events)] if events else []))
    return path, usage


def by_users(programs, scratch, quick):
    """`size` is the number of users, with 50 events each."""
    for users in [1000, 10_000] if quick else [1000, 10_000, 100_000, 1_000_000]:
        data, usage = synthetic(programs, scratch, users)
        yield {"job": "synth", "size": users, **usage}
        log = os.path.join(scratch, "log.csv")
        yield {"job": "export to CSV", "size": users, **run(programs.data, "export", data, "--output", log)[0]}
        imported = os.path.join(scratch, "imported.dfar")
        usage, _ = run(programs.data, "import", "--format", "csv", "--user-column", "user", "--item-column", "item",
                       "--label-column", "label", "--time-column", "time", "--k-core", "0", "--quiet",
                       "--input", log, "--output", imported)
        yield {"job": "import of CSV", "size": users, **usage}
        yield {"job": "info", "size": users, **run(programs.data, "info", imported)[0]}
        os.remove(log)
        os.remove(imported)
        if users <= 10_000 or not quick and users <= 100_000:
            out = os.path.join(scratch, f"users-{users}")
            usage, _ = run(programs.train, "--data", data, "--out", out, "--epochs", "1", "--threads", "1", "--quiet",
                           "--max-length", "20")
            yield {"job": "training, one epoch and both evaluations", "size": users, **usage}
            usage, _ = run(programs.train, "evaluate", "--run", out, "--json")
            yield {"job": "evaluation", "size": users, **usage}
        os.remove(data)


def by_items(programs, scratch, quick):
    """`size` is the number of items; always 100,000 events of 2,000 users."""
    for items in [10_000, 100_000] if quick else [10_000, 100_000, 1_000_000, 10_000_000]:
        data, usage = synthetic(programs, scratch, 2000, items, 100_000)
        yield {"job": "synth, 100,000 events", "size": items, **usage}
        out = os.path.join(scratch, f"items-{items}")
        usage, _ = run(programs.train, "--data", data, "--out", out, "--epochs", "1", "--threads", "1", "--quiet",
                       "--max-length", "20")
        yield {"job": "training, 100,000 events", "size": items, **usage}
        subprocess.run(["rm", "-r", out, data], check=True)


def by_threads(programs, scratch, quick):
    """`size` is the number of threads; times are wall seconds."""
    data, _ = synthetic(programs, scratch, 1000 if quick else 5000)
    threads = 1
    while threads <= (os.cpu_count() or 1):
        out = os.path.join(scratch, f"threads-{threads}")
        usage, _ = run(programs.train, "--data", data, "--out", out, "--epochs", "1", "--threads", str(threads),
                       "--quiet", "--max-length", "100")
        yield {"job": "training, wall seconds by threads", "size": threads, "cpu_s": usage["seconds"],
               "peak_mib": usage["peak_mib"]}
        threads *= 2


def with_exponents(rows):
    """Adds the exponent of each row against the row of the same job before it."""
    last = {}
    for row in rows:
        before = last.get(row["job"])
        if before:
            row["exponent"] = math.log(row["cpu_s"] / before["cpu_s"]) / math.log(row["size"] / before["size"])
        last[row["job"]] = row
    return rows


def markdown(about, rows):
    lines = [", ".join(f"{key} {value}" for key, value in about.items()), "",
             "| job | size | seconds | exponent | peak MiB |", "|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["job"]):
        exponent = f"{row['exponent']:.2f}" if "exponent" in row else ""
        lines.append(f"| {row['job']} | {row['size']:,} | {row['cpu_s']:.4g} | {exponent} | {row['peak_mib']:.0f} |")
    return "\n".join(lines) + "\n"


def draw(rows, path):
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no drawing", file=sys.stderr)
        return
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for job in sorted({row["job"] for row in rows}):
        own = [row for row in rows if row["job"] == job]
        for axis, key in zip(axes, ("cpu_s", "peak_mib")):
            axis.plot([row["size"] for row in own], [row[key] for row in own], marker="o", label=job)
    for axis, title in zip(axes, ("seconds", "peak memory, MiB")):
        axis.set(xscale="log", yscale="log", xlabel="size: length, users, items or threads", title=title)
        axis.grid(True, which="major", alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path)


def about(programs):
    with open("/proc/cpuinfo") as file:
        models = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return {"CPU": models[0] if models else platform.machine(), "cores": os.cpu_count(),
            "load at the start": round(os.getloadavg()[0], 1), "commit": commit.stdout.strip() or "unknown",
            "version": run(programs.data, "--version")[1].strip(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="minutes")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("--quick", action="store_true", help="small sizes only")
    parser.add_argument("--programs", default=os.path.join(ROOT, "target", "release"), help="folder of the programs")
    arguments = parser.parse_args()
    programs = Programs(arguments.programs)
    os.makedirs(arguments.out, exist_ok=True)
    machine, rows = about(programs), []
    with tempfile.TemporaryDirectory() as scratch:
        for part in (by_length, by_users, by_items, by_threads):
            for row in part(programs, scratch, arguments.quick):
                rows.append(row)
                print(f"{row['job']:42}{row['size']:>12,}{row['cpu_s']:>12.4g} s{row['peak_mib']:>8.0f} MiB",
                      file=sys.stderr, flush=True)
    with_exponents(rows)
    with open(os.path.join(arguments.out, "scaling.json"), "w") as file:
        json.dump({"about": machine, "rows": rows}, file, indent=1)
        file.write("\n")
    with open(os.path.join(arguments.out, "scaling.md"), "w") as file:
        file.write(markdown(machine, rows))
    draw(rows, os.path.join(arguments.out, "scaling.svg"))


if __name__ == "__main__":
    main()
