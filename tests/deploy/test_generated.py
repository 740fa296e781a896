"""Generated files are as the code is, and Prometheus's own tool finds no fault with them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from deploy.alerts import alerts, rule_tests, to_yaml
from deploy.boards import BOARDS
from deploy.catalogue import used
from deploy.generated import ROOT, stale
from deploy.tools import ToolError, tool
from streamcl.families import families
from tests.components import lack


@pytest.fixture(scope="module")
def promtool() -> Path:
    try:
        return tool("promtool")
    except ToolError as error:
        lack("prometheus", str(error))


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


def test_python_m_deploy_would_change_no_file() -> None:
    assert [path.relative_to(ROOT) for path in stale()] == []


def test_promtool_accepts_the_rules(promtool: Path) -> None:
    checked = run(promtool, "check", "rules", ROOT / "deploy/prometheus/rules.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_each_alert_fires_alone_in_its_case_and_all_are_silent_in_the_other(promtool: Path) -> None:
    tested = run(promtool, "test", "rules", ROOT / "deploy/prometheus/rules_test.yaml")
    assert tested.returncode == 0, tested.stdout + tested.stderr


def test_a_rule_that_never_fires_would_be_seen(promtool: Path, tmp_path: Path) -> None:
    rules = yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())
    for rule in rules["groups"][0]["rules"]:
        rule["expr"] = f"({rule['expr']}) and vector(0) > 1"
    (tmp_path / "rules.yaml").write_text(to_yaml(rules))
    (tmp_path / "test.yaml").write_text(to_yaml(rule_tests(alerts()[:3])))
    tested = run(promtool, "test", "rules", tmp_path / "test.yaml")
    assert tested.returncode == 1
    assert (tested.stdout + tested.stderr).count("got: nil") == 3


def test_every_alert_says_what_to_do_in_its_rule_and_in_the_runbook() -> None:
    runbook = (ROOT / "docs/runbook.md").read_text()
    for rule in yaml.safe_load((ROOT / "deploy/prometheus/rules.yaml").read_text())["groups"][0]["rules"]:
        told = rule["annotations"]
        assert told["summary"] and told["description"] and "1. " in told["runbook"]
        path, anchor = told["runbook_url"].split("#")
        assert (ROOT / path).exists()
        assert anchor in {heading.lower() for heading in re.findall(r"^## (\w+)$", runbook, re.MULTILINE)}


def test_panels_and_rules_name_only_metrics_of_the_table() -> None:
    known = frozenset[str]().union(*(family.samples() for family in families()))
    texts = [expr for board in BOARDS.values() for panel in board.panels for expr, _ in panel.queries]
    for text in [*texts, *(alert.expr for alert in alerts())]:
        assert used(text) <= known


def test_alerts_that_panels_speak_of_exist() -> None:
    names = {alert.name for alert in alerts()}
    for board in BOARDS.values():
        for panel in board.panels:
            assert set(re.findall(r"Streamcl\w+", panel.text)) <= names
            assert len(panel.text) > 40, f"{panel.title} doesn't say what to do"
