from pathlib import Path

import numpy as np
import pytest

from streamcl.bench import plasticity_images, plasticity_regression, run
from streamcl.bench.options import OptionError, Options
from streamcl.bench.plasticity_learner import Method
from streamcl.bench.plasticity_methods import BACKPROP, CONTINUAL, compared, side_by_side
from streamcl.bench.plasticity_tasks import CHANGE_EVERY, SLOW_BITS, Images, SlowlyChanging
from streamcl.bench.streams import DataError
from tests.bench.test_report import assert_contract


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes of 5 x 5 images that are easy to tell apart."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 300)
    images = rng.integers(0, 30, (300, 5, 5))
    images.reshape(300, 25)[np.arange(300), labels] = 255
    np.savez(tmp_path / "mnist.npz", x=images.astype(np.uint8), y=labels)
    return tmp_path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    size = plasticity_images.Size(4, 50, 2, window=2)
    monkeypatch.setattr(plasticity_images, "PERMUTED", {"small": (size, size)})
    monkeypatch.setattr(plasticity_images, "LABELS", (size, size))
    monkeypatch.setattr(plasticity_images, "LOOKED_AT", 20)


def test_the_slow_bits_stay_for_a_region_and_the_others_are_fair() -> None:
    regions = SlowlyChanging(0).regions()
    first, second = next(regions), next(regions)
    for examples in (first, second):
        assert examples.inputs.shape == (CHANGE_EVERY, 20)
        assert (examples.inputs[:, :SLOW_BITS] == examples.inputs[0, :SLOW_BITS]).all()
        assert np.abs(examples.inputs[:, SLOW_BITS:].mean(axis=0) - 0.5).max() < 0.03
    assert (first.inputs[0, :SLOW_BITS] != second.inputs[0, :SLOW_BITS]).any()


def test_the_target_is_the_authors_net() -> None:
    stream = SlowlyChanging(1)
    examples = next(stream.regions())
    for x, y in zip(examples.inputs[:50], examples.targets[:50], strict=True):
        expected = float(stream.out_bias[0])
        for weights, bias, out in zip(stream.weights, stream.biases, stream.out_weights, strict=True):
            minus = (20 - weights.sum() + bias) / 2
            expected += out if (weights * x).sum() + bias > 0.7 * 21 - minus else 0.0
        assert y == expected
    assert len(np.unique(stream.target(np.random.default_rng(0).integers(0, 2, (999, 20)).astype(np.uint8)))) > 5


def test_a_stream_is_the_same_by_seed_and_another_by_another() -> None:
    one, same, other = (next(SlowlyChanging(seed).regions()) for seed in (3, 3, 4))
    assert (one.inputs == same.inputs).all()
    assert (one.targets == same.targets).all()
    assert (one.targets != other.targets).any()


def test_continual_backpropagation_keeps_what_backpropagation_loses() -> None:
    """The specification's gate on three of its ten seeds; `bench plasticity --quick` runs all."""
    methods = [plasticity_regression.METHODS[name] for name in (BACKPROP, CONTINUAL)]
    runs = side_by_side(lambda seed: plasticity_regression.measure(seed, methods, 2), range(3))
    gaps = [run.errors[BACKPROP][1] - run.errors[CONTINUAL][1] for run in runs]
    assert np.mean(gaps) > 0.15
    assert max(run.errors[CONTINUAL][1] for run in runs) < 0.87
    assert all(run.silent[BACKPROP][1] > run.silent[CONTINUAL][1] for run in runs)


def test_seeds_side_by_side_are_seeds_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plasticity_regression, "BIN", CHANGE_EVERY)
    methods = [Method(CONTINUAL, replacement_rate=1e-3)]
    one_by_one = [plasticity_regression.measure(seed, methods, 2) for seed in range(3)]
    together = side_by_side(lambda seed: plasticity_regression.measure(seed, methods, 2), range(3))
    for one, other in zip(one_by_one, together, strict=True):
        assert one.errors[CONTINUAL].tolist() == other.errors[CONTINUAL].tolist()


