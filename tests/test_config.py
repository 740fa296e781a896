import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest

from streamcl.config import Config, ConfigError, changes, fingerprint

URL = "memory://site/events"


def settings(**more: Any) -> dict[str, Any]:
    plain = {"name": "app", "events": {"url": URL, "label": "y"}, "features": {"user": "categorical"}}
    return {**plain, **more}


def make(**more: Any) -> Config:
    return Config.parse(settings(**more))


def fault(**more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        make(**more)
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "path", "near"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model": {"embeding_dim": 4}}, "model.embeding_dim", "embedding_dim"),
        ({"events": {"url": URL, "label": "y", "max_byte": 1}}, "events.max_byte", "max_bytes"),
        ({"labels": {"url": "memory://site/l", "lable": "y"}}, "labels.lable", "label"),
        ({"features": {"user": {"kind": "categorical", "bucket": 9}}}, "features.user.bucket", "buckets"),
        ({"features": {"numeric": {"kind": "bag", "max_item": 9}}}, "features.numeric.max_item", "max_items"),
        ({"features": {"model": {"kind": "bag", "poling": "sum"}}}, "features.model.poling", "pooling"),
        ({"kafka": {"request_timeout": 1}}, "kafka.request_timeout", "request_timeout_s"),
    ],
)
def test_an_unknown_key_names_its_path_and_the_nearest_known_one(more: Any, path: str, near: str) -> None:
    assert fault(**more) == f"config: {path}: unknown key; did you mean {near!r}?"


def test_an_unknown_key_like_no_other_lists_the_known_ones() -> None:
    assert fault(delivery={"zzzz": 1}) == "config: delivery.zzzz: unknown key; known: mode"


@pytest.mark.parametrize(
    ("more", "path"),
    [
        ({"name": "no spaces"}, "name"),
        ({"seed": -1}, "seed"),
        ({"seed": 1 << 63}, "seed"),
        ({"task": "ranking"}, "task"),
        ({"features": {}}, "features"),
        ({"features": {"numeric": {"kind": "categorical", "buckets": 1}}}, "features.numeric.buckets"),
        ({"features": {"user": "category"}}, "features.user"),
        ({"features": {"user": {"buckets": 8}}}, "features.user"),
        ({"features": {"a..b": "numeric"}}, "features.a..b"),
        ({"features": {"": "numeric"}}, "features."),
        ({"events": {"url": URL, "label": ""}}, "events.label"),
        ({"events": {"url": URL, "label": "y", "id": "a."}}, "events.id"),
        ({"events": {"label": "y"}}, "events.url"),
        ({"model": {"hidden": [64, 0]}}, "model.hidden.1"),
        ({"model": {"init_scale": 0.0}}, "model.init_scale"),
        ({"optimizer": {"learning_rate": float("inf")}}, "optimizer.learning_rate"),
        ({"optimizer": {"l2": float("nan")}}, "optimizer.l2"),
        ({"replay": {"weight": -1}}, "replay.weight"),
        ({"loss": {"class_weights": [1.0, -1.0]}}, "loss.class_weights.1"),
        ({"shard": {"index": 2, "count": 2}}, "shard"),
        ({"join": {"attribution_window_s": 0}}, "join.attribution_window_s"),
    ],
)
def test_a_value_out_of_bounds_names_its_path(more: Any, path: str) -> None:
    assert f"config: {path}: " in fault(**more)


