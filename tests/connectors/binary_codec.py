"""What the tests of Avro and of Protobuf share: a configuration, a prediction, and the words of a refusal."""

from __future__ import annotations

from typing import Any

import pytest

from streamcl.config import Config
from streamcl.protocols import BadInput, Codec
from streamcl.records import EVENTS, Origin, Prediction, Scores
from tests.test_messages import scores


def configured(kind: str, url: str | None = None, task: str = "binary", codec: Any = None) -> Config:
    """Events are of `codec`, predictions of `kind`; without `codec` both are. `url` is the registry's."""
    return Config.parse(
        {
            "name": "app",
            "task": task,
            "model": {"classes": 3},
            "events": {"url": "memory://b/events", "label": "y", "codec": codec or kind},
            "predictions": "memory://b/scores",
            "predictions_codec": kind,
            "features": {"a": "numeric"},
            "registry": {"url": url},
        }
    )


def prediction(*served: float, id: str = "e1", time_s: float = 7.5) -> Prediction:
    made: Scores = scores(*served)
    return Prediction(id, "user", time_s, made, Origin(EVENTS, 2, 40))


def refusal(codec: Codec, payload: bytes) -> str:
    with pytest.raises(BadInput) as caught:
        codec.decode(payload)
    assert caught.value.reason == "undecodable"
    assert caught.value.__cause__ is None
    return str(caught.value)
