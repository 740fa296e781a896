"""An endpoint on a real socket, and a model without weights: what the tests of serving share."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from connectors.codec import JSON
from streamcl.config import Config
from streamcl.decode import Decoder
from streamcl.endpoint import Models
from streamcl.records import Encoded
from streamcl.replica import encoded
from streamcl.serve import Listening
from tests.journey import settings


class Fixed:
    """A model that is always there, and always says a half.

    Args:
        broken: It raises when it is asked about user 666.
    """

    def __init__(self, broken: bool = False, **changes: Any) -> None:
        self.decoder = Decoder(settings(Path("unused"), **changes), JSON())
        self.bad = self.encode({"user": 666}).ids if broken else None

    def current(self) -> Fixed:
        return self

    def encode(self, payload: Any) -> Encoded:
        return encoded(self.decoder, payload, None)

    def answers(self, batch: Sequence[Encoded]) -> list[dict[str, Any]]:
        if self.bad is not None and any(np.array_equal(each.ids, self.bad) for each in batch):
            raise ZeroDivisionError
        return [{"score": 0.5} for _ in batch]

    def brief(self) -> dict[str, Any]:
        return {"name": "shop", "snapshot": "s", "records": 1, "version": 1}

    describe = brief

    def read(self) -> dict[str, float]:
        return {}


@contextmanager
def listening(models: Models, config: Config | None = None, **limits: Any) -> Iterator[Listening]:
    """On a thread of its own; `limits` are settings of [serve]."""
    config = config or models.current().decoder.config
    data = config.model_dump(mode="json")
    endpoint = Listening(models, Config.parse({**data, "serve": {**data["serve"], "port": 0, **limits}}))
    thread = threading.Thread(target=endpoint.run, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        endpoint.stop()
        thread.join(timeout=20)
        assert not thread.is_alive()
