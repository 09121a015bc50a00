"""A recommendation service with FastAPI over a trained run.

    pip install fastapi uvicorn
    DFAR_RUN=runs/ml-100k uvicorn --app-dir examples serve_fastapi:app

    curl localhost:8000/recommend -H 'content-type: application/json' \\
        -d '{"history": [["50", 1], ["172", 1], ["133", 0]], "k": 5}'

Endpoints are plain functions, which FastAPI runs in threads: the engine releases the GIL, so requests
are scored side by side.
"""

from __future__ import annotations

import os

import numpy as np
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field

import dfar

app = FastAPI(title="dfar")
run = dfar.Run.open(os.environ["DFAR_RUN"])


class Question(BaseModel):
    """A history, oldest event first: (item, 1 liked or 0 skipped)."""

    history: list[tuple[str, int]]
    k: int = Field(10, ge=1, le=1000)
    exclude_seen: bool = True


class Answer(BaseModel):
    """Items, best first, with the probability of a like."""

    items: list[str]
    probabilities: list[float]


@app.get("/health")
def health() -> dict[str, str]:
    return {"run": str(run.dir)}


@app.post("/recommend")
def recommend(question: Question) -> Answer:
    try:
        (logits,) = run.score([question.history])
    except ValueError as error:  # an unknown item, or a label that is neither 0 nor 1
        raise HTTPException(422, str(error)) from error
    ids = run.item_ids
    order = np.argsort(-logits, kind="stable")
    if question.exclude_seen:
        seen = {item for item, _ in question.history}
        order = np.array([at for at in order if ids[at] not in seen], dtype=np.int64)
    best = order[: question.k]
    return Answer(
        items=ids[best].tolist(), probabilities=(1 / (1 + np.exp(-logits[best]))).tolist()
    )
