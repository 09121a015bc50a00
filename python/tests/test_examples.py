"""The examples run: the notebook, FHA in a PyTorch model, the service under load."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_fha_in_a_model_of_your_own_learns() -> None:
    pytest.importorskip("torch")
    sys.path.insert(0, str(EXAMPLES))
    import fha_in_your_model

    assert fha_in_your_model.main(120) > 0.75


def test_the_notebook_runs_headless(tmp_path: Path, monkeypatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")  # pandas exports Arrow streams with it
    monkeypatch.chdir(tmp_path)
    notebook = nbformat.read(EXAMPLES / "movielens.ipynb", as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    text = "\n".join(
        str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", ""))
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    assert "test AUC" in text and "recommended" in text


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_the_service_answers_under_load(run, capsys) -> None:
    httpx = pytest.importorskip("httpx")
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", "--app-dir", str(EXAMPLES), "serve_fastapi:app",
         "--port", str(port), "--log-level", "warning"],
        env=os.environ | {"DFAR_RUN": str(run.dir)},
    )
    try:
        with httpx.Client(base_url=url, timeout=30) as client:
            deadline = time.time() + 30
            while True:
                try:
                    client.get("/health").raise_for_status()
                    break
                except httpx.TransportError:
                    assert server.poll() is None and time.time() < deadline
                    time.sleep(0.1)

            def ask(number: int) -> float:
                history = [[str((number + i) % 40), i % 2] for i in range(8)]
                start = time.perf_counter()
                answer = client.post("/recommend", json={"history": history, "k": 5})
                elapsed = time.perf_counter() - start
                answer.raise_for_status()
                found = answer.json()
                assert len(found["items"]) == 5 and not {h[0] for h in history} & {*found["items"]}
                assert found["probabilities"] == sorted(found["probabilities"], reverse=True)
                return elapsed

            ask(0)
            start = time.perf_counter()
            with ThreadPoolExecutor(4) as pool:
                latencies = np.array(list(pool.map(ask, range(200)))) * 1e3
            rate = 200 / (time.perf_counter() - start)
            bad = client.post("/recommend", json={"history": [["gin", 1]]})
            assert bad.status_code == 422 and "unknown item `gin`" in bad.json()["detail"]
    finally:
        server.terminate()
        server.wait(timeout=20)
    p50, p99 = np.percentile(latencies, [50, 99])
    with capsys.disabled():
        print(f"\nservice: 200 requests of 4 clients, {rate:.0f}/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms")
