"""What `bench serve` says about two servers follows from what the clients saw."""

from __future__ import annotations

from streamcl.bench.serve import BATCHES, Seen, _bars


def seen(server: str, connections: int, requests: int, p99_ms: float, batch: int = 1, **values: int) -> Seen:
    told = {"requests": requests, "seconds": 1.0, "p99_ms": p99_ms, "non_2xx": 0, "errors": 0, **values}
    return Seen(server, batch, connections, told, saved=1, swapped=1)


def bars(*of: Seen) -> dict[str, tuple[float, bool]]:
    others = [seen(server, 1, 1, 1.0, batch) for server in ("streamcl", "plain") for batch in BATCHES[1:]]
    return {bar.name: (bar.value, bar.ok) for bar in _bars([*of, *others])}


def test_only_levels_at_the_plain_handler_s_best_p99_or_below_count() -> None:
    plain = [seen("plain", 1, 100, 5.0), seen("plain", 8, 200, 50.0)]
    ours = [seen("streamcl", 1, 900, 10.0), seen("streamcl", 8, 1200, 49.0), seen("streamcl", 32, 5000, 51.0)]
    assert bars(*plain, *ours)["batch 1: throughput at equal p99, times plain"] == (6.0, True)


def test_without_any_such_level_the_bar_is_missed() -> None:
    found = bars(seen("plain", 1, 100, 5.0), seen("streamcl", 1, 9000, 6.0))
    assert found["batch 1: throughput at equal p99, times plain"] == (0.0, False)


def test_one_answer_other_than_2xx_or_one_lost_connection_misses_its_bar() -> None:
    found = bars(seen("plain", 1, 100, 5.0), seen("streamcl", 1, 900, 4.0, non_2xx=1, errors=1))
    assert found["answers other than 2xx"] == (1, False)
    assert found["transport errors"] == (1, False)
