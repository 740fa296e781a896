"""Learning from history without publishing, then handing over to live at a stated position."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from msgspec.structs import replace

from streamcl.protocols import Source, StreamclError
from streamcl.records import EVENTS, Position, Record, Stream, position_to_json
from streamcl.worker import Worker

log = logging.getLogger(__name__)

_TOLD_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """What a worker without any state learns before its first snapshot is cut.

    The position of the handover is a fact of the state (`Progress.publish_from`), so a crash on either side of it
    changes nothing. Recorded history is read before the first snapshot: a crash in it means to begin again, nothing
    having left the worker but dead letters.

    Args:
        history: Opens recorded inputs that lie before the live ones (files, say); they are read to their end, and
            publishing begins where the live inputs begin. None: the history is what the live inputs hold when the
            worker starts for the first time.
    """

    history: Callable[[], Source] | None = None

    def begin(self, worker: Worker) -> None:
        """Leave the worker where its first snapshot is to be cut.

        Raises:
            StreamclError: stopped on the way.
        """
        if self.history:
            _learn(worker, self.history())
        start = dict(worker.source.seek({}))
        worker.progress.position = start
        ends = {stream: start[stream] + waiting for stream, waiting in worker.source.lag().items()}
        if not self.history:
            worker.progress.publish_from = {s: end for s, end in ends.items() if s.input == EVENTS and end > start[s]}
        handover = position_to_json({**start, **worker.progress.publish_from})
        log.info("bootstrap: %d recorded records learned; predictions from %s on", worker.progress.records, handover)


def _learn(worker: Worker, history: Source) -> None:
    live = worker.source, worker.control, worker.outlets
    worker.source, worker.control, worker.outlets = Past(history), None, worker.outlets.silent()
    told = time.monotonic()
    try:
        for _ in worker.run():
            if time.monotonic() - told > _TOLD_EVERY_S:
                told = time.monotonic()
                log.info("bootstrap: %d recorded records learned", worker.progress.records)
        worker.joiner.watermark.leave(Past(history).streams())
        if worker.stopping:
            raise StreamclError("stopped while learning from history: nothing was kept, the next start begins again")
    finally:
        history.close()
        worker.source, worker.control, worker.outlets = live
        worker.caught_up = False


class Past:
    """Recorded inputs as streams of their own, so that no origin is taken twice: partition p becomes -1 - p."""

    def __init__(self, source: Source) -> None:
        self._source = source

    def streams(self) -> Sequence[Stream]:
        return sorted(map(_mirrored, self._source.streams()))

    def poll(self, limit: int, timeout_s: float, only: Stream | None = None) -> Sequence[Record]:
        records = self._source.poll(limit, timeout_s, _mirrored(only) if only else None)
        return [replace(r, origin=r.origin._replace(partition=-1 - r.origin.partition)) for r in records]

    def seek(self, position: Position) -> Position:
        return _mirrored_position(self._source.seek(_mirrored_position(position)))

    def commit(self, position: Position) -> None:
        """Nobody looks at the lag of a recording."""

    def lag(self) -> Mapping[Stream, int]:
        return _mirrored_position(self._source.lag())

    def exhausted(self) -> bool:
        return self._source.exhausted()

    def close(self) -> None:
        self._source.close()


def _mirrored(stream: Stream) -> Stream:
    return stream._replace(partition=-1 - stream.partition)


def _mirrored_position(position: Mapping[Stream, int]) -> dict[Stream, int]:
    return {_mirrored(stream): offset for stream, offset in position.items()}
