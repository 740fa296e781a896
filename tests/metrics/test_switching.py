"""Regret against its known value: exact where a closed form is there, else within deviations of a sum."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.metrics.switching import (
    bit_losses,
    kt_chances,
    kt_regret,
    regret,
    switching_bernoulli,
    switching_chances,
)

BITS = st.lists(st.integers(0, 1), min_size=1, max_size=30)


def test_regret_is_what_was_lost_beyond_the_best_so_far() -> None:
    assert regret([1.0, 0.5, 2.0], [0.5, 0.5, 2.5]).tolist() == [0.5, 0.5, 0.0]


def test_the_kt_estimator_counts_half_a_bit_of_each_kind_before_the_first() -> None:
    assert kt_chances([1, 1, 0, 1]).tolist() == pytest.approx([1 / 2, 3 / 4, 5 / 6, 5 / 8])
    assert kt_chances([1, 1, 0, 1], starts=(0, 2)).tolist() == pytest.approx([1 / 2, 3 / 4, 1 / 2, 1 / 4])


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.7])
@pytest.mark.parametrize("length", [1, 2, 7, 11])
def test_the_expected_regret_is_the_mean_over_every_row_of_bits(length: int, chance: float) -> None:
    total = 0.0
    for bits in product((0, 1), repeat=length):
        best = bit_losses(bits, np.full(length, chance))
        total += math.exp(-best.sum()) * regret(bit_losses(bits, kt_chances(bits)), best)[-1]
    assert kt_regret(length, chance) == pytest.approx(total)


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.8])
def test_the_expected_regret_nears_half_the_logarithm_of_the_length(chance: float) -> None:
    limit = 0.5 * math.log(math.pi / (2 * math.e))
    gaps = [abs(kt_regret(n, chance) - 0.5 * math.log(n) - limit) for n in (100, 1000, 10_000)]
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 0.001


def test_a_switching_source_costs_half_the_logarithm_of_its_length_a_segment() -> None:
    # The regret of a segment is about ln(n)/2 - .274 + (a chi-squared of one degree, less 1)/2 with the sign turned, so
    # its deviation is sqrt(2)/2; the sum over 200 segments has sqrt(200) times that, and 4 deviations are allowed.
    lengths, chances = [250] * 200, np.tile([0.2, 0.7, 0.45, 0.9], 50).tolist()
    bits, chance = switching_bernoulli(3, lengths, chances)
    starts = np.cumsum([0, *lengths[:-1]]).tolist()
    found = regret(bit_losses(bits, kt_chances(bits, starts)), bit_losses(bits, chance))[-1]
    expected = sum(kt_regret(250, each) for each in chances)
    assert abs(found - expected) < 4 * math.sqrt(200 / 2)
    assert expected / 200 == pytest.approx(0.5 * math.log(250) - 0.274, abs=0.01)
    forever = regret(bit_losses(bits, kt_chances(bits)), bit_losses(bits, chance))[-1]
    assert forever > 3 * found  # who never begins anew


@given(BITS, st.floats(0.01, 0.9), st.integers(0, 2**20))
def test_bayes_loses_no_more_than_the_prior_of_the_true_switches(bits: list[int], hazard: float, where: int) -> None:
    starts = [0, *[t for t in range(1, len(bits)) if where >> t & 1]]
    told = bit_losses(bits, kt_chances(bits, starts)).sum()
    switches, stays = len(starts) - 1, len(bits) - len(starts)
    prior = switches * math.log(hazard) + stays * math.log(1.0 - hazard)
    assert bit_losses(bits, switching_chances(bits, hazard)).sum() <= told - prior + 1e-9


@given(st.lists(st.integers(0, 1), min_size=1, max_size=7), st.floats(0.05, 0.9))
def test_bayes_is_the_sum_over_every_set_of_switches(bits: list[int], hazard: float) -> None:
    total = 0.0
    for cuts in product((False, True), repeat=len(bits) - 1):
        starts = [0, *[t for t, cut in enumerate(cuts, 1) if cut]]
        prior = math.prod(hazard if cut else 1.0 - hazard for cut in cuts)
        total += prior * math.exp(-bit_losses(bits, kt_chances(bits, starts)).sum())
    assert bit_losses(bits, switching_chances(bits, hazard)).sum() == pytest.approx(-math.log(total))


def test_the_source_depends_on_its_seed_alone_and_keeps_its_chances() -> None:
    bits, chance = switching_bernoulli(1, [4000, 1000], [0.25, 0.8])
    again, _ = switching_bernoulli(1, [4000, 1000], [0.25, 0.8])
    assert bits.tolist() == again.tolist() != switching_bernoulli(2, [4000, 1000], [0.25, 0.8])[0].tolist()
    assert chance.tolist() == [0.25] * 4000 + [0.8] * 1000
    assert abs(bits[:4000].mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 4000)
    assert abs(bits[4000:].mean() - 0.8) < 4 * math.sqrt(0.8 * 0.2 / 1000)
