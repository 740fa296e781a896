"""Quix Streams with the click model in plain torch: decode, predict, learn one step, encode, produce.

    python quix_clicks.py BOOTSTRAP TOPIC OUT COUNT WARM REPLAY

A script for the interpreter that holds Quix Streams, torch and NumPy. It prints one JSON object: the seconds of wall
clock and of processor that COUNT events take, of those behind the first WARM, until the last answer is acknowledged
and the offsets are committed. Of ours it takes only the model, from the file beside it.
"""

from __future__ import annotations

import json
import sys
import time
import zlib
from typing import Any

import numpy as np


class Learning:
    """A model of `step_plain` between two JSON objects.

    Args:
        buckets: Rows of each field; a value's is its CRC-32 modulo this.
        warm: Events before `started`, which is wall clock and processor in seconds.
    """

    def __init__(self, model: Any, fields: int, buckets: int, warm: int = 0) -> None:
        self.model, self.warm, self.done = model, warm, 0
        self.names = [f"c{field:02}" for field in range(fields)]
        self.buckets, self.first_rows = buckets, [buckets * field for field in range(fields)]
        self.started: tuple[float, float] | None = None

    def __call__(self, event: dict[str, Any]) -> dict[str, Any]:
        if self.done == self.warm:
            self.started = time.perf_counter(), time.process_time()
        self.done += 1
        rows = [zlib.crc32(event[name].encode()) % self.buckets for name in self.names]
        ids = np.add(rows, self.first_rows)
        score = self.model.predict(ids)
        self.model.learn(ids, float(event["label"]))
        return {"id": event["id"], "score": score}


def main(bootstrap: str, topic: str, out: str, count: int, warm: int, replay: int) -> None:
    from quixstreams import Application  # type: ignore[import-not-found]
    from step_plain import FIELDS, ROWS, Torch  # type: ignore[import-not-found]

    learning = Learning(Torch(replay, renewing=replay > 0), FIELDS, ROWS // FIELDS, warm)
    app = Application(
        broker_address=bootstrap,
        consumer_group=f"{out}-quix",
        auto_offset_reset="earliest",
        loglevel="ERROR",
        # What the worker's producer is told; idempotence is Quix's own. At least once, offsets each 5 s: its defaults.
        producer_extra_config={"linger.ms": 5, "acks": "all", "compression.type": "lz4", "batch.size": 128 << 10},
    )
    frame = app.dataframe(app.topic(topic, value_deserializer="json"))
    frame.apply(learning).to_topic(app.topic(out, value_serializer="json"))
    app.run(count=count, collect=False)
    wall_s, cpu_s = learning.started or (0.0, 0.0)
    share = count / (learning.done - warm)
    taken = {"wall_s": share * (time.perf_counter() - wall_s), "cpu_s": share * (time.process_time() - cpu_s)}
    print(json.dumps({"events": learning.done, **taken}), flush=True)


if __name__ == "__main__":
    bootstrap, topic, out, *numbers = sys.argv[1:]
    main(bootstrap, topic, out, *map(int, numbers))
