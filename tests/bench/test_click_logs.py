import csv
import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from streamcl.bench import click_logs
from streamcl.bench.click_logs import CRITEO, ITEMS, OPEN_BANDIT, WEIGHT, criteo, log_rows, open_bandit
from streamcl.bench.drive import Topic
from streamcl.bench.streams import LABEL, TIME, DataError, Dataset
from tests.bench.recorded import DATA

needs_pyarrow = pytest.mark.skipif(not click_logs.orc_installed(), reason="pyarrow comes with the extra bench")
needs_obd = pytest.mark.skipif(not (DATA / OPEN_BANDIT).is_file(), reason=f"no {OPEN_BANDIT}: set STREAMCL_DATA")
needs_criteo = pytest.mark.skipif(
    not all((DATA / path).is_file() for path in CRITEO), reason=f"no {CRITEO[0]}: set STREAMCL_DATA"
)


def bandit_file(path: Path, propensities: tuple[float, ...]) -> Path:
    affinities = {f"user-item_affinity_{item}": 3.0 if item == 7 else 0.0 for item in range(ITEMS)}
    users = {f"user_feature_{place}": f"u{place}" for place in range(4)}
    rows: list[dict[str, Any]] = [
        {
            "timestamp": f"2019-11-24 00:00:{n:02d}.500000+00:00",
            "item_id": item,
            "position": 1,
            "click": n % 2,
            "propensity_score": propensity,
            **users,
            **affinities,
        }
        for n, (item, propensity) in enumerate(zip((7, 9) * len(propensities), propensities, strict=False))
    ]
    with gzip.open(path, "wt") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_a_shown_item_has_its_affinity_and_the_weight_of_its_propensity(tmp_path: Path) -> None:
    data = open_bandit(bandit_file(tmp_path / "obd.csv.gz", (1 / ITEMS, 2 / ITEMS)))
    first, second = data.payloads
    assert (first["item"], first["affinity"], first["affinities"], first[LABEL]) == ("7", 3.0, {"7": 3.0}, 0)
    assert (second["item"], second["affinity"], second["affinities"], second[LABEL]) == ("9", 0.0, {"7": 3.0}, 1)
    assert [first[WEIGHT], second[WEIGHT]] == pytest.approx([1.0, 0.5])
    assert second[TIME] - first[TIME] == 1.0
    assert not {WEIGHT, "propensity", LABEL, TIME} & data.features.keys()


def test_the_worker_learns_with_the_weights_of_the_log(tmp_path: Path) -> None:
    data = open_bandit(bandit_file(tmp_path / "obd.csv.gz", (1 / ITEMS, 2 / ITEMS) * 20))
    plain = Dataset(data.name, data.features, data.payloads)
    model = {"model": {"kind": "logistic"}}
    assert Topic(data).config(model).events.weight == WEIGHT
    assert (Topic(data).run("a", model).scores != Topic(plain).run("b", model).scores).any()


def test_equal_propensities_of_the_uniform_policy_leave_scores_as_they_are(tmp_path: Path) -> None:
    data = open_bandit(bandit_file(tmp_path / "obd.csv.gz", (1 / ITEMS,) * 40))
    plain = Dataset(data.name, data.features, data.payloads)
    model = {"model": {"kind": "deepfm", "embedding_dim": 4, "hidden": [8]}}
    assert (Topic(data).run("a", model).scores == Topic(plain).run("b", model).scores).all()


@needs_obd
def test_the_open_bandit_log_is_what_it_is_known_to_be() -> None:
    data = log_rows("obd", DATA)
    times = [payload[TIME] for payload in data.payloads]
    assert len(times) == 10_000
    assert times == sorted(times)
    assert data.labels().sum() == 46
    assert {payload[WEIGHT] for payload in data.payloads} == {1.0}
    assert len({payload["item"] for payload in data.payloads}) == ITEMS
    assert data.first(10).weight == WEIGHT


@needs_criteo
@needs_pyarrow
def test_criteo_like_rows_are_what_they_are_known_to_be() -> None:
    data = log_rows("criteo", DATA)
    assert data.payloads == log_rows("criteo", DATA).payloads
    assert [payload[TIME] for payload in data.payloads] == np.arange(20_000).tolist()
    assert data.labels().sum() == 623
    assert len(data.features) == 13 + 26
    first = data.payloads[0]
    assert (first["i2"], first["c1"], first[LABEL]) == (901.0, 514771121641, 0)
    assert "i1" not in first  # an empty list: missing
    assert sum("c14" not in payload for payload in data.payloads) == 8358


@needs_pyarrow
def test_rows_of_several_files_come_in_file_order(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import orc

    paths = []
    for part in range(2):
        columns = {name: [[float(part)], []] for name in click_logs.NUMBERS}
        ids = {name: [[part], [5]] for name in click_logs.IDS}
        paths.append(tmp_path / f"part-{part}.orc")
        orc.write_table(pyarrow.table({**columns, **ids, "label": [[1.0], [0.0]]}), paths[-1])
    data = criteo(paths)
    assert [payload.get("i1") for payload in data.payloads] == [0.0, None, 1.0, None]
    assert data.labels().tolist() == [1, 0, 1, 0]


def test_a_missing_file_or_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=f"{OPEN_BANDIT}: no such file; --data DIR must name"):
        log_rows("obd", tmp_path)
    with pytest.raises(DataError, match=f"--data DIR must name the folder that holds {CRITEO[0]}"):
        log_rows("criteo", None)
    monkeypatch.setattr(click_logs, "orc_installed", lambda: False)
    with pytest.raises(DataError, match=r"an ORC file needs pyarrow; install streamcl\[bench\]"):
        criteo([tmp_path / "a.orc"])


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"broken\.gz"):
        open_bandit(tmp_path / "broken.gz")


@needs_pyarrow
def test_a_file_that_is_no_orc_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.orc").write_bytes(b"no orc")
    with pytest.raises(DataError, match=r"broken\.orc"):
        criteo([tmp_path / "broken.orc"])
