import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from river import metrics as _river_metrics

from streamcl.metrics.binary import Binary
from streamcl.metrics.multiclass import Multiclass

river_metrics: Any = _river_metrics  # typed only in parts

Examples = list[tuple[int, NDArray[np.float32]]]


def drawn(count: int, classes: int = 4, seed: int = 0) -> Examples:
    draws = np.random.default_rng(seed)
    served = draws.dirichlet(np.ones(classes), count).astype(np.float32)
    return [(int(draws.choice(classes, p=p / p.sum())), p) for p in served]


def fed(examples: Examples, window: int, classes: int = 4) -> Multiclass:
    metrics = Multiclass(window, classes)
    for label, served in examples:
        metrics.add(np.array([label], np.float64), served[None], np.ones(1))
    return metrics


def by_definition(examples: Examples, before: Examples) -> dict[str, float]:
    labels = [label for label, _ in examples]
    shares = [labels.count(c) / len(labels) for c in set(labels)]
    loss = sum(-math.log(p[y]) for y, p in examples) / len(examples)
    chain = [label for label, _ in (before[-1:] + examples)]
    repeats = [a == b for a, b in pairwise(chain)]
    return {
        "log_loss": loss,
        "ne": loss / -sum(share * math.log(share) for share in shares),
        "accuracy": sum(p.argmax() == y for y, p in examples) / len(examples),
        "no_change_accuracy": sum(repeats) / len(repeats),
    }


@pytest.mark.parametrize(("count", "window"), [(30, 50), (50, 50), (51, 50), (400, 50)])
def test_whole_stream_and_window_are_as_defined(count: int, window: int) -> None:
    examples = drawn(count)
    windowed = by_definition(examples[-window:], examples[:-window])
    expected = by_definition(examples, []) | {f"{name}_window": value for name, value in windowed.items()}
    assert fed(examples, window).read() == pytest.approx(expected | {"examples": count}, rel=1e-6)


def test_log_loss_and_accuracy_equal_rivers() -> None:
    examples = drawn(500, seed=1)
    losses, accuracy, metrics = river_metrics.CrossEntropy(), river_metrics.Accuracy(), fed(examples, 10).read()
    for label, served in examples:
        losses.update(label, dict(enumerate(served.tolist())))
        accuracy.update(label, int(served.argmax()))
    assert metrics["log_loss"] == pytest.approx(losses.get(), rel=1e-6)
    assert metrics["accuracy"] == accuracy.get()


def test_two_classes_are_the_binary_case() -> None:
    examples = drawn(300, classes=2)
    two, binary = fed(examples, 100, classes=2).read(), Binary(100, 10.0)
    labels, served = zip(*examples, strict=True)
    binary.add(np.array(labels, np.float64), np.array(served)[:, 1:], np.ones(len(labels)))
    one = binary.read()
    assert two == pytest.approx({name: one[name] for name in two}, rel=1e-5)


def test_one_class_alone_has_no_ne() -> None:
    metrics = fed([(2, np.full(4, 0.25, np.float32))] * 3, 5).read()
    assert not {"ne", "ne_window"} & metrics.keys()
    assert metrics["no_change_accuracy"] == 1


def test_nothing_is_known_of_an_empty_stream() -> None:
    assert Multiclass(3, 4).read() == {"examples": 0}


@pytest.mark.parametrize("label", [-1.0, 4.0, 1.5, math.nan, math.inf])
def test_a_label_that_is_no_class_has_no_loss(label: float) -> None:
    assert math.isnan(Multiclass(3, 4).loss(label, np.full(4, 0.25, np.float32)))


@pytest.mark.parametrize("cut", [0, 1, 50, 51, 120])
def test_a_restored_multiclass_goes_on_bit_for_bit(cut: int) -> None:
    examples = drawn(120, seed=3)
    restored = Multiclass(50, 4)
    restored.load_state_dict(fed(examples[:cut], 50).state_dict())
    for label, served in examples[cut:]:
        restored.add(np.array([label], np.float64), served[None], np.ones(1))
    assert restored.read() == fed(examples, 50).read()
