"""Run the Dockerfile's steps without a container engine, as root on Debian: `python -m deploy.docker.prove`.

A minimal Debian, made by debootstrap, stands for the base image; each stage is a copy of it, each RUN a chroot. What
Node's image does this machine's npm does, in a folder. The result is then run as the image's user on a read-only root,
with no capability and no way to gain one.

Not proven by this: the base image itself (its Python is another), layers, the registry, an engine's own confinement.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from dockerfile_parse import DockerfileParser

from deploy.chart import ROOT

FILE = ROOT / "deploy" / "docker" / "Dockerfile"
PACKAGES = "python3,python3-venv,python-is-python3,ca-certificates"
MACHINE = ("/etc/resolv.conf", "/etc/hosts", "/etc/ssl/certs/ca-certificates.crt")
"""What an engine lends to a build: how this machine reaches others."""
CHECKS = (
    "streamcl --version",
    "streamcl schema > /dev/null",
    "python -c 'import torch, numba, confluent_kafka, fastavro; print(torch.__version__)'",
    "streamcl demo --quick --in-memory --out /tmp/demo && ls -l /tmp/demo",
    "! touch /opt/streamcl/written 2> /dev/null",
    "! python -m pip --version 2> /dev/null",
)


class Stage:
    """A root folder, and what its instructions have set."""

    def __init__(self, folder: Path, base: Path, arguments: Mapping[str, str], inside: bool = True) -> None:
        self.folder = folder
        self.inside = inside  # whether it has a Debian of its own
        self.given = dict(arguments)
        self.arguments: dict[str, str] = {}
        self.environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
        self.shell = ["/bin/sh", "-c"]
        self.workdir, self.user, self.entrypoint = "/", "0:0", [""]
        if inside:
            sh("cp", "-a", str(base), str(folder))

    def do(self, instruction: str, value: str, stages: Mapping[str, Stage]) -> None:
        if instruction == "ARG":
            name, _, default = value.partition("=")
            self.arguments[name] = self.given.get(name, self._expanded(default.strip('"')))
        elif instruction == "ENV":
            for pair in shlex.split(value):
                name, _, text = pair.partition("=")
                self.environment[name] = self._expanded(text)
        elif instruction == "SHELL":
            self.shell = json.loads(value)
        elif instruction == "WORKDIR":
            self.workdir = value
            (self.folder / value.lstrip("/")).mkdir(parents=True, exist_ok=True)
        elif instruction == "USER":
            self.user = value
        elif instruction == "ENTRYPOINT":
            self.entrypoint = json.loads(value)
        elif instruction == "COPY":
            self._copy(shlex.split(value), stages)
        elif instruction == "RUN":
            self._run(value)
        elif instruction not in ("LABEL", "VOLUME", "EXPOSE", "CMD"):
            raise SystemExit(f"{instruction}: not known here")

    def _expanded(self, text: str) -> str:
        known = self.environment | self.arguments
        return re.sub(r"\$\{?(\w+)\}?", lambda found: known.get(found[1], ""), text)

    def _copy(self, words: list[str], stages: Mapping[str, Stage]) -> None:
        origin = ROOT
        if words[0].startswith("--from="):
            origin = stages[words.pop(0).partition("=")[2]].folder
        *sources, target = words
        for source in sources:
            at = self.folder / self.workdir.lstrip("/") / target if target[0] != "/" else self.folder / target[1:]
            if target.endswith("/"):
                at = at / Path(source).name
            at.parent.mkdir(parents=True, exist_ok=True)
            # Links instead of copies: the same bytes, and gigabytes less of them.
            sh("cp", "-a", *(["-l"] if origin != ROOT else []), str(origin / source.lstrip("/")), str(at))
        for name in ("__pycache__", "node_modules") if origin == ROOT else ():  # as Dockerfile.dockerignore says
            for left_out in list(self.folder.joinpath("build").rglob(name)):
                shutil.rmtree(left_out)

    def _run(self, command: str) -> None:
        print(f"RUN {command}", flush=True)
        if self.inside:
            inside = f"cd {shlex.quote(self.workdir)} && {command}"
            sh("chroot", str(self.folder), *self.shell, inside, environment=self.environment | self.arguments)
        else:
            sh(*self.shell, f"cd {shlex.quote(str(self.folder / self.workdir[1:]))} && {command}")

    def check(self, command: str) -> None:
        """As a container would: mounts of its own, its user, and nothing writable but /tmp and the state."""
        print(f"$ {command}", flush=True)
        root = shlex.quote(str(self.folder))
        uid, _, gid = self.user.partition(":")
        mounts = f"""
            mount --bind {root} {root} && mount -o remount,bind,ro {root}
            mount -t tmpfs -o mode=1777 tmpfs {root}/tmp
            mount -t tmpfs -o uid={uid},gid={gid},mode=0750 tmpfs {root}{self.environment["HOME"]}
            mount -t proc proc {root}/proc && mount --bind /dev {root}/dev
            exec chroot {root} setpriv --reuid={uid} --regid={gid} --clear-groups --no-new-privs --bounding-set=-all \\
                /bin/sh -c {shlex.quote(f"cd {self.workdir} && {command}")}"""  # noqa: S108 - the image's, not ours
        sh("unshare", "--mount", "--pid", "--fork", "/bin/sh", "-ec", mounts, environment=self.environment)


def sh(*command: str, environment: Mapping[str, str] | None = None) -> None:
    subprocess.run(command, env=environment, check=True)  # noqa: S603 - the Dockerfile's own words, and ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "image", help="emptied first")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    if os.geteuid() or shutil.which("debootstrap") is None:
        sys.exit("needs root, and Debian's debootstrap")
    # The demo's report needs it, and a further package is to be proven too.
    arguments = {"EXTRA_PACKAGES": "matplotlib"} | dict(each.split("=", 1) for each in options.build_arg)
    folder: Path = options.folder
    base = folder / "base"
    if not (base / "usr" / "bin" / "python").exists():
        sh("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(base))
    for path in MACHINE:
        shutil.copyfile(path, base / path.lstrip("/"))
    stages: dict[str, Stage] = {}
    stage = None
    for step in DockerfileParser(fileobj=FILE.open("rb")).structure:
        instruction, value = step["instruction"], step["value"]
        if instruction == "FROM":
            name = value.partition(" AS ")[2] or "image"
            sh("rm", "-rf", str(folder / name))
            stage = stages[name] = Stage(folder / name, base, arguments, not value.startswith("node:"))
        elif stage and instruction != "COMMENT":
            stage.do(instruction, value, stages)
    if stage:
        for check in CHECKS:
            stage.check(check)
        sh("du", "-sh", str(stage.folder / "opt" / "streamcl"))


if __name__ == "__main__":
    main()
