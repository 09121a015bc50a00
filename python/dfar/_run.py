"""Training and scoring."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from . import _dfar
from ._data import Dataset
from ._dfar import Table
from .callbacks import Callback, Dispatch, default_progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Recommendations", "Run", "Table", "resume", "train"]

Id = str | int
Event = tuple[Id, int]
PathLike = str | os.PathLike[str]


class Recommendations(NamedTuple):
    """The best items of ``U`` users, best first."""

    users: list[str]
    """``[U]`` ids of the users."""
    items: npt.NDArray[np.object_]
    """``[U, k]`` ids of items; ``None`` where a user has fewer than ``k`` candidates."""
    logits: npt.NDArray[np.float32]
    """``[U, k]``; the probability of a like is ``1 / (1 + exp(-logit))``. NaN where no item is."""


class Run:
    """A trained run: the best model of a run directory, with its configuration and results."""

    def __init__(self, run: _dfar.Run) -> None:
        self._run = run
        self.dir = Path(run.dir()).absolute()
        """The run directory."""
        self._items: npt.NDArray[np.object_] | None = None

    @classmethod
    def open(cls, dir: PathLike, *, device: Literal["cpu", "cuda", "auto"] | None = None) -> Run:
        """Loads the best model of a run, from :func:`train` or from ``dfar-train``.

        Args:
            dir: the run directory.
            device: where to compute; ``None``: the run's device.

        Raises:
            FileNotFoundError: the directory holds no run, or no model yet.
            DataError: the model file is damaged.
        """
        return cls(_dfar.Run.open(dir, device))

    def __repr__(self) -> str:
        model = self._run.model()
        auc = model["valid_auc"]
        auc = "" if auc is None else f", validation AUC {auc:.4f}"
        return f"Run({os.fspath(self.dir)!r}: epoch {model['epoch']}{auc})"

    @property
    def finished(self) -> bool:
        """Whether the run has metrics. If not, continue it with :func:`resume`."""
        return (self.dir / "metrics.json").exists()

    @property
    def config(self) -> dict[str, Any]:
        """The configuration; keys are those of ``config.toml``."""
        config: dict[str, Any] = self._run.config()
        return config

    @property
    def metrics(self) -> dict[str, Any]:
        """The contents of ``metrics.json``: ``run.metrics["test"]["auc"]`` and so on.

        Raises:
            FileNotFoundError: the run is not finished.
        """
        import json

        metrics: dict[str, Any] = json.loads((self.dir / "metrics.json").read_text("utf-8"))
        return metrics

    def curves(self) -> dict[str, npt.NDArray[np.float64]]:
        """Loss, validation AUC, times by epoch: ``[epochs]`` arrays by name, NaN where absent."""
        import json

        import numpy as np

        lines = (self.dir / "log.jsonl").read_text("utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if record["event"] == "epoch"]
        names = [name for name, x in (records[0] if records else {}).items()
                 if x is None or (isinstance(x, (int, float)) and not isinstance(x, bool))]
        return {
            name: np.array([r[name] for r in records], dtype=np.float64) for name in names
        }

    def parameters(self) -> dict[str, npt.NDArray[np.float32]]:
        """The parameters by name, e.g. ``encoder.q.w``; new arrays."""
        return dict(self._run.parameters())

    @property
    def item_ids(self) -> npt.NDArray[np.object_]:
        """``[items]`` original ids of the items, by number."""
        if self._items is None:
            import numpy as np

            items = np.empty(len(ids := self._run.items()), dtype=object)
            items[:] = ids
            self._items = items
        return self._items

    @overload
    def score(  # type: ignore[overload-overlap]  # a string is a sequence, too
        self, histories: Sequence[Sequence[Event]], candidates: Sequence[Id] | None = ...,
        *, table: Literal[False] = ...,
    ) -> npt.NDArray[np.float32]: ...
    @overload
    def score(
        self, histories: Sequence[Sequence[Event]], candidates: Sequence[Sequence[Id]],
        *, table: Literal[False] = ...,
    ) -> list[npt.NDArray[np.float32]]: ...
    @overload
    def score(
        self, histories: Sequence[Sequence[Event]],
        candidates: Sequence[Id] | Sequence[Sequence[Id]] | None = ..., *, table: Literal[True],
    ) -> Table: ...
    def score(self, histories: Any, candidates: Any = None, *, table: bool = False) -> Any:
        """The logits of candidate items after histories.

        Args:
            histories: ``B`` lists of ``(item, label)``, oldest first; label 1 liked, 0 skipped.
                Items have their original ids, as text or whole numbers.
            candidates: item ids for all histories, or a list of ids for each history; ``None``: all
                items, in the order of ``item_ids``.
            table: return a :class:`dfar.Table`.

        Returns:
            ``[B, candidates]`` float32; with a list for each history, a list of arrays. The
            probability of a like is ``1 / (1 + exp(-logit))``.

            With ``table=True``: a table with a row for each history and candidate: ``history``
            (its place, from 0), ``rank`` (from 1, best first), ``item``, ``probability``,
            ``logit``.

        Raises:
            ValueError: an unknown item, or a label that is neither 0 nor 1.
        """
        if candidates is not None:
            candidates = list(candidates)
            if candidates and not isinstance(candidates[0], (str, int)) and _nested(candidates[0]):
                each = [list(c) for c in candidates]
                if table:
                    return self._run.score_table(histories, None, each)
                return self._run.score_each(histories, each)
        if table:
            return self._run.score_table(histories, candidates, None)
        return self._run.score_same(histories, candidates)

    @overload
    def recommend(
        self, users: Iterable[Id] | None = ..., k: int = ..., *, exclude_seen: bool = ...,
        candidates: Iterable[Id] | None = ..., data: Dataset | None = ...,
        table: Literal[False] = ...,
    ) -> Recommendations: ...
    @overload
    def recommend(
        self, users: Iterable[Id] | None = ..., k: int = ..., *, exclude_seen: bool = ...,
        candidates: Iterable[Id] | None = ..., data: Dataset | None = ..., table: Literal[True],
    ) -> Table: ...
    def recommend(
        self,
        users: Iterable[Id] | None = None,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: Iterable[Id] | None = None,
        data: Dataset | None = None,
        table: bool = False,
    ) -> Recommendations | Table:
        """The ``k`` best items of users of a data set, with all their events as history.

        Args:
            users: ids of users in the log; ``None``: every user.
            k: number of items.
            exclude_seen: leave out the items of the user's history.
            candidates: ids of the items to rank; ``None``: all.
            data: data set with the users; ``None``: that of the training.
            table: return a :class:`dfar.Table`.

        Returns:
            Arrays of ``k`` places for each user. With ``table=True``: a table with a row for each
            user and item: ``user``, ``rank`` (from 1, best first), ``item``, ``probability``,
            ``logit``, as in the Parquet files of ``dfar-train score``.

        Raises:
            ValueError: an unknown user or item.
        """
        import numpy as np

        data = Dataset.open(self._run.data()) if data is None else data
        question = (
            data._data, None if users is None else _ids("users", users), k, exclude_seen,
            None if candidates is None else _ids("candidates", candidates),
        )
        if table:
            return self._run.recommend_table(*question)
        names, items, logits = self._run.recommend(*question)
        ids = np.empty(len(self.item_ids) + 1, dtype=object)  # the last stands for no item: None
        ids[:-1] = self.item_ids
        return Recommendations(names, ids[np.minimum(items, len(ids) - 1)], logits)


def _ids(name: str, ids: Iterable[Id]) -> list[Id]:
    if isinstance(ids, (str, bytes)):
        raise TypeError(f"{name} must be a list of ids, not one id")
    return list(ids)


def _nested(x: object) -> bool:
    return hasattr(x, "__iter__")


def train(
    dataset: Dataset,
    config: Mapping[str, Any] | PathLike | None = None,
    out: PathLike | None = None,
    *,
    callbacks: Iterable[Callback] = (),
    progress: bool | None = None,
) -> Run:
    """Trains a model and evaluates it, as ``dfar-train``: same seed, same bits.

    Args:
        dataset: the data set.
        config: the keys of ``config.toml`` (docs/training.md), e.g. ``{"epochs": 5, "seed": 7}``,
            or the path of such a file. Spellings of other frameworks, e.g. ``learning_rate``, are
            understood.
        out: directory of the new run; ``None``: ``runs/NAME``, after the data set.
        callbacks: objects with any of the methods of :class:`dfar.callbacks.Callback`.
        progress: show progress bars (by tqdm, if it is installed); ``None``: in terminals and
            notebooks.

    Returns:
        The run with its best model. If a callback stopped it, ``run.finished`` is false.

    Raises:
        ValueError: a bad configuration, or a data set without training targets.
        FileExistsError: ``out`` holds a run.
        KeyboardInterrupt: Ctrl-C. Everything is saved; continue with :func:`resume`.
        RuntimeError: the loss became non-finite, the device failed, or a callback stopped the run
            before its first epoch ended: there is no model yet, but :func:`resume` continues it.

    The GIL is released. An exception in a callback stops the run, saves it, and is raised again.
    """
    table: dict[str, Any] = {}
    file = None
    if isinstance(config, Mapping):
        table = dict(config)
    elif config is not None:
        file = config
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a dfar.Dataset, not {type(dataset).__name__}")
    dispatch = Dispatch([*callbacks, *default_progress(progress)])
    dir, finished = _dfar.train(dataset._data, file, table, out, dispatch.observe, dispatch.steps)
    return _end(dir, finished, dispatch)


def resume(
    dir: PathLike,
    config: Mapping[str, Any] | None = None,
    *,
    callbacks: Iterable[Callback] = (),
    progress: bool | None = None,
) -> Run:
    """Continues a run that was stopped; its result is the same as without the interruption.

    Args:
        dir: the run directory.
        config: keys to change; only those that do not change the result of a step, e.g. ``epochs``.
        callbacks, progress: as for :func:`train`.
    """
    dispatch = Dispatch([*callbacks, *default_progress(progress)])
    found, finished = _dfar.resume(dir, dict(config or {}), dispatch.observe, dispatch.steps)
    return _end(found, finished, dispatch)


def _end(dir: PathLike, finished: bool, dispatch: Dispatch) -> Run:
    try:
        run = Run.open(dir)
    except FileNotFoundError as error:
        if finished:
            raise
        raise RuntimeError(
            f"a callback stopped the run before its first epoch ended; continue it with "
            f"dfar.resume({os.fspath(dir)!r})"
        ) from error
    dispatch.end(run)
    return run
