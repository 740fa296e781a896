"""`bench worker --task clicks-kafka`: the clicks of `worker_clicks` on a broker, with each client and beside a peer.

The same worker on kafka-python and on librdkafka, with the fused engine and with plain torch; and Quix Streams, whose
pipeline learns with that same plain torch. All read one topic, from the record's bytes to the acknowledged answer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from urllib.parse import urlsplit

from streamcl.bench import peer_python
from streamcl.bench.brokers import Broker
from streamcl.bench.clock import WARM, Taken, one_core
from streamcl.bench.report import Row, progress
from streamcl.bench.step_feed import ON, REPLAYED
from streamcl.bench.worker_clicks import Clicks

FULL, QUICK = (30_000, 3), (6_000, 1)
"""Events and rounds."""
CLIENTS = {"kafka-python": "kafka", "librdkafka": "confluent_kafka"}
"""Module by client."""
QUIX = ("quixstreams", "torch", "numpy")


def measure(broker: Broker, quick: bool) -> list[Row]:
    """A row for each contender: medians over rounds, in which all take turns."""
    count, rounds = QUICK if quick else FULL
    passes = contenders(Clicks(count, partial(broker.new_topic, "bench-clicks")), broker)
    taken: dict[str, list[Taken]] = {name: [] for name in passes}
    for number in range(rounds):
        progress(f"clicks on Kafka, round {number + 1} of {rounds}")
        for name, (run_pass, n) in passes.items():
            with one_core():
                wall_s, cpu_s = run_pass(n)
            taken[name].append(Taken(wall_s / n, cpu_s / n))
    return [_row(name, times) for name, times in taken.items()]


def contenders(stage: Clicks, broker: Broker) -> dict[str, tuple[Callable[[int], Taken], int]]:
    """By name: what runs over so many events, and how many; a sixth of them where one takes ten times as long."""
    count, peer = len(stage.messages), peer_python.versions(*QUIX)
    passes: dict[str, tuple[Callable[[int], Taken], int]] = {}
    for name, replay, settings in (("no replay", 0, {}), (f"{REPLAYED} rows and cbp", REPLAYED, ON)):
        for client in (client for client, module in CLIENTS.items() if find_spec(module)):
            through = {**settings, "kafka": {"client": client}}
            fused, plain = partial(stage.worker, "fused", through), partial(stage.worker, "eager", through, plain=True)
            passes[f"{name}: plain torch on {client}"] = plain, count // 6
            passes[f"{name}: streamcl fused on {client}"] = fused, count
        if peer:
            passes[f"{name}: quix streams with plain torch"] = partial(through_quix, stage, broker, replay), count // 6
    return passes


def through_quix(stage: Clicks, broker: Broker, replay: int, count: int) -> Taken:
    topic, out = (urlsplit(url).path.strip("/") for url in (stage.url, stage.new_topic()))
    said = peer_python.answer("quix_clicks.py", ",".join(broker.bootstrap), topic, out, count, WARM, replay)
    return Taken(said["wall_s"], said["cpu_s"])


def notes(quick: bool) -> list[str]:
    """What one must know to read the rows."""
    count, rounds = QUICK if quick else FULL
    how = (
        f"clicks on Kafka: one partition, at least once; {count:,} events ({count // 6:,} of plain torch), {WARM} to"
        f" warm up; medians of {rounds}; the contender on one core, the broker where it likes; cpu_us_per_event: of"
        " all the contender's threads; nobody writes a snapshot"
    )
    if peer := peer_python.versions(*QUIX):
        held = ", ".join(f"{name} {version}" for name, version in peer.items())
        quix = (
            f"quix streams with plain torch: bench/quix_clicks.py ({held}); the net of bench/step_plain.py; linger,"
            " acks and compression as ours, offsets committed each 5 s; it keeps no metrics and waits for no labels"
        )
    else:
        quix = f"quix streams with plain torch is missing: {peer_python.TO_GET} with {', '.join(QUIX)}"
    lacking = [client for client, module in CLIENTS.items() if not find_spec(module)]
    return [how, quix, *(f"{client} is missing: pip install 'streamcl[{client}]'" for client in lacking)]


def _row(name: str, times: list[Taken]) -> Row:
    wall_s, cpu_s = (statistics.median(column) for column in zip(*times, strict=True))
    figures = {"us_per_event": 1e6 * wall_s, "cpu_us_per_event": 1e6 * cpu_s, "events_per_s": 1.0 / wall_s}
    return Row(f"clicks on Kafka, {name}", figures, table="clicks on Kafka")
