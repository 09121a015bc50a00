"""Training, runs, scores."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import conftest
import numpy as np
import pytest

import dfar


def test_the_same_seed_gives_the_bits_of_the_command(run, data, tmp_path: Path) -> None:
    flags = [f for k, v in conftest.SMALL.items() for f in (f"--{k.replace('_', '-')}", str(v))]
    subprocess.run(
        [conftest.command("dfar-train"), "--data", data.path, "--out", tmp_path / "run", *flags],
        check=True, capture_output=True, timeout=300,
    )
    for file in ("model.safetensors", "config.toml"):
        assert (run.dir / file).read_bytes() == (tmp_path / "run" / file).read_bytes(), file
    own, other = run.metrics, json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert own["test"] == other["test"] and own["valid"] == other["valid"]


def test_a_run_is_opened_from_its_directory(run) -> None:
    again = dfar.Run.open(run.dir)
    assert again.finished and again.metrics["test"]["auc"] > 0.4
    assert again.config["seed"] == 11 and again.config["width"] == 8
    curves = again.curves()
    assert curves["epoch"].tolist() == [1, 2] and curves["loss"].dtype == np.float64
    assert np.isfinite(curves["valid_auc"]).all() and "event" not in curves
    parameters = again.parameters()
    assert sum(x.size for x in parameters.values()) == again.metrics["parameters"]
    assert all(x.dtype == np.float32 for x in parameters.values())
    assert repr(again).startswith("Run(")


def test_scores_are_those_of_the_command(run, data) -> None:
    history = [("3", 1), ("7", 0), (5, 1)]
    found = run.score([history, []])
    assert found.shape == (2, 40) and found.dtype == np.float32
    done = subprocess.run(
        [conftest.command("dfar-train"), "score", "--run", run.dir, "--history", "3:1,7:0,5:1",
         "--top", "40", "--json"],
        check=True, capture_output=True, text=True,
    )
    expected = {row["item"]: row["logit"] for row in json.loads(done.stdout)}
    by_id = dict(zip(run.item_ids, found[0].tolist()))
    assert expected.keys() == by_id.keys()
    assert all(np.float32(expected[i]) == np.float32(by_id[i]) for i in expected)


def test_candidates_are_shared_or_of_each_history(run) -> None:
    histories = [[("3", 1)], [("4", 0), ("5", 1)]]
    every = run.score(histories)
    shared = run.score(histories, ["8", 9])
    assert np.array_equal(shared, every[:, [list(run.item_ids).index(i) for i in ("8", "9")]])
    first, second = run.score(histories, [["8"], ["9", "8"]])
    assert first.tolist() == [shared[0, 0]] and second.tolist() == shared[1, ::-1].tolist()
    assert run.score([], ["8"]).shape == (0, 1) and run.score(histories, []).shape == (2, 0)


def test_recommendations_are_the_best_unseen_items(run, data) -> None:
    users, items, logits = run.recommend(["5", 7], k=4)
    assert users == ["5", "7"] and items.shape == logits.shape == (2, 4)
    for user, best, scores in zip(users, items, logits):
        events = data.user(data.find_user(user))
        seen = {data.item_id(item) for item in events.items}
        history = [(data.item_id(i), int(l)) for i, l in zip(events.items, events.labels)]
        every = dict(zip(run.item_ids, run.score([history])[0]))
        expected = sorted((i for i in every if i not in seen), key=lambda i: -every[i])[:4]
        assert best.tolist() == expected[: len(best)] or np.allclose(
            [every[i] for i in expected], scores
        )
        assert scores.tolist() == [every[i] for i in best]
    everyone = run.recommend(k=2)
    assert everyone.users == data.user_ids() and everyone.items.shape == (80, 2)
    seen_too = run.recommend(["5"], k=40, exclude_seen=False)
    assert sorted(seen_too.items[0]) == sorted(run.item_ids)
    short = run.recommend(["5"], k=100, candidates=["1", "2", "1"], exclude_seen=False)
    assert short.items.shape == (1, 2)
    left_out = run.recommend(["5"], k=40)
    assert left_out.items[0, -1] is None and np.isnan(left_out.logits[0, -1])


def test_a_table_of_recommendations_is_the_file_of_the_command(run, tmp_path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    file = tmp_path / "scores.parquet"
    subprocess.run(
        [conftest.command("dfar-train"), "score", "--run", run.dir, "--all-users", "--top", "4",
         "--exclude-seen", "--output", file],
        check=True, capture_output=True,
    )
    table = run.recommend(k=4, table=True)
    assert len(table) == 80 * 4 and repr(table).startswith("dfar.Table(320 rows: user, rank,")
    found, expected = pa.table(table), pq.read_table(file)
    assert found.schema.equals(expected.schema) and found.equals(expected)
    # Each stream starts anew.
    assert pa.table(table).equals(found) and table.column_names == found.column_names
    assert pa.schema(table).equals(found.schema)


def test_a_table_has_the_rows_that_the_arrays_have(run) -> None:
    pa = pytest.importorskip("pyarrow")
    users, items, logits = run.recommend(["7", 5], k=40)
    found = pa.table(run.recommend(["7", 5], k=40, table=True)).to_pylist()
    expected = [
        (user, rank, item, logit)
        for user, best, scores in zip(users, items, logits.tolist())
        for rank, (item, logit) in enumerate(zip(best, scores), 1)
        if item is not None
    ]
    assert [(r["user"], r["rank"], r["item"], r["logit"]) for r in found] == expected
    assert len(expected) < 80 and len(run.recommend([], table=True)) == 0
    assert pa.table(run.recommend([], table=True)).num_columns == 5


def test_a_table_of_scores_ranks_the_candidates_of_each_history(run) -> None:
    pa = pytest.importorskip("pyarrow")
    histories = [[("3", 1)], [("4", 0), ("5", 1)]]
    scores = run.score(histories, ["8", "9", "8"])
    found = pa.table(run.score(histories, ["8", "9", "8"], table=True)).to_pylist()
    assert [r["history"] for r in found] == [0, 0, 0, 1, 1, 1]
    assert [r["rank"] for r in found] == [1, 2, 3, 1, 2, 3]
    for place in range(2):
        rows = [(r["logit"], r["item"]) for r in found if r["history"] == place]
        by_logit = sorted(zip(scores[place].tolist(), ["8", "9", "8"]), key=lambda r: -r[0])
        assert rows == by_logit
    probability = 1 / (1 + np.exp(-np.array([r["logit"] for r in found])))
    assert np.allclose([r["probability"] for r in found], probability, atol=1e-6)
    each = pa.table(run.score(histories, [["8"], ["9", "8"]], table=True)).to_pylist()
    assert [(r["history"], r["logit"]) for r in each[:1]] == [(0, scores[0, 0])]
    assert sorted(r["item"] for r in each[1:]) == ["8", "9"]
    assert len(run.score(histories, table=True)) == 80


def test_polars_and_pandas_read_a_table(run) -> None:
    table = run.recommend(["5", "7"], k=3, table=True)
    polars = pytest.importorskip("polars")
    frame = polars.DataFrame(table)
    assert frame.columns == table.column_names and frame.height == 6
    assert frame["rank"].to_list() == [1, 2, 3, 1, 2, 3]
    pandas = pytest.importorskip("pandas")
    if hasattr(pandas.DataFrame, "from_arrow"):
        assert pandas.DataFrame.from_arrow(table)["item"].tolist() == frame["item"].to_list()


BAD_SCORES = [
    (lambda r: r.score([[("3", 1)], [("gin", 1)]]), ValueError, r"unknown item `gin` in histories\[1\]"),
    (lambda r: r.score([[("3", 2)]]), ValueError, r"histories\[0\]: label 2"),
    (lambda r: r.score([[("3", 1)]], ["gin"]), ValueError, "unknown item `gin` in candidates"),
    (lambda r: r.score([[("3", 1)]], [["3"], ["4"]]), ValueError, "candidates has 2 lists"),
    (lambda r: r.score([[("3",)]]), (TypeError, ValueError), "histories"),
    (lambda r: r.score(3), TypeError, "histories"),
    (lambda r: r.recommend(["nobody"]), ValueError, "unknown user `nobody` in users"),
    (lambda r: r.recommend("5"), TypeError, "users must be a list"),
    (lambda r: r.recommend(["5"], k=0), ValueError, "k is 0"),
    (lambda r: r.recommend(["nobody"], table=True), ValueError, "unknown user `nobody` in users"),
    (lambda r: r.score([[("3", 2)]], table=True), ValueError, r"histories\[0\]: label 2"),
    (lambda r: r.recommend(["5"], k=-1), OverflowError, "k|negative|unsigned"),
    (lambda r: dfar.Run.open(r.dir, device="tpu"), ValueError, "device is 'tpu'"),
    (lambda r: dfar.Run.open(r.dir.parent), FileNotFoundError, "holds no run"),
]


@pytest.mark.parametrize(("call", "exception", "words"), BAD_SCORES)
def test_bad_questions_are_named(run, call, exception, words) -> None:
    with pytest.raises(exception, match=words):
        call(run)


BAD_CONFIGS = [
    ({"epohcs": 3}, ValueError, "config: unknown key `epohcs`; did you mean `epochs`"),
    ({"epochs": "many"}, ValueError, "config: .*many.* in `epochs`"),
    ({"train_negatives": 2}, ValueError, "config: .* in `train_negatives`"),
    ({"epochs": 0}, ValueError, "epochs = 0: must be at least 1"),
    ({"lr": float("nan")}, ValueError, "lr"),
    ({"width": 7}, ValueError, "width"),
    ({"data": "x.dfar"}, ValueError, "data is the first argument"),
    ({"lr": object()}, TypeError, "config: lr must be"),
    ({3: 4}, TypeError, "config: key 3 is not a string"),
    ({"seed": 2**70}, ValueError, "seed is out of range"),
]


@pytest.mark.parametrize(("config", "exception", "words"), BAD_CONFIGS)
def test_a_bad_configuration_leaves_no_directory(config, exception, words, data, tmp_path) -> None:
    with pytest.raises(exception, match=words):
        dfar.train(data, config, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_precision_that_the_processor_lacks_is_refused(data, tmp_path: Path) -> None:
    code = (
        f"import dfar; data = dfar.Dataset.open({str(data.path)!r}); "
        f"dfar.train(data, {{'precision': 'bf16'}}, {str(tmp_path / 'run')!r}, progress=False)"
    )
    # Without AVX-512 there is no bf16. The variable is read once per process.
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"DFAR_SIMD": "portable"},
        capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 1
    assert "ValueError" in done.stderr and "need AVX512-BF16" in done.stderr, done.stderr


def test_a_configuration_is_a_dictionary_or_a_file(data, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    text = "".join(f"{k} = {v}\n" for k, v in conftest.SMALL.items()).replace("epochs = 2", "epochs = 1")
    file.write_text(text)
    one = dfar.train(data, file, tmp_path / "one", progress=False)
    # Other frameworks' spellings, and NumPy's numbers.
    config = {"hidden_size": np.int64(8), "max_seq_length": 10, "epochs": 1, "negatives": 3, "seed": 11}
    two = dfar.train(data, config, tmp_path / "two", progress=False)
    assert (one.dir / "model.safetensors").read_bytes() == (two.dir / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="holds a finished run; give another `out`"):
        dfar.train(data, config, tmp_path / "two", progress=False)
    with pytest.raises(ValueError, match="cannot read"):
        dfar.train(data, tmp_path / "none.toml", tmp_path / "three")


class Count(dfar.callbacks.Callback):
    def __init__(self, stop_at: int | None = None) -> None:
        self.steps, self.records, self.ended, self.stop_at = [], [], None, stop_at

    def on_step(self, info):
        self.steps.append(info["step"])
        return self.stop_at is None or info["step"] < self.stop_at

    def on_epoch_end(self, record):
        self.records.append(record)

    def on_end(self, run):
        self.ended = run


def test_callbacks_see_steps_and_epochs(data, tmp_path: Path) -> None:
    count = Count()
    run = dfar.train(data, conftest.SMALL, tmp_path / "run", callbacks=[count], progress=False)
    assert count.steps == list(range(1, run.metrics["steps"] + 1))
    assert [r["epoch"] for r in count.records] == [1, 2] and count.ended is run
    assert [r["loss"] for r in count.records] == run.curves()["loss"].tolist()


def test_callbacks_have_records_of_their_own_and_stop_with_a_numpy_bool(data, tmp_path: Path) -> None:
    class Taker(dfar.callbacks.Callback):
        def on_epoch_end(self, record):
            record.clear()
            return np.False_

    count = Count()
    run = dfar.train(data, conftest.SMALL, tmp_path / "run", callbacks=[Taker(), count], progress=False)
    assert not run.finished and count.records[0]["epoch"] == 1
    with pytest.raises(ValueError, match="threads is 5000, but must be at most 1024"):
        dfar.resume(run.dir, {"threads": 5000}, progress=False)


def test_a_run_of_a_relative_directory_is_found_from_other_folders(run, monkeypatch) -> None:
    monkeypatch.chdir(run.dir.parent)
    again = dfar.Run.open(run.dir.name)
    monkeypatch.chdir("/")
    assert again.finished and again.metrics == run.metrics


def test_a_stopped_run_is_continued_to_the_same_bits(run, data, tmp_path: Path) -> None:
    first_epoch = run.metrics["steps"] // 2
    stop = Count(stop_at=first_epoch + 2)
    stopped = dfar.train(data, conftest.SMALL, tmp_path / "run", callbacks=[stop], progress=False)
    assert not stopped.finished and stop.steps[-1] == first_epoch + 2
    with pytest.raises(FileNotFoundError):
        stopped.metrics
    with pytest.raises(ValueError, match="did you mean `patience`"):
        dfar.resume(stopped.dir, {"pateince": 1}, progress=False)
    resumed = dfar.resume(stopped.dir, {"num_workers": 1}, progress=False)
    assert resumed.finished
    assert (resumed.dir / "model.safetensors").read_bytes() == (run.dir / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="`lr` cannot change"):
        dfar.resume(stopped.dir, {"lr": 1.0}, progress=False)
    early = Count(stop_at=1)
    with pytest.raises(RuntimeError, match="before its first epoch ended"):
        dfar.train(data, conftest.SMALL, tmp_path / "early", callbacks=[early], progress=False)
    assert dfar.resume(tmp_path / "early", progress=False).finished


def test_an_exception_of_a_callback_is_raised_and_the_run_is_saved(data, tmp_path: Path) -> None:
    class Fail:
        def on_epoch_end(self, record):
            raise LookupError("mine")

    with pytest.raises(LookupError, match="mine"):
        dfar.train(data, conftest.SMALL, tmp_path / "run", callbacks=[Fail()], progress=False)
    assert dfar.resume(tmp_path / "run", progress=False).finished


@pytest.mark.skipif(not hasattr(signal, "SIGINT") or os.name == "nt", reason="needs Unix signals")
def test_ctrl_c_saves_the_run(data, tmp_path: Path) -> None:
    program = f"""
