import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from river import metrics as _river_metrics

from streamcl.metrics.binary import Binary
from streamcl.metrics.calibration import decile_calibrations, expected_calibration_error, shift_logits, shifted
from streamcl.metrics.losses import log_loss, normalized_entropy
from streamcl.metrics.ranking import exact_auc

river_metrics: Any = _river_metrics  # typed only in parts

EXAMPLE = st.tuples(st.integers(0, 1), st.one_of(st.sampled_from([0.0, 0.5, 1.0]), st.floats(0, 1, width=32)))
Examples = list[tuple[int, float]]


def fed(examples: Examples, window: int, half_life: float = 10.0) -> Binary:
    metrics = Binary(window, half_life)
    for label, score in examples:
        metrics.add(np.array([label], np.float64), np.array([[score]], np.float32), np.ones(1))
    return metrics


def drawn(count: int, seed: int = 0) -> Examples:
    draws = np.random.default_rng(seed)
    scores = draws.beta(1, 3, count).astype(np.float32)
    return list(zip((draws.random(count) < scores).astype(int).tolist(), scores.tolist(), strict=True))


def by_definition(examples: Examples, before: Examples) -> dict[str, float]:
    """Every metric of `examples`, whose predecessors were `before`, by plain loops over everything."""
    if not examples:
        return {}
    labels, scores = zip(*examples, strict=True)
    found = {
        "log_loss": log_loss(labels, scores),
        "accuracy": sum((p >= 0.5) == bool(y) for y, p in examples) / len(examples),
        "base_rate": sum(labels) / len(labels),
        "ne": normalized_entropy(labels, scores),
        "auc": exact_auc(labels, scores),
        "calibration": sum(scores) / sum(labels) if any(labels) else math.nan,
    }
    chain = [label for label, _ in (before[-1:] + examples)]
    repeats = [a == b for a, b in pairwise(chain)]
    if repeats:
        found["no_change_accuracy"] = sum(repeats) / len(repeats)
    return {name: value for name, value in found.items() if math.isfinite(value)}


@given(st.lists(EXAMPLE, max_size=40), st.integers(1, 50))
def test_the_window_is_recomputed_from_its_examples_alone(examples: Examples, window: int) -> None:
    metrics = fed(examples, window).read()
    found = {k.removesuffix("_window"): v for k, v in metrics.items() if k.endswith("_window")}
    found.pop("ece", None)  # see below
    found.pop("ne_recalibrated", None)
    assert found == pytest.approx(by_definition(examples[-window:], examples[:-window]), rel=1e-9)


@given(st.lists(EXAMPLE, max_size=40))
def test_the_whole_stream_is_as_defined_and_auc_within_its_bound(examples: Examples) -> None:
    metrics, expected = fed(examples, 3).read(), by_definition(examples, [])
    auc, bound = expected.pop("auc", math.nan), metrics.pop("auc_bound", math.nan)
    assert metrics.pop("examples") == len(examples)
    np.testing.assert_allclose(metrics.pop("auc", math.nan), auc, atol=0 if math.isnan(bound) else bound + 1e-12)
    beside = ("_window", "_decayed", *(f"decile_calibration_{decile}" for decile in range(1, 11)))
    whole = {name: value for name, value in metrics.items() if not name.endswith(beside)}
    assert whole == pytest.approx(expected, rel=1e-9)


def test_log_loss_and_accuracy_equal_rivers() -> None:
    examples = [(label, min(max(score, 0.001), 0.999)) for label, score in drawn(2000)]
    losses, accuracy, metrics = river_metrics.LogLoss(), river_metrics.Accuracy(), fed(examples, 10).read()
    for label, score in examples:
        losses.update(label, float(np.float32(score)))
        accuracy.update(label, int(score >= 0.5))
    assert metrics["log_loss"] == pytest.approx(losses.get(), rel=1e-12)
    assert metrics["accuracy"] == accuracy.get()


def test_the_constant_base_rate_has_ne_one_calibration_one_and_auc_a_half() -> None:
    metrics = fed([(int(i % 4 == 0), 0.25) for i in range(400)], 100).read()
    for suffix in ("", "_window"):
        assert metrics[f"ne{suffix}"] == pytest.approx(1, abs=1e-12)
        assert metrics[f"calibration{suffix}"] == 1
        assert metrics[f"auc{suffix}"] == 0.5


@pytest.mark.parametrize(("label", "calibrated"), [(0, False), (1, True)])
def test_of_one_class_only_what_is_defined_is_there(label: int, calibrated: bool) -> None:
    metrics = fed([(label, 0.3)] * 5, 3).read()
    assert metrics["base_rate"] == label
    assert not {"ne", "ne_window", "auc", "auc_window", "auc_bound"} & metrics.keys()
    assert ("calibration" in metrics) == ("calibration_window" in metrics) == calibrated


def test_nothing_is_known_of_an_empty_stream() -> None:
    assert Binary(3, 1.0).read() == {"examples": 0}


def test_no_change_is_undefined_for_the_first_example() -> None:
    assert "no_change_accuracy" not in fed([(1, 0.3)], 3).read()
    assert fed([(1, 0.3), (1, 0.3), (0, 0.3)], 9).read()["no_change_accuracy_window"] == 0.5


