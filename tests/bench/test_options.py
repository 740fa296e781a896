from pathlib import Path

import pytest

from streamcl.bench.options import OptionError, Options


def test_an_option_that_would_be_ignored_is_an_error_that_names_it() -> None:
    with pytest.raises(OptionError, match="--task: bench stream has no use for it"):
        Options(task="rotated").require_read_by("stream", {"data"})


def test_options_of_the_contract_are_read_by_every_bench() -> None:
    Options(quick=True, json=True, plot=Path("x.png")).require_read_by("stream", set())


def test_a_choice_has_a_default_and_refuses_what_is_unknown() -> None:
    assert Options().choice("preset", ("a", "b"), "b") == "b"
    assert Options(preset="a").choice("preset", ("a", "b"), "b") == "a"
    with pytest.raises(OptionError, match="--preset: 'c' is none of a, b"):
        Options(preset="c").choice("preset", ("a", "b"), "b")


def test_seeds_count_from_zero() -> None:
    assert Options().seed_list(2) == [0, 1]
    assert Options(seeds=3).seed_list(2) == [0, 1, 2]
    with pytest.raises(OptionError, match="--seeds: 0 is below 1"):
        Options(seeds=0).seed_list(2)
