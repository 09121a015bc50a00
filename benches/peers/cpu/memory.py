"""Refuses peers whose score matrices would not fit: an out-of-memory kill would end the run."""


def score_bytes(lengths, heads):
    """One f32 score matrix of all sequences, padded by buckets (at most a third longer)."""
    return sum(4 * (heads // 2) * heads * n * n for n in lengths)


def available_bytes():
    try:
        with open("/proc/meminfo") as f:
            return next(int(line.split()[1]) << 10 for line in f if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return None  # not Linux: unknown


def refusal(needed):
    """The reason not to run, or None."""
    available = available_bytes()
    if available is None or needed <= 0.7 * available:
        return None
    return f"its score matrices need {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} GiB are free"
