"""What is asked over HTTP, and its answers, by a model that somebody else keeps fresh: a replica's, or the worker's."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import orjson
import prometheus_client as prometheus

from streamcl import openapi
from streamcl.config import Config
from streamcl.decode import Decoder
from streamcl.listen import BROKEN, BUSY, JSON, Answer, Reply, Request, refusal
from streamcl.protocols import BadInput, Codec
from streamcl.records import Encoded
from streamcl.replica import Unready
from streamcl.traffic import Traffic

log = logging.getLogger(__name__)

OPEN = (b"/livez", b"/healthz", b"/readyz")
"""Without a key: whoever probes has none."""


PASS = 256
"""Instances of one pass of the model, at most (count)."""


class Refused(Exception):
    """A request that can't be answered."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


class Scorer(Protocol):
    """A model at one moment: see `replica.Model`."""

    @property
    def decoder(self) -> Decoder: ...

    def encode(self, payload: Any) -> Encoded: ...

    def answers(self, batch: Sequence[Encoded]) -> list[dict[str, Any]]: ...

    def brief(self) -> dict[str, Any]: ...

    def describe(self) -> dict[str, Any]: ...

    def read(self) -> dict[str, float]: ...


class Models(Protocol):
    """Where the model comes from."""

    def current(self) -> Scorer:
        """Raises Unready."""

    def read(self) -> dict[str, float]:
        """How they are followed."""


class Asked(NamedTuple):
    """A request whose instances wait to be scored."""

    instances: int
    request: Request
    reply: Reply


