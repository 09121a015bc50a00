"""Callbacks of :func:`dfar.train`: progress, TensorBoard, and your own.

A callback for Weights & Biases or MLflow is one method::

    class ToWandb(dfar.callbacks.Callback):
        def on_epoch_end(self, record):
            wandb.log({"loss": record["loss"], "auc": record["valid_auc"]}, step=record["epoch"])
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ._run import Run

__all__ = ["Callback", "EarlyStop", "Progress", "TensorBoard"]


class Callback:
    """A callback; override what you need. A method that returns ``False`` stops the run.

    The run waits while a method is executed, with the thread that called :func:`dfar.train`.
    """

    def on_epoch(self, info: dict[str, Any]) -> bool | None:
        """An epoch begins: ``epoch``, ``epochs``, ``batches``, ``done``, ``size``."""

    def on_step(self, info: dict[str, Any]) -> bool | None:
        """A step was taken: ``step``, ``done``, ``loss``, ``bce``, ``ibl``, ``idl``,
        ``gradient_norm``, ``mean_loss`` of the epoch so far."""

    def on_scored(self, info: dict[str, Any]) -> bool | None:
        """Evaluation groups were scored: ``part``, ``done``, ``groups``."""

    def on_epoch_end(self, record: dict[str, Any]) -> bool | None:
        """An epoch was validated: ``epoch``, ``loss``, ``bce``, ``ibl``, ``idl``, ``valid_auc``,
        ``valid_gauc``, ``instances_per_second``, ``train_seconds``, ``valid_seconds``, ``best``."""

    def on_end(self, run: Run) -> None:
        """The run is over, or was stopped by a callback; not called after an exception."""


METHODS = {
    "epoch": "on_epoch",
    "step": "on_step",
    "scored": "on_scored",
    "epoch_end": "on_epoch_end",
}


class Dispatch:
    """Calls the methods that callbacks have."""

    def __init__(self, callbacks: Sequence[Any]) -> None:
        import numpy as np  # not with `import dfar`, which it would make slower

        self.bools = (bool, np.bool_)
        self.callbacks = callbacks
        self.methods: dict[str, list[Any]] = {}
        for event, name in METHODS.items():
            own = [c for c in callbacks if _overrides(c, name)]
            self.methods[event] = [getattr(c, name) for c in own]
        # Events of steps are costly only if someone listens.
        self.steps = bool(self.methods["step"] or self.methods["scored"])

    def observe(self, event: dict[str, Any]) -> bool:
        """Passes an event on; whether to continue."""
        kind = event.pop("event")
        # Each gets its own, which it may change.
        answers = [method(dict(event)) for method in self.methods.get(kind, ())]
        return not any(isinstance(answer, self.bools) and not answer for answer in answers)

    def end(self, run: Run) -> None:
        for callback in self.callbacks:
            if hasattr(callback, "on_end"):
                callback.on_end(run)


def _overrides(callback: Any, name: str) -> bool:
    method = getattr(type(callback), name, None) or getattr(callback, name, None)
    return method is not None and method is not getattr(Callback, name)


class EarlyStop(Callback):
    """Stops the run when the validation AUC reaches ``auc``."""

    def __init__(self, auc: float) -> None:
        self.auc = auc

    def on_epoch_end(self, record: dict[str, Any]) -> bool | None:
        return record["valid_auc"] is None or record["valid_auc"] < self.auc


class TensorBoard(Callback):
    """Writes loss, validation AUC and speed of each epoch as TensorBoard events.

    Needs ``tensorboardX``, or ``torch`` with ``tensorboard``. ``dir`` is the folder of the events.
    """

    def __init__(self, dir: str) -> None:
        for name in ("torch.utils.tensorboard", "tensorboardX"):
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            self.writer: Any = module.SummaryWriter(dir)
            return
        raise ImportError(
            "TensorBoard events need tensorboardX, or torch with tensorboard; install one"
        )

    def on_epoch_end(self, record: dict[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, float):
                group = "valid" if name.startswith("valid_a") or name == "valid_gauc" else "train"
                self.writer.add_scalar(f"{group}/{name}", value, record["epoch"])
        self.writer.flush()

    def on_end(self, run: Run) -> None:
        self.writer.close()


class Progress(Callback):
    """Progress bars by tqdm, and a line for each epoch; without tqdm only the lines."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.tqdm: Any = None
        try:
            self.tqdm = importlib.import_module("tqdm.auto").tqdm
        except ImportError:
            pass

    def _start(self, name: str, total: int, done: int) -> None:
        self._stop()
        if self.tqdm is not None:
            self.bar = self.tqdm(total=total, initial=done, desc=name, leave=False)

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def on_epoch(self, info: dict[str, Any]) -> None:
        self._start(f"epoch {info['epoch']}/{info['epochs']}", info["batches"], info["done"])

    def on_step(self, info: dict[str, Any]) -> None:
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{info['mean_loss']:.4f}", refresh=False)
            self.bar.update(info["done"] - self.bar.n)

    def on_epoch_end(self, record: dict[str, Any]) -> None:
        self._stop()
        auc = record["valid_auc"]
        auc = "-" if auc is None else f"{auc:.4f}"
        best = " (best)" if record["best"] else ""
        seconds = record["train_seconds"] + record["valid_seconds"]
        print(
            f"epoch {record['epoch']}: loss {record['loss']:.4f}, validation AUC {auc}{best}, "
            f"{record['instances_per_second']:.0f} instances/s, {seconds:.1f} s",
            file=sys.stderr,
        )

    def on_end(self, run: Run) -> None:
        self._stop()


def default_progress(progress: bool | None) -> list[Callback]:
    """The progress of a call of `train`; by default in terminals and notebooks."""
    if progress is None:
        progress = sys.stderr.isatty() or "ipykernel" in sys.modules
    return [Progress()] if progress else []
