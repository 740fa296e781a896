import numpy as np
import pytest

from streamcl.config import Config
from streamcl.features import Featurizer
from streamcl.memory.keys import directions
from streamcl.records import Encoded

NO_FEATURES = Encoded(np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, np.float32))
NO_HIDDEN = np.zeros(0, np.float32)


def key(embedding: list[float], *numerics: str) -> list[float]:
    features = {"user": "categorical", "item": "categorical", **dict.fromkeys(numerics, "numeric")}
    data = {"name": "t", "events": {"url": "memory://t/events", "label": "label"}, "features": features}
    keys = directions(Featurizer(Config.parse(data)).layout)
    return list(keys(NO_FEATURES, np.array(embedding, np.float32), NO_HIDDEN))


def test_each_field_counts_alike_however_far_its_embedding_has_grown() -> None:
    assert key([30.0, 40.0, 0.0, 0.001]) == pytest.approx([0.6, 0.8, 0.0, 1.0])


def test_numerics_stay_what_they_are() -> None:
    assert key([30.0, 40.0, 0.0, 0.001, 7.0], "age") == pytest.approx([0.6, 0.8, 0.0, 1.0, 7.0])


def test_nothing_has_no_direction() -> None:
    assert key([0.0, 0.0, 0.0, 2.0]) == [0.0, 0.0, 0.0, 1.0]


def test_without_categories_the_key_is_the_numerics() -> None:
    features = {"age": "numeric", "price": "numeric"}
    data = {"name": "t", "events": {"url": "memory://t/events", "label": "label"}, "features": features}
    keys = directions(Featurizer(Config.parse(data)).layout)
    assert list(keys(NO_FEATURES, np.array([3.0, 4.0], np.float32), NO_HIDDEN)) == [3.0, 4.0]
