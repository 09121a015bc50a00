"""GPU times: the median of CUDA-event times over sets of inputs that together exceed the L2 cache.

`graph`: replays of one CUDA graph with a call on each set of inputs: no launch gaps.
`eager`: calls from Python, with launch gaps.
"""
import statistics

import torch


def sets_past_cache(bytes_per_set, device):
    """Number of input sets so that no call finds its own inputs in the L2 cache."""
    return max(2, -(-3 * torch.cuda.get_device_properties(device).L2_cache_size // bytes_per_set))


def _median_ms(call, budget_ms, least=5, most=200):
    """Times single calls of `call(i)` until the budget is spent."""
    times = []
    while len(times) < least or (sum(times) < budget_ms and len(times) < most):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(len(times))
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def eager_ms(step, sets, budget_ms=100):
    for x in sets:
        step(x)
    torch.cuda.synchronize()
    return _median_ms(lambda i: step(sets[i % len(sets)]), budget_ms)


def graph_ms(step, sets, budget_ms=100):
    """Median over replays, divided by the number of calls in the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for x in sets:
            step(x)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for x in sets:
            step(x)
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    ms = _median_ms(lambda i: graph.replay(), budget_ms) / len(sets)
    graph.reset()
    return ms
