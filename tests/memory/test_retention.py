import math
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamcl.memory.retention import RETENTIONS, ClassBalanced, Recency, Reservoir, Retention
from streamcl.state import digest, flatten, unflatten

POLICIES = sorted(RETENTIONS)


def hold(policy: Retention, labels: list[float]) -> dict[int, int]:
    """By slot, the number of the example that is in it."""
    held: dict[int, int] = {}
    for i, label in enumerate(labels):
        slot = policy.place(label)
        if slot is not None:
            held[slot] = i
    return held


def forget(policy: Retention, held: dict[int, int], who: set[int]) -> dict[int, int]:
    """`held` afterwards."""
    kept = policy.forget(np.array([held[slot] in who for slot in range(len(held))], np.bool_))
    assert len(policy) == len(kept)
    return {new: held[old] for new, old in enumerate(kept.tolist())}


def make(name: str, capacity: int, seed: int = 0) -> Any:
    return RETENTIONS[name](capacity, seed)


LABELS = st.lists(st.sampled_from([0.0, 0.0, 0.0, 1.0, 2.0]), max_size=60)


@pytest.mark.parametrize("name", POLICIES)
@given(capacity=st.integers(1, 12), labels=LABELS)
def test_slots_fill_up_in_order_and_stay_inside(name: str, capacity: int, labels: list[float]) -> None:
    policy = make(name, capacity)
    for i, label in enumerate(labels):
        slot = policy.place(label)
        if i < capacity:
            assert slot == i
        assert slot is None or 0 <= slot < capacity
        assert len(policy) == min(i + 1, capacity)


@given(st.integers(1, 12), st.integers(0, 60))
def test_recency_holds_exactly_the_last_ones(capacity: int, seen: int) -> None:
    held = hold(Recency(capacity, 0), [0.0] * seen)
    assert sorted(held.values()) == list(range(max(0, seen - capacity), seen))


def limit(free: int) -> float:
    """Five standard deviations above the mean of a chi-square distribution."""
    return free + 5.0 * math.sqrt(2.0 * free)


def test_a_reservoir_holds_each_of_n_with_probability_capacity_over_n() -> None:
    runs, capacity, seen = 3000, 8, 24
    times = Counter(i for seed in range(runs) for i in hold(Reservoir(capacity, seed), [0.0] * seen).values())
    expected = runs * capacity / seen
    # Kept or not: each cell is a binomial, so its squared deviation is measured in its own variance.
    deviation = sum((times[i] - expected) ** 2 / (expected * (1 - capacity / seen)) for i in range(seen))
    assert deviation < limit(seen)


def test_after_a_forget_a_reservoir_holds_the_others_with_the_same_probability() -> None:
    """Before and behind it, capacity / seen each; that of the erased is 0."""
    runs, capacity, before, seen = 3000, 8, 16, 24
    erased, times = {3, 7, 8, 15}, Counter[int]()
    for seed in range(runs):
        policy = Reservoir(capacity, seed)
        held = forget(policy, hold(policy, [0.0] * before), erased)
        held |= {slot: before + i for slot, i in hold(policy, [0.0] * (seen - before)).items()}
        assert sorted(held) == list(range(len(policy)))
        times.update(held.values())
    expected = runs * capacity / seen
    others = [i for i in range(seen) if i not in erased]
    deviation = sum((times[i] - expected) ** 2 / (expected * (1 - capacity / seen)) for i in others)
    assert deviation < limit(len(others))
    assert not erased & times.keys()


def test_after_a_forget_a_class_holds_its_others_with_the_same_probability() -> None:
    """As of an unforgetful twin: two samples of equal chance, whose difference has the variance of both."""
    labels, runs, before, erased = [float(i % 4 == 0) for i in range(40)], 2000, 28, {0, 5, 6, 8, 9, 20}
    mine, twins = Counter[int](), Counter[int]()
    for seed in range(runs):
        twin, policy = ClassBalanced(8, runs + seed), ClassBalanced(8, seed)
        twins.update(hold(twin, labels).values())
        held = forget(policy, hold(policy, labels[:before]), erased)
        held |= {slot: before + i for slot, i in hold(policy, labels[before:]).items()}
        assert sorted(held) == list(range(len(policy)))
        mine.update(held.values())
    for i in set(range(40)) - erased:
        chance = (mine[i] + twins[i]) / (2 * runs)
        assert abs(mine[i] - twins[i]) < 5.0 * math.sqrt(2.0 * runs * chance * (1 - chance)), i
    assert not erased & mine.keys()


@pytest.mark.parametrize("name", POLICIES)
@given(capacity=st.integers(1, 9), before=LABELS, after=LABELS, who=st.sets(st.integers(0, 59)))
def test_a_forgetful_policy_is_restored_to_the_bit(
    name: str, capacity: int, before: list[float], after: list[float], who: set[int]
) -> None:
    whole, restored = make(name, capacity), make(name, capacity)
    held = hold(whole, before)
    if held:
        forget(whole, held, who)
    restored.load_state_dict(unflatten(*flatten(whole.state_dict())))
    assert hold(restored, after) == hold(whole, after)
    assert digest(restored.state_dict()) == digest(whole.state_dict())


def test_pairs_share_a_reservoir_as_often_as_chance_says() -> None:
    runs, capacity, seen = 3000, 4, 8
    together = Counter(
        (i, j)
        for seed in range(runs)
        for held in [sorted(hold(Reservoir(capacity, seed), [0.0] * seen).values())]
        for k, i in enumerate(held)
        for j in held[k + 1 :]
    )
    chance = capacity * (capacity - 1) / (seen * (seen - 1))
    width = 5.0 * math.sqrt(runs * chance * (1 - chance))
    assert len(together) == seen * (seen - 1) // 2
    assert all(abs(n - runs * chance) < width for n in together.values())


