"""What a read replica answers with: the model of a worker's newest snapshot, which it follows and never writes to."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from streamcl.checkpoint import Store
from streamcl.config import Config
from streamcl.decode import Decoder
from streamcl.follow import Follower, Place
from streamcl.learner import Learner
from streamcl.messages import scores_to_json
from streamcl.outcomes import Memory, Outcomes
from streamcl.past import Past, past_of
from streamcl.protocols import BadInput, Codec, StreamclError
from streamcl.records import Encoded, Scores
from streamcl.river_learner import RiverLearner
from streamcl.snapshot import Loaded, Snapshot
from streamcl.state import private

log = logging.getLogger(__name__)


class Unready(StreamclError):
    """There is no model yet; the text says why."""


@dataclass(frozen=True)
class Model:
    """What one snapshot knows: everything that a request needs, so that swapping it is one assignment."""

    snapshot: Snapshot
    decoder: Decoder
    learner: Learner | RiverLearner
    about: Mapping[str, Any]
    outcomes: int = 0
    """The number of the last one that it has learned from."""
    forgets: int = 0
    """Commands to forget that its snapshot has obeyed."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while the error memory is read or written; see `outcomes.Memory`."""
    past: Past | None = None
    """As it stood when the snapshot was cut; deltas don't move it."""

    @classmethod
    def of(cls, loaded: Loaded, codec: Codec) -> Model:
        """The model as its own config describes it, which is not always the one that the replica was started with."""
        where = str(loaded.snapshot.path)
        try:
            config = Config.parse(loaded.manifest["config"], where)
            learner = RiverLearner(config) if config.river else Learner(config, serving=True)
            learner.load_state_dict(loaded.state["learner"])
            decoder = Decoder(config, codec)
            past = past_of(config, decoder.featurizer)
            if past:
                past.load_state_dict(loaded.state["past"])
            about = {name: loaded.manifest[name] for name in ("records", "position")}
            outcomes = int(loaded.state["progress"].get("outcomes", 0))
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise StreamclError(f"{where}: not a snapshot of such a worker: {error!r}") from error
        forgets = int(loaded.manifest.get("forgets", 0))
        return cls(loaded.snapshot, decoder, learner, about, outcomes, forgets, past=past)

    def memory(self) -> Memory | None:
        """Of its errors, if it has one."""
        if isinstance(self.learner, RiverLearner) or not self.learner.recall.stages:
            return None
        return Memory(self.decoder.config, self.learner, self.outcomes, self.lock)

    def encode(self, payload: Any) -> Encoded:
        """Raises BadInput as the worker would for an event with these features."""
        return encoded(self.decoder, payload, self.past)

    def answers(self, batch: Sequence[Encoded]) -> list[dict[str, Any]]:
        """In one pass of the model, if it knows how to."""
        with self.lock:
            scores = scored(self.learner, batch)
        return [scores_to_json(each) for each in scores]

    def predict(self, payload: Any) -> dict[str, Any]:
        [answer] = self.answers([self.encode(payload)])
        return answer

    def read(self) -> dict[str, float]:
        with self.lock:
            return self.learner.read()

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
            **self.learner.described(),
            "digest": self.snapshot.digest,
            "position": self.about["position"],
            "features": {name: feature.kind for name, feature in sorted(config.features.items())},
        }


def encoded(decoder: Decoder, payload: Any, past: Past | None) -> Encoded:
    """What is kept of the past is read at the payload's event time; without one as if it came with the newest event."""
    if not isinstance(payload, dict):
        raise BadInput("schema", "an instance must be an object")
    if decoder.config.events.unknown_fields == "dead_letter":
        for name in sorted(decoder.unknown_fields(payload)):
            raise BadInput("unknown_feature", f"unknown field {name!r}")
    features = decoder.featurizer.encode(payload)
    return past.complete(features, decoder.time_of(payload)) if past else features


def scored(learner: Learner | RiverLearner, batch: Sequence[Encoded]) -> list[Scores]:
    """One alone is scored exactly as the worker does it."""
    if len(batch) == 1 or isinstance(learner, RiverLearner):
        return [learner.predict(each) for each in batch]
    return learner.predict_many(batch)


