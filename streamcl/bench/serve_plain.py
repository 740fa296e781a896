"""The same model the way most people serve one: FastAPI, a pydantic body, an eager nn.Module, uvicorn's defaults.

    python -m streamcl.bench.serve_plain CONFIG PORT

Favours that it would not get by itself: one torch thread (two are slower), handlers on the loop (a thread pool is
slower), and uvloop and httptools, which uvicorn takes when they are installed.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel, create_model
from torch import Tensor, nn

from streamcl import connect
from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.recovery import store_of
from streamcl.replica import Model


class Plain(nn.Module):
    """A table of rows, and the model on them; what is standardised is standardised outside."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        engine = learner.engine
        self.rows = nn.Embedding(engine.table.shape[0], engine.table.shape[1], _weight=engine.table)
        self.first = engine.first
        self.model = engine.model

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        rows = self.rows(ids)
        out: Tensor = self.model(rows[:, :, : self.first], rows[:, :, self.first :], dense)
        return torch.sigmoid(out[:, 0])


def app(config: Config) -> FastAPI:
    """Of a model whose features are categorical or numeric."""
    loaded = store_of(config).newest()
    if loaded is None:
        raise SystemExit(f"no checkpoint in {config.checkpoint.folder}")
    learner = Model.of(loaded, connect.codec("json", config, "requests")).learner
    if not isinstance(learner, Learner):
        raise SystemExit("a River model is no nn.Module")
    plain, featurizer, norm = Plain(learner).eval(), Featurizer(config), learner.numerics
    fields = featurizer.categoricals
    names = [name for name, _ in featurizer.numerics]
    kinds: dict[str, Any] = {field.name: (str | int, ...) for field in fields} | dict.fromkeys(names, (float, ...))
    Event = create_model("Event", **kinds)
    served = FastAPI()

    class Score(BaseModel):
        score: float

    class Scores(BaseModel):
        predictions: list[Score]

    Events = create_model("Events", instances=(list[Event], ...))

    def score(events: list[Any]) -> Scores:
        ids = [[field.row(str(getattr(event, field.name))) for field in fields] for event in events]
        dense = np.array([[getattr(event, name) for name in names] for event in events], np.float32)
        with torch.no_grad():
            scores = plain(torch.tensor(ids), torch.from_numpy(norm.apply(dense)))
        return Scores(predictions=[Score(score=each) for each in scores.tolist()])

    @served.post("/v1/predict")
    async def predict(event: Event) -> Scores:
        return score([event])

    @served.post("/v1/batch")
    async def batch(events: Events) -> Scores:
        return score(events.instances)  # type: ignore[attr-defined]

    return served


if __name__ == "__main__":
    torch.set_num_threads(1)
    uvicorn.run(app(Config.load(Path(sys.argv[1]))), port=int(sys.argv[2]), log_level="warning", access_log=False)
