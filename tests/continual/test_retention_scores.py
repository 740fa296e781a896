import numpy as np
import pytest
from msgspec.structs import replace

from streamcl.continual.retention_scores import Quotas
from streamcl.learner import Learner
from streamcl.memory.replay import Replay
from streamcl.plugin import PluginError
from streamcl.records import Selector
from tests.continual.rows import BOUNDARY, bound, chi_square, config, held, made, resumes
from tests.test_learner import stream


def kept(settings: dict[str, object], labels: list[int], seed: int, capacity: int = 10) -> list[int]:
    """Numbers of the examples that are in the memory after a stream of these labels; no step is taken."""
    one = made([{"kind": "quotas", **settings}], "plugin", capacity=capacity).model_copy(update={"seed": seed})
    learner = Learner(one)
    [plugin] = learner.plugins.values()
    memory, found = learner.memory, np.full(capacity, -1)
    assert isinstance(plugin, Quotas)
    for number, label in enumerate(labels):
        plugin.strata.steps = number + 1
        slot = place(memory, float(label), number + 1)
        if slot is not None:
            found[slot] = number
    return [int(each) for each in found[found >= 0]]


def place(memory: Replay, label: float, step: int) -> int | None:
    slot = memory._place(label)
    if slot is not None:
        memory.y[slot], memory.columns["written"][slot] = label, step
    return slot


def test_the_lowest_lot_leaves_so_every_example_is_as_likely_to_be_held() -> None:
    counts = np.zeros(40)
    for seed in range(200):
        counts[kept({}, [0] * 40, seed)] += 1
    assert counts.sum() == 2000
    assert chi_square(counts, np.full(40, 1 / 40)) < bound(40)  # without replacement: below that of independent draws


@pytest.mark.parametrize(("power", "expected"), [(0.0, [10, 10, 10]), (1.0, [20, 8, 2])])
def test_quotas_are_equal_or_in_proportion_to_what_was_seen(power: float, expected: list[int]) -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation([0] * 200 + [1] * 80 + [2] * 20).tolist()
    rows = kept({"by": "class", "power": power}, labels, 0, capacity=30)
    counts = np.bincount([labels[row] for row in rows], minlength=3)
    assert np.abs(counts - expected).max() <= (0 if power == 0 else 2)  # an accepted row waits for the next to leave


def test_of_a_class_with_a_quota_a_uniform_sample_is_held() -> None:
    labels = ([0] * 3 + [1]) * 20
    counts = np.zeros(80)
    for seed in range(200):
        counts[kept({"by": "class"}, labels, seed)] += 1
    common = counts[np.array(labels) == 0]
    assert chi_square(common, np.full(60, 1 / 60)) < bound(60)


def test_the_most_recent_or_the_least_replayed_stay() -> None:
    assert sorted(kept({"keep": "recent"}, [0] * 40, 0)) == list(range(30, 40))
    plugin, learner = held([{"kind": "quotas", "keep": "unused"}], retention="plugin", hits=np.arange(20) % 7)
    assert isinstance(plugin, Quotas)
    assert learner.memory.columns["hits"][plugin.place(0.0, learner.memory)] == 6


def test_segments_have_quotas_and_the_oldest_become_one() -> None:
    learner = Learner(made([{"kind": "quotas", "by": "segment", "segments": 3}], "plugin", per_event=0))
    [plugin] = learner.plugins.values()
    assert isinstance(plugin, Quotas)
    for number, item in enumerate(stream("multiclass", 200)):
        assert learner.learn(item, [BOUNDARY] if number in (60, 90, 180) else [])
    counts = np.bincount(plugin.strata.of(learner.memory), minlength=3)
    assert plugin.seen.tolist() == [90.0, 90.0, 20.0]
    assert plugin.strata.bounds == [90, 180]
    assert np.abs(counts - 20 / 3).max() <= 1


