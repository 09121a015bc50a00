"""Data sets: views of the map, import of files and tables."""

from __future__ import annotations

import gc
import json
import subprocess
from pathlib import Path

import conftest
import numpy as np
import pytest

import dfar

LOG = """user,item,liked,time
ann,tea,1,100
ann,milk,0,200
ann,cake,1,300
ann,nuts,0,400
bob,milk,1,150
bob,tea,0,250
bob,rum,1,350
"""
COLUMNS = {"user": "user", "item": "item", "label": "liked", "time": "time"}
SMALL = {"k_core": 0, "split": "leave-last", "negatives": 1}


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    path.write_text(LOG)
    return path


def test_a_log_is_imported_and_read_back(log: Path, tmp_path: Path) -> None:
    data = dfar.import_log(log, tmp_path / "log.dfar", **COLUMNS, **SMALL)
    assert (data.users, data.items, data.events) == (2, 5, 7)
    assert repr(data).endswith("log.dfar': 2 users, 5 items, 7 events)")
    ann = data.find_user("ann")
    history = data.user(ann)
    assert [data.item_id(item) for item in history.items] == ["tea", "milk", "cake", "nuts"]
    assert history.labels.tolist() == [1, 0, 1, 0]
    assert history.times.tolist() == [100_000, 200_000, 300_000, 400_000]
    assert (history.train_end, history.valid_end) == (2, 3)
    assert data.user_ids() == ["ann", "bob"] and data.find_item("rum") is not None
    assert data.find_item("gin") is None and data.user_id(1) == "bob"
    assert data.protocol["positive"] == "liked = 1"
    assert [len(h.items) for h in data] == [4, 3]
    groups = data.groups("test")
    assert groups.users.tolist() == [0, 1] and groups.negatives.shape == (2, 1)
    assert groups.ceiling is None
    for bad in (lambda: data.user(2), lambda: data.user(-1), lambda: data.item_id(5)):
        with pytest.raises(IndexError, match="user is|item is"):
            bad()
    with pytest.raises(ValueError, match="part is 'train'"):
        data.groups("train")


def test_views_are_the_map_itself_read_only_and_keep_it_alive(data) -> None:
    again = dfar.Dataset.open(data.path)
    first, second = again.histories, again.histories
    for a, b, dtype in zip(first, second, ("u8", "u4", "u1", "i8", "u4")):
        assert a.dtype == dtype and a.ctypes.data == b.ctypes.data and not a.flags.owndata
        with pytest.raises(ValueError):
            a[0] = 0
        with pytest.raises(ValueError):
            a.setflags(write=True)
    assert len(first.offsets) == data.users + 1 and first.split.shape == (data.users, 2)
    # The file's own bytes, after everything but a view is gone.
    items, expected = first.items, first.items.copy()
    raw = Path(data.path).read_bytes()
    assert expected.tobytes() in raw
    del again, first, second, a, b
    gc.collect()
    assert np.array_equal(items, expected)
    ceiling = data.groups("valid").ceiling
    assert ceiling.dtype == np.float32 and ceiling.shape == (len(data.groups("valid").users), 10)


def tables() -> list:
    """The log as a table of each library that is installed."""
    found = []
    rows = [line.split(",") for line in LOG.split()]
    columns = dict(zip(rows[0], zip(*rows[1:])))
    columns |= {"liked": [int(x) for x in columns["liked"]], "time": [int(x) for x in columns["time"]]}
    for name in ("pyarrow", "polars", "pandas"):
        missing = pytest.mark.skip(f"{name} is not installed")
        try:
            module = __import__(name)
        except ImportError:
            found.append(pytest.param(None, id=name, marks=missing))
            continue
        if name == "pyarrow":
            table = module.table({n: list(c) for n, c in columns.items()})
            found.append(pytest.param(table, id="pyarrow"))
            chunked = module.Table.from_batches(
                table.to_batches(max_chunksize=3), table.schema
            )
            found.append(pytest.param(chunked, id="pyarrow-chunks"))
            reader = module.RecordBatchReader.from_batches(table.schema, table.to_batches())
            found.append(pytest.param(reader, id="pyarrow-reader"))
        elif name == "polars":
            frame = module.DataFrame({n: list(c) for n, c in columns.items()})
            found.append(pytest.param(frame, id="polars"))
            categories = frame.with_columns(module.col("item").cast(module.Categorical))
            found.append(pytest.param(categories, id="polars-categories"))
        else:
            frame = module.DataFrame({n: list(c) for n, c in columns.items()})
            # A column that is not wanted, of a type that the importer would refuse.
            frame["extra"] = [[1], [2], [], [], [3], [4], [5]]
            found.append(pytest.param(frame, id="pandas"))
            days = frame.assign(time=module.to_datetime(frame["time"], unit="s"), liked=frame.liked == 1)
            found.append(pytest.param(days, id="pandas-times"))
    return found


