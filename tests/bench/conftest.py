"""The broker of the recovery tests: Apache Kafka, or the embedded one; skips where neither can be had."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streamcl.bench.brokers import Broker, chosen
from streamcl.protocols import ConnectorError
from tests.components import lack


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    try:
        context = chosen(None)
        found = context.__enter__()
    except ConnectorError as error:
        lack("kafka", str(error))
    yield found
    context.__exit__(None, None, None)
