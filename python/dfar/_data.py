"""Data sets: opening, importing, generating."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from . import _dfar

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["Dataset", "Groups", "Histories", "History", "import_log", "synthetic"]

Path = str | os.PathLike[str]
Split = Literal["leave-last", "temporal", "by-user"]


class ArrowTable(Protocol):
    """A table with the Arrow PyCapsule interface: of pandas, polars, pyarrow, DuckDB, ..."""

    def __arrow_c_stream__(self, requested_schema: object = None, /) -> object: ...


class Histories(NamedTuple):
    """The events of all users, end to end: views of the file, read-only."""

    offsets: npt.NDArray[np.uint64]
    """``[users + 1]``: the events of user ``u`` are at ``offsets[u]:offsets[u + 1]``."""
    items: npt.NDArray[np.uint32]
    """``[events]`` items."""
    labels: npt.NDArray[np.uint8]
    """``[events]``: 0 skipped, 1 liked."""
    times: npt.NDArray[np.int64]
    """``[events]`` milliseconds since 1970, ascending within a user."""
    split: npt.NDArray[np.uint32]
    """``[users, 2]``: ``train_end`` and ``valid_end``, counted from the user's first event."""


class History(NamedTuple):
    """The events of one user in time order: views of the file, read-only."""

    items: npt.NDArray[np.uint32]
    """``[T]`` items."""
    labels: npt.NDArray[np.uint8]
    """``[T]``: 0 skipped, 1 liked."""
    times: npt.NDArray[np.int64]
    """``[T]`` milliseconds since 1970."""
    train_end: int
    """Events before it are for training."""
    valid_end: int
    """Events from ``train_end`` to here are for validation, the rest for testing."""


class Groups(NamedTuple):
    """The ``G`` evaluation groups of a part, one for each of its events: views of the file.

    The history of a group is all events of the user before its event.
    """

    users: npt.NDArray[np.uint32]
    """``[G]`` users."""
    events: npt.NDArray[np.uint32]
    """``[G]``: the target's index within the user's events."""
    negatives: npt.NDArray[np.uint32]
    """``[G, n]`` sampled items, which every model is scored against."""
    ceiling: npt.NDArray[np.float32] | None
    """``[G, 1 + n]`` scores of the generating process, of synthetic sets; else ``None``."""


class Dataset:
    """A data set file (``.dfar``), mapped into memory and validated once.

    Arrays of its attributes are read-only views of the map. They are not copied, and they keep the
    map alive.
    """

    __slots__ = ("_data", "events", "items", "path", "users")

    path: os.PathLike[str]
    """The file."""
    users: int
    """Number of users, who are numbered from 0."""
    items: int
    """Number of items, which are numbered from 0."""
    events: int
    """Number of events of all users."""

    def __init__(self, data: _dfar.Dataset) -> None:
        self._data = data
        self.path, self.users, self.items, self.events = data.counts()

    @classmethod
    def open(cls, path: Path) -> Dataset:
        """Maps a file and validates every byte of it.

        Raises:
            DataError: the file is damaged or not a data set.
            OSError: the file cannot be read, e.g. ``FileNotFoundError``.
        """
        return cls(_dfar.Dataset.open(path))

    def __repr__(self) -> str:
        path = os.fspath(self.path)
        return f"Dataset({path!r}: {self.users} users, {self.items} items, {self.events} events)"

    @property
    def histories(self) -> Histories:
        """The events of all users."""
        return Histories(*self._data.histories())

    def user(self, user: int) -> History:
        """The events of one user.

        Raises:
            IndexError: there is no such user.
        """
        if not 0 <= user < self.users:
            raise IndexError(f"user is {user}, but there are {self.users}")
        offsets, items, labels, times, split = self._data.histories()
        own = slice(int(offsets[user]), int(offsets[user + 1]))
        train_end, valid_end = split[user].tolist()
        return History(items[own], labels[own], times[own], train_end, valid_end)

    def __iter__(self) -> Iterator[History]:
        """The histories of all users in order."""
        offsets, items, labels, times, split = self._data.histories()
        ends = offsets.tolist()
        for user, (train_end, valid_end) in enumerate(split.tolist()):
            own = slice(ends[user], ends[user + 1])
            yield History(items[own], labels[own], times[own], train_end, valid_end)

    def groups(self, part: Literal["valid", "test"]) -> Groups:
        """The evaluation groups of a part."""
        return Groups(*self._data.groups(part))

    def item_id(self, item: int) -> str:
        """The id of an item in the log."""
        return self._data.item_id(item)

    def user_id(self, user: int) -> str:
        """The id of a user in the log."""
        return self._data.user_id(user)

    def item_ids(self) -> list[str]:
        """The ids of all items, by number."""
        return self._data.item_ids()

    def user_ids(self) -> list[str]:
        """The ids of all users, by number."""
        return self._data.user_ids()

    def find_item(self, id: str) -> int | None:
        """The item with this id in the log, or ``None``."""
        return self._data.find_item(id)

    def find_user(self, id: str) -> int | None:
        """The user with this id in the log, or ``None``."""
        return self._data.find_user(id)

    @property
    def protocol(self) -> dict[str, Any]:
        """How the data set was made: source, filters, split, negatives. State it with results."""
        protocol: dict[str, Any] = self._data.protocol()
        return protocol