def test_after_a_forget_the_memory_fills_up_as_slowly_as_it_changes() -> None:
    late = 0
    for seed in range(20):
        one = made([{"kind": "quotas"}], "plugin", per_event=0).model_copy(update={"seed": seed})
        learner = Learner(one)
        outcomes = stream("multiclass", 220)
        for item in outcomes[:200]:
            learner.learn(item)
        learner.forget(Selector(until_s=150.0))
        assert len(learner.memory) == int((learner.memory.owners.times[:20] >= 150.0).sum())
        for item in outcomes[200:]:
            learner.learn(item)
        late += int((learner.memory.owners.times[: len(learner.memory)] >= 200.0).sum())
    # 20 newcomers x 20 / 210 of them kept, 20 times: mean about 38, Poisson deviation 6.2; 400 if all were let in
    assert 38 - 31 < late < 38 + 31


def test_flips_are_counted_where_right_turned_wrong() -> None:
    learner = Learner(made(["flips"], per_event=6))
    flips, passes, right = np.zeros(20), np.zeros(20), np.zeros(20)
    memory, engine = learner.memory, learner.engine
    for number, item in enumerate(stream("multiclass", 60)):
        item = replace(item, label=(item.label + number // 12) % 3)  # a taste that changes, so that rows flip
        pick = memory.pick
        drawn: list[np.ndarray] = []

        def watching(n: int, step: int, pick: object = pick, drawn: list[np.ndarray] = drawn) -> object:
            found = pick(n, step)  # type: ignore[operator]
            rows = learner._rows(*learner.memory.examples(found[0]))
            drawn += [found[0].numpy(), (engine.out(rows).output.argmax(1) == rows.y.long()).numpy()]
            return found

        memory.pick = watching  # type: ignore[method-assign, assignment]
        learner.learn(item)
        memory.pick = pick  # type: ignore[method-assign]
        if drawn:
            for row, now in dict(zip(*drawn, strict=True)).items():
                flips[row] += right[row] == 1 and not now
                right[row] = 1 if now else -1
            np.add.at(passes, drawn[0], drawn[1])
        slot = (learner.version - 1) % 20
        flips[slot] = passes[slot] = right[slot] = 0
    assert memory.columns["flips"].tolist() == flips.tolist()
    assert memory.columns["passes"].tolist() == passes.tolist()
    assert flips.sum() > 0


def test_rows_that_were_never_forgotten_leave_first_and_hopeless_ones_before_them() -> None:
    columns = {"hits": [3, 3, 0, 9, 3], "passes": [3, 2, 0, 0, 0], "flips": [0, 2, 0, 0, 0]}
    plugin, learner = held(["flips", "forgettable"], 5, "plugin", **columns)
    order = np.argsort(plugin.scores(learner.memory))  # type: ignore[attr-defined]
    assert order.tolist() == [3, 0, 2, 1, 4]  # hopeless, never forgotten, unvisited, forgotten, not learned yet


def test_rows_that_are_unlikely_now_leave_first() -> None:
    plugin, learner = held(["density"], 5, "plugin")
    mean, deviation = plugin.mean, np.sqrt(plugin.square - plugin.mean**2)  # type: ignore[attr-defined]
    learner.memory.columns["hidden"][:5] = mean + np.array([[0.0], [3.0], [1.0], [2.0], [0.5]]) * (deviation + 0.1)
    assert np.argsort(plugin.scores(learner.memory)).tolist() == [1, 3, 2, 4, 0]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "plugins",
    [
        [{"kind": "quotas", "by": "segment", "segments": 2}],
        [{"kind": "quotas", "by": "class", "power": 0.5, "keep": "unused"}],
        ["flips", {"kind": "forgettable", "by": "class"}],
        ["density"],
    ],
)
def test_what_stays_is_resumed_to_the_bit(plugins: list[object]) -> None:
    assert resumes(plugins, "plugin")


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(PluginError, match="quotas"):
        Learner(config("regression", replay={"retention": "plugin"}, plugins=[{"kind": "quotas", "by": "class"}]))
    with pytest.raises(PluginError, match="flips"):
        Learner(config("regression", plugins=["flips"]))
    with pytest.raises(PluginError, match="forgettable"):
        Learner(made(["forgettable"], "plugin"))
    with pytest.raises(PluginError, match="density"):
        Learner(config(model={"kind": "logistic"}, replay={"retention": "plugin"}, plugins=["density"]))
