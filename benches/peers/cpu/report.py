"""Tables and plots from the rows of run.py. Needs matplotlib only for the plots.

python report.py OUT          the table again, from OUT/rows.jsonl and OUT/environment.json
"""

import argparse
import json
import os
import re
import shutil

OPERATIONS = {
    "attention": "Attention",
    "training": "Training step",
    "systems": "Training step of the compared systems",
    "import": "Import of a CSV log",
}
PASSES = {
    "forward": "forward",
    "both": "forward and backward",
    "step": "step",
    "group-by": "reader and group-by",
    "histories": "histories",
}


def arguments(p):
    p.add_argument("out", help="folder of the rows; a case that it has is not measured again")
    p.add_argument(
        "--quick",
        action="store_true",
        help="tiny sizes, to see that everything works; nothing is filed",
    )
    p.add_argument("--only", choices=["check", *OPERATIONS])
    p.add_argument(
        "--threads", type=int, nargs="+", help="numbers of threads [default: 1 and all cores]"
    )
    p.add_argument(
        "--data", nargs="+", help="data sets of the compared systems [default: a synthetic one]"
    )
    p.add_argument(
        "--batch-tokens", type=int, nargs="+", help="events of their batches [default: 512 4096]"
    )
    p.add_argument(
        "--without", metavar="WORD", help="leave out compared systems' peers with it in their names"
    )
    p.add_argument("--rounds", type=int, help="turns of each peer in the compared systems [default: 7]")
    p.add_argument(
        "--results", help="file the tables and plots in this folder, under the name of the machine"
    )


def read_rows(path):
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.strip()]


def write_json(path, value):
    with open(path + ".part", "w") as f:
        json.dump(value, f, indent=1)
        f.write("\n")
    os.replace(path + ".part", path)


def cases(rows):
    """-> {(op, pass, threads, case): {peer: row}} of the timed rows, in the order of measurement."""
    found = {}
    for row in rows:
        if "ms" in row:
            found.setdefault((row["op"], row["pass"], row["threads"], row["case"]), {})[
                row["peer"]
            ] = row
    return found


def is_dfar(peer):
    return peer.split()[0] == "dfar"


def ratios(rows):
    """One entry for each case: dfar's time in f32, the best peer in f32 and its ratio to that, and the
    best peer of any precision and its ratio to the fastest dfar."""
    entries = []
    for (op, direction, threads, case), timed in cases(rows).items():
        fastest_first = sorted(timed.values(), key=lambda row: row["ms"])
        ours = [row for row in fastest_first if is_dfar(row["peer"])]
        peers = [row for row in fastest_first if not is_dfar(row["peer"])]
        if not ours or not peers:
            continue
        of_f32 = lambda rows: next((row for row in rows if not row["peer"].endswith("bf16")), None)
        ours_f32, best_f32 = of_f32(ours), of_f32(peers)
        entry = {
            "op": op,
            "pass": direction,
            "threads": threads,
            "case": case,
            "dfar_ms": (ours_f32 or ours[0])["ms"],
            "ours": ours,
            "peers": peers,
            "best": peers[0]["peer"],
            "ratio": peers[0]["ms"] / ours[0]["ms"],
        }
        if ours_f32 and best_f32:
            entry.update(
                best_f32=best_f32["peer"],
                ratio_f32=best_f32["ms"] / ours_f32["ms"],
            )
        entries.append(entry)
    return entries


def _table(header, lines):
    return [
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
        *("| " + " | ".join(map(str, x)) + " |" for x in lines),
    ]


