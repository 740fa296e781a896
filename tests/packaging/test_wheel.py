"""The wheel: built, installed where nothing of the checkout is seen, and run; and the version, which has one place."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from deploy.chart import CHART, ROOT
from streamcl import __version__


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env=environment or None, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), cwd=ROOT)
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def elsewhere(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of an environment with the wheel; this one lends it the dependencies, for torch alone is gigabytes."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    run(*pip, "install", "--no-deps", "--no-index", "--quiet", wheel, cwd=folder)
    (site,) = folder.glob("lib/*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


def test_it_runs_outside_of_the_checkout(elsewhere: Path, tmp_path: Path) -> None:
    def said(command: str, *arguments: str) -> list[str]:
        return run(elsewhere / command, *arguments, cwd=tmp_path, PATH=str(elsewhere), HOME=str(tmp_path)).split()

    files = said("python", "-c", "import streamcl, connectors; print(streamcl.__file__, connectors.__file__)")
    assert all(Path(file).is_relative_to(elsewhere.parent) for file in files)
    assert said("streamcl", "--version") == [__version__]
    assert "replay" in said("streamcl", "--help")
    assert said("python", "-c", "from importlib.metadata import version as v; print(v('streamcl'))") == [__version__]


def test_it_holds_the_packages_whole(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tracked = run("git", "ls-files", "streamcl", "connectors", cwd=ROOT).split()
    assert [name for name in tracked if name not in names and not name.endswith(".gitignore")] == []
    assert {name.partition("/")[0] for name in names} == {"streamcl", "connectors", f"streamcl-{__version__}.dist-info"}
    assert not any("__pycache__" in name for name in names)


def test_twine_finds_no_fault(wheel: Path) -> None:
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel, cwd=wheel.parent)


def test_every_extra_installs(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"streamcl-{__version__}.dist-info/METADATA").decode())
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(metadata.get_all("Provides-Extra") or ()) == set(table)
    for extra in ("", *table):
        for text in metadata.get_all("Requires-Dist") or ():
            needed = Requirement(text)
            if needed.name == "streamcl" or not (needed.marker is None or needed.marker.evaluate({"extra": extra})):
                continue
            try:
                assert needed.specifier.contains(installed(needed.name), prereleases=True), (extra, text)
            except PackageNotFoundError:
                pytest.fail(f"extra {extra!r}: {text} is not in the environment that `make setup` makes")


def test_the_version_has_one_place() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project
    assert project["dynamic"] == ["version"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)
    released = re.findall(r"^## (.+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[0] == "Unreleased" or released[0].split()[0] == __version__
    numbers = [each.split()[0] for each in released if each != "Unreleased"]
    assert numbers[:1] in ([], [__version__])