@pytest.mark.parametrize("table", tables())
def test_a_table_gives_the_same_events_as_the_file(table, log: Path, tmp_path: Path) -> None:
    from_file = dfar.import_log(log, tmp_path / "file.dfar", **COLUMNS, **SMALL)
    from_table = dfar.import_log(table, tmp_path / "table.dfar", **COLUMNS, **SMALL)
    for a, b in zip(from_file.histories, from_table.histories):
        assert np.array_equal(a, b)
    assert from_file.item_ids() == from_table.item_ids()
    assert np.array_equal(from_file.groups("test").negatives, from_table.groups("test").negatives)
    assert from_table.protocol["source"]["files"] == ["table.arrow"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file.dfar", "log.csv", "table.dfar"]


def test_a_column_is_given_by_number_in_a_table_whose_others_are_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = {"uid": ["a", "a", "b"], "item": ["x", "y", "z"], "time": [1, 2, 3], "label": [1, 0, 1]}
    data = dfar.import_log(
        pyarrow.table(table), tmp_path / "x.dfar", user="0", item="item", time="time", label="label",
        k_core=0, negatives=0,
    )
    assert data.user_ids() == ["a", "b"] and data.item_ids() == ["x", "y", "z"]


def test_the_label_column_of_a_format_is_found_in_a_table(tmp_path: Path) -> None:
    table = {"u": ["a"] * 4, "i": ["w", "x", "y", "z"], "t": [1, 2, 3, 4], "rating": [5, 1, 4, 2]}
    pyarrow = pytest.importorskip("pyarrow")
    data = dfar.import_log(
        pyarrow.table(table), tmp_path / "x.dfar", format="movielens", user="u", item="i", time="t",
        k_core=0, negatives=0,
    )
    assert data.histories.labels.tolist() == [1, 0, 1, 0]


def test_a_table_has_the_checks_of_the_command_line(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    good = {"user": ["a", "a"], "item": ["x", "y"], "liked": [1, 0], "time": [1, 2]}
    cases = [
        (good | {"liked": [1, 7]}, {}, "a flag is 0 or 1 .*`positive_above`"),
        (good | {"user": [1.5, 2.5]}, {}, "table .*column user is Float64"),
        (good | {"user": ["a", None]}, {}, "table"),
        ({k: v for k, v in good.items() if k != "time"}, {}, "table: no column time"),
        (good, {"label": "rating"}, "table: no column rating"),
        (
            {"when" if name == "time" else name: values for name, values in good.items()},
            {"time": None},
            "no column time or timestamp for the time: give `time`",
        ),
        (good, {"label": None}, "no column label for the label: give `label` or `all_liked`"),
    ]
    for columns, change, words in cases:
        with pytest.raises(dfar.DataError, match=words):
            dfar.import_log(pa.table(columns), tmp_path / "x.dfar", **COLUMNS | change, **SMALL)
    assert list(tmp_path.iterdir()) == []


def test_the_messages_are_those_of_the_command(log: Path, tmp_path: Path) -> None:
    log.write_text(LOG.replace("bob,tea,0,250", "bob,tea,0,never"))
    flags = ["--user-column", "user", "--item-column", "item", "--label-column", "liked"]
    flags += ["--time-column", "time", "--k-core", "0"]
    done = subprocess.run(
        [conftest.command("dfar-data"), "import", "--format", "csv", "--input", log, "--output",
         tmp_path / "x.dfar", *flags],
        capture_output=True, text=True, check=False,
    )
    with pytest.raises(dfar.DataError) as caught:
        dfar.import_log(log, tmp_path / "x.dfar", **COLUMNS, **SMALL)
    assert done.stderr.splitlines()[-1] == f"error: {caught.value}"


def test_the_reader_s_decisions_are_logged(log: Path, tmp_path: Path, caplog) -> None:
    with caplog.at_level("INFO", logger="dfar"):
        dfar.import_log(log, tmp_path / "x.dfar", **COLUMNS, **SMALL)
    assert "names the columns, user, item, time, label = liked" in caplog.text


BAD = [
    ({"format": "excel"}, ValueError, "format is 'excel', but must be 'movielens', "),
    ({"time_unit": "h"}, ValueError, "time_unit is 'h'"),
    ({"split": "random"}, ValueError, "split is 'random'"),
    ({"k_core": -1}, OverflowError, "k_core|negative|unsigned"),
    ({"k_core_on": "some"}, ValueError, "k_core_on is 'some'"),
    ({"delimiter": "ab"}, (TypeError, ValueError), "delimiter|length 1"),
    ({"liked": "buy"}, TypeError, "liked must be a list"),
    ({"positive_above": 3.0, "all_liked": True}, ValueError, "positive_above excludes all_liked"),
    ({"skipped": ["x"]}, ValueError, "need liked"),
    ({"sort_memory": 0}, ValueError, "sort_memory is 0"),
    ({"train_share": 2.0, "split": "temporal"}, dfar.DataError, "train-share: 2 is not above 0"),
    ({"train_share": 0.7}, ValueError, "this split is 'leave-last'"),
]


@pytest.mark.parametrize(("change", "exception", "words"), BAD)
def test_bad_options_are_named(change, exception, words, log: Path, tmp_path: Path) -> None:
    with pytest.raises(exception, match=words):
        dfar.import_log(log, tmp_path / "x.dfar", **{**COLUMNS, **SMALL, **change})


def test_files_that_are_no_data_set(tmp_path: Path, data) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        dfar.Dataset.open(tmp_path / "none.dfar")
    assert caught.value.filename == str(tmp_path / "none.dfar")
    path = tmp_path / "x.dfar"
    path.write_bytes(b"not a data set at all" * 10)
    with pytest.raises(dfar.DataError, match="is not a dfar data set"):
        dfar.Dataset.open(path)
    damaged = bytearray(Path(data.path).read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(dfar.DataError, match="checksum|entry"):
        dfar.Dataset.open(path)
    with pytest.raises(TypeError, match="path"):
        dfar.Dataset.open(3)
    with pytest.raises(TypeError, match="table must be a path.*not int"):
        dfar.import_log(3, tmp_path / "y.dfar")
    with pytest.raises(FileNotFoundError):
        dfar.import_log(tmp_path / "none.csv", tmp_path / "y.dfar", **COLUMNS)


def test_protocols_are_plain_data(data) -> None:
    assert json.loads(json.dumps(data.protocol)) == data.protocol
    assert data.protocol["synthetic"]["users"] == 80
