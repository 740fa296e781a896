"""Small recorded logs, and configurations that read them; plug-ins that go wrong."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from streamcl.plugin import Step, Term

BASE = """
name = "shop"
features = {{user = "categorical", price = "numeric"}}
model = {{kind = "logistic"}}
optimizer = {{kind = "sgd", learning_rate = 0.01}}
worker = {{engine = "eager", max_records = {poll}}}
metrics = {{window = 100}}
drift = {{detector = "none"}}
[events]
url = "file://{folder}/events.jsonl"
id = "id"
key = "user"
time = "ts"
"""
INLINE = 'label = "clicked"\n'
LATE = """
[labels]
url = "file://{folder}/clicks.jsonl"
default = 1
time = "ts"
[join]
attribution_window_s = 20
on_close = "negative"
"""


def shop(folder: Path, events: int = 400, *, late: bool = False, poll: int = 50) -> Path:
    """Write a log of views whose clicks depend on the user alone, and the base that reads it; returns its path.

    `late`: clicks stand in a file of their own, 1 to 15 s later; no click is known after 20 s.
    """
    rng = np.random.default_rng(0)
    rows, clicks = [], []
    for id in range(events):
        user = int(rng.integers(8))
        clicked = int(rng.random() < (0.1 if user % 2 else 0.9))
        row = {"id": str(id), "ts": float(id), "user": f"u{user}", "price": float(id % 3)}
        rows.append(row if late else row | {"clicked": clicked})
        if clicked:
            clicks.append({"id": str(id), "ts": float(id) + 1 + int(rng.integers(15))})
    clicks.sort(key=lambda click: float(str(click["ts"])))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "clicks.jsonl").write_text("".join(json.dumps(click) + "\n" for click in clicks))
    path = folder / "shop.toml"
    path.write_text((BASE + (LATE if late else INLINE)).format(folder=folder, poll=poll))
    return path


class Fails(Term):
    """Raises when it is asked."""

    class Options(Term.Options):
        kind: Literal["fails"] = "fails"

    def loss(self, step: Step) -> Tensor:
        raise RuntimeError("no such luck")


class Dies(Term):
    """Takes its process with it."""

    class Options(Term.Options):
        kind: Literal["dies"] = "dies"

    def loss(self, step: Step) -> Tensor:
        os._exit(9)


class Waits(Term):
    """Takes longer than anybody waits."""

    class Options(Term.Options):
        kind: Literal["waits"] = "waits"

    def loss(self, step: Step) -> Tensor:
        time.sleep(600)
        raise AssertionError
