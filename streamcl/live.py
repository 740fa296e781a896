"""The worker's own endpoint: predictions from the model that is learning, between two records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from streamcl.config import Config, ConfigError
from streamcl.messages import scores_to_json
from streamcl.records import Encoded
from streamcl.replica import Unready, encoded, scored
from streamcl.worker import Worker


class LiveModel:
    """A running worker's model: every look at it is of a state between two records.

    The state only changes on the worker's thread; predicting changes nothing, so what is learned stays what it would
    have been.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.decoder = worker.decoder
        with worker.gate:
            self._note()

    def encode(self, payload: Any) -> Encoded:
        """Raises BadInput as the worker would for an event with these features."""
        if self.worker.past is None:
            return encoded(self.decoder, payload, None)
        with self.worker.gate:
            return encoded(self.decoder, payload, self.worker.past)

    def answers(self, batch: Sequence[Encoded]) -> list[dict[str, Any]]:
        with self.worker.gate:
            scores = scored(self.worker.learner, batch)
            self._note()
        return [scores_to_json(each) for each in scores]

    def read(self) -> dict[str, float]:
        """Nothing: `[telemetry]` says it already."""
        return {}

    def _note(self) -> None:
        self._told = {"records": self.worker.progress.records, "version": self.worker.learner.version}

    def brief(self) -> dict[str, Any]:
        """Of the state that was looked at last."""
        return {"name": self.worker.config.name, "snapshot": "live", **self._told}

    def describe(self) -> dict[str, Any]:
        with self.worker.gate:
            self._note()
            position = self.worker.progress.state_dict()["position"]
        config = self.worker.config
        features = {name: feature.kind for name, feature in sorted(config.features.items())}
        how = self.worker.learner.described()
        return {**self.brief(), "task": config.task, **how, "position": position, "features": features}


class Live:
    """The model of the one shard of this process, whoever holds it at the moment.

    Args:
        worker: The running one; None while there is none.

    Raises:
        ConfigError: the process may hold several shards, and a request doesn't say which it means.
    """

    def __init__(self, config: Config, worker: Callable[[], Worker | None]) -> None:
        if len(config.shard.here) > 1 or config.shard.assignment == "group":
            raise ConfigError("serve.in_worker: needs one shard in this process, assigned by hand")
        self._worker = worker
        self._model: LiveModel | None = None

    def current(self) -> LiveModel:
        """Raises Unready."""
        worker = self._worker()
        if worker is None or not worker.caught_up:
            raise Unready("the worker is starting, or recovering" if worker is None else "repeating the logged order")
        if self._model is None or self._model.worker is not worker:
            self._model = LiveModel(worker)
        return self._model

    def read(self) -> dict[str, float]:
        return {}
