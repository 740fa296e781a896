"""`streamcl shadow` and `streamcl rollback` as a user runs them: exit codes, JSON, tables, errors with the cure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from streamcl.shadow_commands import _figures, _install
from streamcl.warm_start import save
from tests.test_cli import CONFIG, Run, answer
from tests.test_cli import streamcl as streamcl  # a fixture


def rows(first: int, last: int) -> str:
    found = [{"id": i, "ts": i, "user": i % 7, "price": i % 3, "clicked": i % 2} for i in range(first, last)]
    return "".join(json.dumps(row) + "\n" for row in found)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with a config, another one of a deeper model, and 200 events."""
    text = CONFIG.format(folder=tmp_path)
    (tmp_path / "shop.toml").write_text(text)
    (tmp_path / "deep.toml").write_text(text.replace("hidden = [4]", "hidden = [5, 3]"))
    (tmp_path / "events.jsonl").write_text(rows(0, 200))
    return tmp_path


def more(shop: Path, first: int, last: int) -> None:
    with (shop / "events.jsonl").open("a") as file:
        file.write(rows(first, last))


def shadow(streamcl: Run, shop: Path, *arguments: str) -> Any:
    both = str(shop / "shop.toml"), str(shop / "deep.toml")
    return answer(streamcl, "shadow", "run", *both, "--idle-exit-s", "0.3", *arguments, "--json")


def scored(shop: Path) -> list[str]:
    return [json.loads(line)["id"] for line in (shop / "scores.jsonl").read_text().splitlines()]


def test_a_shadow_is_run_looked_at_and_promoted(shop: Path, streamcl: Run) -> None:
    both = str(shop / "shop.toml"), str(shop / "deep.toml")
    answer(streamcl, "run", both[0], "--json")
    [ran] = shadow(streamcl, shop, "--from-start")["shards"]
    assert (ran["begun"]["begun"], ran["behind_records"], ran["changed"]) == ("start", 0, ["model.hidden"])
    [told] = answer(streamcl, "shadow", "status", *both, "--json")["shards"]
    assert told == ran
    table = streamcl("shadow", "status", *both).stdout
    assert "log_loss_since" in table
    assert "difference" in table

    [promoted] = answer(streamcl, "shadow", "promote", *both, "--install", "--json")["promoted"]
    assert promoted["records"] == 200
    assert (shop / "shop.toml.before").read_text() == CONFIG.format(folder=shop)
    assert (shop / "shop.toml").read_text() == (shop / "deep.toml").read_text()
    more(shop, 200, 260)
    ran = answer(streamcl, "run", both[0], "--json")
    assert ran["records"] == 260
    assert scored(shop) == list(map(str, range(260)))
    replayed = answer(streamcl, "replay", both[0], "--json")
    assert replayed["learned_hash"] == ran["learned_hash"]


def test_the_former_settings_are_refused_behind_a_promotion(shop: Path, streamcl: Run) -> None:
    both = str(shop / "shop.toml"), str(shop / "deep.toml")
    answer(streamcl, "run", both[0], "--json")
    shadow(streamcl, shop)
    refused = streamcl("shadow", "promote", *both)
    assert refused.returncode == 0, refused.stderr  # labels come inline: nothing waits
    former = streamcl("run", both[0])
    assert (former.returncode, "model.hidden" in former.stderr) == (2, True)
    assert answer(streamcl, "run", both[1], "--json")["records"] == 200


def test_a_shadow_is_dropped_and_the_live_worker_goes_on(shop: Path, streamcl: Run) -> None:
    both = str(shop / "shop.toml"), str(shop / "deep.toml")
    before = answer(streamcl, "run", both[0], "--json")
    shadow(streamcl, shop)
    assert answer(streamcl, "shadow", "drop", *both, "--json") == {"dropped": 1}
    for command in ("drop", "status", "promote"):
        gone = streamcl("shadow", command, *both)
        assert (gone.returncode, "there is no shadow" in gone.stderr) == (1, True)
    assert answer(streamcl, "run", both[0], "--json")["state_digest"] == before["state_digest"]


def test_a_shadow_of_another_application_is_refused(shop: Path, streamcl: Run) -> None:
    (shop / "deep.toml").write_text((shop / "deep.toml").read_text().replace('name = "shop"', 'name = "other"'))
    refused = streamcl("shadow", "run", str(shop / "shop.toml"), str(shop / "deep.toml"))
    assert refused.returncode == 2
    assert "name must be the live one's, shop, not other" in refused.stderr


