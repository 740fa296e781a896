from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from streamcl import backtest
from streamcl.config import Config
from streamcl.sweep.answers import Answers
from streamcl.sweep.log import Log, scan
from streamcl.sweep.trial import Kept, Task, advance, folder_of
from tests.sweep.logs import shop


@pytest.fixture(params=[False, True], ids=["inline", "late"])
def read(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Config, Log]:
    config = backtest.redirected(Config.load(shop(tmp_path, 300, late=request.param)), {})
    return config, scan(config)


def carry(folder: Path, read: tuple[Config, Log], *cuts: int) -> Kept:
    config, log = read
    for until in cuts:
        task = Task(folder, config.model_dump(mode="json"), log, until, goes_on=until < log.events)
        advance(task, lambda _: None)
    return Kept(folder)


def same(one: Answers, other: Answers) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in Answers.__slots__)


def test_a_run_in_stretches_says_what_one_in_one_go_says(tmp_path: Path, read: tuple[Config, Log]) -> None:
    whole = carry(tmp_path / "whole", read, 300)
    parts = carry(tmp_path / "parts", read, 77, 150, 300)
    assert [(start, end) for start, end, _ in parts.parts()] == [(0, 77), (77, 150), (150, 300)]
    assert same(parts.answers(300), whole.answers(300))
    assert parts.reached(150)
    assert not whole.reached(150)
    assert len(whole.answers(300).events) > 250
    rest = parts.answers(300, 150)
    assert len(parts.answers(150).events) + len(rest.events) == len(whole.answers(300).events)


def test_a_stretch_that_is_lost_is_run_again(tmp_path: Path, read: tuple[Config, Log]) -> None:
    kept = carry(tmp_path / "run", read, 77, 150)
    before = kept.answers(150)
    kept.parts()[-1][2].unlink()
    assert same(carry(tmp_path / "run", read, 150).answers(150), before)


def test_without_its_state_a_run_begins_anew(tmp_path: Path, read: tuple[Config, Log]) -> None:
    before = carry(tmp_path / "whole", read, 300).answers(300)
    kept = carry(tmp_path / "run", read, 77)
    kept.drop_state()
    again = carry(tmp_path / "run", read, 300)
    assert [(start, end) for start, end, _ in again.parts()] == [(0, 300)]
    assert same(again.answers(300), before)


def test_nothing_is_kept_of_a_state_behind_the_end(tmp_path: Path, read: tuple[Config, Log]) -> None:
    assert not (carry(tmp_path / "run", read, 77, 300).folder / "state").exists()


def test_a_folder_is_named_by_configuration_and_log(tmp_path: Path, read: tuple[Config, Log]) -> None:
    config, log = read
    data = config.model_dump(mode="json")
    other = Config.parse({**data, "optimizer": {"kind": "sgd", "learning_rate": 0.5}})
    polled = Config.parse({**data, "worker": {**data["worker"], "max_records": 7}})
    assert folder_of(tmp_path, config, log) != folder_of(tmp_path, other, log)
    assert folder_of(tmp_path, config, log) == folder_of(tmp_path, polled, log)
