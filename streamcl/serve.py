"""A read replica: predictions over HTTP from the newest snapshot of a worker, which it follows and never writes to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from streamcl import connect
from streamcl.checkpoint import Store
from streamcl.config import Config
from streamcl.decode import Decoder
from streamcl.learner import Learner
from streamcl.messages import scores_to_json
from streamcl.protocols import BadInput, Codec, StreamclError
from streamcl.recovery import store_of
from streamcl.river_learner import RiverLearner
from streamcl.snapshot import Loaded, Snapshot

log = logging.getLogger(__name__)

MAX_INSTANCES = 1000
"""Of one request; more would keep the others waiting."""


class Refused(Exception):
    """A request that can't be answered: an HTTP status, a reason, and a text for its sender."""

    def __init__(self, status: int, reason: str, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.reason = reason


@dataclass(frozen=True)
class Model:
    """What one snapshot knows: everything that a request needs, so that swapping it is one assignment."""

    snapshot: Snapshot
    decoder: Decoder
    learner: Learner | RiverLearner
    about: Mapping[str, Any]

    @classmethod
    def of(cls, loaded: Loaded, codec: Codec) -> Model:
        """The model as its own config describes it, which is not always the one that the replica was started with."""
        where = str(loaded.snapshot.path)
        try:
            config = Config.parse(loaded.manifest["config"], where)
            learner = RiverLearner(config) if config.river else Learner(config)
            learner.load_state_dict(loaded.state["learner"])
            about = {name: loaded.manifest[name] for name in ("records", "position")}
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise StreamclError(f"{where}: not a snapshot of such a worker: {error!r}") from error
        return cls(loaded.snapshot, Decoder(config, codec), learner, about)

    def predict(self, payload: Any) -> dict[str, Any]:
        """Raises BadInput as the worker would for an event with these features."""
        if not isinstance(payload, dict):
            raise BadInput("schema", "an instance must be an object")
        if self.decoder.config.events.unknown_fields == "dead_letter":
            for name in sorted(self.decoder.unknown_fields(payload)):
                raise BadInput("unknown_feature", f"unknown field {name!r}")
        return scores_to_json(self.learner.predict(self.decoder.featurizer.encode(payload)))

    def brief(self) -> dict[str, Any]:
        return {
            "name": self.decoder.config.name,
            "snapshot": self.snapshot.name,
            "records": self.about["records"],
            "version": self.learner.version,
        }

    def describe(self) -> dict[str, Any]:
        config = self.decoder.config
        return {
            **self.brief(),
            "task": config.task,
            "digest": self.snapshot.digest,
            "position": self.about["position"],
            "features": {name: feature.kind for name, feature in sorted(config.features.items())},
        }


class Predictor:
    """The newest model of a folder of snapshots; reads only, and runs nobody's retention.

    Args:
        max_bytes: Largest body of a request (count).
    """

    def __init__(self, store: Store, codec: Codec, max_bytes: int = 1 << 20) -> None:
        self.store = store
        self.codec = codec
        self.max_bytes = max_bytes
        self.model: Model | None = None
        self.reason = f"no checkpoint in {store.folder} yet"
        self._tried: str | None = None
        self._stop = threading.Event()

    def refresh(self) -> bool:
        """Take the newest sound snapshot unless it is the present one; True when the model has changed.

        Raises:
            StreamclError: a snapshot that can't be used here; the model that was there stays.
        """
        damaged = dict(self.store.damaged)
        sound = [snapshot.name for snapshot in self.store.ls() if snapshot.name not in damaged]
        if not sound or sound[-1] in (self._tried, self._name()):
            return False
        self._tried = sound[-1]  # once is enough: what can't be used now will not be a second later
        loaded = self.store.newest()
        if loaded is None or loaded.snapshot.name == self._name():
            return False
        self.model = Model.of(loaded, self.codec)
        log.info("serving %s", loaded.snapshot.path)
        return True

    def _name(self) -> str | None:
        return self.model.snapshot.name if self.model else None

    def follow(self, every_s: float = 1.0) -> None:
        """Refresh until `close`; a fault is logged, and what was served before is served on."""
        while not self._stop.wait(every_s):
            try:
                self.refresh()
            except StreamclError as error:
                self._tell(str(error))

    def _tell(self, reason: str) -> None:
        if reason != self.reason:
            self.reason = reason
            log.warning("snapshot not taken: %s", reason)

    def close(self) -> None:
        self._stop.set()

    def current(self) -> Model:
        if self.model is None:
            raise Refused(503, "unready", self.reason)
        return self.model


def app(predictor: Predictor) -> Starlette:
    """The endpoints: `POST /v1/predict`, `GET /v1/model`, `/readyz`, `/livez` (also `/healthz`).

    A request is one event's payload, or `{"instances": [payload, ...]}`; the answer holds `predictions` in that order
    and the `model` that made all of them. An event is scored as the worker would score it, labels and id not needed.

    Errors are `{"error": {"reason", "message"}}`: 400 for content (names the field, and never shows its value), 413 for
    too much of it, 415 for anything but JSON, 503 before the first snapshot.
    """

    # All of it on the loop's own thread: a prediction takes less time than handing it to another one.
    async def predict(request: Request) -> Response:
        body = _decoded(await _body(request, predictor.max_bytes), predictor.codec)
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
    return Starlette(routes=routes, exception_handlers={Refused: _refusal})


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
    predictor = Predictor(store, connect.codec("json", config, "requests"), config.events.max_bytes)
    predictor.refresh()
    threading.Thread(target=predictor.follow, name="follow", daemon=True).start()
    try:
        uvicorn.run(app(predictor), host=host, port=port, log_level="info", access_log=False, lifespan="off")
    finally:
        predictor.close()
