"""Every generated file and what is to stand in it."""

from __future__ import annotations

from pathlib import Path

from deploy import alerts, catalogue
from deploy.boards import BOARDS
from deploy.panels import to_json

ROOT = Path(__file__).parents[1]


def files() -> dict[Path, str]:
    """Text by path."""
    head = "# Written by `python -m deploy` from deploy/alerts.py; change it there.\n"
    texts = {
        "deploy/prometheus/rules.yaml": head + alerts.to_yaml(alerts.rules()),
        "deploy/prometheus/rules_test.yaml": head + alerts.to_yaml(alerts.rule_tests()),
        "docs/runbook.md": alerts.runbook(),
        "docs/metrics.md": catalogue.table(),
    }
    texts |= {f"deploy/grafana/{name}.json": to_json(board) for name, board in BOARDS.items()}
    return {ROOT / path: text for path, text in texts.items()}


def stale() -> list[Path]:
    """Files that are not as the code is."""
    return [path for path, text in files().items() if not path.exists() or path.read_text() != text]