ONCE = {"delivery": {"mode": "exactly_once"}, "predictions": "memory://site/p"}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"events": {"url": URL}}, "events.label: no label"),
        ({"labels": {"url": "memory://site/labels"}}, "events.id: needed"),
        ({"events": {"url": URL, "id": "i"}, "labels": {"url": "memory://other/labels"}}, "labels.url: must have"),
        ({"events": {"url": URL, "id": "i"}, "labels": {"url": URL}}, "labels.url: equals"),
        ({"events": {"url": URL, "id": "i"}, "labels": {"url": URL + "2", "default": 0.5}}, "labels.default: no label"),
        ({"commands": "memory://else/where"}, "commands: must have the scheme and host of events.url"),
        ({"commands": URL}, "commands: they need a topic of their own"),
        ({"commands": "memory://site/p", "outcomes": "memory://site/p"}, "outcomes: they need a topic of their own"),
        ({"features": {"y": "numeric"}}, "features.y: is the label"),
        ({"task": "regression", "replay": {"retention": "class_balanced"}}, "replay.retention: "),
        ({"replay": {"retention": "none", "per_event": 1}}, "replay.per_event: "),
        ({"events": {"url": "file:///e.jsonl", "label": "y", "codec": "avro"}}, "events.codec: the rows of a file"),
        ({"registry": {"url": "http://user:hunter2@host"}}, "registry.url: no user or password"),
        ({"loss": {"class_weights": [1, 2, 3]}}, "loss.class_weights: 3 are given; binary labels have 2"),
        (
            {"task": "regression", "loss": {"class_weights": [1, 2]}},
            "loss.class_weights: 2 are given; regression has no classes",
        ),
        ({"metrics": {"segments": ["devize"]}}, "metrics.segments: 'devize' is no categorical feature, nor events.key"),
        ({"metrics": {"group_by": "n"}, "features": {"n": "numeric"}}, "metrics.group_by: 'n' is no categorical"),
        ({"metrics": {"segments": ["user", "user"]}}, "metrics.segments: each field once"),
        ({"metrics": {"segments": ["key"]}}, "metrics.segments: 'key' is whose or which an event is"),
        (
            {"metrics": {"segments": ["user"]}, "events": {"url": URL, "label": "y", "key": "user"}},
            "metrics.segments: 'user' is whose or which an event is",
        ),
        ({"metrics": {"group_by": "user"}, "task": "regression"}, "metrics.group_by: for binary labels"),
        ({"metrics": {"ranking": {"group_by": "r"}}, "task": "multiclass"}, "metrics.ranking.group_by: for binary"),
        (
            {"metrics": {"ranking": {"group_by": "r"}}, "sample": {"negatives": 0.5}},
            "metrics.ranking.group_by: lists would lack the negatives that sample.negatives leaves out",
        ),
        ({"river": "river.dummy:NoChangeClassifier"}, "river: is saved as a pickle"),
        ({"predictions": "kafka://user:hunter2@host/topic"}, "predictions: no user or password"),
        ({"outcomes": "kafka://user:hunter2@host/topic"}, "outcomes: no user or password"),
        ({"outcomes": "memory://site/p", "predictions": "memory://site/p"}, "outcomes: they need a topic of their own"),
        (
            {**ONCE, "outcomes": "memory://else/where"},
            "delivery.mode: exactly_once needs outcomes and control on the same",
        ),
        ({"events": {"url": "kafka://user:hunter2@host/topic", "label": "y"}}, "events.url: no user or password"),
        ({"predictions": "kafka://[host]/topic"}, "predictions: not a URL: "),
        ({"events": {"url": "kafka://[::1/t", "label": "y"}}, "events.url: not a URL: "),
    ],
)
def test_settings_that_contradict_each_other_name_the_one_to_change(more: Any, text: str) -> None:
    message = fault(**more)
    assert message.startswith(f"config: {text}")
    assert "hunter2" not in message


def test_every_fault_has_a_line_of_its_own() -> None:
    assert len(fault(seed=-1, modle={}, model={"classes": 1}).splitlines()) == 3


def test_an_engine_of_graphs_needs_a_gpu() -> None:
    assert "worker.engine: graph replays CUDA graphs, and worker.device is cpu" in fault(worker={"engine": "graph"})


def test_a_river_model_is_accepted_by_those_who_trust_pickles() -> None:
    assert make(river="river.dummy:NoChangeClassifier", trust_pickle=True).river


def test_a_file_is_read_and_named_in_every_error(tmp_path: Path) -> None:
    path = tmp_path / "app.toml"
    path.write_text(f'name = "app"\nevents = {{url = "{URL}", label = "y"}}\nfeatures = {{user = "categorical"}}\n')
    assert Config.load(path) == make()
    for text, error in (("name = ", "not TOML"), ('nam = "x"', "nam: unknown key"), ("\udcff", "utf-8")):
        path.write_text(text, errors="surrogateescape")
        with pytest.raises(ConfigError, match=rf"app\.toml: .*{error}"):
            Config.load(path)
    with pytest.raises(ConfigError, match=r"none\.toml"):
        Config.load(tmp_path / "none.toml")


def test_a_codecs_name_is_short_for_its_table() -> None:
    short, long = ({"url": URL, "label": "y", "codec": codec} for codec in ("avro", {"kind": "avro"}))
    assert make(events=short) == make(events=long)
    assert fault(events={"url": URL, "label": "y", "codec": {"kind": "avro", "schema": "x"}}) == (
        "config: events.codec.schema: unknown key; did you mean 'schema_file'?"
    )


def test_nothing_can_be_changed_after_parsing() -> None:
    with pytest.raises(ValueError, match="frozen"):
        make().__setattr__("seed", 1)


