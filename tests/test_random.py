import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from streamcl.random import below, bits, key_of, noise_array, normal_array, uniform_array

KEY = key_of(7, "test")

GOLDEN_KEY = 1097529751895575086
GOLDEN_BITS = [15768521310958193169, 10944923443635138573, 17392814895899096103]
GOLDEN_BELOW = [854, 593, 529, 410, 678, 344]
GOLDEN_UNIFORM = [0.8548132531112423, 0.9428663847886022, 0.02993481954020283]
GOLDEN_NORMAL = [0.5244237347967089, 0.8214722750336162, 2.1750625671320516]


def chi_square_limit(cells: int) -> float:
    """Five standard deviations above the mean of a chi-square distribution: its mean is k, its variance 2k."""
    free = cells - 1
    return free + 5.0 * math.sqrt(2.0 * free)


def chi_square(counts: NDArray[np.int64]) -> float:
    expected = counts.sum() / len(counts)
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("vary", ["step", "index", "key"])
def test_draws_are_uniform_along_every_counter(vary: str) -> None:
    def draw(i: int) -> int:
        if vary == "step":
            return below(64, KEY, i)
        return below(64, KEY, 5, i) if vary == "index" else below(64, key_of(i, "test"), 5)

    counts = np.bincount([draw(i) for i in range(20_000)], minlength=64)
    assert chi_square(counts) < chi_square_limit(64)


def test_pairs_of_neighbouring_steps_and_of_neighbouring_indices_are_independent() -> None:
    def pair(i: int, by_step: bool) -> int:
        second = below(8, KEY, i + 1) if by_step else below(8, KEY, i, 1)
        return below(8, KEY, i) * 8 + second

    for by_step in (True, False):
        counts = np.bincount([pair(i, by_step) for i in range(20_000)], minlength=64)  # every draw stands in two pairs
        assert chi_square(counts) < chi_square_limit(64)


def test_the_high_bits_and_the_low_bits_are_fair() -> None:
    draws = np.array([bits(KEY, i) for i in range(4_000)], np.uint64)
    ones = ((draws[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)).sum(0)
    assert np.all(np.abs(ones - 2_000.0) < 5.5 * math.sqrt(4_000 / 4))


@given(st.integers(1, 1 << 62), st.integers(0, 1 << 63), st.integers(0, 1 << 40), st.integers(0, 1 << 20))
def test_below_stays_below(n: int, seed: int, step: int, index: int) -> None:
    assert 0 <= below(n, key_of(seed, "a"), step, index) < n


def test_components_and_seeds_have_draws_of_their_own() -> None:
    assert len({key_of(seed, name) for seed in range(100) for name in ("a", "b", "ab", "")}) == 400


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_element_i_is_the_same_however_the_row_is_cut(count: int, start: int, longer: int) -> None:
    for make in (uniform_array, normal_array):
        whole = make(KEY, start + count + longer)
        np.testing.assert_array_equal(make(KEY, count, start), whole[start : start + count])


def test_uniform_numbers_are_the_bits_of_step_zero() -> None:
    expected = [((bits(KEY, 0, i) >> 12) + 0.5) * 2.0**-52 for i in range(100)]
    np.testing.assert_array_equal(uniform_array(KEY, 100), expected)


def test_uniform_numbers_are_uniform_and_their_bounds_are_open() -> None:
    u = uniform_array(KEY, 100_000)
    assert chi_square(np.bincount((u * 100).astype(int), minlength=100)) < chi_square_limit(100)
    most = (1 << 52) - 1
    assert (most + 0.5) * 2.0**-52 < 1.0  # which 53 bits and a half would not be


def test_normal_numbers_have_the_moments_of_a_normal_distribution() -> None:
    z = normal_array(KEY, 100_000)
    root = math.sqrt(len(z))
    assert abs(z.mean()) < 5.0 / root
    assert abs((z**2).mean() - 1.0) < 5.0 * math.sqrt(2.0) / root  # var(z^2) = 2
    assert abs((z**4).mean() - 3.0) < 5.0 * math.sqrt(96.0) / root  # var(z^4) = 105 - 9
    assert abs((z[1:] * z[:-1]).mean()) < 5.0 / root


def test_the_row_of_key_zero_is_the_published_output_of_splitmix64() -> None:
    assert [bits(0, 0, i) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_values_are_the_same_for_ever() -> None:
    assert key_of(0, "") == 0x2D06800538D394C2
    assert key_of(42, "golden") == GOLDEN_KEY
    assert [bits(GOLDEN_KEY, step, index) for step, index in ((0, 0), (1, 0), (0, 1))] == GOLDEN_BITS
    assert [below(1000, GOLDEN_KEY, step) for step in range(6)] == GOLDEN_BELOW
    np.testing.assert_array_equal(uniform_array(GOLDEN_KEY, 3), GOLDEN_UNIFORM)
    np.testing.assert_allclose(normal_array(GOLDEN_KEY, 3), GOLDEN_NORMAL, rtol=1e-14)  # libm may differ in a last bit


def test_noise_is_the_four_fields_of_a_draw_summed_and_brought_to_unit_variance() -> None:
    for step in (0, 9):
        for index, value in enumerate(noise_array(KEY, step, 3)):
            z = bits(KEY, step, index)
            fields = [(z >> shift) & 0xFFFF for shift in (0, 16, 32, 48)]
            assert value == pytest.approx((sum(fields) - 4 * 32767.5) / math.sqrt((65536**2 - 1) / 3))


def test_noise_has_the_moments_of_four_uniforms() -> None:
    noise = noise_array(KEY, 1, 100_000)
    # Five standard errors; the kurtosis of a sum of four uniforms is 2.7, so var(x^2) is 1.7.
    assert abs(noise.mean()) < 5.0 / math.sqrt(len(noise))
    assert abs((noise**2).mean() - 1.0) < 5.0 * math.sqrt(1.7 / len(noise))
    assert np.abs(noise).max() <= math.sqrt(12.0)
