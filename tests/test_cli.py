"""The command line, run as a user runs it: exit codes, JSON, signals, and errors that name what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from streamcl.cli import _with_shards, main
from streamcl.config import ConfigError
from tests.journey import settings

CONFIG = """
name = "shop"
predictions = "file://{folder}/scores.jsonl"
features = {{user = {{kind = "categorical", buckets = 31}}, price = "numeric"}}
model = {{embedding_dim = 2, hidden = [4]}}
checkpoint = {{folder = "{folder}/checkpoints", every_events = 50}}
telemetry = {{port = 0}}
[events]
url = "file://{folder}/events.jsonl"
id = "id"
time = "ts"
label = "clicked"
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with a config and 200 events."""
    (tmp_path / "shop.toml").write_text(CONFIG.format(folder=tmp_path))
    rows = [{"id": i, "ts": i, "user": i % 7, "price": i % 3, "clicked": i % 2} for i in range(200)]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


class Run(Protocol):
    def __call__(self, *arguments: str) -> Done: ...


@pytest.fixture
def streamcl(capfd: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process, where a start takes no seconds; see `program` for a process of its own."""

    def run(*arguments: str) -> Done:
        with pytest.raises(SystemExit) as left:
            main(arguments)
        captured = capfd.readouterr()
        return Done(int(left.value.code or 0), captured.out, captured.err)

    return run


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "streamcl.cli", *arguments]


