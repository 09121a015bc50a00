"""A CSV log with pandas or polars, as a program of its own: `reading.py PEER TASK FILE`. Prints JSON.

Tasks: `group-by` reads the file and counts the events of each user; `histories` reads it and puts the
events of each user in order of time, part of what `dfar-data import` does. The clock starts after the
library is imported.
"""

import json
import sys
import time

PEERS = ("pandas", "pandas pyarrow", "polars read_csv", "polars scan_csv")
TASKS = ("group-by", "histories")


def with_pandas(task, path, engine):
    import pandas as pd

    start = time.perf_counter()
    log = pd.read_csv(path, engine=engine)
    counts = log.groupby("user", sort=False).size()
    found = {"users": len(counts), "rows": int(counts.sum())}
    if task == "histories":
        log["liked"] = log["rating"] > 3
        log = log.sort_values(["user", "time"])
        counts = log.groupby("user", sort=False).size()
        found["liked"] = int(log["liked"].sum())
    return start, {**found, "lengths": counts}


def with_polars(task, path, lazy):
    import polars as pl

    start = time.perf_counter()
    log = pl.scan_csv(path) if lazy else pl.read_csv(path).lazy()
    if task == "group-by":
        counts = log.group_by("user").len().collect(engine="streaming" if lazy else "auto")["len"]
        return start, {"users": len(counts), "rows": int(counts.sum()), "lengths": counts}
    liked = (pl.col("rating") > 3).alias("liked")
    histories = (
        log.group_by("user").agg(pl.col("item").sort_by("time"), liked.sort_by("time")).collect()
    )
    counts = histories["item"].list.len()
    return start, {
        "users": len(histories),
        "rows": int(counts.sum()),
        "lengths": counts,
        "liked": int(histories["liked"].list.sum().sum()),
    }


def main():
    peer, task, path = sys.argv[1:]
    if peer.startswith("pandas"):
        start, found = with_pandas(task, path, "pyarrow" if peer == "pandas pyarrow" else "c")
    else:
        start, found = with_polars(task, path, peer == "polars scan_csv")
    seconds = time.perf_counter() - start
    lengths = found.pop("lengths")
    print(json.dumps({"seconds": seconds, **found, "longest": int(lengths.max())}))


if __name__ == "__main__":
    main()
