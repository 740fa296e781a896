import gzip
from pathlib import Path

import numpy as np
import pytest

from streamcl.bench.continual_course import Course
from streamcl.bench.continual_recommender import BACK, DELAY, DRIFT_EVERY, USER_SHARE, USERS, World
from streamcl.bench.continual_run import log_losses
from streamcl.bench.continual_streams import PAIRS, STREAMS, digits, pooled
from streamcl.bench.quality import entropy
from streamcl.bench.streams import DataError
from streamcl.config import Config
from streamcl.features import Featurizer
from tests.bench.continual_data import tiny_course
from tests.bench.recorded import DATA, needs_recorded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files like MNIST's and scikit-learn's digits: of the former each class has a pixel of its own."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 2400)
    x = rng.integers(0, 30, (2400, 28, 28))
    x.reshape(2400, 784)[np.arange(2400), 30 * y] = 255
    images = x.astype(np.uint8)
    np.savez(tmp_path / "mnist.npz", x=images[:2000], y=y[:2000], xt=images[2000:], yt=y[2000:])
    table = np.column_stack([rng.integers(0, 17, (500, 64)), np.arange(500) % 10])
    with gzip.open(tmp_path / "digits.csv.gz", "wt") as file:
        np.savetxt(file, table, delimiter=",", fmt="%d")
    return tmp_path


def same(one: Course, other: Course) -> bool:
    pairs = [(one.rows, other.rows), *zip(one.held_out, other.held_out, strict=True)]
    return all(
        np.array_equal(a.labels, b.labels)
        and np.array_equal(a.dense, b.dense)
        and np.array_equal(a.categories, b.categories)
        for a, b in pairs
    )


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "elec2"])
def test_a_stream_is_the_same_by_seed_and_another_by_another(name: str, folder: Path) -> None:
    first, again, other = (STREAMS[name](folder, seed, True) for seed in (3, 3, 4))
    assert same(first, again)
    assert not same(first, other)
    assert len(first.segments) == len(first.rows)
    assert (np.diff(first.segments) >= 0).all()


@pytest.mark.parametrize("name", [name for name in STREAMS if name != "elec2"])
def test_a_stream_fits_its_configuration(name: str, folder: Path) -> None:
    course = STREAMS[name](folder, 0, True)
    layout = Featurizer(Config.parse(course.config({"replay": {"retention": "reservoir"}}, 0))).layout
    first = course.rows.encoded(layout)[0]
    assert first.dense.shape == (len(layout.numerics),)
    assert first.ids.shape == first.weights.shape == (len(layout.fields),)


def test_classes_come_in_pairs_each_example_once_and_none_is_held_out(folder: Path) -> None:
    course = STREAMS["split-digits"](folder, 0, False)
    assert course.source == "scikit-learn's digits"
    for segment, pair in enumerate(PAIRS):
        assert set(course.rows.labels[course.segments == segment]) == set(pair)
        assert set(course.held_out[segment].labels) == set(pair)
    assert len(course.rows) == 400  # a fifth of each class is held out
    assert [len(rows) for rows in course.held_out] == [20] * 5
    rows = np.concatenate([course.rows.dense, *(rows.dense for rows in course.held_out)])
    assert len(np.unique(rows, axis=0)) == 500
    assert (rows.min(), rows.max()) == (0.0, 1.0)


def test_without_scikit_learns_digits_mnists_stand_in_and_say_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "digits.csv.gz").unlink()
    monkeypatch.setattr("streamcl.bench.continual_streams.find_spec", lambda _name: None)
    images = digits(folder, 0)
    assert images.source == "MNIST, averaged to 8 x 8"
    assert images.x.shape[1] == 64
    assert len(images.x) + len(images.test_x) == 1797
    with pytest.raises(DataError, match=r"mnist\.npz"):
        digits(None, 0)


def test_pooling_keeps_the_sum_and_the_place() -> None:
    image = np.zeros((1, 28, 28), np.float32)
    image[0, 2, 6] = 16.0  # with a border of 2 in the second row and the third column of squares
    small = pooled(image.reshape(1, -1)).reshape(8, 8)
    assert small[1, 2] == 1.0
    assert small.sum() == 1.0


