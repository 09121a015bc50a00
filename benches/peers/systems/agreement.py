"""Whether results agree with float64, tensor by tensor. Needs NumPy only.

A gradient jumps where an activation meets ReLU's kink: among the millions of a batch, a few lie
within rounding of it, and either side is right. The reference therefore has two gradients, with the
kink moved a little to either side; what lies between them has no error.
"""

import numpy as np

# Of losses and gradients, relative to the largest value of the tensor.
TOLERANCE = 1e-4


def errors(found, reference):
    """-> {name: error}. `reference`: both sides of the kinks, [2, ..]. The largest value of a gradient
    counts as at least a thousandth of that of its batch: one that is 0 in exact arithmetic (of a bias
    before a softmax) is rounding noise."""
    largest = {n: np.abs(x).max(initial=0.0) for n, x in reference.items()}
    found_errors = {}
    for name, sides in reference.items():
        x = found[name].astype(np.float64)
        if x.shape != sides.shape[1:] or not np.isfinite(x).all():
            found_errors[name] = float("inf")
            continue
        outside = np.maximum(sides.min(0) - x, x - sides.max(0)).max(initial=0.0)
        batch, _, rest = name.partition(".grad.")
        of_batch = [v for n, v in largest.items() if rest and n.startswith(batch + ".grad.")]
        scale = max(largest[name], 1e-3 * max(of_batch, default=0.0), 1e-30)
        found_errors[name] = float(outside / scale)
    return found_errors


def judge(found, reference):
    """-> the errors by tensor, and those above the tolerance"""
    each = errors(found, reference)
    return each, {n: e for n, e in each.items() if not e <= TOLERANCE}
