"""What Prometheus and the kubelet see of a worker, over real HTTP."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import httpx
import pytest
from msgspec.structs import replace
from prometheus_client.parser import text_string_to_metric_families as parse

from deploy.tools import ToolError, tool
from streamcl import telemetry
from streamcl.config import Config
from streamcl.drift import DriftDetector
from streamcl.readings import BOUNDARIES, LAYERS, PARTS, PERCENTILES, QUALITY, STAGES
from streamcl.records import DeadLetter, Fate, Origin, Record, Signal, Stream, Turn
from streamcl.stations import Drift
from streamcl.telemetry import FATES, REASONS, Telemetry, TelemetryError
from tests.components import lack
from tests.metrics.sliced import outcome

EVENTS_0 = Stream("events", 0)
READINGS = {
    "log_loss": 0.5,
    "log_loss_window": 0.25,
    "auc": 0.75,
    "tickets": 3.0,
    "watermark_s": 99.5,
    "drift_mean_loss": 0.4,
    "drift_alarms": 2.0,
}

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def settings(port: int) -> Config:
    data = {
        "name": "shop",
        "events": {"url": "memory://b/views", "label": "y"},
        "features": {"user": "categorical"},
        "telemetry": {"port": port},
    }
    return Config.parse(data)


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture
def watching() -> Iterator[tuple[Telemetry, httpx.Client]]:
    with closing(Telemetry(settings(free_port()))) as watcher:
        url = watcher.start()
        assert url is not None
        with httpx.Client(base_url=url) as client:
            yield watcher, client


def turn(records: int = 4) -> Turn:
    origin = Origin("events", 0, 7)
    return Turn(
        records=records,
        position={EVENTS_0: 11},
        dead_letters=(DeadLetter(Record(origin, "views", 0.0, b"{"), "undecodable", "not JSON"),),
        signals=(Signal("drift", "loss", origin), Signal("clock", "day", origin)),
        counts={"predicted": 3, "joined": 2, "dead_letter": 1},
    )


def scrape(client: httpx.Client) -> Series:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    return {(s.name, frozenset(s.labels.items())): s.value for family in parse(response.text) for s in family.samples}


def value(series: Series, name: str, **labels: str) -> float:
    return series[f"streamcl_{name}", frozenset(labels.items())]


def test_what_the_drift_detector_says_is_explained() -> None:
    said = DriftDetector(Drift()).read().keys()
    assert said - {"drift_alarms"} <= PARTS.keys()  # alarms are a counter by source


def test_a_turn_is_counted_by_fate_reason_and_source(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    for _ in range(2):
        watcher.observe(turn(), seconds=0.02, lag={EVENTS_0: 5}, readings=READINGS)
    series = scrape(client)
    assert value(series, "events_consumed_total") == 8
    assert value(series, "events_total", fate="predicted") == 6
    assert value(series, "events_total", fate="joined") == 4
    assert value(series, "dead_letters_total", reason="undecodable") == 2
    assert value(series, "drift_alarms_total", source="loss") == 2
    assert value(series, "turn_seconds_count") == 2
    assert value(series, "turn_seconds_bucket", le="0.025") == 2
    assert value(series, "position", input="events", partition="0") == 11
    assert value(series, "lag_records", input="events", partition="0") == 5


def test_how_late_labels_are_is_a_histogram_of_those_that_were_joined(
    watching: tuple[Telemetry, httpx.Client],
) -> None:
    watcher, client = watching
    fates = [(Fate.JOINED, 0.5), (Fate.JOINED, 30.0), (Fate.LATE, 7200.0), (Fate.EXPIRED, 1800.0), (Fate.INLINE, 0.0)]
    told = [replace(outcome(1.0, 0.5), fate=fate, delay_s=delay_s) for fate, delay_s in fates]
    watcher.observe(replace(turn(), outcomes=tuple(told)), seconds=0.02, lag={}, readings={"join_hit_ratio": 0.75})
    series = scrape(client)
    assert value(series, "label_delay_seconds_count") == 3
    assert value(series, "label_delay_seconds_sum") == 7230.5
    assert value(series, "label_delay_seconds_bucket", le="1.0") == 1
    assert value(series, "label_delay_seconds_bucket", le="60.0") == 2
    assert value(series, "join_hit_ratio") == 0.75


def test_readings_become_gauges_and_the_window_a_label(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    watcher.observe(turn(), seconds=0.02, lag={}, readings=READINGS | {"lag_records": 5.0, "dormant_ratio": 0.1})
    series = scrape(client)
    assert value(series, "log_loss", window="whole") == 0.5
    assert value(series, "log_loss", window="recent") == 0.25
    assert value(series, "auc", window="whole") == 0.75
    assert value(series, "tickets") == 3
    assert value(series, "watermark_timestamp_seconds") == 99.5
    assert value(series, "drift_loss_mean") == 0.4
    assert not any(name == "streamcl_drift_alarms" for name, _ in series)
    assert value(series, "dormant_ratio") == 0.1


def test_what_decays_is_a_window_and_a_tenth_of_the_scores_a_label(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    readings = {"ne_decayed": 0.75, "ne_recalibrated_window": 0.5, "ece_window": 0.25, "decile_calibration_10": 2.0}
    readings |= {"base_decile_calibration_1": 3.0, "task_like.decile_calibration_2": 4.0}
    watcher.observe(turn(), seconds=0.02, lag={}, readings=readings)
    series = scrape(client)
    assert value(series, "ne", window="decayed") == 0.75
    assert value(series, "ne_recalibrated", window="recent") == 0.5
    assert value(series, "ece", window="recent") == 0.25
    assert value(series, "decile_calibration", decile="10") == 2
    assert value(series, "base_decile_calibration", decile="1") == 3
    assert value(series, "task_decile_calibration", task="like", decile="2") == 4


def test_a_reading_that_became_undefined_leaves_no_stale_series(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    watcher.observe(turn(), seconds=0.02, lag={}, readings=READINGS)
    watcher.observe(turn(), seconds=0.02, lag={}, readings={"log_loss": 0.5})
    series = scrape(client)
    assert not any(name == "streamcl_auc" for name, _ in series)
    assert value(series, "log_loss", window="whole") == 0.5


def test_a_turn_without_readings_or_lag_keeps_the_last_ones(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    watcher.observe(turn(), seconds=0.02, lag={EVENTS_0: 5}, readings=READINGS)
    watcher.observe(turn(), seconds=0.02, lag={}, readings={})
    series = scrape(client)
    assert value(series, "tickets") == 3
    assert value(series, "lag_records", input="events", partition="0") == 5


def test_a_negative_lag_reads_as_none(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    watcher.observe(turn(), seconds=0.0, lag={EVENTS_0: -3}, readings={})
    assert value(scrape(client), "lag_records", input="events", partition="0") == 0


def test_what_may_be_incremented_exists_at_zero_from_the_start(watching: tuple[Telemetry, httpx.Client]) -> None:
    series = scrape(watching[1])
    assert {value(series, "events_total", fate=fate) for fate in FATES} == {0}
    assert {value(series, "dead_letters_total", reason=reason) for reason in REASONS} == {0}
    assert {value(series, "checkpoint_restores_total", result=r) for r in ("ok", "damaged", "none")} == {0}
    assert value(series, "drift_alarms_total", source="loss") == 0
    assert value(series, "checkpoint_damaged_total") == value(series, "events_consumed_total") == 0
    assert value(series, "ready") == 0


def test_an_idle_turn_is_no_sample_of_turn_seconds(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    watcher.observe(turn(records=0), seconds=0.1, lag={}, readings={})
    assert value(scrape(client), "turn_seconds_count") == 0


def test_checkpoints_and_restores_are_told(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    began = value(scrape(client), "checkpoint_last_success_timestamp_seconds")
    watcher.restored(0, "none")
    watcher.restored(2, "ok")
    watcher.restored(0, "ok")
    watcher.checkpointed(0.3, 4096)
    series = scrape(client)
    assert value(series, "checkpoint_restores_total", result="none") == 1
    assert value(series, "checkpoint_restores_total", result="damaged") == 1
    assert value(series, "checkpoint_restores_total", result="ok") == 1
    assert value(series, "checkpoint_damaged_total") == 2
    assert value(series, "checkpoint_seconds_sum") == pytest.approx(0.3)
    assert value(series, "checkpoint_bytes") == 4096
    assert value(series, "checkpoint_last_success_timestamp_seconds") >= began > 1.6e9


def test_every_series_is_ours_or_the_process_s_and_no_label_holds_an_id(
    watching: tuple[Telemetry, httpx.Client],
) -> None:
    watcher, client = watching
    readings = dict.fromkeys([*QUALITY, *(f"{name}_window" for name in QUALITY), *PARTS], 0.5)
    readings |= {f"error_memory_{stage}_{name}": 0.5 for stage in range(2) for name in STAGES}
    readings |= {f"layer_{layer}_{name}": 0.5 for layer in range(2) for name in LAYERS}
    readings |= {f"boundary_{boundary}_{name}": 0.5 for boundary in range(2) for name in BOUNDARIES}
    readings |= {f"layer_{layer}_{name}_p{p}": 0.5 for layer in range(2) for name in PERCENTILES for p in (10, 90)}
    watcher.observe(turn(), seconds=0.02, lag={EVENTS_0: 5}, readings=readings)
    series = scrape(client)
    labels = {name for _, pairs in series for name, _ in pairs}
    assert all(name.startswith(("streamcl_", "process_")) for name, _ in series)
    assert labels <= {
        "fate",
        "reason",
        "source",
        "result",
        "cause",
        "input",
        "partition",
        "window",
        "le",
        "version",
        "python",
        "torch",
        "stage",
        "layer",
        "boundary",
        "percentile",
    }
    assert value(series, "error_memory_lambda", stage="1") == 0.5
    assert value(series, "boundary_signals", boundary="1") == 0.5
    assert value(series, "base_log_loss", window="recent") == 0.5


def test_a_dynamic_table_s_readings_have_its_field_as_a_label(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    readings = {"table:user:rows": 4.0, "table:user.id:evicted:ttl": 5.0, "table:user.id:evicted:lru": 6.0}
    watcher.observe(turn(), seconds=0.02, lag={}, readings=readings)
    series = scrape(client)
    assert value(series, "table_rows", field="user") == 4
    assert value(series, "table_evicted", field="user.id", reason="ttl") == 5
    assert value(series, "table_evicted", field="user.id", reason="lru") == 6


def test_a_value_of_a_field_is_a_label_whatever_is_in_it(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    values = ["ios", "other", 'a:b"c\\', "two\nlines", "{}"]
    readings = {f"segment:device.os:{value}:{name}": 0.5 for value in values for name in ("auc", "log_loss", "events")}
    watcher.observe(turn(), seconds=0.02, lag={}, readings=readings)
    series = scrape(client)
    for name in ("segment_auc", "segment_log_loss", "segment_events"):
        assert {(dict(pairs)["field"], dict(pairs)["value"]) for at, pairs in series if at == f"streamcl_{name}"} == {
            ("device.os", each) for each in values
        }


def test_how_lists_are_ranked_has_k_as_a_label(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    readings = {"ranking_ndcg_at_5": 0.5, "ranking_recall_at_20": 0.25, "ranking_lists": 7.0, "gauc_window": 0.75}
    watcher.observe(turn(), seconds=0.02, lag={}, readings=readings | {"ranking_left_out": 0.125})
    series = scrape(client)
    assert value(series, "ranking_ndcg", k="5") == 0.5
    assert value(series, "ranking_recall", k="20") == 0.25
    assert value(series, "ranking_closed_lists") == 7
    assert value(series, "ranking_left_out") == 0.125
    assert value(series, "gauc", window="recent") == 0.75


def test_a_layer_s_readings_are_one_family_with_a_text_and_a_label(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    readings = {"layer_0_dormant_ratio": 0.25, "layer_11_dormant_ratio": 0.5, "layer_1_unit_age_steps_p90": 7.0}
    readings |= {"layer_0_of_some_rule": 3.0, "gradient_norm": 2.0, "player_0_x": 1.0}
    watcher.observe(turn(), seconds=0.02, lag={}, readings=readings)
    series, text = scrape(client), client.get("/metrics").text
    assert value(series, "dormant_ratio", layer="0") == 0.25
    assert value(series, "dormant_ratio", layer="11") == 0.5
    assert value(series, "unit_age_steps", layer="1", percentile="90") == 7
    assert value(series, "of_some_rule", layer="0") == 3
    assert value(series, "gradient_norm") == 2
    assert value(series, "player_0_x") == 1
    assert f"# HELP streamcl_dormant_ratio {LAYERS['dormant_ratio']}" in text
    assert text.count("# TYPE streamcl_dormant_ratio gauge") == 1
    assert not any(name.startswith("streamcl_layer_") for name, _ in series)


def test_layers_of_several_shards_are_told_apart() -> None:
    config = settings(0)
    watcher = Telemetry(config.model_copy(update={"shard": config.shard.model_copy(update={"count": 2})}))
    for shard in (0, 1):
        readings = {"layer_0_dead_ratio": 0.25 + shard, "error_memory_0_lambda": 0.5 + shard}
        watcher.observe(turn(), seconds=0.0, lag={}, readings=readings, shard=shard)
    found = watcher.registry.get_sample_value
    assert found("streamcl_dead_ratio", {"layer": "0", "shard": "1"}) == 1.25
    assert found("streamcl_dead_ratio", {"layer": "0", "shard": "0"}) == 0.25
    assert found("streamcl_error_memory_lambda", {"stage": "0", "shard": "1"}) == 1.5
    watcher.left(1)
    assert found("streamcl_dead_ratio", {"layer": "0", "shard": "1"}) is None


def test_ready_is_a_503_with_its_reason_until_the_worker_is(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    assert client.get("/readyz").status_code == 503
    watcher.ready(False, "repeating the logged order")
    assert client.get("/readyz").json() == {"ok": False, "reason": "repeating the logged order"}
    watcher.ready(True)
    assert client.get("/readyz").status_code == 200
    assert value(scrape(client), "ready") == 1


@pytest.mark.parametrize("path", ["/livez", "/healthz"])
def test_live_means_that_the_loop_turned_or_polled_idle(
    watching: tuple[Telemetry, httpx.Client], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    watcher, client = watching
    assert client.get(path).status_code == 200
    monkeypatch.setattr(telemetry, "LIVE_S", -1.0)
    response = client.get(path)
    assert response.status_code == 503
    assert "has not turned" in response.json()["reason"]
    monkeypatch.undo()
    watcher.observe(turn(records=0), seconds=0.1, lag={}, readings={})
    assert client.get(path).status_code == 200


def test_port_0_switches_it_off() -> None:
    with closing(Telemetry(settings(0))) as watcher:
        assert watcher.start() is None


def test_two_workers_in_one_process_do_not_share_numbers() -> None:
    first, second = Telemetry(settings(0)), Telemetry(settings(0))
    first.observe(turn(), seconds=0.0, lag={}, readings={})
    assert second.registry.get_sample_value("streamcl_events_consumed_total") == 0


def test_an_address_in_use_is_an_error_that_names_it() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(TelemetryError, match=f"127.0.0.1:{port}"):
            Telemetry(settings(port)).start()


def test_close_ends_the_server() -> None:
    watcher = Telemetry(settings(free_port()))
    url = watcher.start()
    watcher.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/livez")


def test_few_modules_import_the_client() -> None:
    package = Path(telemetry.__file__).parent
    users = {path.name for path in package.rglob("*.py") if "prometheus_client" in path.read_text()}
    assert users == {
        "endpoint.py",
        "families.py",
        "readings.py",
        "telemetry.py",
        "traffic.py",
        "worker_telemetry.py",
    }


def test_promtool_finds_no_fault(watching: tuple[Telemetry, httpx.Client]) -> None:
    watcher, client = watching
    try:
        promtool = tool("promtool")
    except ToolError as error:
        lack("prometheus", str(error))
    watcher.observe(turn(), seconds=0.02, lag={EVENTS_0: 5}, readings=READINGS)
    text = client.get("/metrics").text
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")
