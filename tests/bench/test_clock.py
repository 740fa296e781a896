import os
from typing import Any

import pytest

from streamcl import connect
from streamcl.bench.clock import WARM, Clock, one_core, timed
from streamcl.bench.drive import Incomplete
from streamcl.config import Config
from streamcl.records import Message
from streamcl.worker import Worker, build


def worker_on(name: str, bodies: list[bytes], **settings: Any) -> Worker:
    url = f"memory://clock-{name}/events"
    shape: dict[str, Any] = {"name": name, "events": {"url": url, "label": "y"}, "features": {"x": "numeric"}}
    config = Config.parse(shape | settings)
    sink = connect.open_sink(url, config)
    sink.send([Message(body) for body in bodies])
    sink.flush()
    sink.close()
    return build(config)


def test_a_clock_reads_a_share_of_what_it_took() -> None:
    clock = Clock()
    half, whole = clock.read(0.5), clock.read()
    assert 0.0 < 2.0 * half.wall_s <= whole.wall_s


def test_a_pass_ends_at_its_events_and_warms_up_before_the_clock_starts() -> None:
    worker = worker_on("ends", [b'{"x": %d, "y": 1}' % (i % 7) for i in range(3 * WARM)])
    taken = timed(worker, 2 * WARM)
    assert worker.progress.records == 2 * WARM
    assert taken.wall_s > 0.0 and taken.cpu_s > 0.0
    worker.close()


def test_a_pass_that_refused_an_event_is_no_measurement() -> None:
    bodies = [b'{"x": 1, "y": 1}'] * (2 * WARM)
    bodies[WARM + 3] = b"{"
    worker = worker_on("refused", bodies)
    with pytest.raises(Incomplete, match=r"1000 events, but the worker counted .*dead_letter"):
        timed(worker, 2 * WARM)
    worker.close()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds nobody to a core")
def test_one_core_is_kept_to_until_the_end() -> None:
    before = os.sched_getaffinity(0)
    with one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
