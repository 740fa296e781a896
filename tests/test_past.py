"""What is kept of the past: against lists of everything, in the order of the stream, through cuts and restarts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from connectors.codec import JSON
from streamcl.config import Config, ConfigError
from streamcl.features import Featurizer
from streamcl.learner import Learner
from streamcl.live import LiveModel
from streamcl.past import Past
from streamcl.records import EVENTS, Encoded, Fate, Origin, Outcome, Scores, Selector, Ticket
from streamcl.recovery import store_of
from streamcl.replica import Model
from streamcl.state import digest
from streamcl.testing.state import check_stateful
from tests.journey import COMMANDS_URL, click, die_after, fill, finish, order, repeat, view
from tests.journey import settings as journey

FEATURES: dict[str, Any] = {
    "user": {"kind": "categorical", "buckets": 1000},
    "item": {"kind": "categorical", "buckets": 1000},
}
UNSAID = Scores(np.zeros(1, np.float32), np.zeros(1, np.float32), 0)


class Stream:
    """Events through a past, one after another; their labels may come later."""

    def __init__(self, **features: Any) -> None:
        events = {"url": "memory://a/b", "label": "y", "key": "user", "time": "t"}
        self.config = Config.parse({"name": "t", "events": events, "features": {**FEATURES, **features}})
        self.encoder = Featurizer(self.config)
        self.past = Past(self.config, self.encoder)

    def ask(self, time_s: float | None = 0.0, **payload: Any) -> Encoded:
        return self.past.complete(self.encoder.encode(payload), time_s)

    def see(self, time_s: float = 0.0, **payload: Any) -> Ticket:
        features = self.ask(time_s, **payload)
        self.past.saw(features, time_s, str(payload.get("user", "")))
        return Ticket("", time_s, features, UNSAID, Origin(EVENTS, 0, 0), "", str(payload.get("user", "")))

    def hear(self, ticket: Ticket, label: float, delay_s: float = 0.0) -> None:
        self.past.heard(Outcome(ticket, label, Fate.JOINED, delay_s))

    def slots(self, name: str, features: Encoded) -> list[tuple[int, float]]:
        """(row within its field, weight) of the filled slots."""
        field = self.encoder.fields[name]
        rows = zip(features.ids.tolist(), features.weights.tolist(), strict=True)
        return [
            (row - field.base, weight) for row, weight in list(rows)[field.slot : field.slot + field.slots] if weight
        ]

    def listed(self, name: str, features: Encoded) -> list[str]:
        """Items that a history lists, by their rows."""
        base = self.encoder.fields["item"].base
        by_row = {self.encoder.fields["item"].row(f"i{n}") - base: f"i{n}" for n in range(10)}
        return [by_row[row] for row, _ in self.slots(name, features)]

    def number(self, name: str, features: Encoded) -> float:
        return float(features.dense[self.encoder.layout.numerics.index(name)])


def history(**more: Any) -> dict[str, Any]:
    return {"kind": "history", "of": "item", "by": "user", **more}


def test_a_history_lists_the_last_values_newest_first() -> None:
    stream = Stream(seen=history(last=3))
    for n in range(5):
        stream.see(float(n), user="a", item=f"i{n}")
    stream.see(5.0, user="b", item="i9")
    asked = stream.ask(6.0, user="a", item="i7")
    assert stream.listed("seen", asked) == ["i4", "i3", "i2"]
    assert [weight for _, weight in stream.slots("seen", asked)] == [np.float32(1 / 3)] * 3
    assert stream.listed("seen", stream.ask(6.0, user="c", item="i7")) == []
    assert stream.listed("seen", stream.ask(6.0, item="i7")) == []


def test_a_history_by_label_waits_for_the_label() -> None:
    stream = Stream(liked=history(when="positive"), disliked=history(when="negative"))
    first, second = stream.see(0.0, user="a", item="i1"), stream.see(1.0, user="a", item="i2")
    assert stream.listed("liked", stream.ask(2.0, user="a")) == []
    stream.hear(second, 1.0)
    assert stream.listed("liked", stream.ask(2.0, user="a")) == ["i2"]
    stream.hear(first, 0.0)
    asked = stream.ask(2.0, user="a")
    assert (stream.listed("liked", asked), stream.listed("disliked", asked)) == (["i2"], ["i1"])


def test_what_is_too_old_is_not_listed() -> None:
    stream = Stream(seen=history(max_age_s=10.0))
    stream.see(0.0, user="a", item="i1")
    stream.see(8.0, user="a", item="i2")
    assert stream.listed("seen", stream.ask(10.0, user="a")) == ["i2", "i1"]
    assert stream.listed("seen", stream.ask(11.0, user="a")) == ["i2"]


def test_a_count_is_of_the_events_before() -> None:
    stream = Stream(n={"kind": "count", "of": "item"})
    for expected in range(4):
        ticket = stream.see(0.0, user="a", item="i1")
        assert stream.number("n", ticket.features) == np.float32(math.log1p(expected))
    assert math.isnan(stream.number("n", stream.ask(0.0, user="a")))


def test_a_rate_is_smoothed_towards_that_of_all_labels() -> None:
    stream = Stream(r={"kind": "rate", "of": "item", "weight": 2.0})
    assert stream.number("r", stream.ask(0.0, item="i1")) == 0.0
    for item, label in (("i1", 1.0), ("i1", 1.0), ("i2", 0.0), ("i2", 0.0)):
        stream.hear(stream.see(0.0, user="a", item=item), label)
    assert stream.number("r", stream.ask(0.0, item="i1")) == np.float32((2 + 2 * 0.5) / 4)
    assert stream.number("r", stream.ask(0.0, item="i9")) == 0.5


def test_a_given_prior_is_the_rate_of_what_is_unknown_and_a_logit_is_finite() -> None:
    stream = Stream(r={"kind": "rate", "of": "item", "prior": 0.2, "form": "logit"})
    assert stream.number("r", stream.ask(0.0, item="i1")) == pytest.approx(math.log(0.25))
    bare = Stream(r={"kind": "rate", "of": "item", "form": "logit"})
    assert math.isfinite(bare.number("r", bare.ask(0.0, item="i1")))


def test_counts_and_rates_of_a_bag_are_those_of_its_values_together() -> None:
    stream = Stream(
        tags={"kind": "bag", "buckets": 1000, "max_items": 3},
        n={"kind": "count", "of": "tags"},
        r={"kind": "rate", "of": "tags", "weight": 2.0, "prior": 0.5},
    )
    heard: list[tuple[str, float]] = []
    rng = np.random.default_rng(0)
    for _ in range(60):
        tags = [f"g{n}" for n in rng.choice(5, rng.integers(4), replace=False)]
        known = [label for tag, label in heard if tag in tags]
        ticket, label = stream.see(0.0, tags=tags), float(rng.integers(2))
        if tags:
            assert stream.number("n", ticket.features) == np.float32(math.log1p(len(known)))
            assert stream.number("r", ticket.features) == np.float32((sum(known) + 1.0) / (len(known) + 2.0))
        else:
            assert math.isnan(stream.number("n", ticket.features))
        stream.hear(ticket, label)
        heard += [(tag, label) for tag in tags]


def test_an_elapsed_time_by_a_bag_is_refused() -> None:
    with pytest.raises(ConfigError, match="'tags' is no categorical or time feature"):
        Stream(tags={"kind": "bag"}, gap={"kind": "elapsed", "by": "tags"})


def test_elapsed_is_missing_at_first_and_then_since_the_event_before() -> None:
    stream = Stream(gap={"kind": "elapsed", "by": "user"})
    assert math.isnan(stream.number("gap", stream.see(5.0, user="a").features))
    assert stream.number("gap", stream.see(9.0, user="a").features) == np.float32(math.log1p(4.0))
    assert stream.number("gap", stream.ask(1.0, user="a")) == 0.0
    assert stream.number("gap", stream.ask(None, user="a")) == 0.0  # as if it came with the newest event


def test_the_hour_and_the_weekday_are_those_of_utc() -> None:
    stream = Stream(h="time", d={"kind": "time", "part": "weekday"}, c={"kind": "time", "cyclic": True})
    friday_6_pm = 1_709_316_000.0 + 600.0  # 2024-03-01 18:10
    asked = stream.ask(friday_6_pm, user="a")
    assert stream.slots("h", asked) == [(19, 1.0)]
    assert stream.slots("d", asked) == [(5, 1.0)]
    angle = 2 * math.pi * (18 + 1 / 6) / 24
    assert (stream.number("c.sin", asked), stream.number("c.cos", asked)) == pytest.approx(
        (math.sin(angle), math.cos(angle)), abs=1e-6
    )


def test_without_any_time_a_part_of_it_is_missing() -> None:
    stream = Stream(h="time", c={"kind": "time", "cyclic": True})
    asked = stream.ask(None, user="a")
    assert stream.slots("h", asked) == [(0, 1.0)]
    assert math.isnan(stream.number("c.sin", asked))


def test_a_cross_tells_pairs_apart_and_is_missing_where_a_part_is() -> None:
    stream = Stream(x={"kind": "cross", "of": ["user", "item"]})
    pairs = [("a", "i1"), ("a", "i2"), ("b", "i1"), ("b", "i2")]
    rows = [stream.slots("x", stream.ask(user=user, item=item))[0][0] for user, item in pairs]
    assert len(set(rows)) == 4
    assert 0 not in rows
    assert stream.slots("x", stream.ask(user="a")) == [(0, 1.0)]


def test_bins_are_quantiles_of_what_came_before() -> None:
    stream = Stream(price={"kind": "numeric", "bins": 4})
    rng = np.random.default_rng(0)
    assert stream.slots("price", stream.ask(price=0.0)) == [(0, 1.0)]  # nothing is known
    for value in rng.normal(size=4096):
        stream.see(price=float(value))
    for bin, value in ((1, -2.0), (2, -0.3), (3, 0.3), (4, 2.0)):
        assert stream.slots("price", stream.ask(price=value)) == [(bin, 1.0)]
    assert stream.slots("price", stream.ask()) == [(0, 1.0)]
    # Each quartile of a sample of 1,024: within five standard deviations of its share.
    edges = stream.past.kept["price.bins"].state_dict()["edges"]
    share = [(stream.past.kept["price.bins"].state_dict()["sample"] < edge).mean() for edge in edges]
    assert np.abs(np.array(share) - [0.25, 0.5, 0.75]).max() < 0.001
    assert np.abs(edges - [-0.674, 0.0, 0.674]).max() < 5 * 1.36 / math.sqrt(1024)


ALL: dict[str, Any] = {
    "price": {"kind": "numeric", "scale": "log", "bins": 4},
    "seen": history(last=4),
    "liked": history(last=4, when="positive", keys=3),
    "n": {"kind": "count", "of": "item", "keys": 4, "half_life_events": 9.0},
    "r": {"kind": "rate", "of": "x", "half_life_s": 9.0, "bins": 3},
    "gap": {"kind": "elapsed", "by": "user"},
    "tags": {"kind": "bag", "buckets": 50, "max_items": 3},
    "tag_rate": {"kind": "rate", "of": "tags", "keys": 9, "half_life_events": 9.0},
    "near": {"kind": "bag", "buckets": 1000, "max_items": 3},
    "co": {"kind": "covisits", "of": "item", "beside": "near", "keys": 5, "half_life_s": 900.0},
    "liked_with": {"kind": "covisits", "of": "item", "beside": "liked", "power": 0.0},
    "x": {"kind": "cross", "of": ["user", "h"]},
    "z": {"kind": "cross", "of": ["item", "r"]},
    "h": "time",
}


def live(stream: Stream, step: int) -> str:
    rng = np.random.default_rng(step)
    payload = {"user": f"u{rng.integers(5)}", "item": f"i{rng.integers(6)}", "price": float(rng.normal())}
    payload["tags"] = [f"g{n}" for n in rng.integers(0, 9, rng.integers(4))]
    payload["near"] = [f"i{n}" for n in rng.integers(0, 6, rng.integers(4))]
    ticket = stream.see(step * 900.0, **payload)
    stream.hear(ticket, float(rng.integers(2)), 3.0)
    return digest(dict(ticket.features._asdict()))


def test_it_goes_on_to_the_bit_from_any_state() -> None:
    class Lived(Past):
        stream: Stream

    def make() -> Lived:
        stream = Stream(**ALL)
        made = Lived(stream.config, stream.encoder)
        made.stream, stream.past = stream, made
        return made

    check_stateful(make, lambda part, n: [live(part.stream, 30 * n + i) for i in range(30)], steps=6)


def test_asking_changes_nothing() -> None:
    stream = Stream(**ALL)
    for step in range(80):
        live(stream, step)
    before = digest(stream.past.state_dict())
    asked = [stream.ask(1e5, user=f"u{n}", item=f"i{n}", price=1.0) for n in range(9)]
    assert digest(stream.past.state_dict()) == before
    assert not any(np.shares_memory(one.weights, other.weights) for one in asked for other in asked if one is not other)


def test_what_is_kept_is_bounded() -> None:
    stream = Stream(
        seen=history(keys=7, last=2),
        n={"kind": "count", "of": "item", "keys": 7},
        r={"kind": "rate", "of": "item", "keys": 7},
    )
    for n in range(500):
        stream.hear(stream.see(float(n), user=f"u{n}", item=f"i{n}"), 1.0)
    assert {name: len(each) for name, each in stream.past.kept.items()} == {"seen": 7, "n": 7, "r": 8}


def test_forgetting_a_key_erases_what_it_alone_has_made_and_its_entries_in_others() -> None:
    stream = Stream(
        seen=history(),
        fans={"kind": "history", "of": "user", "by": "item"},
        n={"kind": "count", "of": "user"},
        r={"kind": "rate", "of": "item"},
    )
    for user, item in (("a", "i1"), ("b", "i1"), ("a", "i2")):
        stream.hear(stream.see(0.0, user=user, item=item), 1.0)
    assert stream.past.forget(Selector(key="a")) == 2 + 2 + 1 + 1  # its history, in two others', its count, i2's rate
    asked = stream.ask(0.0, user="a", item="i1")
    assert stream.listed("seen", asked) == []
    assert [row for row, _ in stream.slots("fans", asked)] == [
        stream.encoder.fields["user"].row("b") - stream.encoder.fields["user"].base
    ]
    assert stream.number("n", asked) == 0.0
    assert stream.number("n", stream.ask(0.0, user="b")) == np.float32(math.log1p(1))


WORKED = {
    "user": {"kind": "categorical", "buckets": 13},
    "price": {"kind": "numeric", "bins": 3},
    "shelf": {"kind": "categorical", "buckets": 7},
    "seen": {"kind": "history", "of": "shelf", "by": "user", "last": 3},
    "liked": {"kind": "history", "of": "shelf", "by": "user", "last": 3, "when": "positive"},
    "n": {"kind": "count", "of": "user"},
    "r": {"kind": "rate", "of": "shelf"},
}


def worked(folder: Path, **changes: Any) -> Config:
    return journey(folder, features=WORKED, **changes)


def inputs(count: int = 40) -> None:
    rng = np.random.default_rng(3)
    views = [view(id, float(id), shelf=int(rng.integers(4))) for id in range(count)]
    clicks = [click(id, id + float(rng.integers(1, 15))) for id in range(count) if rng.integers(2)]
    fill([*views, *clicks])


def test_rates_are_those_of_the_stream_also_where_a_share_of_the_negatives_is_learned_from(tmp_path: Path) -> None:
    kept = []
    for share in (1.0, 0.2):
        inputs()
        worker = finish(worked(tmp_path / f"{share}", sample={"negatives": share})).worker
        assert (worker.counts["not_drawn"] > 0) == (share < 1.0)
        assert worker.past is not None
        kept.append(digest(worker.past.state_dict()))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("engine", ["fused", "eager"])
def test_a_worker_keeps_the_same_however_the_stream_is_cut(tmp_path: Path, engine: str) -> None:
    digests = set()
    for most in (1, 7, 500):
        inputs()
        worker = {"max_records": most, "poll_timeout_s": 0.01, "engine": engine}
        result = finish(worked(tmp_path / str(most), worker=worker))
        digests.add((result.digest, tuple(m.value for m in result.scores)))
        assert result.worker.past is not None
        assert result.worker.past.labels == result.worker.counts["joined"] + result.worker.counts["expired"] > 0
    assert len(digests) == 1


def test_a_worker_that_dies_keeps_what_one_that_lives_does(tmp_path: Path) -> None:
    inputs()
    config = worked(tmp_path)
    die_after(config, 4)
    die_after(config, 3)
    assert finish(config).digest == repeat(config).digest


def test_a_command_to_forget_reaches_the_past(tmp_path: Path) -> None:
    fill([*[view(id, float(id), shelf=1) for id in range(10)], order("f", 9.5, key="1")])
    worker = finish(worked(tmp_path, commands=COMMANDS_URL)).worker
    assert worker.past is not None
    rings = worker.past.kept["seen"].state_dict()
    assert len(rings["keys"]) == 4
    assert json.loads(json.dumps(worker.counts["forgotten_rows"])) > 0


def test_a_replica_and_the_live_model_answer_from_what_is_kept_and_change_nothing(tmp_path: Path) -> None:
    inputs()
    config = worked(tmp_path)
    worker = finish(config).worker
    assert worker.past is not None
    loaded = store_of(config).newest()
    assert loaded is not None
    replica, live = Model.of(loaded, JSON()), LiveModel(worker)
    payload = {"user": 1, "shelf": 2, "price": 1.0, "ts": 60.0}
    bare = replica.decoder.featurizer.encode(payload)
    before = digest(worker.past.state_dict())
    encoded = replica.encode(payload)
    assert encoded.ids.tolist() == live.encode(payload).ids.tolist() != bare.ids.tolist()
    assert replica.predict(payload)["score"] == live.answers([live.encode(payload)])[0]["score"]
    assert digest(worker.past.state_dict()) == before


def test_histories_crosses_and_rates_of_dynamic_tables_are_alike_in_both_engines() -> None:
    table = {"max_rows": 8, "admission": {"kind": "count", "threshold": 2}}
    dynamic = {"kind": "categorical", "table": table}
    cross = {"kind": "cross", "of": ["user", "item"], "buckets": 50}
    kept = {"seen": history(last=5), "clicks": {"kind": "rate", "of": "item"}, "n": {"kind": "count", "of": "user"}}
    stream = Stream(user=dynamic, item=dynamic, both=cross, **kept)
    table_of = stream.config.model_dump(mode="json", include={"name", "events", "features"})
    model = {"kind": "mlp", "hidden": [8], "embedding_dim": 4, "dtype": "float64"}
    replay = {"retention": "reservoir", "per_event": 2, "capacity": 20}
    eager, fused = (
        Learner(Config.parse({**table_of, "model": model, "replay": replay, "worker": {"engine": engine}}, "t"))
        for engine in ("eager", "fused")
    )
    rng = np.random.default_rng(0)
    for i, (user, item, label) in enumerate(zip(*rng.integers(0, [[12], [20], [2]], (3, 200)).tolist(), strict=True)):
        ticket = stream.see(float(i), user=f"u{user}", item=f"i{item}")
        stream.hear(ticket, float(label))
        for learner in (eager, fused):
            scored = replace(ticket, scores=learner.predict(ticket.features))
            learner.learn(Outcome(scored, float(label), Fate.JOINED, 0.0))
    assert (eager.engine.table - fused.engine.table).abs().max() < 1e-12
    assert eager.read()["table:item:evicted:lru"] == fused.read()["table:item:evicted:lru"] > 0
    again = Past(stream.config, stream.encoder)
    again.load_state_dict(stream.past.state_dict())
    assert digest(again.state_dict()) == digest(stream.past.state_dict())


def test_a_history_with_rows_of_its_own_of_a_dynamic_table_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"features.seen.rows: 'item' has a dynamic table"):
        Stream(item={"kind": "categorical", "table": "dynamic"}, seen=history(rows="own"))
