"""Which broker a bench runs on: the user's own, Apache Kafka, or the embedded one where Java or Maven are missing."""

from __future__ import annotations

import contextlib
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any
from urllib.parse import urlsplit

from kafka import KafkaAdminClient

from streamcl.protocols import ConnectorError


@dataclass(frozen=True, slots=True)
class Broker:
    """A broker that runs.

    Attributes:
        kind: `given` (the user's own), `apache` or `embedded`.
        url: What stands before `/topic`.
        handle: To kill, freeze and restart it; None for a given one.
    """

    kind: str
    url: str
    handle: Any = None

    @property
    def bootstrap(self) -> list[str]:
        return urlsplit(self.url).netloc.split(",")

    def new_topic(self, prefix: str) -> str:
        """URL of a topic that nobody has used, with one partition, whatever the broker's default is."""
        name = f"{prefix}-{uuid.uuid4().hex[:12]}"
        admin = KafkaAdminClient(bootstrap_servers=self.bootstrap)
        try:
            admin.create_topics({name: {"num_partitions": 1}}, wait_for_metadata=True)
        finally:
            admin.close()
        return f"{self.url}/{name}"


@contextlib.contextmanager
def chosen(via: str | None, **settings: Any) -> Iterator[Broker]:
    """The broker at `via`, a URL without a topic; else one of our own for as long as the context lasts.

    Args:
        settings: Of Apache Kafka (`brokers=3`). With any, nothing else will do.

    Raises:
        ConnectorError: there is none; says why.
    """
    if via:
        yield Broker("given", via.rstrip("/"))
        return
    causes = []
    for kind in ("apache",) if settings else ("apache", "embedded"):
        for point in entry_points(group="streamcl.brokers", name=kind):
            try:
                broker = point.load()(**settings).__enter__()
            except ConnectorError as error:
                causes.append(f"{kind}: {error}")
                continue
            try:
                yield Broker(kind, broker.url, broker)
            finally:
                broker.__exit__(*sys.exc_info())
            return
    raise ConnectorError(f"no broker: {'; '.join(causes) or 'none is registered; is streamcl installed?'}")
