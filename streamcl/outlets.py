"""Where a worker's results go: predictions, outcomes, dead letters and deltas, each to a place of its own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

from streamcl import connect
from streamcl.channel import Publisher, open_publisher
from streamcl.config import Config
from streamcl.messages import OUR_BYTES, dead_letter_message, outcome_message, prediction_messages, rejected_message
from streamcl.protocols import Codec, ConnectorError, Sink
from streamcl.records import Message, Origin, Turn


@dataclass
class Outlets:
    """What of a turn leaves the worker, and through which sinks.

    Args:
        codec: Writes predictions.
        predictions, outcomes: None for a backtest that only wants metrics, and in exactly-once delivery, where the
            control log carries what `published` returns.
        dead_letters: None: what a destination refuses stops the worker.
        deltas: In both modes behind the order: a delta that is sent again is the same to the byte.
    """

    config: Config
    codec: Codec
    predictions: Sink | None = None
    outcomes: Sink | None = None
    dead_letters: Sink | None = None
    deltas: Publisher | None = None
    answers: Callable[[Origin], bool] = lambda _: True
    """Whether an event is answered: history that is learned before going live is not."""

    def __post_init__(self) -> None:
        self.topic = urlsplit(self.config.events.url).path.rpartition("/")[2]
        for sink, url in ((self.predictions, self.config.predictions), (self.outcomes, self.config.outcomes_url)):
            if sink:
                sink.rejected = partial(self._rejected, url or "")

    @classmethod
    def open(cls, config: Config, codec: Codec) -> Outlets:
        """On the configured URLs. Raises ConnectorError: nothing is left open."""
        with contextlib.ExitStack() as opened:

            def sink(url: str | None) -> Sink | None:
                return opened.enter_context(contextlib.closing(connect.open_sink(url, config))) if url else None

            alone = not config.exactly_once  # else the control log carries what is published
            predictions, outcomes = (sink(url if alone else None) for url in (config.predictions, config.outcomes_url))
            dead_letters = sink(config.dead_letters_url)
            deltas = open_publisher(config.deltas_url, config) if config.deltas_url else None
            opened.pop_all()
            return cls(config, codec, predictions, outcomes, dead_letters, deltas)

    def send(self, turn: Turn) -> None:
        """All but deltas, which wait for nothing that this could still raise."""
        # Dead letters first: were their sink to fail, no prediction of this turn would be out twice.
        self.send_dead_letters(turn)
        if self.predictions and turn.predictions:
            self.predictions.send(self._predictions(turn))
        if self.outcomes and turn.learned:
            self.outcomes.send(self._outcomes(turn))

    def send_deltas(self, turn: Turn) -> None:
        if self.deltas and turn.deltas:
            self.deltas.send(turn.deltas)

    def send_dead_letters(self, turn: Turn) -> None:
        if self.dead_letters and turn.dead_letters:
            most = min(self.config.events.max_bytes, self.config.kafka.max_request_bytes - 3 * OUR_BYTES)
            self.dead_letters.send([dead_letter_message(d, most) for d in turn.dead_letters])

    def published(self, turn: Turn) -> dict[str, list[Message]]:
        """What leaves with the order, by URL."""
        answers, outcomes = self.config.predictions, self.config.outcomes_url
        found = {answers: self._predictions(turn)} if answers else {}
        return found | ({outcomes: self._outcomes(turn)} if outcomes else {})

    def _outcomes(self, turn: Turn) -> list[Message]:
        most = self.config.kafka.max_request_bytes - OUR_BYTES
        return [outcome_message(learned, most) for learned in turn.learned]

    def _predictions(self, turn: Turn) -> list[Message]:
        by_id = self.config.kafka.compact_predictions
        answered = [p for p in turn.predictions if self.answers(p.origin)]
        return prediction_messages(answered, self.codec, self.topic, by_id)

    def _rejected(self, url: str, message: Message, error: str) -> None:
        if self.dead_letters is None:
            raise ConnectorError(f"{url}: {error}; and there is no place for dead letters")
        self.dead_letters.send([rejected_message(message, error)])

    def flush(self) -> None:
        """Return once everything sent is durable."""
        for sink in (self.predictions, self.outcomes, self.dead_letters):  # what the first reject goes to the last
            if sink:
                sink.flush()
        if self.deltas:
            self.deltas.flush()

    def close(self) -> None:
        with contextlib.ExitStack() as closing:  # what fails to close keeps none of the others open
            for part in (self.deltas, self.dead_letters, self.outcomes, self.predictions):
                if part:
                    closing.callback(part.close)

    def silent(self) -> Outlets:
        """The same, but nothing is published; bad records are still told."""
        return Outlets(self.config, self.codec, dead_letters=self.dead_letters)