def test_a_permuted_task_has_the_pixels_of_the_same_images_in_other_places(folder: Path) -> None:
    course = STREAMS["permuted-mnist"](folder, 0, True)
    assert np.bincount(course.segments).tolist() == [300] * 4
    first, second = course.held_out[:2]
    assert np.array_equal(first.labels, second.labels)
    assert np.array_equal(np.sort(first.dense, axis=1), np.sort(second.dense, axis=1))
    assert not np.array_equal(first.dense, second.dense)


def test_the_recommenders_labels_have_their_chances_and_none_beats_those() -> None:
    course = STREAMS["recommender"](None, 0, False)
    chances, labels = course.chances, course.rows.labels
    assert chances is not None
    assert course.delay == DELAY
    assert course.start == DRIFT_EVERY
    # the mean of label - chance has deviation sqrt(mean p (1 - p) / N): four of them
    deviation = np.sqrt((chances * (1 - chances)).mean() / len(labels))
    assert abs((labels - chances).mean()) < 4 * deviation
    best = log_losses(labels, chances[:, None])
    assert best.mean() < log_losses(labels, np.clip(chances + 0.05, 0, 1)[:, None]).mean()
    assert 0.15 < entropy(labels) - best.mean() < 0.3  # nats that a constant regrets: room to learn something


def test_items_and_users_come_alike_often() -> None:
    course = STREAMS["recommender"](None, 1, False)
    for column, count in ((0, 60), (1, 50)):
        share = np.bincount(course.rows.categories[:, column], minlength=count) / len(course.rows)
        # a share 1/count of 16,000 draws has deviation sqrt(1/count/16,000): five of them
        assert np.abs(share - 1 / count).max() < 5 * np.sqrt(1 / count / len(course.rows))


def test_a_drift_gives_some_users_another_taste_and_some_of_them_the_one_before() -> None:
    rng = np.random.default_rng(0)
    world, back, switched = World.first(rng), 0, 0
    for _ in range(200):
        after = world.drifted(rng)
        moved = (after.tastes != world.tastes).any(axis=1)
        assert moved.sum() == round(USER_SHARE * USERS)
        assert np.array_equal(after.before[moved], world.tastes[moved])
        assert (after.trends != world.trends).sum() == 12
        back += int((after.tastes[moved] == world.before[moved]).all(axis=1).sum())
        switched += int(moved.sum())
        world = after
    # four deviations of a share of 2,400 draws
    assert abs(back / switched - BACK) < 4 * np.sqrt(BACK * (1 - BACK) / switched)


@pytest.mark.parametrize("name", ["recurring-sea", "recurring-agrawal"])
def test_the_first_concept_comes_back_and_the_one_between_contradicts_it(name: str) -> None:
    course = STREAMS[name](None, 0, True)
    assert course.drifts == (1000, 2000)
    assert np.bincount(course.segments).tolist() == [1000] * 3
    x, y = course.rows.dense, course.rows.labels
    if name == "recurring-sea":
        says = [x[:, 0] + x[:, 1] > 9.5, x[:, 0] + x[:, 1] > 7.0, x[:, 0] + x[:, 1] > 9.5]
        agrees = [float((says[s] == (y > 0.5))[course.segments == s].mean()) for s in range(3)]
        agrees = [max(share, 1 - share) for share in agrees]
        # a tenth of the labels is turned; four deviations of a share of 1,000 draws
        assert all(abs(share - 0.9) < 4 * np.sqrt(0.09 / 1000) for share in agrees)
    assert 0.2 < y.mean() < 0.8


@needs_recorded
def test_elec2_is_in_its_order_and_no_change_is_right_in_85_per_cent() -> None:
    course = STREAMS["elec2"](DATA, 0, False)
    labels = course.rows.labels
    assert len(labels) == 45_312
    assert np.mean(labels[1:] == labels[:-1]) == pytest.approx(0.853, abs=5e-4)


def test_a_recipe_takes_the_streams_memory_unless_it_has_its_own() -> None:
    course = tiny_course(0)
    assert "replay" not in course.config({}, 0)
    assert course.config({"replay": {"retention": "recency"}}, 0)["replay"] == {
        "retention": "recency",
        "capacity": 50,
        "per_event": 5,
    }
    own = course.config({"replay": {"retention": "recency", "capacity": 7}}, 0)["replay"]
    assert own["capacity"] == 7