class Endpoint:
    """`POST /v1/predict`, `GET /v1/model`, `/metrics`, `/openapi.json`, `/docs`, `/readyz`, `/livez` (also `/healthz`).

    A request is one event's payload, or `{"instances": [payload, ...]}`; the answer holds `predictions` in that order
    and the `model` that made all of them. An event is scored as the worker would score it, labels and id not needed.
    What has arrived by the time the model is free shares one pass: nothing waits for company.

    Errors are `{"error": {"reason", "message"}}`: 400 for content (names the field, and never shows its value), 413 for
    too much of it, 415 for anything but JSON, 503 before the first model and under too much load.

    Args:
        models: Its `current` is asked for each request.
        config: Describes requests as long as there is no model.
        key: Clients must show it, as `Authorization: Bearer KEY` or `X-API-Key: KEY`.
    """

    def __init__(self, models: Models, config: Config, codec: Codec, key: bytes | None = None) -> None:
        self.models = models
        self.config = config
        self.limits = config.serve
        self.codec = codec
        self.key = key
        self.traffic = Traffic(self._readings)
        self.routes: dict[bytes, Callable[[], Answer]] = {
            b"/v1/model": lambda: _json(self.models.current().describe()),
            b"/metrics": lambda: Answer(200, self.traffic.text(), prometheus.CONTENT_TYPE_LATEST.encode()),
            b"/openapi.json": lambda: _json(self._document()),
            b"/docs": self._docs,
            b"/readyz": self._ready,
            b"/livez": lambda: _json({"ok": True, "reason": ""}),
        }
        self.routes[b"/healthz"] = self.routes[b"/livez"]
        self._model: Scorer | None = None  # the present one, which what waits was read for
        self._asked: list[Asked] = []
        self._waiting: list[Encoded] = []
        self._records = 0

    def handle(self, request: Request, reply: Reply) -> None:
        """Answer now; a prediction once everything that has arrived by now has been read."""
        self.traffic.in_flight += 1
        try:
            if request.path == b"/v1/predict" and request.method == b"POST":
                self._allow(request)
                self._ask(request, reply)
                return
            answer = self._other(request)
        except Refused as refused:
            answer = refused.answer
        except Unready as error:
            answer = refusal(503, "unready", str(error), (b"retry-after", b"1"))
        except Exception:  # whatever it is, the others are still answered
            log.exception("while answering %r", request.path)
            answer = BROKEN
        self._answered(request, reply, answer)

    def refused(self, status: int) -> None:
        self.traffic.answered(status, 0.0)
        if status == BUSY.status:
            self.traffic.shed["connections"] += 1

    def tick(self) -> None:
        """See whether another model answers now."""
        with contextlib.suppress(Unready):
            self._take(self.models.current())

    def _allow(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, shown = request.headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            shown = request.headers.get(b"x-api-key", b"")
        if not hmac.compare_digest(shown.strip(), self.key):
            text = "show the key: Authorization: Bearer KEY, or X-API-Key: KEY"
            raise Refused(refusal(401, "unauthorized", text, (b"www-authenticate", b"Bearer")))

    def _other(self, request: Request) -> Answer:
        if request.path not in OPEN:
            self._allow(request)
        allowed = b"POST" if request.path == b"/v1/predict" else b"GET, HEAD"
        route = self.routes.get(request.path)
        if route is None and request.path != b"/v1/predict":
            raise Refused(refusal(404, "path", f"there are: POST /v1/predict, GET {b', '.join(self.routes).decode()}"))
        if route is None or request.method not in (b"GET", b"HEAD"):
            raise Refused(refusal(405, "method", f"allowed is {allowed.decode()}", (b"allow", allowed)))
        self.tick()  # what is told about swaps is then of this moment
        return route()

    # predictions

    def _ask(self, request: Request, reply: Reply) -> None:
        if len(self._waiting) >= self.limits.max_queued_instances:  # before any work on it
            self._shed()
        if request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != JSON:
            raise Refused(refusal(415, "media_type", "send JSON, with Content-Type: application/json"))
        model = self.models.current()
        self._take(model)
        encoded = self._encoded(model, request.body)
        if len(self._waiting) + len(encoded) > self.limits.max_queued_instances:
            self._shed()
        if not self._asked:
            asyncio.get_running_loop().call_soon(self._score)
        self._asked.append(Asked(len(encoded), request, reply))
        self._waiting += encoded
        self.traffic.queued = len(self._waiting)

    def _take(self, model: Scorer) -> None:
        """Score what waits with the model that it was read for, then go over to this one."""
        if model is not self._model:
            self._score()
            records = int(model.brief()["records"])
            self.traffic.swapped(records - self._records if self._model else 0)
            self._model, self._records = model, records

    def _shed(self) -> None:
        self.traffic.shed["queue"] += 1
        raise Refused(BUSY)

    def _encoded(self, model: Scorer, body: bytes) -> list[Encoded]:
        try:
            payload = self.codec.decode(body)
            if not (len(payload) == 1 and isinstance(instances := payload.get("instances"), list)):
                return [model.encode(payload)]
        except BadInput as error:
            raise Refused(refusal(400, error.reason, str(error))) from error
        if len(instances) > (most := self.limits.max_instances):
            raise Refused(refusal(413, "too_large", f"{len(instances)} instances; at most {most}"))
        encoded = []
        for index, instance in enumerate(instances):
            try:
                encoded.append(model.encode(instance))
            except BadInput as error:
                where = f"instances[{index}]: " if len(instances) > 1 else ""
                raise Refused(refusal(400, error.reason, f"{where}{error}")) from error
        return encoded

    def _score(self) -> None:
        """One pass for all that waits."""
        asked, waiting, model = self._asked, self._waiting, self._model
        self._asked, self._waiting, self.traffic.queued = [], [], 0
        if model is None or not asked:
            return
        try:
            # Beyond some size a pass is no cheaper for each, and all would wait for the last.
            parts = [model.answers(waiting[i : i + PASS]) for i in range(0, len(waiting), PASS)]
            answers = [answer for part in parts for answer in part]
            brief = orjson.Fragment(orjson.dumps(model.brief()))
        except Exception:
            log.exception("while scoring %d instances", len(waiting))
            for each in asked:
                self._answered(each.request, each.reply, BROKEN)
            return
        self.traffic.passes += len(parts)
        self.traffic.instances += len(waiting)
        start = 0
        for count, request, reply in asked:
            body = {"predictions": answers[start : start + count], "model": brief}
            start += count
            self._answered(request, reply, _json(body))

    def _answered(self, request: Request, reply: Reply, answer: Answer) -> None:
        reply(answer)
        self.traffic.in_flight -= 1
        self.traffic.answered(answer.status, asyncio.get_running_loop().time() - request.arrived_s)

    # descriptions

    def _ready(self) -> Answer:
        self.models.current()
        return _json({"ok": True, "reason": ""})

    def _document(self) -> dict[str, Any]:
        """Of the model's own config, which is not always the one that we were started with."""
        config = self.config
        with contextlib.suppress(Unready):
            config = self.models.current().decoder.config
        return openapi.document(config, self.limits)

    def _docs(self) -> Answer:
        quiet = (b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'")
        return Answer(200, openapi.page(self._document()).encode(), b"text/html; charset=utf-8", (quiet,))

    def _readings(self) -> Mapping[str, float]:
        try:
            return self.models.current().read() | self.models.read()
        except Unready:
            return self.models.read()


def _json(value: Any) -> Answer:
    return Answer(200, orjson.dumps(value))