def old(**more: Any) -> Any:
    return json.loads(json.dumps(make(**more).model_dump(mode="json")))


def test_nothing_has_changed_after_a_round_trip_through_json() -> None:
    more = {"features": {"b": "bag", "a": "numeric"}, "checkpoint": {"folder": "x/y"}, "optimizer": {"l2": 0.1 + 0.2}}
    assert changes(old(**more), make(**more)) == []


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"telemetry": {"port": 1}}, [("telemetry.port", "free")]),
        ({"events": {"url": "memory://elsewhere/e", "label": "y"}}, [("events.url", "free")]),
        ({"optimizer": {"learning_rate": 0.5}}, [("optimizer.learning_rate", "stop")]),
        ({"optimizer": {"kind": "sgd"}}, [("optimizer.kind", "new")]),
        ({"events": {"url": URL, "label": "y", "codec": "avro"}}, [("events.codec.kind", "stop")]),
        ({"predictions_codec": "avro"}, [("predictions_codec", "stop")]),
        ({"registry": {"url": "http://elsewhere"}}, [("registry.url", "free")]),
        ({"model": {"hidden": [3]}}, [("model.hidden", "new")]),
        ({"features": {"user": {"kind": "categorical", "buckets": 5}}}, [("features", "new")]),
        ({"seed": 1, "worker": {"threads": 2}}, [("seed", "new"), ("worker.threads", "stop")]),
    ],
)
def test_a_change_is_free_needs_a_stop_or_a_new_start(more: Any, found: Any) -> None:
    assert changes(old(), make(**more)) == found


def test_labels_that_come_or_go_need_a_new_start() -> None:
    events = {"url": URL, "label": "y", "id": "i"}
    without, with_labels = {"events": events}, {"events": events, "labels": {"url": "memory://site/labels"}}
    for before, after in ((without, with_labels), (with_labels, without)):
        found = changes(old(**before), make(**after))
        assert ("labels", "new") in found
        assert {change for _, change in found} == {"new"}


def test_a_checkpoint_of_another_version_is_refused_by_path() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint: model\.magic: unknown key"):
        changes({**old(), "model": {"magic": 1}}, make())


def test_the_fingerprint_ignores_what_is_free_and_the_order_of_features() -> None:
    two = {"a": "numeric", "b": "bag"}
    base = fingerprint(make(features=two))
    assert fingerprint(make(features=dict(reversed(two.items())), telemetry={"port": 1})) == base
    assert fingerprint(make(features=two, seed=1)) != base
    assert fingerprint(make(features=two, optimizer={"l2": 1e-9})) != base


def test_defaults_beside_the_events_follow_their_url() -> None:
    assert make().dead_letters_url == "memory://site/app-dead-letters"
    assert make().control_url == "memory://site/app-control"
    assert make(shard={"index": 1, "count": 2}).control_url == "memory://site/app-control-1"
    assert make(control="memory://x/y").control_url == "memory://x/y"
    assert make(outcomes="memory://x/y").outcomes_url == "memory://x/y"
    assert make(outcomes="memory://x/y", shard={"index": 1, "count": 2}).outcomes_url == "memory://x/y-1"
    file = make(events={"url": "file:///data/e.jsonl", "label": "y"}, checkpoint={"folder": "here"})
    assert file.dead_letters_url == (Path("here").resolve() / "app-dead-letters.jsonl").as_uri()


def test_the_schema_is_json_without_dangling_references() -> None:
    schema = Config.model_json_schema()
    text = json.dumps(schema, allow_nan=False)
    for reference in (part.split('"')[0] for part in text.split('"#/$defs/')[1:]):
        assert reference in schema["$defs"]


def test_the_schema_allows_what_may_be_written() -> None:
    schema = Config.model_json_schema()
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    shown = tomllib.loads(readme.partition("```toml\n")[2].partition("```")[0])
    short = {
        "preset": "ewc",
        "plugins": ["ewc"],
        "plasticity": ["l2"],
        "features": {
            "user": {"kind": "categorical", "table": {"admission": "bloom"}},
            "item": {"kind": "bag", "table": "dynamic"},
        },
    }
    short["events"] = {**shown["events"], "codec": "avro"}
    for data in (shown, {**shown, **short}):
        jsonschema_rs.validate(schema, data)
    for path, wrong in (("features", {"user": "categoric"}), ("replay", {"capcity": 3}), ("preset", "none_such")):
        with pytest.raises(jsonschema_rs.ValidationError, match=path if path != "replay" else "capcity"):
            jsonschema_rs.validate(schema, {**shown, path: wrong})
