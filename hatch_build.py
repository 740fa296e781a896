"""npm brings what the status page draws with, at the version and digest of streamcl/web/package-lock.json.

A wheel, an sdist and an editable install have it then. Without npm they are built all the same: the page shows tables.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KEPT = ("LICENSE", "package.json", "dist/uPlot.iife.min.js", "dist/uPlot.min.css")


class Charts(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        web = Path(self.root, "streamcl", "web")
        wanted = json.loads((web / "package.json").read_text())["dependencies"]["uplot"]
        brought = web / "node_modules" / "uplot"
        if not _is(brought, wanted) and (error := _bring(web)):
            self.app.display_warning(f"the status page will have no charts: {error}")
        build_data["artifacts"] += [f"/{(brought / name).relative_to(self.root)}" for name in KEPT]


def _is(brought: Path, wanted: str) -> bool:
    told = brought / "package.json"
    return told.is_file() and json.loads(told.read_text())["version"] == wanted


def _bring(web: Path) -> str:
    """Why it could not; "" if it did."""
    npm = shutil.which("npm")
    if npm is None:
        return "npm is not on PATH"
    command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    made = subprocess.run(command, cwd=web, capture_output=True, text=True, check=False)  # noqa: S603
    return made.stderr.strip() or f"npm ended with {made.returncode}" if made.returncode else ""
