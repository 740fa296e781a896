"""Prometheus and promtool: from PATH, else out of Debian's package, unpacked below build/tools and never installed.

`python -m deploy.tools` prints where they are. Debian bookworm's is 2.42.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

TOOLS = Path(__file__).parents[1] / "build" / "tools"


class ToolError(Exception):
    """A tool can't be had here; says why."""


def tool(name: str) -> Path:
    """The path of `prometheus` or `promtool`.

    Raises:
        ToolError: it is not on PATH, and there is no apt that could fetch it.
    """
    if found := shutil.which(name):
        return Path(found)
    unpacked = TOOLS / "usr" / "bin" / name
    if not unpacked.exists():
        _unpack()
    return unpacked


def _unpack() -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise ToolError("prometheus is not on PATH, and there is no apt-get to fetch Debian's package with")
    TOOLS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for command in (["apt-get", "download", "prometheus"], ["dpkg", "-x", "", str(TOOLS)]):
            if command[0] == "dpkg":
                command[2] = str(next(Path(folder).glob("prometheus_*.deb")))
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)  # noqa: S603 - ours
            if done.returncode:
                raise ToolError(f"{' '.join(command)}: {done.stderr.strip().splitlines()[-1:]}")


def main() -> int:
    try:
        for name in ("prometheus", "promtool"):
            print(tool(name))
    except ToolError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
