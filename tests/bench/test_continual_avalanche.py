import os
import sys

import pytest

from streamcl.bench.continual_avalanche import AVALANCHE, avalanche_er
from streamcl.bench.options import OptionError
from streamcl.bench.peer_python import PYTHON, interpreter
from tests.bench.continual_data import tiny_course


def test_a_python_without_avalanche_is_refused_with_what_it_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)
    with pytest.raises(OptionError, match="No module named 'avalanche'"):
        avalanche_er("avalanche er", tiny_course(0), 0)


def test_a_python_that_is_not_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, "/nowhere/python")
    assert interpreter() is None
    with pytest.raises(OptionError, match=PYTHON):
        avalanche_er("avalanche er", tiny_course(0), 0)


@pytest.mark.skipif(PYTHON not in os.environ, reason=f"{PYTHON} names no Python with avalanche-lib")
def test_avalanche_learns_the_same_course() -> None:
    course = tiny_course(0)
    run = avalanche_er(next(iter(AVALANCHE)), course, 0)
    assert run.curve[0].tolist()[-1] == len(course.rows)
    assert 10.0 < run.figures["final"] <= 100.0  # one class at random would be a tenth
