"""Spans of sampled events, by OpenTelemetry's own SDK."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.sdk", reason="streamcl[otel] is not installed")

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from streamcl.config import ConfigError
from streamcl.recovery import Keeper, store_of
from streamcl.traces import Traces
from streamcl.worker import build
from tests.journey import Item, click, fill, settings, view


def spans(folder: Path, share: float) -> list[ReadableSpan]:
    """Of 40 views by 5 users, every second one clicked."""
    items: list[Item] = []
    for id in range(40):
        items += [view(id, float(id))] + ([click(id, id + 0.5)] if id % 2 else [])
    fill([*items, view(1000, 500.0)])
    config = settings(folder, telemetry={"port": 0, "trace_share": share})
    exporter = InMemorySpanExporter()
    traces = Traces(config, exporter)
    keeper = Keeper(build(config), store_of(config), beside=False)
    keeper.restore()
    for turn in keeper.run():
        traces.add(turn, 0.001)
    traces.close()
    return list(exporter.get_finished_spans())


def told(span: ReadableSpan, name: str) -> object:
    assert span.attributes
    return span.attributes[f"streamcl.{name}"]


def test_what_was_learned_joins_the_trace_of_the_answer(tmp_path: Path) -> None:
    found = spans(tmp_path, 1.0)
    answers = {told(span, "offset"): span for span in found if span.name == "answer"}
    learned = [span for span in found if span.name == "learn"]
    assert (len(answers), len(learned)) == (41, 40)
    for span in learned:
        answer = answers[told(span, "offset")]
        assert span.context and answer.context and span.parent
        assert span.context.trace_id == answer.context.trace_id
        assert span.parent.span_id == answer.context.span_id
    assert len({span.context.trace_id for span in answers.values() if span.context}) == 41


def test_a_key_is_traced_whole_or_not_at_all_and_again_alike(tmp_path: Path) -> None:
    found = spans(tmp_path / "a", 0.5)
    users = {int(str(told(span, "offset"))) % 5 for span in found if told(span, "offset") != 40}
    assert 0 < len(users) < 5
    assert sum(span.name == "answer" for span in found if told(span, "offset") != 40) == 8 * len(users)
    again = spans(tmp_path / "b", 0.5)
    assert [span.context.trace_id for span in found if span.context] == [s.context.trace_id for s in again if s.context]


def test_no_span_shows_a_key_an_id_or_a_feature(tmp_path: Path) -> None:
    shown = {name for span in spans(tmp_path, 1.0) for name in span.attributes or {}}
    places = {"input", "partition", "offset", "event_time_s"}
    assert shown == {f"streamcl.{name}" for name in places | {"score", "weights_version", "fate", "label_delay_s"}}


def test_without_the_extra_the_setting_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"telemetry.trace_share: pip install 'streamcl\[otel\]'"):
        Traces(settings(tmp_path, telemetry={"port": 0, "trace_share": 0.1}))
