"""Simulated clicks whose tastes drift, forty minutes of them, for deploy/compose.yaml: `python traffic.py CONFIG`."""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path

from streamcl.config import Config
from streamcl.demo.simulator import Settings, simulate
from streamcl.demo.traffic import Traffic


def send(config: Config, events: int, per_s: float) -> int:
    """To the config's topics, at a pace (records per second), whether anyone reads them or not; returns how many."""
    with closing(Traffic(simulate(Settings(events=events)), config, per_s, lead=sys.maxsize)) as traffic:
        traffic.run()
    if traffic.error:
        raise traffic.error
    return traffic.sent


if __name__ == "__main__":
    send(Config.load(Path(sys.argv[1])), events=200_000, per_s=100.0)