class Predictor:
    """The newest model of a folder of snapshots; reads only, and runs nobody's retention.

    Args:
        codec: How requests are written.
        outcomes: What the error memory is made of, after a snapshot. None: scores are compensated by what the worker
            remembered when it cut the snapshot.
        follower: Of the deltas after a snapshot. None: it stands until the next one.
    """

    def __init__(
        self, store: Store, codec: Codec, outcomes: Outcomes | None = None, follower: Follower | None = None
    ) -> None:
        self.store = store
        self.codec = codec
        self.outcomes = outcomes
        self.follower = follower
        self.model: Model | None = None
        self.reason = f"no checkpoint in {store.folder} yet"
        self._tried: str | None = None
        self._stop = threading.Event()

    def refresh(self) -> bool:
        """Take the newest sound snapshot unless it is the present one, and the deltas behind it.

        True when the model has changed.

        Raises:
            StreamclError: a snapshot that can't be used here; the model that was there stays.
        """
        taken = self._take_deltas()  # first: they may lead to where the newest snapshot is
        if self._take_snapshot():
            taken = self._take_deltas() or True
        return taken

    def _take_snapshot(self) -> bool:
        damaged = dict(self.store.damaged)
        sound = [snapshot for snapshot in self.store.ls() if snapshot.name not in damaged]
        if not sound or sound[-1].name in (self._tried, self._name()) or self._passed(sound[-1]):
            return False
        self._tried = sound[-1].name  # once is enough: what can't be used now will not be a second later
        loaded = self.store.newest()
        if loaded is None or loaded.snapshot.name == self._name():
            return False
        model = Model.of(loaded, self.codec)
        if self.outcomes:
            self.outcomes.adopt(model.memory())
        self.model = model
        log.info("serving %s", loaded.snapshot.path)
        if self.follower and isinstance(model.learner, Learner):
            cut = loaded.state.get("deltas", {}).get("last", "")
            self.follower.begin(model.decoder.config, model.learner, Place(model.about["records"], cut))
        return True

    def _passed(self, snapshot: Snapshot) -> bool:
        """Whether deltas lead there as well. They don't say what has been forgotten."""
        told = snapshot.manifest
        if self.model and told.get("forgets", 0) != self.model.forgets:
            return False
        return bool(self.follower and self.follower.passes(told.get("records", 0), told.get("delta", "")))

    def _take_deltas(self) -> bool:
        taken = False
        while self._take_some():
            taken = True
        return taken

    def _take_some(self) -> bool:
        old = self.model
        change = self.follower.step() if self.follower and old else None
        if change is None or self.follower is None or old is None:
            return False
        model = replace(
            old,
            learner=self.follower.learner,
            about={"records": change.records, "position": change.position},
            outcomes=change.outcomes,
            lock=threading.Lock(),
        )
        self._hand_over(old, model)
        self.follower.swapped(old)
        return True

    def _hand_over(self, old: Model, model: Model) -> None:
        """Swap the model, and with it the error memory. A form that keeps what other weights wrote goes on as it was,
        and then outcomes count from where the old one stood: none is written twice.
        """
        assert isinstance(old.learner, Learner) and isinstance(model.learner, Learner)  # noqa: S101 - deltas need it
        stages = old.learner.recall.stages
        keeps = any(stage.config.on_new_weights == "keep" for stage in stages)
        if stages and (keeps or not self.outcomes):
            with old.lock:
                model.learner.recall.load_state_dict(private(old.learner.recall.state_dict()))
        if not self.outcomes:
            model.learner.recall.renew(model.learner.version)
        elif keeps and self.outcomes.memory:
            model = replace(model, outcomes=max(model.outcomes, self.outcomes.memory.number))
        if self.outcomes:
            self.outcomes.adopt(model.memory())
        self.model = model

    def _name(self) -> str | None:
        return self.model.snapshot.name if self.model else None

    def follow(self, every_s: float = 1.0) -> None:
        """Refresh, and read outcomes, until `close`; a fault is logged, and what was served before is served on."""
        due = time.monotonic() + every_s
        while not self._stop.is_set():
            left_s = min(max(due - time.monotonic(), 0.0), 0.1)
            if left_s:
                if not (self.outcomes and self.outcomes.step(left_s)):
                    self._stop.wait(left_s)
                continue
            try:
                self.refresh()
            except StreamclError as error:
                self._tell(str(error))
            due = time.monotonic() + every_s
        for part in (self.outcomes, self.follower):
            if part:
                part.close()

    def _tell(self, reason: str) -> None:
        if reason != self.reason:
            self.reason = reason
            log.warning("snapshot not taken: %s", reason)

    def read(self) -> dict[str, float]:
        """What the readers of outcomes and deltas say about themselves; see `Model.read` for the model."""
        return {name: value for part in (self.outcomes, self.follower) if part for name, value in part.read().items()}

    def close(self) -> None:
        self._stop.set()

    def current(self) -> Model:
        """Raises Unready."""
        if self.model is None:
            raise Unready(self.reason)
        return self.model
