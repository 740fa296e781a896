import gzip
from pathlib import Path

import pytest

from streamcl.bench import run
from streamcl.bench.options import Options
from streamcl.bench.streams import DataError
from tests.bench.test_report import assert_contract


def test_bounded_tables_are_measured_beside_unbounded_ones(tmp_path: Path) -> None:
    (tmp_path / "yoochoose").mkdir()
    for period, sessions in ((0, range(400)), (1, range(400, 700))):
        clicks = "\n".join(f"s{n} i{(n * n + step) % 37}" for n in sessions for step in range(2))
        (tmp_path / f"yoochoose/period_{period}.txt.gz").write_bytes(gzip.compress(clicks.encode()))
    report = run("stream", Options(quick=True, task="admission", data=tmp_path, events=5 * 200))
    assert_contract(report.to_json())
    assert [row.name for row in report.rows] == ["unbounded", "bounded"]
    assert [row.values["events"] for row in report.rows] == [5 * 200] * 2
    assert report.rows[0].values["session_rows"] == 100
    assert [bar.name for bar in (*report.bars, *report.aims)] == ["auc lost by bounds", "share of rows saved"]


def test_the_folder_of_the_clicks_has_to_be_named() -> None:
    with pytest.raises(DataError, match="--data DIR"):
        run("stream", Options(task="admission"))
