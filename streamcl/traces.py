"""Traces of a few events, by OpenTelemetry: from the answer to what was learned of it. Needs the extra `otel`.

Which events is drawn by their key, so all that a user saw is there or nothing, and a repetition traces the same. The id
of a trace follows from where its event stands (input, partition, offset): the outcome, days later, joins the span of
the answer, also in another process. Spans name that place, never an id, a key or a value of a feature.

Where they go, OpenTelemetry's own variables say: OTEL_EXPORTER_OTLP_ENDPOINT and its like, OTEL_RESOURCE_ATTRIBUTES.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import xxhash

from streamcl.config import Config, ConfigError
from streamcl.random import bits, key_of
from streamcl.records import Origin, Turn, mark

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_WORD = (1 << 64) - 1


class Traces:
    """Spans `answer` and `learn` of sampled events; exported on a thread of OpenTelemetry's own.

    Args:
        config: `telemetry.trace_share` of the keys are traced.
        exporter: Instead of OTLP over HTTP.

    Raises:
        ConfigError: OpenTelemetry is not installed.
    """

    def __init__(self, config: Config, exporter: SpanExporter | None = None) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        except ImportError as error:
            raise ConfigError(f"telemetry.trace_share: pip install 'streamcl[otel]' ({error})") from error

        class Placed(RandomIdGenerator):
            """Trace ids as told before; ids of spans too, where they must be found again."""

            trace = 0
            span = 0

            def generate_trace_id(self) -> int:
                return self.trace

            def generate_span_id(self) -> int:
                return self.span or super().generate_span_id()

        self._ids, self._api = Placed(), trace
        resource = Resource.create({"service.name": "streamcl", "streamcl.model": config.name})
        self._provider = TracerProvider(resource=resource, id_generator=self._ids)
        self._provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("streamcl")
        self._key, self._below = key_of(config.seed, "telemetry.trace_share"), config.telemetry.trace_share * 2.0**64

    def sampled(self, key: str) -> bool:
        return bits(self._key, mark(key) & _WORD) < self._below

    def add(self, turn: Turn, seconds: float) -> None:
        """The turn that has just ended, after so long. Nothing of one that is repeated: it was traced before."""
        if turn.recovering:
            return
        ended = time.time_ns()
        began = ended - int(1e9 * seconds)
        for prediction in turn.predictions:
            if self.sampled(prediction.key):
                self._ids.trace, self._ids.span = _places(prediction.origin)
                span = self._tracer.start_span("answer", start_time=began)
                span.set_attribute("streamcl.score", prediction.scores.served.tolist())
                span.set_attribute("streamcl.weights_version", prediction.scores.version)
                self._end(span, prediction.origin, prediction.time_s, ended)
        for outcome in turn.outcomes:
            if self.sampled(outcome.ticket.key):
                origin = outcome.ticket.origin
                trace, answer = _places(origin)
                flags = self._api.TraceFlags(self._api.TraceFlags.SAMPLED)
                context = self._api.SpanContext(trace, answer, is_remote=True, trace_flags=flags)
                parent = self._api.set_span_in_context(self._api.NonRecordingSpan(context))
                self._ids.span = 0
                span = self._tracer.start_span("learn", context=parent, start_time=began)
                span.set_attribute("streamcl.fate", outcome.fate.value)
                span.set_attribute("streamcl.label_delay_s", outcome.delay_s)
                self._end(span, origin, outcome.ticket.time_s, ended)

    def _end(self, span: Span, origin: Origin, time_s: float, ended: int) -> None:
        span.set_attribute("streamcl.input", origin.input)
        span.set_attribute("streamcl.partition", origin.partition)
        span.set_attribute("streamcl.offset", origin.offset)
        span.set_attribute("streamcl.event_time_s", time_s)
        span.end(ended)

    def close(self) -> None:
        """Once everything is exported, or OpenTelemetry has given up."""
        self._provider.shutdown()


def _places(origin: Origin) -> tuple[int, int]:
    """Ids of an event's trace and of its answer's span; neither may be 0."""
    digest = xxhash.xxh3_128_intdigest(str(origin).encode())
    return digest or 1, digest & _WORD or 1
