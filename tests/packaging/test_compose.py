"""deploy/compose.yaml, read by the loader of `docker compose`, and what it mounts."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from connectors.apache import VERSION
from deploy.chart import ROOT
from deploy.compose.traffic import send
from deploy.go_tools import COMPOSE, ToolError
from streamcl import __version__
from streamcl.backtest import build as backtest
from streamcl.config import Config, table_of
from tests.components import lack

FILE = ROOT / "deploy" / "compose.yaml"
CONFIG = ROOT / "deploy" / "compose" / "clicks.toml"


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    """As Compose understands them, with every profile."""
    try:
        loader = COMPOSE.path()
    except ToolError as error:
        lack("compose", str(error))
    done = subprocess.run(
        [loader, "-format", "json", "compose.yaml"],
        cwd=FILE.parent,
        env={"COMPOSE_PROFILES": "*"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)["services"]
    return found


def test_everything_is_there_and_streamcl_is_confined(services: dict[str, Any]) -> None:
    assert services.keys() >= {"kafka", "topics", "worker", "replica", "prometheus", "grafana"}
    for name in ("worker", "replica"):
        its = services[name]
        assert its["image"] == f"streamcl:{__version__}"
        assert (its["read_only"], its["cap_drop"], its["user"]) == (True, ["ALL"], "10001:10001")
        assert its["security_opt"] == ["no-new-privileges:true"]
    assert services["kafka"]["image"] == f"apache/kafka:{VERSION}"


def test_what_is_mounted_is_there(services: dict[str, Any]) -> None:
    binds = [v["source"] for its in services.values() for v in its.get("volumes", ()) if v["type"] == "bind"]
    later = {str(FILE.parent / each) for each in ("prometheus", "grafana")}  # generated
    assert len(binds) >= 6
    assert [path for path in binds if not Path(path).exists() and path not in later] == []


def test_nothing_listens_beyond_this_machine(services: dict[str, Any]) -> None:
    ports = [port for its in services.values() for port in its.get("ports", ())]
    assert {port["host_ip"] for port in ports} == {"127.0.0.1"}
    assert len({port["published"] for port in ports}) == len(ports)


def test_the_config_fits_the_services(services: dict[str, Any]) -> None:
    config = Config.load(CONFIG)
    targets = [
        target
        for job in yaml.safe_load((FILE.parent / "compose" / "prometheus.yaml").read_text())["scrape_configs"]
        for static in job["static_configs"]
        for target in static["targets"]
    ]
    assert targets == [f"worker:{config.telemetry.port}", f"replica:{config.serve.port}"]
    for name, port in (("worker", config.telemetry.port), ("replica", config.serve.port)):
        assert f"http://localhost:{port}/readyz" in services[name]["healthcheck"]["test"][-1]
    read = {url.rpartition("/")[2] for url in config.inputs.values()}
    assert f"for topic in {' '.join(sorted(read, reverse=True))}" in services["topics"]["command"][0]
    assert config.checkpoint.folder.is_relative_to("/var/lib/streamcl")
    datasource = yaml.safe_load((FILE.parent / "compose" / "grafana" / "datasources.yaml").read_text())["datasources"][
        0
    ]
    assert datasource["url"] == "http://prometheus:9090"


def test_the_worker_learns_from_the_traffic(tmp_path: Path) -> None:
    table = table_of(CONFIG)
    for name in ("events", "labels"):
        table[name]["url"] = (tmp_path / f"{name}.jsonl").as_uri()
    for name in ("predictions", "outcomes", "deltas"):
        del table[name]
    table["worker"] = {"engine": "eager"}
    table["checkpoint"]["folder"] = str(tmp_path)
    config = Config.parse(table)
    sent = send(config, events=300, per_s=1e9)
    with closing(backtest(config)) as worker:
        worker.progress.position = dict(worker.source.seek({}))
        letters = [letter for turn in worker.run() for letter in turn.dead_letters]
        assert (worker.progress.records, letters) == (sent, [])
        assert worker.counts["joined"] > 10


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
def test_prometheus_takes_its_configuration() -> None:
    path = FILE.parent / "compose" / "prometheus.yaml"
    done = subprocess.run(
        ["promtool", "check", "config", "--syntax-only", path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
