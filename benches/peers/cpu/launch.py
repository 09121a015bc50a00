"""Runs a command and prints what it used, as JSON: `python -S -E launch.py OUTPUT COMMAND...`.

A small process of its own, because Linux counts the memory of the process that starts a program as
part of that program's peak.
"""

import json
import os
import sys
import time

start = time.perf_counter()
child = os.fork()
if child == 0:
    out = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(out, 1)
    os.execvp(sys.argv[2], sys.argv[2:])
_, status, used = os.wait4(child, 0)
print(
    json.dumps(
        {
            "status": os.waitstatus_to_exitcode(status),
            "seconds": time.perf_counter() - start,
            "cpu_s": used.ru_utime + used.ru_stime,
            "peak_mib": used.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10),
        }
    )
)
