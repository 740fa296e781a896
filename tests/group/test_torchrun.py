"""Groups as they are run: processes that torchrun starts, kills and starts again, on files."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

LONGEST_S = 240.0
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--max-restarts", "2", "--no-python", "--nproc-per-node")


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two partitions of labelled clicks; the second ends sooner."""
    folder = tmp_path_factory.mktemp("events")
    for partition, count in enumerate((6000, 4000)):
        rows = [{"id": f"{partition}-{n}", "ts": n, "user": n * n % 53, "click": int(n % 7 < 2)} for n in range(count)]
        (folder / f"events-{partition}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_config(folder: Path, events: str) -> Path:
    tables: dict[str, dict[str, Any]] = {
        "events": {"url": f"file://{events}", "id": "id", "key": "user", "time": "ts", "label": "click"},
        "features": {"user": {"kind": "categorical", "buckets": 64}},
        "model": {"kind": "deepfm", "embedding_dim": 4, "hidden": [8]},
        "replay": {"retention": "reservoir", "capacity": 50, "per_event": 1},
        "checkpoint": {"folder": str(folder / "checkpoints"), "every_events": 700, "lease_s": 0.5},
        "group": {"round_events": 100, "timeout_s": 60.0},
        "telemetry": {"port": 0},
    }
    path = folder / "config.toml"
    path.write_text('name = "shop"\n' + "".join(_table(name, table) for name, table in tables.items()))
    return path


def _table(name: str, table: dict[str, Any]) -> str:
    return f"[{name}]\n" + "".join(
        f"{key} = {json.dumps(value)}\n" if not isinstance(value, dict) else f"{key} = {_inline(value)}\n"
        for key, value in table.items()
    )


def _inline(table: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key} = {json.dumps(value)}" for key, value in table.items()) + "}"


@contextlib.contextmanager
def started(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    process = subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def run(config: Path, ranks: int) -> Sequence[str]:
    """What `streamcl run` needs to be started by torchrun with so many ranks; 0: by nobody."""
    alone = ("-m", "streamcl.cli", "run", str(config), "--json")
    return alone if not ranks else (*TORCHRUN, str(ranks), sys.executable, *alone)


def states(process: subprocess.Popen[str]) -> list[tuple[int, int, str]]:
    """(shard, records, digest) of all ranks, once they have left; they write one JSON document after another."""
    out, errors = process.communicate(timeout=LONGEST_S)
    assert process.returncode == 0, errors[-4000:]
    found, rest = [], out.strip()
    while rest:
        told, end = json.JSONDecoder().raw_decode(rest)
        found += told.get("shards", [told])
        rest = rest[end:].strip()
    return sorted((each["shard"], each["records"], each["state_digest"]) for each in found)


def test_one_rank_is_a_worker_like_any_other(tmp_path: Path, events: Path) -> None:
    found = []
    for ranks in (0, 1):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        with started(*run(write_config(folder, f"{events}/events-0.jsonl"), ranks)) as process:
            found.append(states(process))
    assert found[0] == found[1]


def test_a_group_whose_rank_is_killed_comes_to_the_state_of_one_that_was_left_alone(
    tmp_path: Path, events: Path
) -> None:
    found = []
    for kills in (0, 1):
        folder = tmp_path / str(kills)
        folder.mkdir()
        with started(*run(write_config(folder, f"{events}/events-*.jsonl"), 2)) as process:
            if kills:
                _kill(folder / "checkpoints", rank=1, behind=12)
            found.append(states(process))
    assert found[0] == found[1]
    assert [records for _, records, _ in found[0]] == [6000, 4000]
    assert (tmp_path / "1" / "checkpoints" / "shop-0-of-2" / "claims" / "0000000002").exists()  # both were begun anew


def _kill(checkpoints: Path, rank: int, behind: int) -> None:
    """Once a rank has closed so many rounds; its claim says which process it is."""
    log, claim = checkpoints / f"shop-control-{rank}.jsonl", checkpoints / f"shop-{rank}-of-2" / "claims" / "0000000001"
    end = time.monotonic() + LONGEST_S
    while time.monotonic() < end:
        if log.exists() and f'"closes":[{behind},'.encode() in log.read_bytes():
            os.kill(json.loads(claim.read_text())["pid"], signal.SIGKILL)
            return
        time.sleep(0.005)
    raise AssertionError("the round did not come")
