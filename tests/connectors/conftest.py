"""A schema registry for each test that asks for one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.connectors.registry_server import SchemaRegistry


@pytest.fixture
def server() -> Iterator[SchemaRegistry]:
    with SchemaRegistry() as registry:
        yield registry
