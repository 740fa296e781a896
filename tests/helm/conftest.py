"""The chart, rendered by the real Helm."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.chart import CHART
from deploy.go_tools import HELM, ToolError
from tests.components import lack

KUBERNETES = "1.31.0"
"""What charts are rendered for: a Helm that Go builds takes itself for one of an old cluster."""
RELEASE = "shop"
SMALL = CHART / "examples" / "small.yaml"

Manifest = dict[str, Any]


class Failed(Exception):
    """What Helm said."""


class Chart:
    """`helm`, on the chart in `folder`."""

    def __init__(self, helm: Path, folder: Path = CHART) -> None:
        self.helm = helm
        self.folder = folder

    def run(self, *arguments: str) -> str:
        done = subprocess.run([self.helm, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(done.stderr + done.stdout)
        return done.stdout

    def render(self, values: Path | dict[str, Any], *more: dict[str, Any], release: str = RELEASE) -> Rendered:
        """With values from a file, or given, and further ones over them."""
        arguments = ["template", release, str(self.folder), "--kube-version", KUBERNETES, "--namespace", "prod"]
        given = [each for each in (values, *more) if isinstance(each, dict)]
        assert len(given) <= 1, "Helm reads them from its input"
        for each in (values, *more):
            arguments += ["--values", str(each) if isinstance(each, Path) else "-"]
        text = "".join(map(json.dumps, given))
        done = subprocess.run([self.helm, *arguments], input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Failed(done.stderr)
        return Rendered([each for each in yaml.safe_load_all(done.stdout) if each])


class Rendered(list[Manifest]):
    """A release's manifests."""

    def of(self, kind: str, component: str | None = None) -> list[Manifest]:
        found = [each for each in self if each["kind"] == kind]
        label = "app.kubernetes.io/component"
        return [each for each in found if component in (None, each["metadata"].get("labels", {}).get(label))]

    def the(self, kind: str, component: str | None = None) -> Manifest:
        (found,) = self.of(kind, component)
        return found

    def pods(self) -> Iterator[Manifest]:
        """Every pod's metadata and spec."""
        for each in self:
            if each["kind"] in ("StatefulSet", "Deployment"):
                yield each["spec"]["template"]
            elif each["kind"] == "Pod":
                yield each


@pytest.fixture(scope="session")
def helm() -> Path:
    try:
        return HELM.path()
    except ToolError as error:
        lack("helm", str(error))


@pytest.fixture(scope="session")
def chart(helm: Path) -> Chart:
    return Chart(helm)


Render = Callable[..., Rendered]


@pytest.fixture
def render(chart: Chart) -> Render:
    """The smallest example, and what a test sets over it."""

    def rendered(**values: Any) -> Rendered:
        return chart.render(SMALL, values)

    return rendered