def test_rolling_back_is_listed_done_and_goes_on(shop: Path, streamcl: Run) -> None:
    config = str(shop / "shop.toml")
    answer(streamcl, "run", config, "--json")
    listed = answer(streamcl, "rollback", config, "--list", "--json")["snapshots"]
    assert [each["records"] for each in listed] == sorted((each["records"] for each in listed), reverse=True)
    assert listed[0]["metrics"]["examples"] == 200
    table = streamcl("rollback", config, "--list").stdout
    assert all(each["name"] in table for each in listed)  # whole, to be copied
    assert "log_loss" in table
    done = answer(streamcl, "rollback", config, "--to", listed[-1]["name"], "--json")
    assert (done["records"], done["relearn"]) == (200, False)
    assert done["lineage"] == [{"kind": "rollback", "records": 200, "to": listed[-1]["records"]}]
    more(shop, 200, 230)
    assert answer(streamcl, "run", config, "--json")["records"] == 230
    assert scored(shop) == list(map(str, range(230)))


def test_relearning_under_another_rate_answers_nothing_twice(shop: Path, streamcl: Run) -> None:
    config = shop / "shop.toml"
    answer(streamcl, "run", str(config), "--json")
    oldest = answer(streamcl, "rollback", str(config), "--list", "--json")["snapshots"][-1]["name"]
    config.write_text("optimizer = {learning_rate = 0.2}\n" + config.read_text())
    done = streamcl("rollback", str(config), "--to", oldest, "--relearn")
    assert done.returncode == 0, done.stderr
    assert "will learn on from there" in done.stdout
    more(shop, 200, 230)
    assert answer(streamcl, "run", str(config), "--json")["records"] == 230
    assert scored(shop) == list(map(str, range(230)))


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ((), 2, "give --to SNAPSHOT, or --list"),
        (("--to", "7", "--list"), 2, "give --to SNAPSHOT, or --list"),
        (("--to", "7"), 1, "no snapshot 7; there are"),
        (("--list", "--shard", "1"), 2, "shard.count is 1"),
    ],
)
def test_a_rollback_that_is_asked_wrongly_says_how(
    shop: Path, streamcl: Run, arguments: tuple[str, ...], code: int, said: str
) -> None:
    answer(streamcl, "run", str(shop / "shop.toml"), "--json")
    done = streamcl("rollback", str(shop / "shop.toml"), *arguments)
    assert (done.returncode, said in done.stderr) == (code, True), done.stderr


def test_a_warm_start_is_told_by_run_and_replay_alike(shop: Path, streamcl: Run) -> None:
    config, file = str(shop / "shop.toml"), shop / "w.safetensors"
    save(file, {"linear.bias": torch.tensor([1.5])})
    ran = answer(streamcl, "run", config, "--warm-start", str(file), "--json")
    replayed = answer(streamcl, "replay", config, "--warm-start", str(file), "--json")
    assert ran["state_digest"] == replayed["state_digest"]
    assert answer(streamcl, "replay", config, "--json")["state_digest"] != ran["state_digest"]
    facts = answer(streamcl, "checkpoint", "show", config)["manifest"]["lineage"]
    assert [fact["kind"] for fact in facts] == ["warm_start"]
    answer(streamcl, "run", config, "--warm-start", str(file), "--json")  # the same again: what a supervisor does
    save(file, {"linear.bias": torch.tensor([2.5])})
    refused = streamcl("run", config, "--warm-start", str(file))
    assert (refused.returncode, "there is a checkpoint already" in refused.stderr) == (2, True)


def test_installing_is_done_once(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "b").write_text("new")
    for _ in range(2):
        _install(tmp_path / "a", tmp_path / "b")
        assert [(tmp_path / name).read_text() for name in ("a", "a.before")] == ["new", "old"]


def test_figures_since_the_beginning_come_first() -> None:
    figures = {"auc": 1.0, "auc_window": 2.0, "log_loss_since": 3.0, "alone": 4.0}
    assert _figures({"live": figures, "shadow": figures | {"auc": 5.0}})[0] == ("log_loss_since", 3.0, 3.0)
    assert _figures({"live": figures, "shadow": {"auc": 5.0}}) == [("auc", 1.0, 5.0)]
