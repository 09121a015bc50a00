"""The model against the golden DFAR cases: losses, logits, all gradients, two optimizer steps."""
import glob
import json
import os

import torch

from .model import Dfar, clip_each, loss

# f32: 5e-5 is the tolerance of one kernel's gradients; this is that of the whole network.
TOLERANCE = {"f64": 1e-9, "f32": 1e-4}


def load(path, dtype, device):
    """-> case, model with the golden parameters, batch, tensors of the file"""
    from safetensors import safe_open
    with safe_open(path, "pt") as f:
        case = json.loads(f.metadata()["case"])
        t = {name: f.get_tensor(name) for name in f.keys()}
    model = Dfar(case["items"], case["max_length"], case["width"], case["heads"], case["normalization"],
                 case["attention"], case["tower"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(t["param." + name])
    lengths = torch.tensor(case["lengths"])
    items, labels = (torch.zeros(len(lengths), case["max_length"], dtype=torch.long) for _ in range(2))
    cu = t["cu_seqlens"].long()
    for b, n in enumerate(case["lengths"]):
        items[b, :n], labels[b, :n] = (t[name][cu[b]:cu[b + 1]].long() for name in ("history_item", "history_label"))
    batch = (items, labels, lengths, t["candidate"].long(), t["target"].to(dtype))
    return case, model.to(device, dtype), tuple(x.to(device) for x in batch), t


def share(batch, shared):
    """The batch as it is, or with a copy of the history for every candidate."""
    if shared:
        return batch
    items, labels, lengths, candidates, target = batch
    C = candidates.shape[1]
    return (*(x.repeat_interleave(C, 0) for x in (items, labels, lengths)), candidates.reshape(-1, 1), target.reshape(-1, 1))


def compare(path, dtype, device, shared):
    """-> {name: relative error}"""
    case, model, batch, t = load(path, dtype, device)
    batch = share(batch, shared)
    error = lambda x, ref, floor=1e-30: float((x.detach().cpu().double() - ref).abs().max() / max(float(ref.abs().max()), floor))
    total, parts, logits = loss(model, *batch, case)
    total.backward()
    found = {"loss": error(total, t["loss"]), "logits": error(logits, t["logits"])}
    for name, part in parts.items():
        found["loss." + name] = error(part, t["loss." + name])
    # A gradient that is zero in exact arithmetic (a bias before a softmax) is rounding noise on
    # both sides.
    floor = 1e-3 * max(float(t["grad." + n].abs().max()) for n, _ in model.named_parameters())
    for name, p in model.named_parameters():
        found["grad." + name] = error(p.grad, t["grad." + name], floor)
    optimizer = torch.optim.Adam(model.parameters(), lr=case["lr"], eps=1e-8)
    for step in range(case["steps"]):
        optimizer.zero_grad()
        total, *_ = loss(model, *batch, case)
        total.backward()
        clip_each([p.grad for p in model.parameters()], case["clip"])
        optimizer.step()
        found[f"step {step} loss"] = error(total, t["step_losses"][step])
    if dtype == torch.float64:      # in f32, Adam amplifies rounding noise
        for name, p in model.named_parameters():
            found["after." + name] = error(p, t["after." + name])
    return found


def check(folder, device):
    """Prints a line per case, precision and sharing; True if all agree."""
    good = True
    paths = sorted(glob.glob(os.path.join(folder, "dfar_*.safetensors")))
    if not paths:
        raise SystemExit(f"no dfar_*.safetensors in {folder}")
    for path in paths:
        for name, dtype in (("f64", torch.float64), ("f32", torch.float32)):
            for shared in (False, True):
                found = compare(path, dtype, device, shared)
                bad = {k: e for k, e in found.items() if not e <= TOLERANCE[name]}
                good &= not bad
                worst = max(found, key=found.get)
                print(f"{'FAIL' if bad else 'ok  '} {os.path.basename(path)[:-12]:24} {name} {'shared   ' if shared else 'instances'} "
                      f"{len(found)} tensors, worst {found[worst]:.1e} ({worst}) {list(bad.items())[:5] if bad else ''}", flush=True)
    return good