class SlowBalance:
    """Algorithm 1 of Chrysakis & Moens 2020 as it is written, with lists of examples and Python's generator."""

    def __init__(self, capacity: int, seed: int) -> None:
        self.capacity, self.random = capacity, random.Random(seed)  # noqa: S311
        self.memory: list[tuple[float, int]] = []
        self.seen: Counter[float] = Counter()
        self.full: set[float] = set()

    def add(self, label: float, i: int) -> None:
        self.seen[label] += 1
        if len(self.memory) < self.capacity:
            self.memory.append((label, i))
            return
        sizes = Counter(c for c, _ in self.memory)
        largest = {c for c, n in sizes.items() if n == max(sizes.values())}
        self.full |= largest
        if label not in self.full:
            victim = self.random.choice([k for k, (c, _) in enumerate(self.memory) if c == min(largest)])
            self.memory[victim] = (label, i)
        elif self.random.random() <= sizes[label] / self.seen[label]:
            victim = self.random.choice([k for k, (c, _) in enumerate(self.memory) if c == label])
            self.memory[victim] = (label, i)


@given(st.integers(1, 12), LABELS)
def test_class_sizes_are_those_of_algorithm_1(capacity: int, labels: list[float]) -> None:
    slow = SlowBalance(capacity, 0)
    for i, label in enumerate(labels):
        slow.add(label, i)
    held = hold(ClassBalanced(capacity, 0), labels)
    assert Counter(labels[i] for i in held.values()) == Counter(c for c, _ in slow.memory)


def test_each_example_is_kept_as_often_as_algorithm_1_keeps_it() -> None:
    labels, runs = [float(i % 5 == 4) + 2.0 * (i % 7 == 6) for i in range(28)], 1500
    fast = Counter(i for seed in range(runs) for i in hold(ClassBalanced(9, seed), labels).values())
    slow: Counter[int] = Counter()
    for seed in range(runs):
        oracle = SlowBalance(9, seed)
        for i, label in enumerate(labels):
            oracle.add(label, i)
        slow.update(i for _, i in oracle.memory)
    for i in range(len(labels)):
        chance = (fast[i] + slow[i]) / (2 * runs)
        width = 5.0 * math.sqrt(2.0 * runs * max(chance * (1 - chance), 1 / runs))
        assert abs(fast[i] - slow[i]) < width, i


def stream(counts: dict[float, int], seed: int) -> list[float]:
    labels = np.repeat(list(counts), list(counts.values()))
    return [float(c) for c in np.random.default_rng(seed).permutation(labels)]


@pytest.mark.parametrize("order", ["shuffled", "sorted", "reversed"])
def test_an_imbalanced_stream_ends_balanced_and_a_rare_class_is_kept_whole(order: str) -> None:
    labels = stream({0.0: 2000, 1.0: 200, 2.0: 60, 3.0: 5}, seed=1)
    labels = {"shuffled": labels, "sorted": sorted(labels), "reversed": sorted(labels, reverse=True)}[order]
    sizes = Counter(labels[i] for i in hold(ClassBalanced(50, 2), labels).values())
    assert sizes[3.0] == 5
    assert sizes.total() == 50
    assert [sizes[c] for c in (0.0, 1.0, 2.0)] == [15, 15, 15]


def test_within_a_class_each_example_is_held_with_the_same_probability() -> None:
    runs = 2000
    labels = [float(i % 4 == 0) for i in range(40)]
    times = Counter(i for seed in range(runs) for i in hold(ClassBalanced(8, seed), labels).values())
    for label in (0.0, 1.0):
        mine = [i for i, c in enumerate(labels) if c == label]
        chance = 4 / len(mine)
        deviation = sum((times[i] - runs * chance) ** 2 / (runs * chance * (1 - chance)) for i in mine)
        assert deviation < limit(len(mine))


def test_a_class_that_was_the_largest_never_grows_again() -> None:
    policy = ClassBalanced(6, 0)
    hold(policy, [0.0] * 6 + [1.0, 2.0])
    sizes = {c: len(slots) for c, slots in policy.members.items()}
    hold(policy, [0.0] * 50)
    assert {c: len(slots) for c, slots in policy.members.items()} == sizes


@pytest.mark.parametrize("name", POLICIES)
@given(capacity=st.integers(1, 9), before=LABELS, after=LABELS)
def test_a_restored_policy_goes_on_to_the_bit(
    name: str, capacity: int, before: list[float], after: list[float]
) -> None:
    whole, restored = make(name, capacity), make(name, capacity)
    hold(restored, after)  # whatever it was, it becomes what was saved
    hold(whole, before)
    restored.load_state_dict(unflatten(*flatten(whole.state_dict())))
    assert len(restored) == len(whole)
    assert hold(restored, after) == hold(whole, after)
    assert digest(restored.state_dict()) == digest(whole.state_dict())


@pytest.mark.parametrize("name", ["reservoir", "class_balanced"])
def test_what_is_kept_depends_on_the_seed(name: str) -> None:
    labels = stream({0.0: 100, 1.0: 100}, seed=0)
    assert hold(make(name, 10, 1), labels) == hold(make(name, 10, 1), labels)
    assert hold(make(name, 10, 1), labels) != hold(make(name, 10, 2), labels)


def test_a_thousand_classes_in_a_small_memory_keep_their_place() -> None:
    policy = ClassBalanced(100, 0)
    hold(policy, [float(i % 1000) for i in range(3000)])
    slots = sorted(slot for slots in policy.members.values() for slot in slots)
    assert slots == list(range(100))
