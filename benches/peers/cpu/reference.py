"""The operation in float64 NumPy (docs/mathematics.md, Joint), by chunks of queries: the measure of
every peer before it is timed."""

import numpy as np

CHUNK = 512


def sequence(q, k, v, do, label):
    """One sequence. q, k, v: [T, H, d]; do: [T, H / 2, H, d] -> o, dq, dk, dv"""
    q, k, v, do = (x.astype(np.float64) for x in (q, k, v, do))
    T, H, d = q.shape
    half, scale = H // 2, q.shape[2] ** -0.5
    head = np.arange(half) + half * label[:, None]  # [T, g]: a token's own heads
    serves = (np.arange(H) >= half)[None] == (label[:, None] == 1)  # [T, H]
    own = np.take_along_axis(q, head[:, :, None], 1)
    keys, values = k.reshape(T * H, d), v.reshape(T * H, d)
    token = np.repeat(np.arange(T), H)
    kept = serves.reshape(T * H)
    o, dq = np.zeros((T, half, H, d)), np.zeros_like(q)
    dk, dv = np.zeros_like(keys), np.zeros_like(values)
    for begin in range(0, T, CHUNK):
        rows = np.arange(begin, min(begin + CHUNK, T))
        seen = (rows[-1] + 1) * H  # later keys are hidden from all rows
        hidden = token[None, :seen] > rows[:, None]
        slot = np.arange(seen) % H
        for a in range(half):
            s = own[rows, a] @ keys[:seen].T * scale
            s[hidden] = -np.inf
            p = np.exp(s - s.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            masked = p * kept[:seen]
            dp = np.empty_like(p)
            for c in range(H):
                columns = slot == c
                o[rows, a, c] = masked[:, columns] @ values[:seen][columns]
                dp[:, columns] = do[rows, a, c] @ values[:seen][columns].T
                dv[:seen][columns] += masked[:, columns].T @ do[rows, a, c]
            dp *= kept[:seen]
            ds = p * (dp - (p * dp).sum(1, keepdims=True)) * scale
            dq[rows, head[rows, a]] = ds @ keys[:seen]
            dk[:seen] += ds.T @ own[rows, a]
    return {"o": o, "dq": dq, "dk": dk.reshape(T, H, d), "dv": dv.reshape(T, H, d)}


def relative_error(x, ref):
    """max|x - ref| / max|ref|; infinite if a value is not finite."""
    if x.shape != ref.shape or not np.isfinite(x).all():
        return float("inf")
    return float(np.abs(x - ref).max() / max(np.abs(ref).max(), 1e-30))


def expected(x, chosen):
    """The results for the chosen sequences, and their packed rows."""
    offsets = x["cu_seqlens"]
    rows, parts = [], []
    for b in chosen:
        part = slice(int(offsets[b]), int(offsets[b + 1]))
        if part.start < part.stop:
            rows.append(np.arange(part.start, part.stop))
            parts.append(
                sequence(
                    *(x[n][part] for n in ("q", "k", "v", "do")), x["label"][part].astype(np.int64)
                )
            )
    return np.concatenate(rows), {n: np.concatenate([p[n] for p in parts]) for n in parts[0]}


# CONTRIBUTING.md: of every f32 result. bf16: as ../fha/inputs.py.
TOLERANCE = {
    "f32": {"o": 1e-5, "dq": 5e-5, "dk": 5e-5, "dv": 5e-5},
    "bf16": {"o": 5e-2, "dq": 5e-2, "dk": 5e-2, "dv": 5e-2},
}


def judge(found, rows, wanted, precision):
    """-> the errors by tensor, and those above the tolerance"""
    errors = {
        n: relative_error(found[n][rows].astype(np.float64), ref) for n, ref in wanted.items()
    }
    return errors, {n: e for n, e in errors.items() if not e <= TOLERANCE[precision][n]}
