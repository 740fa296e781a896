import zlib

import numpy as np

from streamcl.bench.quix_clicks import Learning
from streamcl.bench.step_plain import FIELDS, ROWS, Torch


def events(count: int) -> list[dict[str, object]]:
    rng = np.random.default_rng(0)
    return [
        {"id": str(i), "label": int(rng.integers(2))} | {f"c{f:02}": f"v{rng.integers(50)}" for f in range(FIELDS)}
        for i in range(count)
    ]


def test_each_event_is_answered_and_then_learned_by_the_plain_model() -> None:
    learning, oracle = Learning(Torch(), FIELDS, ROWS // FIELDS), Torch()
    for event in events(20):
        ids = np.array([1000 * f + zlib.crc32(str(event[f"c{f:02}"]).encode()) % 1000 for f in range(FIELDS)])
        assert learning(event) == {"id": event["id"], "score": oracle.predict(ids)}
        oracle.learn(ids, float(str(event["label"])))


def test_the_clock_starts_behind_what_warms_up() -> None:
    learning, (first, second, third) = Learning(Torch(), FIELDS, ROWS // FIELDS, warm=2), events(3)
    learning(first)
    learning(second)
    assert learning.started is None
    learning(third)
    assert learning.started is not None and learning.done == 3
