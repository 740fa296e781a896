"""The soak: what its statistics call growth, and what they call noise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from streamcl.bench.recovery_soak import FULL, MIB, Sample, _bars, grown, interval, slope_of
from streamcl.bench.recovery_traffic import endless
from streamcl.records import EVENTS


def samples(mib: list[float], handles: int = 20) -> list[Sample]:
    """One every ten seconds."""
    return [Sample(10.0 * i, round(MIB * each), 10, handles, 100, 0.0, 0.0, 0.0) for i, each in enumerate(mib)]


def drifting(rng: np.random.Generator, minutes: float) -> NDArray[np.float64]:
    """Half an hour of samples whose noise is correlated over so many minutes; a quarter of a MiB is typical."""
    stay = np.exp(-10.0 / (60.0 * minutes))
    steps = rng.normal(size=180) * np.sqrt(1 - stay**2)
    steps[0] = rng.normal()
    return 0.25 * np.array(list(itertools.accumulate(steps, lambda before, step: stay * before + step)))


@pytest.mark.parametrize(("minutes", "most"), [(0.2, 0.06), (1.0, 0.06), (3.0, 0.1)])
def test_few_flat_series_are_called_growing_however_long_their_noise_stays(minutes: float, most: float) -> None:
    """Of 1,000 each; the standard error of a share of .05 is .007."""
    rng, x = np.random.default_rng(0), np.arange(180) / 360
    assert np.mean([interval(x, 600 + drifting(rng, minutes))[1] > 0 for _ in range(1000)]) < most


@pytest.mark.parametrize("minutes", [0.2, 1.0, 3.0])
def test_a_leak_of_3_mib_an_hour_is_found_in_it(minutes: float) -> None:
    rng, x = np.random.default_rng(1), np.arange(180) / 360
    assert np.mean([interval(x, 600 + 3 * x + drifting(rng, minutes))[1] > 0 for _ in range(300)]) > 0.95


def test_only_the_second_half_counts() -> None:
    filled = [*np.linspace(300, 600, 100), *([600.0, 601.0] * 50)]
    slope, _, _ = slope_of(samples(filled))
    assert abs(slope) < 1


def test_a_peak_is_no_growth_and_one_more_that_stays_is() -> None:
    assert grown([5, 5, 9, 5, 5, 5, 5, 5]) == 0
    assert grown([5, 5, 5, 5, 6, 6, 6, 6]) == 1


def test_a_leak_of_memory_and_one_of_handles_each_miss_a_bar_of_their_own() -> None:
    flat = [500.0 + i % 2 for i in range(400)]
    leak = [each + 0.1 * i for i, each in enumerate(flat)]
    assert all(bar.ok for bar in _bars(samples(flat), FULL))
    assert [bar.name for bar in _bars(samples(leak), FULL) if not bar.ok] == [
        "soak: growth of memory, least in its interval (MiB/h)",
        "soak: growth of memory over half, most in its interval (share)",
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