def test_regression_reports_every_method_and_its_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plasticity_regression, "BIN", CHANGE_EVERY)
    report = run("plasticity", Options(quick=True, seeds=2, events=2 * CHANGE_EVERY))
    assert_contract(report.to_json())
    assert [row.name for row in report.rows] == list(plasticity_regression.METHODS)
    ours = next(row.values for row in report.rows if row.name == CONTINUAL)
    assert ours["rise"] == pytest.approx(float(str(ours["mse_2"])) - float(str(ours["mse_1"])))
    assert "gain" not in report.rows[1].values
    assert "silent_last" not in report.rows[0].values
    assert len(report.bars) == 3
    assert all(len(curve.x) == 2 for curve in report.curves)


def test_a_method_is_run_beside_the_two_that_bars_are_about(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plasticity_regression, "BIN", CHANGE_EVERY)
    report = run("plasticity", Options(quick=True, seeds=1, events=1, method="l2 .01"))
    assert [row.name for row in report.rows] == [BACKPROP, CONTINUAL, "l2 .01"]
    with pytest.raises(OptionError, match="--method: 'l3' is none of linear, "):
        run("plasticity", Options(quick=True, method="l3"))


def test_options_that_a_task_would_ignore_are_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="--data: bench plasticity --task slowly-changing-regression has no use"):
        run("plasticity", Options(data=folder))
    with pytest.raises(OptionError, match="--task: 'mnist' is none of slowly-changing-regression, "):
        run("plasticity", Options(task="mnist"))


@pytest.mark.usefixtures("tiny")
def test_permuted_images_are_judged_task_by_task(folder: Path) -> None:
    report = run("plasticity", Options(task="permuted-mnist", data=folder))
    assert_contract(report.to_json())
    assert [row.name for row in report.rows] == list(plasticity_images.METHODS)
    assert [bar.name for bar in report.bars][:2] == ["backprop falls, points", "continual_backprop falls, points"]
    assert report.config["widths"] == [25, 100, 100, 100, 10]
    values = {row.name: row.values for row in report.rows}[CONTINUAL]
    assert values["fall"] == pytest.approx(float(str(values["first"])) - float(str(values["last"])))
    assert {len(curve.x) for curve in report.curves} == {4}


@pytest.mark.usefixtures("tiny")
def test_permuted_labels_promise_nothing(folder: Path) -> None:
    report = run("plasticity", Options(task="label-permuted", data=folder, method=CONTINUAL))
    assert report.bars == []
    assert len(report.aims) == 1
    assert [row.name for row in report.rows] == [BACKPROP, CONTINUAL]


def test_a_task_is_a_permutation_of_pixels_or_of_labels(folder: Path) -> None:
    images = Images(folder)
    first, second = (task for task, _ in zip(images.permuted(0, 120), range(2), strict=False))
    assert sorted(first.columns) == list(range(25))
    assert (first.columns != second.columns).any()
    assert len(set(first.order.tolist())) == 120
    assert (first.targets == images.examples.targets).all()
    renamed = next(images.label_permuted(0, 120))
    assert (renamed.columns == np.arange(25)).all()
    pairs = set(zip(images.examples.targets.tolist(), renamed.targets.tolist(), strict=True))
    assert len(pairs) == len({new for _, new in pairs}) == 10


def test_images_that_are_not_there_or_not_images_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--data DIR must name the folder that holds mnist\.npz"):
        Images(None)
    with pytest.raises(DataError, match=r"mnist\.npz: no arrays x"):
        Images(tmp_path)
    np.savez(tmp_path / "mnist.npz", x=np.zeros((3, 4)), y=np.zeros(3))
    with pytest.raises(DataError, match=r"want uint8 \(N, H, W\)"):
        Images(tmp_path)


def test_differences_are_paired() -> None:
    ours, theirs = np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.0, 2.0])
    found = compared("gain", ours, theirs)
    assert found["gain"] == pytest.approx(4 / 3)
    assert found["gain_se"] == pytest.approx(1 / 3)
    assert 0.0 < found["gain_p"] < 0.1
