"""What has become of a state besides its stream: whose weights it began with, and when its model went back or came in.

Each is a fact of the state, and where there is a control log an order in it, so that recovery and replay repeat it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from streamcl.protocols import State, StreamclError
from streamcl.records import Order, Was
from streamcl.state import private

if TYPE_CHECKING:
    from streamcl.worker import Worker


class Lineage:
    """The facts, oldest first; part of a worker's state.

    | `kind` | what happened | what else it says |
    |---|---|---|
    | `warm_start` | the first weights came from a file | `sha256` |
    | `rollback` | at `records` the model became what it was at `to` records | |
    | `relearn` | at `records` the shard went back to `to` records whole, and learned on from there unheard | |
    | `shadow` | at `records` it began beside a live shard | `begun`, `position`; metrics of both, `live` and `own` |
    | `promoted` | at `records` it took that shard's place | `shadow`, the digest of its last snapshot |

    Attributes:
        find: Gives the learner's state of a snapshot, or None; a recovery looks among the shard's own.
        heeds: False for a shadow, whose model is its own: what becomes of the live one's is not for it.
    """

    def __init__(self) -> None:
        self.facts: list[dict[str, Any]] = []
        self.find: Callable[[Was], State | None] = lambda _: None
        self.heeds = True
        self._kept: dict[int, tuple[State, int]] = {}  # and how often it is still needed

    def add(self, kind: str, **said: Any) -> None:
        self.facts.append({"kind": kind, **said})

    def last(self, kind: str) -> dict[str, Any] | None:
        return next((fact for fact in reversed(self.facts) if fact["kind"] == kind), None)

    def heed(self, order: Order, worker: Worker) -> None:
        """What an order says of the model; called before its records are taken.

        Raises:
            StreamclError: it names a model that is nowhere: neither a snapshot is left of it, nor was it passed on the
                way here.
        """
        if not self.heeds:
            return
        if order.keep:
            self._kept[worker.control_offset] = private(worker.learner.state_dict()), order.keep
        if order.was is not None:
            self._go_back(order.was, worker)
        if order.promoted is not None and worker.control and not self._is_of(order.promoted):
            raise StreamclError(
                f"the control log says that a shadow took this shard's place at {worker.progress.records} records, and "
                "this snapshot is from before that; restore a later one"
            )

    def _go_back(self, was: Was, worker: Worker) -> None:
        learner, needed = self._kept.pop(was.offset, (None, 0))
        if learner is not None and needed > 1:
            self._kept[was.offset] = learner, needed - 1
        learner = learner or self.find(was)
        if learner is None:
            raise StreamclError(
                f"the control log says that at {worker.progress.records} records the model went back to what it was at "
                f"{was.records}; that snapshot is gone, and what is left begins behind it: restore one of the two"
            )
        worker.learner.load_state_dict(learner)
        if worker.deltas:  # their chain is of other weights: they begin anew
            worker.deltas.load_state_dict({})
        self.add("rollback", records=worker.progress.records, to=was.records)

    def _is_of(self, shadow: str) -> bool:
        return any(fact.get("shadow") == shadow for fact in self.facts)

    def state_dict(self) -> State:
        return {"facts": [dict(fact) for fact in self.facts]}

    def load_state_dict(self, state: State) -> None:
        self.facts = [dict(fact) for fact in state.get("facts", ())]
