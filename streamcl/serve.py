"""A read replica: predictions over HTTP."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import orjson
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamcl import connect
from streamcl.config import Config
from streamcl.outcomes import Outcomes
from streamcl.protocols import BadInput, Codec
from streamcl.recovery import store_of
from streamcl.replica import Model, Predictor, Unready

MAX_INSTANCES = 1000
"""Of one request; more would keep the others waiting."""


class Refused(Exception):
    """A request that can't be answered: an HTTP status, a reason, and a text for its sender."""

    def __init__(self, status: int, reason: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason


def app(predictor: Predictor, max_bytes: int = 1 << 20) -> Starlette:
    """The endpoints: `POST /v1/predict`, `GET /v1/model`, `/readyz`, `/livez` (also `/healthz`).

    A request is one event's payload, or `{"instances": [payload, ...]}`; the answer holds `predictions` in that order
    and the `model` that made all of them. An event is scored as the worker would score it, labels and id not needed.

    Errors are `{"error": {"reason", "message"}}`: 400 for content (names the field, and never shows its value), 413 for
    too much of it, 415 for anything but JSON, 503 before the first snapshot.
    """

    # All of it on the loop's own thread: a prediction takes less time than handing it to another one.
    async def predict(request: Request) -> Response:
        body = _decoded(await _body(request, max_bytes), predictor.codec)
        model = predictor.current()
        single = not (body.keys() == {"instances"} and isinstance(body["instances"], list))
        instances = [body] if single else body["instances"]
        if len(instances) > MAX_INSTANCES:
            raise Refused(413, "too_large", f"{len(instances)} instances; at most {MAX_INSTANCES}")
        return _json({"predictions": _predictions(model, instances), "model": model.brief()})

    async def describe(_: Request) -> Response:
        return _json(predictor.current().describe())

    async def ready(_: Request) -> Response:
        predictor.current()
        return _json({"ok": True, "reason": ""})

    async def live(_: Request) -> Response:
        return _json({"ok": True, "reason": ""})

    routes = [Route("/v1/predict", predict, methods=["POST"]), Route("/v1/model", describe)]
    routes += [Route("/readyz", ready), Route("/livez", live), Route("/healthz", live)]
    return Starlette(routes=routes, exception_handlers={Refused: _refusal, Unready: _unready})


def _predictions(model: Model, instances: list[Any]) -> list[dict[str, Any]]:
    predictions = []
    for index, payload in enumerate(instances):
        try:
            predictions.append(model.predict(payload))
        except BadInput as error:
            where = f"instances[{index}]: " if len(instances) > 1 else ""
            raise Refused(400, error.reason, f"{where}{error}") from error
    return predictions


async def _body(request: Request, max_bytes: int) -> bytes:
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "media_type", "send JSON, with Content-Type: application/json")
    body = bytearray()
    async for chunk in request.stream():  # a length that the sender states is not to be relied on
        body += chunk
        if len(body) > max_bytes:
            raise Refused(413, "too_large", f"a body may have {max_bytes} bytes")
    return bytes(body)


def _decoded(body: bytes, codec: Codec) -> Mapping[str, Any]:
    try:
        return codec.decode(body)
    except BadInput as error:
        raise Refused(400, error.reason, str(error)) from error


def _refusal(_: Request, error: Exception) -> Response:
    reason = getattr(error, "reason", "")
    return _json({"error": {"reason": reason, "message": str(error)}}, getattr(error, "status", 500))


def _unready(request: Request, error: Exception) -> Response:
    return _refusal(request, Refused(503, "unready", str(error)))


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def serve(config: Config, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Answer until told to stop (SIGTERM, Ctrl-C), from the snapshots of `config`'s shard.

    Raises:
        CheckpointError: the folder, or a snapshot in it, can't be used.
    """
    torch.set_num_threads(config.worker.threads)
    here = config.checkpoint.model_copy(update={"remote": None})  # fetching copies would be writing
    store = store_of(config.model_copy(update={"checkpoint": here}))
    outcomes = Outcomes(config.outcomes_url, config) if config.outcomes_url else None
    predictor = Predictor(store, connect.codec("json", config, "requests"), outcomes)
    predictor.refresh()
    threading.Thread(target=predictor.follow, name="follow", daemon=True).start()
    try:
        uvicorn.run(
            app(predictor, config.events.max_bytes),
            host=host,
            port=port,
            log_level="info",
            access_log=False,
            lifespan="off",
        )
    finally:
        predictor.close()
