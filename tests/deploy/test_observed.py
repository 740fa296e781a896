"""What people on call see, by the real Prometheus over real workers: every panel, every rule, every fault."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from connectors.embedded import EmbeddedBroker
from deploy.alerts import Alert, alerts
from deploy.boards import BOARDS
from deploy.catalogue import used
from deploy.panels import Panel
from deploy.tools import ToolError, tool
from streamcl.families import families
from streamcl.protocols import ConnectorError
from tests.components import lack
from tests.deploy.prometheus import Prometheus, patiently, prometheus
from tests.deploy.shop import Traffic, producing, worker

SCALE = 0.01
"""An hour of the rules is 36 seconds here."""
START_S, WARM_S = 150.0, 25.0
EXPECTED = {
    "healthy": set[str](),
    "no-labels": {"StreamclLabelsStopped"},
    "no-broker": {"StreamclBrokersAway"},
    "nan-labels": {"StreamclBadLabels"},
    "read-only": {"StreamclCheckpointFailing"},
    "drift": {"StreamclDriftStorm"},
}
PANELS = [pytest.param(panel, id=f"{name}-{panel.title}") for name, board in BOARDS.items() for panel in board.panels]


@dataclass
class Watched:
    """All workers, some seconds after each got its fault."""

    prometheus: Prometheus
    fired: dict[str, set[str]]


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    folder = tmp_path_factory.mktemp("watched")
    try:
        tool("prometheus")
    except ToolError as error:
        lack("prometheus", str(error))
    ports = dict(zip(EXPECTED, _free_ports(len(EXPECTED)), strict=True))
    with contextlib.ExitStack() as stack:
        try:
            shared, alone = (stack.enter_context(EmbeddedBroker()) for _ in range(2))
        except ConnectorError as error:
            lack("prometheus", str(error))
        producers = {broker: stack.enter_context(producing(broker)) for broker in (shared, alone)}
        disk = stack.enter_context(_disk(folder / "disk"))
        traffic = {}
        for name, port in ports.items():
            broker = alone if name == "no-broker" else shared
            checkpoints = disk if name == "read-only" else folder / "checkpoints"
            started = worker(broker, producers[broker], name, folder / "workers", port, checkpoints)
            traffic[name] = stack.enter_context(started)
        seen = stack.enter_context(prometheus(folder / "prometheus", _free_ports(1)[0], ports, SCALE))
        logs = folder / "workers"
        patiently(
            lambda: seen.value("sum(streamcl_ready)") == len(EXPECTED),
            START_S,
            lambda: [f"{path.name}: {path.read_text()[-500:]}" for path in logs.glob("*.log")],
        )
        time.sleep(WARM_S)
        since = time.monotonic()
        _break(traffic, alone, disk)

        def everything() -> bool:
            fired = seen.fired(time.monotonic() - since)
            return all(expected <= fired.get(name, set()) for name, expected in EXPECTED.items())

        with contextlib.suppress(AssertionError):  # the tests tell what is missing
            patiently(_flipping(traffic["drift"], everything), 120.0, "")
        time.sleep(5.0)  # for what fires beside
        yield Watched(seen, seen.fired(time.monotonic() - since))


def _break(traffic: dict[str, Traffic], broker: EmbeddedBroker, disk: Path) -> None:
    traffic["no-labels"].labels = False
    traffic["nan-labels"].poison = 0.5
    traffic["no-broker"].stop()
    os.kill(broker.pid, signal.SIGKILL)
    _read_only(disk)


def _flipping(traffic: Traffic, holds: Callable[[], bool]) -> Callable[[], bool]:
    """Looks, and turns every taste into its opposite each five seconds."""
    began = time.monotonic()

    def look() -> bool:
        traffic.sign = -1.0 if int((time.monotonic() - began) / 5.0) % 2 == 0 else 1.0
        return holds()

    return look


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    """A folder that `_read_only` can make so; for root it has to be a file system of its own."""
    folder.mkdir()
    root = os.geteuid() == 0
    if root:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "streamcl", str(folder)], check=False)
        if done.returncode:
            pytest.skip("nothing can be made read-only for root where it may not mount")
    try:
        yield folder
    finally:
        if root:
            subprocess.run(["umount", "-l", str(folder)], check=False)


def _read_only(folder: Path) -> None:
    if os.geteuid() == 0:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    else:
        for path in (folder, *folder.rglob("*")):
            if path.is_dir():
                path.chmod(0o555)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as held:
        listeners = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [int(each.getsockname()[1]) for each in listeners]


def shown(expr: str, instance: str = "healthy") -> str:
    """A panel's expression as Grafana sends it."""
    chosen = {"$namespace": ".*", "$job": "streamcl", "$instance": instance, "$__rate_interval": "10s"}
    for variable, value in chosen.items():
        expr = expr.replace(variable, value)
    return expr


@pytest.mark.parametrize("name", EXPECTED)
def test_each_fault_fires_its_alert_and_no_other(watched: Watched, name: str) -> None:
    assert watched.fired.get(name, set()) == EXPECTED[name]


@pytest.mark.parametrize("panel", PANELS)
def test_every_query_of_a_panel_shows_data(watched: Watched, panel: Panel) -> None:
    for expr, _ in panel.queries:
        watched.prometheus.get("format_query", query=shown(expr))
        assert watched.prometheus.query(shown(expr)) or panel.may_be_empty


@pytest.mark.parametrize(("alert", "quick"), zip(alerts(), alerts(SCALE), strict=True), ids=lambda each: each.name)
def test_every_rule_can_be_asked_and_has_data(watched: Watched, alert: Alert, quick: Alert) -> None:
    for rule in (alert, quick):
        watched.prometheus.query(rule.expr)
    for name in used(alert.expr):
        if name.startswith("streamcl_group_"):  # of ranks alone; the rule itself is tested with promtool
            continue
        assert watched.prometheus.query(f'{name}{{instance="healthy"}}'), name


def test_everything_scraped_stands_in_the_table(watched: Watched) -> None:
    known = frozenset[str]().union(*(family.samples() for family in families()))
    found = watched.prometheus.get("label/__name__/values", **{"match[]": '{__name__=~"(streamcl|process)_.+"}'})
    assert set(found) <= known


def test_grafana_finds_workers_to_choose_from(watched: Watched) -> None:
    for label, value in (("job", "streamcl"), ("instance", "healthy")):
        assert value in watched.prometheus.get(f"label/{label}/values", **{"match[]": "streamcl_build_info"})
