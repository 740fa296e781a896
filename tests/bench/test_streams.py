import gzip
from pathlib import Path

import numpy as np
import pytest

from streamcl.bench.quality import losses
from streamcl.bench.streams import (
    LABEL,
    ML_100K,
    SYNTHETIC,
    TIME,
    DataError,
    Dataset,
    elec,
    ml_100k,
    recorded,
    synthetic,
    with_side,
    yoochoose,
)
from tests.bench.recorded import DATA, needs_recorded


def zipped(path: Path, text: str) -> Path:
    with gzip.open(path, "wt") as file:
        file.write(text)
    return path


def test_ratings_come_in_time_order_and_ties_in_file_order(tmp_path: Path) -> None:
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
    rows = ["1\t10\t5\t30", "2\t20\t3\t10", "3\t30\t4\t20", "4\t40\t1\t10"]
    data = ml_100k(zipped(tmp_path / "ml.gz", "\n".join([header, *rows])))
    assert [payload["user"] for payload in data.payloads] == ["2", "4", "3", "1"]
    assert data.labels().tolist() == [0, 0, 1, 1]
    assert data.payloads[0] == {"user": "2", "item": "20", TIME: 10.0, LABEL: 0}


def test_prices_are_numbers_half_an_hour_apart(tmp_path: Path) -> None:
    data = elec(zipped(tmp_path / "e.gz", "period,nswprice,class\n0.0,0.5,1\n0.02,0.6,0"))
    assert data.features == {"period": "numeric", "nswprice": "numeric"}
    assert data.payloads[1] == {"period": 0.02, "nswprice": 0.6, TIME: 1800.0, LABEL: 0}


def test_a_missing_file_is_named_and_so_is_what_the_option_wants(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{ML_100K}: no such file; --data DIR must name the folder that holds"):
        recorded("ml-100k", tmp_path)
    with pytest.raises(DataError, match=f"--data DIR must name the folder that holds {ML_100K}"):
        recorded("ml-100k", None)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"broken\.gz"):
        elec(tmp_path / "broken.gz")


@needs_recorded
def test_ml_100k_is_what_it_is_known_to_be() -> None:
    data = recorded("ml-100k", DATA)
    times = [payload[TIME] for payload in data.payloads]
    assert len(times) == 100_000
    assert times == sorted(times)
    assert data.labels().mean() == 0.55375
    assert data.payloads[0] == {"user": "259", "item": "255", TIME: 874724710.0, LABEL: 1}


@needs_recorded
def test_elec_is_what_it_is_known_to_be() -> None:
    data = recorded("elec", DATA)
    labels = data.labels()
    assert len(labels) == 45_312
    assert np.mean(labels[1:] == labels[:-1]) == pytest.approx(0.8533, abs=5e-5)
    assert data.payloads[0]["nswprice"] == pytest.approx(0.056443)


def test_each_click_stands_among_items_that_were_not_clicked(tmp_path: Path) -> None:
    rows = [f"s{i % 7} {i % 50}" for i in range(1010)]
    data = yoochoose(zipped(tmp_path / "y.gz", "\n".join(rows)))
    assert len(data.payloads) == 50
    assert data.impression == 5
    for click, place in enumerate(range(0, 50, 5), 1000):
        shown = data.payloads[place : place + 5]
        assert len({payload["item"] for payload in shown}) == 5
        assert [payload["item"] for payload in shown if payload[LABEL]] == [str(click % 50)]
        assert {payload["session"] for payload in shown} == {f"s{click % 7}"}
        assert {payload["prev"] for payload in shown} == {str((click - 7) % 50)}


def test_a_session_s_first_click_has_none_before_it(tmp_path: Path) -> None:
    rows = [*(f"s{i % 7} {i % 50}" for i in range(1000)), "new 3", "new 4"]
    data = yoochoose(zipped(tmp_path / "y.gz", "\n".join(rows)))
    assert [payload["prev"] for payload in data.payloads] == [None] * 5 + ["3"] * 5


def test_the_place_of_a_click_tells_nothing(tmp_path: Path) -> None:
    rows = [f"s{i % 7} {i % 50}" for i in range(3000)]
    labels = yoochoose(zipped(tmp_path / "y.gz", "\n".join(rows))).labels().reshape(-1, 5)
    assert np.all(np.abs(labels.mean(axis=0) - 0.2) < 0.03)


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_a_synthetic_stream_repeats_and_each_seed_is_another(kind: str) -> None:
    assert synthetic(kind, 50, 0).payloads == synthetic(kind, 50, 0).payloads
    assert synthetic(kind, 50, 0).payloads != synthetic(kind, 50, 1).payloads


@pytest.mark.parametrize("kind", SYNTHETIC)
def test_the_best_loss_lies_below_that_of_the_base_rate(kind: str) -> None:
    data = synthetic(kind, 20_000, 0)
    labels = data.labels()
    assert data.best_losses is not None
    assert data.best_losses.mean() < losses(labels, np.full(len(labels), labels.mean())).mean() - 0.02


def test_concepts_recur_with_values_of_their_own() -> None:
    letters = [payload["f0"][0] for payload in synthetic("recurring", 8, 0).payloads]
    assert letters == list("AABBAABB")


def test_switching_is_invisible_in_the_values() -> None:
    assert all(payload["f0"].isdigit() for payload in synthetic("switching", 8, 0).payloads)


def test_an_unknown_kind_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(DataError, match="no synthetic stream 'cubic'; there are: stationary"):
        synthetic("cubic", 10, 0)


def test_the_first_events_keep_their_best_losses() -> None:
    data = synthetic("stationary", 10, 0)
    assert data.best_losses is not None
    first = data.first(3)
    assert first.best_losses is not None
    assert len(first.payloads) == len(first.best_losses) == 3
    assert len(list(first.messages())) == 3


def test_side_features_are_read_beside_the_ratings(tmp_path: Path) -> None:
    folder = tmp_path / "ml-100k"
    folder.mkdir()
    data = Dataset("ml-100k", {}, [{"user": "2", "item": "7", TIME: 1.0, LABEL: 1}])
    with pytest.raises(DataError, match=r"ml-100k\.user"):
        with_side(data, tmp_path)
    (folder / "ml-100k.user").write_text("id\tage\tgender\toccupation\tzip\n2\t53\tF\tother\t94043\n")
    (folder / "ml-100k.item").write_text("id\ttitle\tyear\tclass\n7\tX\t1995\tAction Thriller\n")
    [payload] = with_side(data, tmp_path).payloads
    assert (payload["age"], payload["gender"], payload["zip"], payload["year"]) == (53.0, "F", "9", "1995")
    assert payload["genres"] == ["Action", "Thriller"]
