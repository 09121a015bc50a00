"""The side of a worker: a process with some peers, which runs what the driver asks for.

One JSON object per line in each direction. A worker is idle (it blocks on its input) while another
one is timed, so the thread pools of two libraries never run at once.

    {"do": "load", "path": FILE}                   -> {"peers": [..], "skipped": {peer: reason}}
    {"do": "check", "peer": P, "path": FILE}       -> {"seconds": of the first call}; writes o, dq, dk, dv
    {"do": "warm", "peer": P, "pass": "forward"}   -> {"seconds": of the call}
    {"do": "time", "peer": P, "pass": .., "seconds": S}  -> {"times": [seconds, ..]}, at least one

Every answer may be {"error": text} instead.
"""

import gc
import json
import os
import sys
import time


def serve(load):
    """`load(path)` -> (peers, skipped): peers maps a name to an object with `forward()`, `both()`
    (forward and backward) and `results()` -> {name: NumPy array} of the last `both()`."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints goes to the log
    peers = {}
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = _answer(request, peers, load)
        except Exception as e:
            answer = {"error": f"{type(e).__name__}: {str(e).strip()[:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(request, peers, load):
    do = request["do"]
    if do == "load":
        found, skipped = load(request["path"])
        peers.update(found)
        return {"peers": list(found), "skipped": skipped}
    peer = peers[request["peer"]]
    start = time.perf_counter()
    if do == "check":
        peer.both()
        seconds = time.perf_counter() - start
        from safetensors.numpy import save_file

        save_file(peer.results(), request["path"])
        return {"seconds": seconds}
    call = peer.forward if request["pass"] == "forward" else peer.both
    if do == "warm":
        call()
        return {"seconds": time.perf_counter() - start}
    gc.disable()
    times, begun = [], time.perf_counter()
    while not times or time.perf_counter() - begun < request["seconds"]:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    gc.enable()
    gc.collect()
    return {"times": times}
