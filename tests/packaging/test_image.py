"""deploy/docker: the Dockerfile, as far as it can be judged where no image can be built; `prove.py` runs its steps."""

from __future__ import annotations

import fnmatch
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dockerfile_parse import DockerfileParser

from deploy.chart import ROOT

FILE = ROOT / "deploy" / "docker" / "Dockerfile"


@pytest.fixture(scope="module")
def steps() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = DockerfileParser(fileobj=FILE.open("rb")).structure
    return [each for each in found if each["instruction"] != "COMMENT"]


def last(steps: list[dict[str, Any]], instruction: str) -> str:
    return str([each["value"] for each in steps if each["instruction"] == instruction][-1])


def test_hadolint_finds_no_fault() -> None:
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint has no wheel for this platform")
    done = subprocess.run([hadolint, FILE], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_it_runs_as_nobody_in_particular(steps: list[dict[str, Any]]) -> None:
    assert last(steps, "USER") == "10001:10001"  # a number: Kubernetes can't see that a name is not root's
    assert json.loads(last(steps, "ENTRYPOINT")) == ["streamcl"]
    assert json.loads(last(steps, "CMD")) == ["run", "/etc/streamcl/config/streamcl.toml"]
    instructions = [each["instruction"] for each in steps]
    assert instructions.index("USER") > max(i for i, each in enumerate(instructions) if each in ("RUN", "COPY"))


def test_what_it_copies_is_there_and_nothing_else_is_sent(steps: list[dict[str, Any]]) -> None:
    copied = [
        source
        for each in steps
        if each["instruction"] == "COPY" and "--from" not in each["value"]
        for source in each["value"].split()[:-1]
    ]
    ignore = (FILE.parent / "Dockerfile.dockerignore").read_text().splitlines()
    sent = [line[1:] for line in ignore if line.startswith("!")]
    assert "*" in ignore
    assert sorted(set(sent) & set(copied)) == sorted(sent)
    assert all(any(Path(source).is_relative_to(each) for each in sent) for source in copied)
    assert all((ROOT / source).exists() for source in copied)
    assert not any(fnmatch.fnmatch(source, "*.toml") and "clicks" in source for source in copied)


def test_its_version_and_tag_come_from_the_one_place() -> None:
    done = subprocess.run(["make", "-n", "image", "VARIANT=cuda"], cwd=ROOT, capture_output=True, text=True, check=True)
    from streamcl import __version__

    assert f"--build-arg VERSION={__version__}" in done.stdout
    assert f"--tag streamcl:{__version__}-cuda ." in done.stdout
