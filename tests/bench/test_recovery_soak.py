"""The soak: what its statistics call growth, and what they call noise."""

from __future__ import annotations

import itertools
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.bench.recovery_soak import FULL, MIB, Sample, _bars, grown, interval, slope_of, theil_sen
from streamcl.bench.recovery_traffic import endless
from streamcl.records import EVENTS


def samples(mib: list[float], handles: int = 20) -> list[Sample]:
    """One every ten seconds."""
    return [Sample(10.0 * i, round(MIB * each), 10, handles, 100, 0.0, 0.0, 0.0) for i, each in enumerate(mib)]


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=12))
def test_the_slope_is_the_median_of_all_pairs(y: list[float]) -> None:
    x = np.arange(len(y), dtype=np.float64)
    pairs = [(y[j] - y[i]) / (j - i) for i, j in itertools.combinations(range(len(y)), 2)]
    assert theil_sen(x, np.array(y)) == pytest.approx(statistics.median(pairs))


def test_noise_is_no_growth_and_a_leak_in_it_is() -> None:
    rng = np.random.default_rng(0)
    noise = np.convolve(rng.normal(size=200), np.ones(8) / 8, "same")  # samples that hang together
    x = np.linspace(0.0, 0.5, 200)
    _, low, high = interval(x, 600 + noise)
    assert low < 0 < high
    slope, low, high = interval(x, 600 + noise + 10 * x)
    assert 0 < low < 10 < high
    assert slope == pytest.approx(10, abs=3)


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