def _number(x):
    """Three significant digits, without an exponent."""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def markdown(rows, about):
    """The page of one run."""
    machine, versions = about["machine"], about["versions"]
    names = ", ".join(
        f"{name} {version}"
        for name, version in versions.items()
        if version and name not in ("rustc", "python")
    )
    load = lambda name: ", ".join(str(x) for x in about.get(name, []))
    text = [
        "# dfar and its peers on one CPU",
        "",
        f"- {machine['processor']}, {machine['cores']} cores, {', '.join(machine['features']) or 'no vector features listed'}",
        f"- commit {about['commit']}, {about['date']}, {versions['rustc']}, Python {versions['python']}",
        f"- {names}",
        f"- load average (1, 5, 15 minutes) before: {load('load_before')}; after: {load('load_after')}",
        "",
        "Shortest of several turns, all peers in turn. **Ratio** = best peer / fastest dfar: above 1, dfar",
        "is faster. `benches/peers/README.md` says what the peers compute.",
    ]
    if about.get("quick"):
        text += ["", "**A quick run: sizes and repetitions are too small for conclusions.**"]
    entries = ratios(rows)
    for op, title in OPERATIONS.items():
        mine = [e for e in entries if e["op"] == op]
        if not mine:
            continue
        text += ["", f"## {title}", ""]
        if op == "import":
            lines = []
            for e in mine:
                row = lambda r: (
                    PASSES[e["pass"]],
                    e["threads"],
                    r["peer"],
                    _number(r["ms"]),
                    _number(r["ms"] / e["dfar_ms"]),
                    f"{r['rows_per_cpu_s'] / 1e6:.2f}",
                    _number(r["peak_mib"]),
                )
                lines += [row(r) for r in (*e["ours"], *e["peers"])]
            text += _table(
                [
                    "task of the peers",
                    "threads",
                    "program",
                    "ms",
                    "ms / dfar's",
                    "million rows per CPU second",
                    "peak MiB",
                ],
                lines,
            )
            text += [
                "",
                *_table(
                    ["task of the peers", "threads", "best peer", "ratio"],
                    [
                        (PASSES[e["pass"]], e["threads"], e["best"], _number(e["ratio"]))
                        for e in mine
                    ],
                ),
            ]
            continue
        unit = {"training": "events", "systems": "system"}.get(op, "length")
        lines = [
            (
                PASSES[e["pass"]],
                e["threads"],
                e["case"],
                _number(e["dfar_ms"]),
                e.get("best_f32", "none"),
                _number(e["ratio_f32"]) if "ratio_f32" in e else "",
                e["ours"][0]["peer"],
                e["best"],
                _number(e["ratio"]),
            )
            for e in mine
        ]
        text += _table(
            [
                "pass",
                "threads",
                unit,
                "dfar ms",
                "best f32 peer",
                "ratio f32",
                "fastest dfar",
                "best peer",
                "**ratio**",
            ],
            lines,
        )
        rows_of = lambda e: [*e["ours"], *e["peers"]]
        peers = sorted({r["peer"] for e in mine for r in rows_of(e)})
        text += ["", "Milliseconds of every program:", ""]
        lines = []
        for e in mine:
            timed = {r["peer"]: _number(r["ms"]) for r in rows_of(e)}
            lines.append(
                (
                    PASSES[e["pass"]],
                    e["threads"],
                    e["case"],
                    *(timed.get(p, "-") for p in peers),
                )
            )
        text += _table(["pass", "threads", unit, *peers], lines)
        if op == "systems":
            text += ["", "Medians of the turns, with their quartiles, and the ratio of medians:", ""]
            lines = [
                (
                    e["case"],
                    e["threads"],
                    r["peer"],
                    " ".join(_number(r[n]) for n in ("median_ms", "low_ms", "high_ms")),
                    f"{r['instances_per_s']:.0f}",
                    _number(r["median_ms"] / e["ours"][0]["median_ms"]),
                    f"{r['max_rel_err']:.1e}",
                )
                for e in mine
                for r in rows_of(e)
            ]
            header = ["system", "threads", "program", "ms", "instances/s", "ms / dfar's", "error"]
            text += _table(header, lines)
    failed = [row for row in rows if "error" in row]
    if failed:
        text += ["", "## Not timed", ""]
        grouped = {}
        for row in failed:
            reason = re.sub(r"\s+", " ", row["error"]).replace("|", "/")
            where = f"{row['op']} {row['case']}" + (
                f" {PASSES[row['pass']]}" if "pass" in row else ""
            )
            grouped.setdefault((row["peer"], reason), []).append(where)
        text += [
            f"- {peer}, {', '.join(dict.fromkeys(where))}: {reason}"
            for (peer, reason), where in grouped.items()
        ]
    return "\n".join(text) + "\n"


