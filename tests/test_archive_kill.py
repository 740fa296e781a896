"""kill -9 while tickets wait on disk: none is lost, and the state is, to the bit, that of a run nobody disturbed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

EVENTS, EVERY = 30_000, 3
CONFIG = """
name = "kill"
events.url = "file://{folder}/views.jsonl"
events.id = "id"
events.time = "ts"
labels.url = "file://{folder}/clicks.jsonl"
labels.default = 1
labels.time = "ts"
predictions = "file://{folder}/scores.jsonl"
features.user = {{ kind = "categorical", buckets = 50 }}
model.kind = "logistic"
telemetry.port = 0
join = {{ attribution_window_s = 1e5, max_tickets = 1_000_000, memory_tickets = 500 }}
checkpoint = {{ folder = "{folder}/checkpoints", every_events = 2_000, retain = 2, lease_s = 0 }}
"""


def streamcl(command: str, config: Path) -> list[str]:
    return [sys.executable, "-W", "ignore", "-m", "streamcl.cli", command, str(config), "--json"]


def snapshots(folder: Path) -> int:
    return len(list(folder.glob("checkpoints/kill-0-of-1/0*")))


def test_kill_9_loses_no_ticket_that_waits_on_disk(tmp_path: Path) -> None:
    """Every third event's label comes 20,000 events later, when its ticket has long been on disk."""
    with (tmp_path / "views.jsonl").open("w") as views, (tmp_path / "clicks.jsonl").open("w") as clicks:
        for n in range(EVENTS):
            views.write(json.dumps({"id": f"view-{n}", "ts": float(n), "user": n % 50}) + "\n")
            if n % EVERY == 0:
                clicks.write(json.dumps({"id": f"view-{n}", "ts": n + 20_000.0}) + "\n")
    config = tmp_path / "worker.toml"
    config.write_text(CONFIG.format(folder=tmp_path))
    for life in range(3):
        before, began = snapshots(tmp_path), time.monotonic()
        newest = max(tmp_path.glob("checkpoints/kill-0-of-1/0*"), default=None)
        with subprocess.Popen(streamcl("run", config), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as worker:
            while max(tmp_path.glob("checkpoints/kill-0-of-1/0*"), default=None) == newest:
                assert worker.poll() is None, worker.stderr and worker.stderr.read().decode()
                assert time.monotonic() < began + 120, (life, before)
                time.sleep(0.01)
            time.sleep(0.05 * life)
            worker.send_signal(signal.SIGKILL)
            worker.wait()
            assert worker.returncode == -signal.SIGKILL
    ran = json.loads(subprocess.check_output(streamcl("run", config)))
    replayed = json.loads(subprocess.check_output(streamcl("replay", config)))
    assert ran["state_digest"] == replayed["state_digest"]
    assert ran["counts"]["joined"] == EVENTS // EVERY
    assert list(tmp_path.glob("checkpoints/kill-0-of-1/chunks/*"))
