"""The soak: what its statistics call growth, and what they call noise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from numpy.typing import NDArray

from streamcl.bench.recovery_soak import FULL, MIB, Sample, _bars, grown, memory_of
from streamcl.bench.recovery_traffic import endless
from streamcl.records import EVENTS


def samples(mib: list[float], handles: int = 20) -> list[Sample]:
    """One every ten seconds."""
    return [Sample(10.0 * i, round(MIB * each), 10, handles, 100, 0.0, 0.0, 0.0) for i, each in enumerate(mib)]


HOURS = (np.arange(360) + 1) / 360


def resident(rng: np.random.Generator, minutes: float, creep: float = 0.0, leak: float = 0.0) -> NDArray[np.float64]:
    """An hour of samples: noise correlated over so many minutes, .18 MiB of it, and dips when memory is given back."""
    stay = np.exp(-10.0 / (60.0 * minutes))
    steps = rng.normal(size=len(HOURS)) * np.sqrt(1 - stay**2)
    steps[0] = rng.normal()
    noise = 0.18 * np.array(list(itertools.accumulate(steps, lambda before, step: stay * before + step)))
    dips = 1.8 * (rng.random(len(HOURS)) < 0.12)
    return 700.0 + creep * np.log(HOURS) + leak * HOURS + noise - dips


def judged(mib: NDArray[np.float64]) -> float:
    """The lower end of the leak's interval."""
    return memory_of(samples(mib.tolist())).low


@pytest.mark.parametrize("creep", [0.0, 0.5])
@pytest.mark.parametrize(("minutes", "most"), [(0.2, 0.06), (1.0, 0.06), (3.0, 0.1)])
def test_few_series_without_a_leak_are_said_to_leak_however_they_creep(
    minutes: float, most: float, creep: float
) -> None:
    """Of 1,000 each; the standard error of a share of .05 is .007."""
    rng = np.random.default_rng(0)
    assert np.mean([judged(resident(rng, minutes, creep)) > 0 for _ in range(1000)]) < most


@pytest.mark.parametrize(
    ("minutes", "leak", "least"), [(0.2, 1.3, 0.8), (0.2, 3.0, 0.99), (1.0, 3.0, 0.97), (3.0, 3.0, 0.95)]
)
def test_a_leak_is_found_beside_creep_and_noise(minutes: float, leak: float, least: float) -> None:
    """1.3 MiB an hour is what a leak of 2 KB a snapshot once came to."""
    rng = np.random.default_rng(1)
    assert np.mean([judged(resident(rng, minutes, 0.3, leak)) > 0 for _ in range(300)]) > least


def test_a_day_is_not_made_better_by_a_creep_that_ends() -> None:
    bars = {bar.name: bar for bar in _bars(samples((700.0 + 2.0 * np.log(HOURS) - 5.0 * HOURS).tolist()), FULL)}
    day = bars["soak: growth of memory in a day, most in its interval (share)"]
    assert day.value == pytest.approx(2.0 * math.log(24.0 / 0.05) / 693.8, rel=0.05)


def test_creep_and_leak_are_told_apart() -> None:
    found = memory_of(samples((700.0 + 2.0 * np.log(HOURS) + 5.0 * HOURS).tolist()))
    assert found.creep == pytest.approx(2.0, abs=0.1)
    assert found.leak == pytest.approx(5.0, abs=0.2)


def test_the_first_minutes_do_not_count() -> None:
    filled = [*np.linspace(300, 600, 18), *([600.0] * 342)]
    assert abs(memory_of(samples(filled)).leak) < 1e-6


def test_a_process_that_leaks_nothing_creeps_past_its_high_water_mark() -> None:
    """What is held is stationary; its maximum so far rises by about as much in each doubling of time, not of turns."""
    rng = np.random.default_rng(2)
    marks = np.maximum.accumulate(rng.exponential(1.0, size=(200, 4096)), axis=1).mean(axis=0)
    doublings = np.diff(marks[[255, 511, 1023, 2047, 4095]])
    assert doublings == pytest.approx(math.log(2.0), abs=0.25)  # sd of a mean of 200 differences: .1


def test_a_peak_is_no_growth_and_one_more_that_stays_is() -> None:
    assert grown([5, 5, 9, 5, 5, 5, 5, 5]) == 0
    assert grown([5, 5, 5, 5, 6, 6, 6, 6]) == 1


def test_a_leak_of_memory_and_one_of_handles_each_miss_a_bar_of_their_own() -> None:
    flat = [500.0 + i % 2 for i in range(400)]
    leak = [each + 0.1 * i for i, each in enumerate(flat)]
    assert all(bar.ok for bar in _bars(samples(flat), FULL))
    assert [bar.name for bar in _bars(samples(leak), FULL) if not bar.ok] == [
        "soak: leak of memory, least in its interval (MiB/h)",
        "soak: growth of memory in a day, most in its interval (share)",
    ]
    handles = samples(flat)[:300] + [
        Sample(s.at_s, s.rss_bytes, 10, 21, 100, 0.0, 0.0, 0.0) for s in samples(flat)[300:]
    ]
    assert [bar.name for bar in _bars(handles, FULL) if not bar.ok] == ["soak: growth of handles over half"]


def test_endless_traffic_goes_on_in_the_order_of_its_timestamps_with_every_id_once() -> None:
    records = list(itertools.islice(endless(0, 4, 1000.0, 0.03), 45_000))
    assert [record.time_s for record in records] == sorted(record.time_s for record in records)
    ids = [record.value for record in records if record.input == EVENTS and not record.bad]
    assert len(ids) == len(set(ids)) > 20_000
