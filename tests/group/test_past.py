"""What ranks keep of the past: after a meeting each knows what one learner would, of the values that all see."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as effort
from hypothesis import strategies as st

from streamcl.past import Rings
from streamcl.records import Selector
from streamcl.sums import Sums
from tests.group.crew import FEATURES, Click, Member, alike, config, crew, meet

SOME = effort(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
rounds = st.lists(
    st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("uvwx"), st.integers(0, 1)), max_size=6),
    min_size=1,
    max_size=4,
)


def made(**more: Any) -> Any:
    room = {"keys": more["keys"]} if "keys" in more else {}
    features = {
        **FEATURES,
        "rate": {"kind": "rate", "of": "item", **more},
        "count": {"kind": "count", "of": "item", **more},
        "mine": {"kind": "rate", "of": "user"},
        "fans": {"kind": "history", "of": "user", "by": "item", "last": 3},
        "since": {"kind": "elapsed", "by": "item", **room},
        "near": {"kind": "bag", "buckets": 64, "max_items": 2},
        "near_count": {"kind": "count", "of": "near", **more},
        "co": {"kind": "covisits", "of": "item", "beside": "near", **more},
    }
    return config(features=features)


def split(clicks: list[Click]) -> list[list[Click]]:
    return [[each for each in clicks if each[0] in users] for users in ("ab", "cd")]


def kept(member: Member, name: str) -> Any:
    assert member.past is not None
    return member.past.kept[name]


def part(member: Member, name: str) -> Sums:
    name, _, of_pair = name.partition(".")
    found: Sums = getattr(kept(member, name), of_pair) if of_pair else kept(member, name)
    return found


def sums(member: Member, name: str, now: float) -> dict[int, Any]:
    found = part(member, name)
    rows = found.state_dict()["rows"].tolist()
    return {row: pytest.approx(found.read_row(row, now), rel=1e-9, abs=1e-12) for row in sorted(rows)}


@pytest.mark.parametrize("more", [{}, {"half_life_s": 5.0}])
@SOME
@given(rounds)
def test_sums_and_histories_are_those_of_one_learner(more: Any, course: list[list[Click]]) -> None:
    config = made(**more)
    members, one = crew(config, 2), Member(config, 0, 1)
    for clicks in course:
        for click in clicks:  # each at its own time, whoever learns it
            member = members[click[0] in "cd"]
            member.time = one.time
            member.learn(click)
            one.learn(click)
        meet(members)
        assert alike(members)
        for name in ("rate", "count", "since", "near_count", "co.pairs", "co.values"):
            ours, theirs = (sums(each, name, one.time) for each in (members[0], one))
            assert ours.keys() == theirs.keys()
            for row in ours:
                assert part(members[0], name).read_row(row, one.time) == theirs[row]
        rings: Rings = kept(members[1], "fans")
        assert {row: list(ring) for row, ring in rings.rings.items()} == {
            row: list(ring) for row, ring in kept(one, "fans").rings.items()
        }


@pytest.mark.parametrize("keys", [1, 2, 4])
@SOME
@given(rounds)
def test_ranks_that_have_no_room_for_all_values_keep_the_same(keys: int, course: list[list[Click]]) -> None:
    members = crew(made(keys=keys), 2)
    for clicks in course:
        for click in clicks:
            members[click[0] in "cd"].learn(click)
        meet(members)
        assert alike(members)


def test_what_is_kept_by_the_key_of_the_shards_stays_at_home() -> None:
    members = crew(made(), 2)
    members[0].learn(("a", "u", 1))
    members[1].learn(("c", "u", 0))
    said = members[0].merge.say(1)
    assert b"past.rate/rows" in said and b"mine" not in said
    meet(members)
    user = members[0].featurizer.fields["user"]
    assert user.row("c") - user.base not in kept(members[0], "mine").state_dict()["rows"]


def test_what_has_been_forgotten_on_all_ranks_does_not_come_back() -> None:
    members = crew(made(), 2)
    members[0].learn(("a", "u", 1), ("b", "v", 1))
    members[1].learn(("c", "v", 0))
    meet(members)
    members[0].learn(("a", "w", 1))
    for member in members:
        assert member.past is not None
        member.past.forget(Selector(key="a"))
    meet(members)
    assert alike(members)
    item = members[1].featurizer.fields["item"]
    rings: Rings = kept(members[1], "fans")
    assert item.row("u") - item.base not in rings.rings and item.row("w") - item.base not in rings.rings
    assert item.row("w") - item.base not in kept(members[0], "rate").state_dict()["rows"]


def test_ranks_hear_of_events_whose_labels_are_still_to_come() -> None:
    members = crew(made(), 2)
    for member, user in zip(members, "ac", strict=True):
        assert member.past is not None
        features = member.past.complete(member.featurizer.encode({"user": user, "item": "u", "price": 1.0}), 1.0)
        member.past.saw(features, 1.0, user)
    meet(members)
    assert alike(members)
    row = members[0].featurizer.fields["item"].row("u") - members[0].featurizer.fields["item"].base
    assert part(members[0], "count").read_row(row, 1.0)[1] == pytest.approx(2.0)


def test_what_one_rank_forgets_a_round_before_another_leaves_them_alike() -> None:
    members = crew(made(), 2)
    members[0].learn(("a", "u", 1))
    members[1].learn(("c", "u", 1))
    meet(members)
    for member in members:
        assert member.past is not None
        member.past.forget(Selector(key="a"))
        members[1].learn(("d", "u", 1))
        meet(members)
        assert alike(members)
    item = members[1].featurizer.fields["item"]
    rings: Rings = kept(members[1], "fans")
    user = members[1].featurizer.fields["user"]
    assert user.row("a") - user.base not in {row for row, *_ in rings.rings[item.row("u") - item.base]}


def test_numbers_that_one_rank_has_forgotten_do_not_come_back_from_another() -> None:
    members = crew(config(features={**FEATURES, "price": {"kind": "numeric", "bins": 4}}), 2)
    members[0].learn(*[("a", "u", 1)] * 9)
    members[1].learn(*[("c", "u", 0)] * 5)
    meet(members)
    for member in reversed(members):
        assert member.past is not None
        member.past.forget(Selector(key="a"))
        meet(members)
        assert alike(members)
        assert not any(len(kept(each, "price.bins")) for each in members)
