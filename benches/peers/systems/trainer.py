"""Training steps: gradients, clipping of each tensor, Adam. Of the item table, the rows of the batch
take part and no others, as in dfar."""

from dataclasses import dataclass
from typing import Callable

import numpy as np
import torch
import torch.nn.functional as F

from . import model
from .batch import by_instance


@dataclass(frozen=True)
class Form:
    """How a peer computes."""

    system: str
    heads: int
    embed_l2: float
    cell: str = "own"  # "library": PyTorch's; "own": gru.Gru; "equations"
    split_tower: bool = True
    relu: Callable = F.relu


class Tensors:
    """A padded batch as PyTorch's tensors, with the names of its fields."""

    def __init__(self, b, dtype):
        for name, x in vars(b).items():
            x = torch.from_numpy(np.ascontiguousarray(x))
            setattr(self, name, x.to(dtype) if x.is_floating_point() else x)
        B, T = self.items.shape
        self.items_by_time = self.items.t().contiguous()
        self.last_by_time = torch.where(self.length > 0, (self.length - 1) * B + self.history, 0)
        self.candidate_item = self.pair[self.candidate]
        self.mean = torch.ones(T, T, dtype=dtype).tril() / torch.arange(1, T + 1)[:, None]


def library_cell(D):
    """The signs with which `gru.*` are the parameters of torch.nn.GRU, whose z is 1 - u."""
    signs = torch.ones(3 * D)
    signs[D : 2 * D] = -1
    return signs


class Trainer:
    def __init__(self, options, parameters, batches, instances=False, dtype=torch.float32, compiled=False, **form):
        self.options = options
        self.form = Form(options["system"], options["heads"], options["embed_l2"], **form)
        x = {n: torch.from_numpy(v).to(dtype, copy=True) for n, v in parameters.items()}
        self.item = x.pop("item")
        if self.form.cell == "library" and "gru.w" in x:
            signs = library_cell(self.item.shape[1])
            for name, w in (("gru.weight_ih", "gru.w"), ("gru.weight_hh", "gru.u")):
                x[name] = (x.pop(w) * signs).t().contiguous()
            x["gru.bias_ih"] = x.pop("gru.b") * signs
        self.p = {n: v.requires_grad_() for n, v in x.items()}
        self.first, self.second = (
            [torch.zeros_like(v, requires_grad=False) for v in (*self.p.values(), self.item)]
            for _ in range(2)
        )
        self.count = torch.zeros(())
        self.batches = [Tensors(by_instance(b) if instances else b, dtype) for b in batches]
        self.loss = torch.compile(model.loss, dynamic=False) if compiled else model.loss

    def gradients(self, b):
        """-> losses, touched rows, gradients of all parameters and of these"""
        rows = self.item.index_select(0, b.touched).requires_grad_()
        losses = self.loss(self.p, rows, b, self.form)
        return losses, rows, torch.autograd.grad(losses[0], [*self.p.values(), rows])

    def step(self, b):
        losses, rows, gradients = self.gradients(b)
        # The fused Adam reads memory in order, whatever the strides.
        clip, gradients = self.options["clip"], [x.contiguous() for x in gradients]
        norms = torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, [clip / n.clamp_min(clip) for n in norms])
        of_rows = [x[-1].index_select(0, b.touched) for x in (self.first, self.second)]
        rows = rows.detach()
        self.count += 1
        with torch.no_grad():
            torch._fused_adam_(
                [*self.p.values(), rows],
                gradients,
                [*self.first[:-1], of_rows[0]],
                [*self.second[:-1], of_rows[1]],
                [],
                [self.count] * len(gradients),
                lr=self.options["lr"],
                beta1=0.9,
                beta2=0.999,
                weight_decay=0.0,
                eps=1e-8,
                amsgrad=False,
                maximize=False,
            )
            for table, x in zip((self.item, self.first[-1], self.second[-1]), (rows, *of_rows)):
                table.index_copy_(0, b.touched, x)
        return losses[0]

    def steps(self):
        """One on each batch."""
        for b in self.batches:
            self.step(b)

    def check(self):
        """What dfar's worker writes in `check`: losses and gradients of each batch, then the losses of
        steps on the first."""
        found = {}
        for i, b in enumerate(self.batches):
            losses, _, gradients = self.gradients(b)
            for name, x in zip(("loss", "loss.bce", "loss.l2"), losses):
                found[f"{i}.{name}"] = x.detach().reshape(1)
            of = dict(zip(self.p, gradients))
            of["item"] = torch.zeros_like(self.item).index_copy_(0, b.touched, gradients[-1])
            if "gru.weight_ih" in of:
                signs = library_cell(self.item.shape[1])
                for name, w in (("gru.weight_ih", "gru.w"), ("gru.weight_hh", "gru.u")):
                    of[w] = of.pop(name).t() * signs
                of["gru.b"] = of.pop("gru.bias_ih") * signs
            found.update({f"{i}.grad.{name}": x for name, x in of.items()})
        steps = [float(self.step(self.batches[0]).detach()) for _ in range(self.options["checked_steps"])]
        return {**{n: x.contiguous().numpy() for n, x in found.items()}, "step_losses": np.array(steps)}


class Kinked(torch.autograd.Function):
    """ReLU whose gradient begins at `side` times the rounding of f32, instead of 0."""

    @staticmethod
    def forward(ctx, x, side):
        ctx.save_for_backward(x > side * 3e-7 * x.abs().max())
        return x.relu()

    @staticmethod
    def backward(ctx, d):
        (on,) = ctx.saved_tensors
        return d * on, None


def reference(options, parameters, batches):
    """The results of `check` in float64 by the plain formulas, on both sides of ReLU's kinks."""
    sides = [
        Trainer(
            options,
            parameters,
            batches,
            dtype=torch.float64,
            cell="equations",
            split_tower=False,
            relu=lambda x, side=side: Kinked.apply(x, side),
        ).check()
        for side in (1, -1)
    ]
    return {n: np.stack([side[n] for side in sides]) for n in sides[0]}