def plots(rows, folder):
    """An SVG for each pass of attention: ratio to dfar by length, on logarithmic axes. Returns the
    names of the files; none without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("svg")
    # The same bytes for the same rows.
    matplotlib.rcParams.update({"svg.hashsalt": "dfar", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    made = []
    for direction in ("forward", "both"):
        mine = [
            e
            for e in ratios(rows)
            if e["op"] == "attention" and e["pass"] == direction and e["case"].isdigit()
        ]
        if not mine:
            continue
        counts = sorted({e["threads"] for e in mine})
        figure, axes = plt.subplots(
            1, len(counts), figsize=(5.2 * len(counts), 4.2), sharey=True, squeeze=False
        )
        peers = sorted({r["peer"] for e in mine for r in e["peers"]})
        forms = sorted({peer.rsplit(" ", 1)[0] for peer in peers})
        lengths = sorted({int(e["case"]) for e in mine})
        for axis, threads in zip(axes[0], counts):
            for peer in peers:
                points = [
                    (int(e["case"]), r["ms"] / e["dfar_ms"])
                    for e in mine
                    if e["threads"] == threads
                    for r in e["peers"]
                    if r["peer"] == peer
                ]
                if points:
                    form, precision = peer.rsplit(" ", 1)
                    i = forms.index(form)
                    axis.plot(
                        *zip(*sorted(points)),
                        "--" if precision == "bf16" else "-",
                        marker="os^vDPX*"[i % 8],
                        markersize=4,
                        linewidth=1.2,
                        color=f"C{i % 10}",
                        label=peer,
                    )
            axis.axhline(1, color="black", linewidth=1)
            axis.set(
                xscale="log",
                yscale="log",
                xlabel="sequence length",
                title=f"{threads} thread{'s' * (threads > 1)}",
            )
            axis.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
            axis.minorticks_off()
            axis.grid(True, which="both", alpha=0.2)
        axes[0][0].set_ylabel(f"time of the peer / time of dfar, {PASSES[direction]}")
        axes[0][-1].legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        name = f"attention-{'forward' if direction == 'forward' else 'forward-backward'}.svg"
        figure.savefig(os.path.join(folder, name), bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        made.append(name)
    return made


def write(out, folder):
    """OUT/table.md and the plots."""
    rows = read_rows(os.path.join(out, "rows.jsonl"))
    with open(os.path.join(out, "environment.json")) as f:
        about = json.load(f)
    text = markdown(rows, about)
    for name in plots(rows, folder):
        text += f"\n![{name[:-4]}]({name})\n"
    with open(os.path.join(folder, "table.md"), "w") as f:
        f.write(text)
    print(text)


def machine_name(machine):
    """A folder name: the processor and its number of cores."""
    words = re.sub(r"\((r|tm)\)|\bcpu\b|@.*", " ", machine["processor"].lower())
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-") + f"-{machine['cores']}-cores"


def file(out, results):
    """Copies a run to RESULTS/MACHINE/DATE-COMMIT. Returns the folder."""
    with open(os.path.join(out, "environment.json")) as f:
        about = json.load(f)
    folder = os.path.join(
        results, machine_name(about["machine"]), f"{about['date'][:10]}-{about['commit']}"
    )
    os.makedirs(folder, exist_ok=True)
    for name in (
        "rows.jsonl",
        "environment.json",
        "golden.txt",
        "table.md",
        "attention-forward.svg",
        "attention-forward-backward.svg",
    ):
        if os.path.exists(os.path.join(out, name)):
            shutil.copy(os.path.join(out, name), folder)
    return folder


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("out")
    out = p.parse_args().out
    write(out, out)


if __name__ == "__main__":
    main()
