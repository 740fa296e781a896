"""A real Prometheus over real workers."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from deploy.alerts import rules, to_yaml
from deploy.tools import tool


@dataclass
class Prometheus:
    """Its HTTP API."""

    client: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        """`data` of an answer. Raises AssertionError with Prometheus's own words for an error."""
        answer = self.client.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer['error']}"
        return answer.get("data")

    def query(self, expr: str) -> list[dict[str, Any]]:
        """The series of an instant query, now."""
        found: list[dict[str, Any]] = self.get("query", query=expr)["result"]
        return found

    def value(self, expr: str) -> float:
        """Of the only series; NaN without one."""
        found = self.query(expr)
        return float(found[0]["value"][1]) if found else float("nan")

    def fired(self, last_s: float) -> dict[str, set[str]]:
        """By instance: the alerts that fired at any time within the last so many seconds."""
        expr = (
            f'count by (instance, alertname) (max_over_time(ALERTS{{alertstate="firing"}}[{max(1, round(last_s))}s]))'
        )
        found: dict[str, set[str]] = {}
        for series in self.query(expr):
            found.setdefault(series["metric"].get("instance", ""), set()).add(series["metric"]["alertname"])
        return found


@contextlib.contextmanager
def prometheus(folder: Path, port: int, targets: Mapping[str, int], scale: float) -> Iterator[Prometheus]:
    """Scrapes every second the workers at these ports of loopback, by instance; rules with times scaled.

    Raises:
        ToolError: there is none.
    """
    folder.mkdir(parents=True)
    (folder / "rules.yaml").write_text(to_yaml(rules(scale)))
    static = [
        {"targets": [f"127.0.0.1:{scraped}"], "labels": {"instance": instance}} for instance, scraped in targets.items()
    ]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s", "scrape_timeout": "900ms"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "streamcl", "static_configs": static}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = [str(tool("prometheus")), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data"]
    command += [f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"]
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10.0) as client:
                patiently(lambda: client.get("/-/ready").status_code == 200, 30.0, "Prometheus is not ready")
                yield Prometheus(client)
        finally:
            process.terminate()


def patiently(holds: Callable[[], bool], within_s: float, otherwise: str | Callable[[], object]) -> None:
    """Return as soon as it holds; an unreachable address does not hold."""
    deadline = time.monotonic() + within_s
    while True:
        with contextlib.suppress(httpx.TransportError):
            if holds():
                return
        assert time.monotonic() < deadline, otherwise if isinstance(otherwise, str) else otherwise()
        time.sleep(0.25)
