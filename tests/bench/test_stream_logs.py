import math

import numpy as np
import pytest

from streamcl.bench import main, peers, run, stream_logs
from streamcl.bench.click_logs import NUMBERED, SHOWN, WEIGHT
from streamcl.bench.options import OptionError, Options
from streamcl.bench.presets import BEST_ON_LOG
from streamcl.bench.quality import Trace
from streamcl.bench.reproduced import measure
from streamcl.bench.streams import LABEL, TIME, Dataset

ROWS = [
    {
        **{f"i{n}": float(row % (n + 3)) for n in range(1, 14) if (row + n) % 5},
        **{f"c{n}": row % (3 * n) for n in range(1, 27) if (row + n) % 7},
        TIME: float(row),
        LABEL: int(row % 9 == 0),
    }
    for row in range(120)
]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """A few rows in the place of a log."""
    data = Dataset("criteo", NUMBERED, ROWS)
    monkeypatch.setattr(stream_logs, "log_rows", lambda *_: data)
    monkeypatch.setattr(stream_logs, "_vw_grids", lambda _: {"vw default tuned": ["-l .1", "-l .5"]})
    monkeypatch.setattr(stream_logs, "_river_grid", lambda _: ["intercept_init -2 alpha 0.1 l2 1"])
    return data


def test_ours_and_every_peer_are_judged_on_the_same_events(small: Dataset) -> None:
    report = run("stream", Options(stream="criteo", quick=True, seeds=2))
    names = [row.name for row in report.rows]
    assert names[:4] == [f"streamcl {kind}, seed {seed}" for kind in ("logistic", "deepfm") for seed in (0, 1)]
    assert {"constant rate", "no-change", "river logistic ftrl", "deepfm retrained every 2,000 rows"} <= set(names)
    assert all(row.values["events"] == 120 for row in report.rows if "events" in row.values)
    both = [float(str(row.values["auc"])) for row in report.rows[:2]]
    assert report.headline["auc"] == pytest.approx(np.mean(both))
    assert {"auc >= river logistic ftrl", "ne <= river logistic ftrl tuned"} <= {bar.name for bar in report.bars}
    assert "ne <= constant rate" in {bar.name for bar in report.aims}


def test_a_difference_lies_within_its_interval() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random(400) < 0.3).astype(float)
    good, bad = (
        Trace(name, np.clip(0.3 + a * (labels - 0.3), 0.05, 0.95)) for name, a in (("good", 0.6), ("bad", 0.1))
    )
    noisy = Trace("noisy", rng.random(400))
    rows = stream_logs.differences(labels, [good], [bad, noisy, good], quick=True)
    for row in rows:
        values = {name: float(str(value)) for name, value in row.values.items()}
        for metric in ("auc", "ne"):
            assert values[f"{metric}_lower"] <= values[f"{metric}_difference"] <= values[f"{metric}_upper"]
    assert float(str(rows[0].values["ne_upper"])) < 0
    assert rows[2].values["ne_lower"] == rows[2].values["ne_upper"] == 0.0


def test_a_tuned_peer_is_chosen_on_the_first_fifth_alone() -> None:
    labels = [1] * 20 + [0] * 80
    data = Dataset("x", {"a": "categorical"}, [{"a": "b", TIME: float(n), LABEL: y} for n, y in enumerate(labels)])
    peer = lambda name, part, score: Trace(name, np.full(len(part.payloads), float(score)))  # noqa: E731
    found = stream_logs.tuned("peer", data, peer, ["0.1", "nan", "0.9"])
    assert found.name == "peer: 0.9"
    assert len(found.scores) == 100


def test_peers_are_given_the_fields_that_ours_read() -> None:
    data = stream_logs.logged(Dataset("criteo", NUMBERED, ROWS))
    payload = data.payloads[3]
    river, line = peers.river_example(data.features, payload), peers.vw_line(data.features, payload)
    for name, kind in NUMBERED.items():
        value = payload.get(name)
        number = kind == "numeric" and value is not None
        assert (river[name] == value) if number else (river[f"{name}={value}"] == 1.0)
        assert f"|{name} x:{value}" in line if number else f"|{name} {value}" in line
    assert payload["i3"] == pytest.approx(math.log1p(float(ROWS[3]["i3"])), abs=1e-6)
    assert set(BEST_ON_LOG["criteo"]["features"]) == set(NUMBERED)
    assert set(BEST_ON_LOG["obd"]["features"]) == set(SHOWN)


def test_weights_of_the_uniform_policy_leave_the_figures_as_they_are(small: Dataset) -> None:
    data = Dataset("obd", NUMBERED, [{**row, WEIGHT: 1.0} for row in ROWS], weight=WEIGHT)
    trace = Trace("x", np.linspace(0.1, 0.9, len(ROWS)))
    plain = measure(trace, data.labels())
    found = stream_logs._ips(trace, data)
    assert found == {f"ips_{name}": pytest.approx(plain[name]) for name in ("auc", "ne", "log_loss")}
    assert stream_logs._ips(trace, small) == {}


def test_what_is_not_of_a_log_is_refused() -> None:
    with pytest.raises(OptionError, match="--preset: 'tuned' is none of best, default"):
        main("stream", Options(stream="obd", preset="tuned"))
    with pytest.raises(OptionError, match="--events: stream obd is read whole"):
        main("stream", Options(stream="obd", events=5))