import dfar, sys
data = dfar.Dataset.open({str(data.path)!r})
try:
    dfar.train(data, {{"epochs": 100000, "patience": 0, "max_length": 10}}, {str(tmp_path / "run")!r})
except KeyboardInterrupt:
    sys.exit(42)
"""
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE)
    model = tmp_path / "run" / "model.safetensors"
    deadline = time.time() + 60
    while not model.exists() and time.time() < deadline:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=20) == 42, child.stderr.read().decode()
    state = dfar.resume(tmp_path / "run", {"patience": 1}, progress=False)
    assert state.finished


def test_other_python_threads_run_during_training(data, tmp_path: Path) -> None:
    turns, done = 0, threading.Event()

    def work() -> None:
        dfar.train(data, conftest.SMALL, tmp_path / "run", progress=False)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.wait(0.001):
        turns += 1
    thread.join()
    assert turns > 10


def test_threads_of_a_server_share_a_run(run) -> None:
    histories = [[("3", 1), ("7", 0)]] * 3
    expected = run.score(histories)
    found = [None] * 8

    def work(place: int) -> None:
        found[place] = run.score(histories)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(np.array_equal(x, expected) for x in found)


def test_progress_prints_epochs(data, tmp_path: Path, capsys) -> None:
    dfar.train(data, conftest.SMALL | {"epochs": 1}, tmp_path / "run", progress=True)
    assert "epoch 1: loss" in capsys.readouterr().err


def test_tensorboard_events_are_written(data, tmp_path: Path) -> None:
    try:
        board = dfar.callbacks.TensorBoard(str(tmp_path / "events"))
    except ImportError as error:
        pytest.skip(str(error))
    dfar.train(data, conftest.SMALL, tmp_path / "run", callbacks=[board], progress=False)
    (file,) = (tmp_path / "events").iterdir()
    assert b"valid/valid_auc" in file.read_bytes()