def import_log(
    table: ArrowTable | Path | Sequence[Path],
    output: Path,
    *,
    format: Literal["csv", "movielens", "amazon", "kuairand", "kuairec", "inter"] = "csv",
    user: str | None = None,
    item: str | None = None,
    time: str | None = None,
    label: str | None = None,
    date: str | None = None,
    delimiter: str | None = None,
    time_unit: Literal["auto", "s", "ms", "us", "ns"] = "auto",
    positive_above: float | None = None,
    all_liked: bool = False,
    liked: Sequence[str] = (),
    skipped: Sequence[str] = (),
    ignore_others: bool = False,
    skip_bad_rows: int = 0,
    keep_repeats: bool = False,
    k_core: int = 10,
    k_core_on: Literal["all", "positive"] | None = None,
    k_core_until_stable: bool = False,
    split: Split | None = None,
    train_share: float | None = None,
    valid_share: float | None = None,
    negatives: int = 9,
    exclude_seen: bool = False,
    seed: int = 1,
    member: str | None = None,
    temp_dir: Path | None = None,
    sort_memory: int = 32,
) -> Dataset:
    """Makes a data set file from a log of (user, item, time, feedback), and opens it.

    The same as ``dfar-data import``, with its checks; keyword arguments are its flags, with
    ``user`` for ``--user-column`` and so on. docs/data-format.md describes them.

    Args:
        table: a table of pandas, polars, pyarrow or another library with ``__arrow_c_stream__``; or
            the path of a log, or several. A table is read through the Arrow C stream interface and
            passes through a temporary Arrow file, because the importer reads it twice.
        output: the ``.dfar`` file to make; an existing file is replaced.
        format: format of the log; ``"csv"`` stands for any table or file.
        user, item, time, label, date: names of columns; for ``"csv"``, these words by default.
        positive_above: a label above it is liked. By default a label is a flag: 1 liked, 0 skipped.
        all_liked: every event is liked; no label is needed.
        liked, skipped, ignore_others: names of labels, if labels are names.
        k_core: fewest events of an item, then of a user; 0: no filter.
        split: ``"leave-last"``, ``"temporal"`` or ``"by-user"``; ``None``: by the format.
        train_share, valid_share: shares of the other two splits; 0.8 and 0.1 by default.
        negatives: negatives of each evaluation group.
        sort_memory: mebibytes of events to sort in memory at a time.

    Raises:
        DataError: a bad row, a missing column, or a table that leaves nothing to train on.
        OSError: a file cannot be read or written.
        TypeError, ValueError: a bad argument.

    The reader's decisions are logged to the logger ``dfar``, and stored in ``Dataset.protocol``.
    The GIL is released, and Ctrl-C stops the import. Memory does not grow with the number of rows.
    """
    import logging  # here, because it is slow to load

    for name, names in (("liked", liked), ("skipped", skipped)):
        if isinstance(names, str):
            raise TypeError(f"{name} must be a list of names, not a string")
    if positive_above is not None and (all_liked or liked):
        raise ValueError("positive_above excludes all_liked and liked")
    if all_liked and (liked or label is not None):
        raise ValueError("all_liked excludes liked and label")
    if (skipped or ignore_others) and not liked:
        raise ValueError("skipped and ignore_others need liked")
    return Dataset(
        _dfar.import_log(
            table, output, format=format, user=user, item=item, time=time, date=date, label=label,
            delimiter=delimiter, time_unit=time_unit, positive_above=positive_above,
            all_liked=all_liked, liked=list(liked), skipped=list(skipped),
            ignore_others=ignore_others, skip_bad_rows=skip_bad_rows, keep_repeats=keep_repeats,
            k_core=k_core, k_core_on=k_core_on, k_core_until_stable=k_core_until_stable,
            split=split, train_share=train_share, valid_share=valid_share, negatives=negatives,
            exclude_seen=exclude_seen, seed=seed, member=member, temp_dir=temp_dir,
            sort_memory=sort_memory, observe=logging.getLogger("dfar").info,
        )
    )


def synthetic(
    output: Path,
    *,
    users: int = 1000,
    items: int = 500,
    events_per_user: float = 50.0,
    seed: int = 1,
    negatives: int = 9,
    split: Split = "temporal",
) -> Dataset:
    """Makes a data set whose best possible AUC is known, as ``dfar-data synth``, and opens it."""
    _dfar.synthetic(output, users, items, events_per_user, seed, negatives, split)
    return Dataset.open(output)
