"""A replica's way from a snapshot to the newest delta: the next weights are made beside those that serve.

Two learners take turns. The one that serves is never changed; the other takes the deltas that it lacks, and then a
model around it is put in the first one's place by one assignment. A request keeps the model that it began with, so it
never sees half of a delta. The first learner is used again once no request holds its model any more; if one still does
when the next delta comes, a third is made instead of waiting.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from typing import NamedTuple

from streamcl.channel import Reader
from streamcl.config import Config
from streamcl.delta import Change, Newer, Torn, Unfit, apply, become, decode, lineage
from streamcl.learner import Learner
from streamcl.protocols import ConnectorError

log = logging.getLogger(__name__)

_KNOWN = 1000  # cuts remembered, to know a snapshot of the same history again
_PATIENT_LOOKS = 60
_TOGETHER = 16  # deltas that become one model, when there are many


class Place(NamedTuple):
    """Where a model stands: records taken, and the checksum of the last cut before."""

    records: int
    cut: str


class Follower:
    """Reads deltas behind a snapshot. One thread; `read` may be called from any.

    Attributes:
        place: Where the newest model stands; None before the first snapshot.
        waiting: For the next snapshot: a delta is missing, or of another history.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.place: Place | None = None
        self.waiting = False
        self.taken = self.taken_bytes = self.gaps = self.foreign = self.failures = self.copies = 0
        self._lag = self._looks = 0
        self._known: deque[str] = deque(maxlen=_KNOWN)
        self._away, self._told = False, ""
        self._config: Config | None = None
        self._front: Learner | None = None
        self._spare: _Spare | None = None
        self._last: list[Change] = []  # what the spare lacks

    def passes(self, records: int, cut: str) -> bool:
        """Whether a snapshot need not be loaded: it is of the history that we follow, and the last cut before it is
        behind us. If it is ahead by less than a delta and none comes for long, the stream may have stopped: load it.
        """
        if self.place is None or self.waiting or cut not in self._known:
            return False
        self._looks = self._looks + 1 if records > self.place.records else 0
        return self._looks < _PATIENT_LOOKS

    def begin(self, config: Config, learner: Learner, place: Place) -> None:
        """A snapshot was loaded; from now on its learner is not ours to change."""
        self.place, self.waiting = place, False
        self._known.clear()
        self._known.append(place.cut)
        self._config, self._front, self._spare, self._last = config, learner, None, []
        self._lag, self._looks, self._told = 0, 0, ""
        self.reader.close()  # what it has read by now may be needed again

    def step(self) -> Change | None:
        """Take what there is into the spare learner: the newest change of it, None when there is nothing new.

        After a change `learner` is to be served, and `swapped` to be called.
        """
        if self.place is None or self.waiting:
            return None
        changes = self._take()
        if not changes:
            return None
        learner = self._prepared()
        try:
            for change in changes:
                apply(learner, change.state)
        except Unfit as error:
            self._wait(f"a delta does not fit: {error}")
            self.foreign += 1
            self._spare = None
            return None
        self._spare, self._last = None, changes
        self.learner = learner
        return changes[-1]

    def swapped(self, old: object) -> None:
        """`learner` serves now; its predecessor is free for use once nobody holds `old`, the model around it."""
        assert self._front is not None  # noqa: S101 - there was a step
        self._spare = _Spare(self._front, old)
        self._front = self.learner

    def read(self) -> dict[str, float]:
        """Counts since the replica began; `deltas_age_records`: how far the newest delta seen is ahead."""
        return {
            "deltas_applied": float(self.taken),
            "deltas_applied_bytes": float(self.taken_bytes),
            "deltas_gaps": float(self.gaps),
            "deltas_foreign": float(self.foreign),
            "deltas_failures": float(self.failures),
            "deltas_copies": float(self.copies),
            "deltas_age_records": float(self._lag),
            "deltas_waiting": float(self.waiting),
        }

    def close(self) -> None:
        self.reader.close()

    def _take(self) -> list[Change]:
        """Deltas that follow one another from `place` on."""
        assert self.place is not None  # noqa: S101 - `step` looks first
        found: list[Change] = []
        try:
            for data in self.reader.read(self.place.records):
                change = decode(data)
                if not self._foreign(change) and self._follows(change):
                    found.append(change)
                    self.taken, self.taken_bytes = self.taken + 1, self.taken_bytes + len(data)
                if self.waiting or len(found) == _TOGETHER:
                    break
        except Torn as error:  # a file is read again the next time; what is behind it must wait
            self._tell(str(error))
        except Newer as error:
            self._wait(str(error))
        except ConnectorError as error:
            self._failed(error)
        else:
            self._away = False
        return found

    def _foreign(self, change: Change) -> bool:
        assert self._config is not None  # noqa: S101 - as above
        if change.fingerprint == lineage(self._config):
            return False
        self.foreign += 1
        self._tell(f"passed over: a delta of another configuration, {change.fingerprint}")
        return True

    def _follows(self, change: Change) -> bool:
        """Step on to a delta that fits. One that comes again is nothing; one that does not fit is a gap."""
        assert self.place is not None  # noqa: S101 - as above
        place = self.place
        self._lag = max(self._lag, change.records - place.records)
        if change.records <= place.records:
            return False
        if change.since > place.records or change.previous != place.cut:
            cause = "is missing" if change.since > place.records else "is of another history"
            self.gaps += 1
            self._wait(f"what comes before the delta of {change.records} records {cause}; we are at {place.records}")
            return False
        self.place = Place(change.records, change.id)
        self._known.append(change.id)
        self._lag = self._looks = 0
        return True

    def _prepared(self) -> Learner:
        """A learner that stands where the front one does, and that nobody else holds."""
        if self._spare and self._spare.free():
            learner, lacking = self._spare.learner, self._last
            for change in lacking:
                apply(learner, change.state)
        else:
            learner = self._copied()
        return learner

    def _copied(self) -> Learner:
        assert self._config is not None and self._front is not None  # noqa: S101 - as above
        self.copies += 1
        learner = Learner(self._config, serving=True)
        become(learner, self._front)
        return learner

    def _wait(self, cause: str) -> None:
        self.waiting = True
        log.warning("deltas: %s; waiting for the next snapshot", cause)

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._told = text
            log.warning("deltas: %s", text)

    def _failed(self, error: ConnectorError) -> None:
        self.failures += 1
        log.log(logging.INFO if self._away else logging.WARNING, "%s; serving without new deltas", error)
        self._away = True


class _Spare:
    """A learner that has served, and whether its model is still in use."""

    def __init__(self, learner: Learner, model: object) -> None:
        self.learner = learner
        self._model = weakref.ref(model)

    def free(self) -> bool:
        return self._model() is None
