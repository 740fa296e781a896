"""The last examples by what else is known of them: ranked within groups, and measured by the values of fields."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np
from numpy.typing import NDArray

from streamcl.config import Config
from streamcl.metrics.binary import weighted_metrics
from streamcl.metrics.examples import Examples
from streamcl.metrics.grouped import within_groups
from streamcl.metrics.kernels import write_rows
from streamcl.metrics.losses import finite, log_losses, ratio
from streamcl.metrics.ranking import exact_auc
from streamcl.protocols import State
from streamcl.records import Selector, marks
from streamcl.traits import keys, trait

Floats = NDArray[np.float64]

OTHER, MISSING = "other", "missing"
"""Names of the values that have no series of their own, and of none. A value that is called so shares its series."""
LONGEST = 64
"""Characters of a value that may have a series of its own."""


class Values(dict[str, int]):
    """Which values of a field have a place of their own: the first `most` that came, for good. The rest share the last.

    So as many series as that, and one more, are all that there will ever be of the field, whatever comes.

    Attributes:
        names: Of the places, in their order; by what a ticket says they are found in the dict itself.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.names: list[str] = []

    def places(self, texts: Sequence[str]) -> NDArray[np.int16]:
        full = len(self.names) == self.most
        found = map(self.get, texts, repeat(self.most)) if full else map(self.__getitem__, texts)
        return np.fromiter(found, np.int16, len(texts))

    def __missing__(self, text: str) -> int:
        value = text or MISSING
        if len(self.names) == self.most or value == OTHER or len(value) > LONGEST:
            return self.most
        place = len(self.names)
        self.names.append(value)
        self.update(dict.fromkeys(("", MISSING) if value == MISSING else (value,), place))
        return place

    def name(self, place: int) -> str:
        return OTHER if place == self.most else self.names[place]


class Slices:
    """Of the last `metrics.window` examples: gAUC within the values of `metrics.group_by`, and log-loss, NE,
    calibration and AUC for each value of the fields in `metrics.segments`.

    An example is one that the task's own metrics take, too. Of an event whose group is not known nothing can be ranked:
    it is left out, and counts in the share that is. Off, and without a state, while neither is configured. What is
    computed is computed when it is read.

    Shape:
        A ring of N = `metrics.window` rows: numbers (N, 3) label, score, weight; marks (N, 2) of the group and of whose
        event it is; places (N, F) of the value of each of F fields.
    """

    def __init__(self, config: Config) -> None:
        metrics, self._size = config.metrics, config.metrics.window
        self._settings = {
            "group_by": metrics.group_by,
            "segments": list(metrics.segments),
            "max_segments": metrics.max_segments,
            "key": config.events.key,
            "segment": config.events.segment,
        }
        self._group = trait(metrics.group_by, config.events, config.features) if metrics.group_by else None
        self._fields = {name: trait(name, config.events, config.features) for name in metrics.segments}
        self._most = metrics.max_segments
        self._on = bool(self._group or self._fields)
        self._begin()

    def _begin(self) -> None:
        rows = self._size if self._on else 0
        self._numbers = np.zeros((rows, 3))
        self._marks = np.zeros((rows if self._group else 0, 2), np.int64)
        self._places = np.zeros((rows, len(self._fields)), np.int16)
        self._written = 0
        self._values = {name: Values(self._most) for name in self._fields}

    def update(self, examples: Examples) -> None:
        """Take examples in, whose losses are finite."""
        if not self._on:
            return
        tickets, marked = examples.tickets, np.zeros((2, 0), np.int64)
        if group := self._group:
            owners = examples.owners
            marked = np.stack((owners if group is keys else marks(group(tickets)), owners))
        places = np.empty((len(self._fields), len(tickets)), np.int16)
        for column, (name, read) in enumerate(self._fields.items()):
            places[column] = self._values[name].places(read(tickets))
        columns = examples.labels, examples.scores, examples.weights, marked, places
        write_rows(self._written, *columns, self._numbers, self._marks, self._places)
        self._written += len(tickets)

    def _held(self) -> NDArray[np.int64]:
        """Rows of the ring, oldest first."""
        count = min(self._written, self._size)
        return (self._written - count + np.arange(count)) % self._size

    def read(self) -> dict[str, float]:
        """`gauc_window`, `gauc_left_out_window`; `segment:FIELD:VALUE:WHAT` of the values that the window holds."""
        if not self._on:
            return {}
        held = self._held()
        labels, scores, weights = self._numbers[held].T
        found: dict[str, float] = {}
        if self._group and len(held):
            groups = self._marks[held, 0]
            known = groups != 0
            auc, left_out = within_groups(labels[known], scores[known], groups[known], weights[known])
            judged = float(weights[known].sum()) * (1.0 - left_out) if known.any() else 0.0
            left_out = 1.0 - ratio(judged, float(weights.sum()))
            found |= {"gauc_window": auc, "gauc_left_out_window": left_out}
        for name, places in zip(self._fields, self._places[held].T, strict=True):
            for place in np.unique(places).tolist():
                at = places == place
                told = _quality(labels[at], scores[at], weights[at])
                value = self._values[name].name(place)
                found |= {f"segment:{name}:{value}:{what}": number for what, number in told.items()}
        return finite(found)

    def forget(self, who: Selector) -> dict[str, int]:
        """Examples that are of nobody's group from now on (count): of which of an event's ids or when it was, nobody
        knows.
        """
        if not self._group:
            return {}
        owners = who.owners
        meant = self._marks[:, 0] != 0
        if owners is not None:
            meant &= np.isin(self._marks[:, 1], list(owners))
        self._marks[meant] = 0
        return {"grouped": int(meant.sum())}

    def state_dict(self) -> State:
        if not self._on:
            return {}
        return {
            "settings": dict(self._settings),
            "numbers": self._numbers.copy(),
            "marks": self._marks.copy(),
            "places": self._places.copy(),
            "written": self._written,
            "values": [list(values.names) for values in self._values.values()],
        }

    def load_state_dict(self, state: State) -> None:
        """Under other settings, or of a snapshot that knows nothing of it, it begins anew."""
        self._begin()
        if not self._on or state.get("settings") != self._settings:
            return
        for mine, name in ((self._numbers, "numbers"), (self._marks, "marks"), (self._places, "places")):
            mine[:] = state[name]
        self._written = int(state["written"])
        for values, names in zip(self._values.values(), state["values"], strict=True):
            values.places(names)


def _quality(labels: Floats, scores: Floats, weights: Floats) -> dict[str, float]:
    """(n,) each."""
    loss, weight = float((weights * log_losses(labels, scores)).sum()), float(weights.sum())
    sums = weight, loss, float((weights * scores).sum()), float((weights * labels).sum())
    return {"events": float(len(labels)), "auc": exact_auc(labels, scores, weights), **weighted_metrics(*sums)}
