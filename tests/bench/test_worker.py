"""The arithmetic of `bench worker`; tests/kafka/test_bench.py runs it."""

from __future__ import annotations

import pytest

from streamcl.bench import worker


@pytest.mark.parametrize("number", [0, 7, 59_999])
def test_an_event_takes_two_hundred_bytes(number: int) -> None:
    assert len(worker._event(number)) == 200


def test_the_bar_is_the_worker_on_kafka_over_the_sum_of_its_parts() -> None:
    wall = {"bare kafka-python loop": 60.0, "streamcl on memory://": 40.0, "streamcl on kafka-python": 105.0}
    cpu = {**wall, "streamcl on kafka-python": 111.0}
    assert [(bar.value, bar.ok) for bar in worker._bars(wall, cpu)] == [(1.05, True), (1.11, False)]
