"""Tools that only tests need, built once from their Go modules into build/tools: `make tools`."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "build" / "tools"


class ToolError(Exception):
    """It can't be had here; the text says why."""


@dataclass(frozen=True)
class Tool:
    """A program at one version, from a module that Go's proxy and checksum database know."""

    name: str
    module: str
    version: str

    def path(self) -> Path:
        """Where it is, built if need be; several processes may ask at once. Raises ToolError."""
        found = FOLDER / f"{self.name}-{self.version}"
        if found.exists():
            return found
        if shutil.which("go") is None:
            raise ToolError(
                f"{self.name} {self.version} is not in {FOLDER}, and Go, which builds it, is not on the PATH"
            )
        FOLDER.mkdir(parents=True, exist_ok=True)
        with (FOLDER / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not found.exists():
                self._build(found)
        return found

    def _build(self, found: Path) -> None:
        partial = found.with_suffix(".partial")
        done = subprocess.run(  # noqa: S603 - the user's own Go, no shell
            ["go", "install", f"{self.module}@{self.version}"],  # noqa: S607 - the user's own Go
            env={**os.environ, "GOBIN": str(partial)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise ToolError(f"Go can't build {self.module}@{self.version}: {done.stderr.strip()[-300:]}")
        (partial / self.module.rpartition("/")[2]).rename(found)
        partial.rmdir()


HELM = Tool("helm", "helm.sh/helm/v3/cmd/helm", "v3.22.0")
COMPOSE = Tool("compose", "github.com/compose-spec/compose-go/v2/cmd", "v2.16.2")
"""The loader that `docker compose` itself reads its files with."""


def main() -> None:
    for tool in (HELM, COMPOSE):
        try:
            print(tool.path())
        except ToolError as error:
            print(f"skipped: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
