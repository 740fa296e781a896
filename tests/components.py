"""What a test does without a component: it skips, and fails where STREAMCL_REQUIRE names it."""

from __future__ import annotations

import os
from typing import NoReturn

import pytest


def lack(component: str, reason: str) -> NoReturn:
    if component in os.environ.get("STREAMCL_REQUIRE", "").split(","):
        pytest.fail(f"STREAMCL_REQUIRE names {component}, but: {reason}")
    pytest.skip(reason)