def test_windowed_sums_do_not_drift() -> None:
    """A huge loss that has left the window leaves nothing behind, to the last bit."""
    tail = drawn(100)
    long, short = fed([(1, 0.0)] * 500 + tail, 100).read(), fed([(1, 0.0), *tail], 100).read()
    assert all(long[name] == short[name] for name in long if name.endswith("_window"))


@pytest.mark.parametrize("cut", [0, 1, 7, 50, 51, 199, 200])
def test_a_restored_binary_goes_on_bit_for_bit(cut: int) -> None:
    examples = drawn(200, seed=3)
    restored = Binary(50, 10.0)
    restored.load_state_dict(fed(examples[:cut], 50).state_dict())
    for label, score in examples[cut:]:
        served = np.array([score], np.float32)
        restored.add(np.array([label], np.float64), served[None], np.ones(1))
    assert restored.read() == fed(examples, 50).read()


@given(st.lists(EXAMPLE, max_size=40), st.sampled_from([0.5, 3.0, 1000.0]))
def test_decayed_metrics_weigh_each_example_by_how_long_ago_it_was(examples: Examples, half_life: float) -> None:
    found = fed(examples, 3, half_life).read()
    weights = [2.0 ** (-(len(examples) - 1 - i) / half_life) for i in range(len(examples))]
    weight = sum(weights)
    positives = sum(w * y for w, (y, _) in zip(weights, examples, strict=True))
    expected: dict[str, float] = {}
    if examples:
        loss = sum(w * log_loss([y], [p]) for w, (y, p) in zip(weights, examples, strict=True)) / weight
        expected |= {"log_loss": loss, "base_rate": positives / weight}
        if positives:
            expected["calibration"] = sum(w * p for w, (_, p) in zip(weights, examples, strict=True)) / positives
        if 0 < sum(y for y, _ in examples) < len(examples):
            rate = positives / weight
            expected["ne"] = loss / -(rate * math.log(rate) + (1 - rate) * math.log(1 - rate))
    decayed = {name.removesuffix("_decayed"): value for name, value in found.items() if name.endswith("_decayed")}
    assert decayed == pytest.approx(expected, rel=1e-9)


def test_decayed_over_a_half_life_without_end_is_the_whole_stream() -> None:
    found = fed(drawn(300), 10, 1e12).read()
    for name in ("log_loss", "ne", "calibration", "base_rate"):
        assert found[f"{name}_decayed"] == pytest.approx(found[name], rel=1e-9)


def test_the_window_s_calibration_error_and_deciles_are_those_of_its_examples() -> None:
    found, last = fed(drawn(300), 100).read(), drawn(300)[-100:]
    labels, scores = zip(*last, strict=True)
    assert found["ece_window"] == expected_calibration_error(labels, scores)
    deciles = {f"decile_calibration_{i}": c for i, c in enumerate(decile_calibrations(labels, scores), 1)}
    kept = {name: value for name, value in found.items() if name.startswith("decile")}
    assert kept == {name: value for name, value in deciles.items() if math.isfinite(value)}


def test_recalibrated_ne_forgives_a_shift_of_all_logits_and_nothing_else() -> None:
    """It is of the window, by the shift of the one before; until that is complete there is none."""
    right = drawn(4000, seed=1)
    moved = [(label, float(shifted([score], 1.0)[0])) for label, score in right]
    plain, off = fed(right, 2000).read(), fed(moved, 2000).read()
    assert off["ne_window"] > plain["ne_window"] + 0.1
    labels, scores = zip(*moved, strict=True)
    mended = shifted(scores[2000:], shift_logits(labels[:2000], scores[:2000]))
    assert off["ne_recalibrated_window"] == pytest.approx(normalized_entropy(labels[2000:], mended), rel=1e-6)
    assert off["ne_recalibrated_window"] == pytest.approx(plain["ne_recalibrated_window"], rel=1e-4)
    assert "ne_recalibrated_window" not in fed(moved[:3999], 2000).read()


@pytest.mark.parametrize("count", [3, 50, 70])
def test_a_snapshot_of_before_there_were_two_windows_goes_on(count: int) -> None:
    """What it holds is one window; decayed sums begin with the next example."""
    examples = drawn(200, seed=3)
    old = fed(examples[:count], 50).state_dict()
    ring = np.zeros((50, 4))
    held = np.roll(fed(examples[:count], 50)._window.columns().T[-50:], count if count > 50 else 0, axis=0)
    ring[: len(held)] = held
    old["window"] = {"ring": ring, "written": count}
    del old["decayed"]
    restored = Binary(50, 10.0)
    restored.load_state_dict(old)
    for label, score in examples[count:]:
        restored.add(np.array([label], np.float64), np.array([[score]], np.float32), np.ones(1))
    found, expected = restored.read(), fed(examples, 50).read()
    assert {k: v for k, v in found.items() if "decayed" not in k} == {
        k: v for k, v in expected.items() if "decayed" not in k
    }
    assert found["log_loss_decayed"] == pytest.approx(fed(examples[count:], 50).read()["log_loss_decayed"], rel=1e-12)
