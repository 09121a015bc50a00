"""Every Python snippet of the README runs, in its order, as a reader would paste it."""

from __future__ import annotations

import random
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"


def log(path: Path) -> None:
    """Ratings in the format of MovieLens, with the users and items that the README names."""
    choose = random.Random(0)
    items = [*range(1, 40), 50, 133, 172]
    with path.open("w") as file:
        for user in range(150, 200):
            for step, item in enumerate(choose.sample(items, 25)):
                time = 880_000_000 + 100 * step + user
                print(user, item, choose.randint(1, 5), time, sep="\t", file=file)


SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def run(snippets: list[str]) -> dict[str, Any]:
    names: dict[str, Any] = {}
    for snippet in snippets:
        exec(compile(snippet, README.name, "exec"), names)
    return names


def test_the_snippets_on_logs_and_arrays_run(tmp_path: Path, monkeypatch) -> None:
    for package in ("pandas", "polars", "pyarrow", "tensorboardX"):
        pytest.importorskip(package)
    logged = []
    monkeypatch.setitem(
        sys.modules, "wandb", types.SimpleNamespace(log=lambda values, step: logged.append(step))
    )
    monkeypatch.chdir(tmp_path)
    log(tmp_path / "u.data")
    names = run([snippet for snippet in SNIPPETS if "torch" not in snippet])
    assert names["items"].shape == (2, 10) and len(names["best"]) == 50 * 10
    assert logged == list(range(1, 1 + len(logged))) and logged
    assert names["dq"].shape == names["q"].shape


def test_the_snippets_on_tensors_run() -> None:
    pytest.importorskip("torch")
    snippets = [snippet for snippet in SNIPPETS if "torch" in snippet]
    assert len(snippets) == 2
    names = run(snippets)
    assert names["y"].shape == (int(names["lengths"].sum()), 64)
    assert names["padded"].shape == (8, 50, 64)
