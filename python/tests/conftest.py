"""Fixtures of all tests."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))


def command(name: str) -> str:
    """A binary of the engine: in the folder DFAR_BIN, in target/release, or on the PATH."""
    folders = [os.environ.get("DFAR_BIN"), HERE.parents[1] / "target" / "release"]
    for folder in filter(None, folders):
        if (path := Path(folder) / name).exists():
            return str(path)
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not built: cargo build --release")
    return found


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A synthetic data set of 80 users and 40 items."""
    import dfar

    path = tmp_path_factory.mktemp("data") / "synthetic.dfar"
    return dfar.synthetic(path, users=80, items=40, events_per_user=15, seed=3)


SMALL = {"width": 8, "max_length": 10, "epochs": 2, "negatives": 3, "seed": 11}


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    """A finished run on `data`, trained for two epochs."""
    import dfar

    return dfar.train(data, SMALL, tmp_path_factory.mktemp("run") / "run", progress=False)