def answer(streamcl: Run, *arguments: str) -> Any:
    done = streamcl(*arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_run_replay_and_checkpoints_tell_one_story(shop: Path, streamcl: Run) -> None:
    config = str(shop / "shop.toml")
    ran = answer(streamcl, "run", config, "--json")
    assert ran["records"] == 200
    assert ran["counts"] == {"inline": 200, "learned": 200, "predicted": 200}
    assert len((shop / "scores.jsonl").read_text().splitlines()) == 200
    replayed = answer(streamcl, "replay", config, "--json")
    assert replayed["state_digest"] == ran["state_digest"]
    assert replayed["learned_hash"] == ran["learned_hash"]

    [*_, newest] = answer(streamcl, "checkpoint", "ls", config, "--json")["snapshots"]
    assert (newest["records"], newest["clean"], newest["digest"]) == (200, True, ran["state_digest"])
    assert answer(streamcl, "checkpoint", "show", config)["manifest"]["position"] == {"events": {"0": 200}}
    again = answer(streamcl, "run", config, "--json")  # nothing is left to learn, and nothing is learned twice
    assert again["state_digest"] == ran["state_digest"]

    assert streamcl("checkpoint", "verify", config).returncode == 0
    arrays = shop / "checkpoints" / "shop-0-of-1" / newest["name"] / "arrays.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-1])
    torn = streamcl("checkpoint", "verify", config)
    assert torn.returncode == 1
    assert torn.stdout.count(newest["name"]) == 1


def test_what_is_asked_for_is_forgotten_by_the_next_run_and_by_a_replay(shop: Path, streamcl: Run) -> None:
    config = str(shop / "shop.toml")
    unset = streamcl("forget", config, "--key", "3")
    assert (unset.returncode, "commands: no URL in the config" in unset.stderr) == (2, True)

    told = f'commands = "file://{shop}/commands.jsonl"\nreplay = {{retention = "recency"}}\n'
    (shop / "shop.toml").write_text(
        told + (shop / "shop.toml").read_text().replace("[events]", '[events]\nkey = "user"')
    )
    (shop / "commands.jsonl").touch()
    assert answer(streamcl, "run", config, "--json")["counts"]["learned"] == 200
    assert "not a" not in streamcl("check", config).stdout
    asked = answer(streamcl, "forget", config, "--key", "3", "--from", "1970-01-01T00:01:40", "--json")
    late = streamcl("forget", config, "--event-id", "7", "--event-id", "8", "--wait", "--timeout-s", "0.1")
    assert late.returncode == 1
    assert "not on record after 0.1 s; still owed by shards: 0" in late.stderr
    for bad, text in ([], "everything would be meant"), (["--until", "soon"], "--until soon: expected seconds"):
        refused = streamcl("forget", config, *bad)
        assert (refused.returncode, text in refused.stderr) == (2, True)

    ran = answer(streamcl, "run", config, "--json")
    assert (ran["counts"]["forget_requests"], ran["counts"]["forgotten_rows"]) == (2, 15 + 1 + 2)
    first, second = map(json.loads, (shop / "checkpoints" / "shop-0-of-1" / "audit.jsonl").read_text().splitlines())
    assert (first["request"], first["rows"]["replay"]) == (asked["request"], 15)  # every seventh of the last 99
    assert first["rows"]["diagnostics"] == 1  # the 144th step was looked at
    assert second["rows"]["replay"] == 2
    assert answer(streamcl, "replay", config, "--json")["state_digest"] == ran["state_digest"]
    inputs = [f"--input={name}=file://{shop}/{name}.jsonl" for name in ("events", "commands")]
    assert answer(streamcl, "replay", config, *inputs, "--json")["counts"] == ran["counts"]
    assert "forget_requests" not in answer(streamcl, "replay", config, inputs[0], "--json")["counts"]


def test_sigterm_ends_a_run_cleanly_and_the_next_goes_on(shop: Path, streamcl: Run) -> None:
    """A pipe of events that never ends by itself, here by being read one record a turn."""
    config = shop / "shop.toml"
    with (shop / "events.jsonl").open("a") as events:
        events.writelines(json.dumps({"id": i, "ts": i, "user": 1, "clicked": 1}) + "\n" for i in range(200, 40_000))
    config.write_text("worker = {max_records = 1}\n" + config.read_text())
    process = subprocess.Popen(
        program("run", str(config), "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not list((shop / "checkpoints").glob("shop-0-of-1/*-50")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert process.returncode == 0, stderr
    ran = json.loads(stdout)
    assert 50 <= ran["records"] < 40_000
    [*_, newest] = answer(streamcl, "checkpoint", "ls", str(config), "--json")["snapshots"]
    assert (newest["records"], newest["clean"]) == (ran["records"], True)


def test_a_run_told_to_serve_answers_while_it_learns(shop: Path) -> None:
    config = shop / "shop.toml"
    with (shop / "events.jsonl").open("a") as events:
        events.writelines(json.dumps({"id": i, "ts": i, "user": 1, "clicked": 1}) + "\n" for i in range(200, 90_000))
    process = subprocess.Popen(program("run", str(config), "--serve", "0"), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    url = next(line.split()[-4].rstrip(",") for line in process.stderr if "serving on http" in line)
    versions: list[int] = []
    deadline = time.monotonic() + 60
    while len(set(versions)) < 3 and time.monotonic() < deadline:
        found = httpx.post(f"{url}/v1/predict", json={"user": 1})
        versions += [found.json()["model"]["version"]] if found.status_code == 200 else []
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0
    assert len(set(versions)) >= 3
    assert versions == sorted(versions)


def test_check_prints_the_plan_and_schema_prints_json(shop: Path, streamcl: Run) -> None:
    plan = answer(streamcl, "check", str(shop / "shop.toml"), "--json")
    assert plan["inputs"] == {"events": f"file://{shop}/events.jsonl"}
    assert plan["snapshot"] is None
    schema = json.loads(streamcl("schema").stdout)
    assert schema["properties"]["seed"]["change"] == "new"


def test_check_looks_at_the_place_of_deltas(shop: Path, streamcl: Run) -> None:
    config, place = shop / "shop.toml", shop / "deltas"
    config.write_text(config.read_text() + f'[deltas]\nurl = "{place.as_uri()}"\nevery_events = 50\n')
    plan = answer(streamcl, "check", str(config), "--json")
    assert (plan["deltas"], plan["findings"][0]) == (place.as_uri(), f"{place.as_uri()}: 0 delta(s)")
    place.write_text("a file where a folder should be")
    done = streamcl("check", str(config))
    assert (done.returncode, "deltas.url: file://" in done.stderr) == (1, True), done.stderr
    config.write_text(config.read_text().replace(place.as_uri(), "nosuch://place"))
    done = streamcl("check", str(config))
    assert (done.returncode, "deltas.url: nosuch://place" in done.stderr) == (2, True), done.stderr


@pytest.mark.parametrize(
    ("edit", "code", "message"),
    [
        (("[events]", "[evnts]"), 2, "evnts: unknown key; did you mean 'events'?"),
        (("embedding_dim", "embeding_dim"), 2, "model.embeding_dim: unknown key; did you mean 'embedding_dim'?"),
        (('name = "shop"', 'name = "shop'), 2, "not TOML"),
        (("events.jsonl", "nothing.jsonl"), 1, "nothing.jsonl"),
        (('url = "file:', 'url = "kefka:'), 1, "kefka"),
    ],
)
def test_an_error_is_one_line_that_names_the_fault(
    shop: Path, edit: tuple[str, str], code: int, message: str, streamcl: Run
) -> None:
    config = shop / "shop.toml"
    config.write_text(config.read_text().replace(*edit))
    done = streamcl("run", str(config))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_folder_that_cannot_be_written_stops_the_start(shop: Path, streamcl: Run) -> None:
    (shop / "checkpoints").write_text("a file where a folder should be")
    done = streamcl("run", str(shop / "shop.toml"))
    assert done.returncode == 1
    assert str(shop / "checkpoints") in done.stderr
    assert not (shop / "scores.jsonl").exists() or not (shop / "scores.jsonl").read_text()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_checkpoint_folder_stops_the_start(shop: Path, streamcl: Run) -> None:
    (shop / "checkpoints").mkdir(mode=0o555)
    done = streamcl("run", str(shop / "shop.toml"))
    assert done.returncode == 1
    assert str(shop / "checkpoints") in done.stderr


def test_a_changed_setting_that_means_other_state_is_refused_by_name(shop: Path, streamcl: Run) -> None:
    config = shop / "shop.toml"
    answer(streamcl, "run", str(config), "--json")
    config.write_text("seed = 5\n" + config.read_text())
    for command in ("run", "check"):
        done = streamcl(command, str(config))
        assert done.returncode == 2
        assert "seed" in done.stderr


def test_replay_follows_a_recorded_order(shop: Path, streamcl: Run) -> None:
    """Two inputs merged by time, then in an order of our own."""
    (shop / "clicks.jsonl").write_text("".join(json.dumps({"id": i, "ts": i + 3}) + "\n" for i in range(0, 200, 2)))
    config = shop / "shop.toml"
    labels = f'\n[labels]\nurl = "file://{shop}/clicks.jsonl"\ndefault = 1\ntime = "ts"\n'
    config.write_text(config.read_text().replace('label = "clicked"', "") + labels)
    order = {"runs": [["events", 0, 200], ["labels", 0, 100]], "position": {"events": {"0": 200}, "labels": {"0": 100}}}
    (shop / "order.jsonl").write_text(json.dumps(order) + "\n")
    merged = answer(streamcl, "replay", str(config), "--json")
    ordered = answer(streamcl, "replay", str(config), "--order", f"file://{shop}/order.jsonl", "--json")
    assert merged["records"] == ordered["records"] == 300
    assert merged["learned_hash"] == ordered["learned_hash"]
    assert merged["state_digest"] != ordered["state_digest"]


def test_a_sweep_compares_configurations_and_leaves_a_page(shop: Path, streamcl: Run) -> None:
    (shop / "sweep.toml").write_text('base = "shop.toml"\nevents = 150\n[grid]\noptimizer.learning_rate = [0.1]\n')
    asked = ("replay", "--sweep", str(shop / "sweep.toml"), "--out", str(shop / "out"), "--jobs", "1")
    found = answer(streamcl, *asked, "--json")
    assert [row["figures"]["examples"] for row in found["rows"]] == [150, 150]
    assert found["report"] == str(shop / "out" / "report.html")
    done = streamcl(*asked)
    assert (done.returncode, "learning_rate=0.1" in done.stdout) == (0, True)
    assert not (shop / "scores.jsonl").exists()


def test_what_a_sweep_can_not_do_is_said(shop: Path, streamcl: Run) -> None:
    path, config = str(shop / "sweep.toml"), str(shop / "shop.toml")
    (shop / "sweep.toml").write_text("[grid]\noptimizer.learning_rat = [0.1]\n")
    for arguments, told in (
        ((config, "--sweep", path), "optimizer.learning_rat: unknown key; did you mean 'learning_rate'?"),
        (("--sweep", path), "base: no configuration to start from"),
        ((config, "--sweep", path, "--predictions", "file:///p.jsonl"), "--predictions: a sweep"),
        ((config, "--jobs", "2"), "--out, --jobs: are those of --sweep"),
        ((), "CONFIG: missing"),
    ):
        done = streamcl("replay", *arguments)
        assert (done.returncode, told in done.stderr) == (2, True), done.stderr


def test_a_recorded_history_is_learned_first_and_not_answered(shop: Path, streamcl: Run) -> None:
    config, lines = str(shop / "shop.toml"), (shop / "events.jsonl").read_text().splitlines(keepends=True)
    (shop / "old.jsonl").write_text("".join(lines[:150]))
    (shop / "events.jsonl").write_text("".join(lines[150:]))
    ran = answer(streamcl, "run", config, "--history", f"events=file://{shop}/old.jsonl", "--json")
    assert ran["counts"] == {"inline": 200, "learned": 200, "predicted": 200}
    scores = [json.loads(line) for line in (shop / "scores.jsonl").read_text().splitlines()]
    assert [score["id"] for score in scores] == [str(id) for id in range(150, 200)]
    assert ran["position"] == {"events": {"0": 50}}


def test_a_history_that_is_no_input_is_refused(shop: Path, streamcl: Run) -> None:
    done = streamcl("run", str(shop / "shop.toml"), "--history", "views=file:///old.jsonl")
    assert (done.returncode, "expected events=URL" in done.stderr) == (2, True)


def test_help_teaches_every_command(streamcl: Run) -> None:
    overview = streamcl("--help").stdout
    for command in ("run", "replay", "serve", "check", "schema", "checkpoint", "bench"):
        assert command in overview
        assert streamcl(command, "--help").returncode == 0


def test_a_start_does_not_wait_for_what_only_a_report_needs() -> None:
    loaded = "import sys, streamcl.cli; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_reshard_prints_its_plan_and_a_dry_run_writes_nothing(shop: Path, streamcl: Run) -> None:
    config = str(shop / "shop.toml")
    ran = answer(streamcl, "run", config, "--json")
    before = answer(streamcl, "checkpoint", "ls", config, "--json")
    planned = answer(streamcl, "reshard", config, "--from", "1", "--to", "1", "--dry-run", "--json")
    assert (planned["records"], planned["learned_hash"]) == (200, ran["learned_hash"])
    assert planned["shards"][0]["position"] == {"events": {"0": 200}}
    assert answer(streamcl, "checkpoint", "ls", config, "--json") == before
    assert "1 shards to 1" in streamcl("reshard", config, "--from", "1", "--to", "1").stdout
    assert answer(streamcl, "checkpoint", "ls", config, "--json")["snapshots"][-1] != before["snapshots"][-1]
    refused = streamcl("reshard", config, "--from", "2", "--to", "1")
    assert refused.returncode == 1
    assert "no snapshot of shard 0 of 2" in refused.stderr


@pytest.mark.parametrize(
    ("shards", "message"),
    [("1/4", "--shards 1/4: expected"), ("3", "indices [3] must be below count 1"), ("x", "--shards x: expected")],
)
def test_shards_that_are_not_there_are_refused(shop: Path, streamcl: Run, shards: str, message: str) -> None:
    done = streamcl("run", str(shop / "shop.toml"), "--shards", shards)
    assert done.returncode == 2
    assert message in done.stderr


def test_shards_are_named_by_a_list_or_by_a_remainder() -> None:
    config = settings(Path("unused"), shard={"count": 4, "indices": [0, 2]})
    assert _with_shards(config, "1/2").shard.here == (1, 3)
    assert _with_shards(config, "3,0").shard.here == (0, 3)
    assert _with_shards(config, None).shard.here == (0, 2)
    with pytest.raises(ConfigError, match="a group hands out the shards"):
        _with_shards(settings(Path("unused"), shard={"count": 4, "assignment": "group"}), "1/2")
