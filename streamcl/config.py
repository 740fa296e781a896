"""The configuration: all stations together, read from a file, and compared with what a checkpoint was made with.

What a change of a setting means for a checkpoint stands at each setting; see `stations`.
"""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializeAsAny, ValidationError, model_validator

from streamcl import derived, plugin, traits
from streamcl.architectures import Model, faults
from streamcl.architectures import Task as FurtherTask
from streamcl.derived import KINDS, Feature
from streamcl.methods import (
    MEMORIES,
    PLASTICITY,
    Diagnostics,
    KeyMemory,
    Memory,
    Plasticity,
    Resetting,
    ShrinkAndPerturb,
    WeightClipping,
)
from streamcl.plugin import PluginError
from streamcl.protocols import StreamclError
from streamcl.records import COMMANDS, EVENTS, LABELS
from streamcl.services import Kafka, Registry, Serve
from streamcl.signalling import BOUNDARIES, Boundary, ClockBoundary
from streamcl.stations import (
    Categorical,
    Category,
    Change,
    Checkpoint,
    Delivery,
    Deltas,
    Drift,
    Events,
    FieldPath,
    Free,
    GroupConfig,
    Join,
    Labels,
    Loss,
    Metrics,
    New,
    Optimizer,
    Replay,
    Sample,
    Shard,
    Station,
    Stop,
    Task,
    Telemetry,
    Worker,
)

HEADS = {"dfm": 1, "es_dfm": 2}
"""Logits behind the first, by kind of loss; see `streamcl.engine.delayed`."""


class ConfigError(StreamclError):
    """What is wrong with the configuration, one line per fault, each with its path."""


def table_of(path: Path) -> dict[str, Any]:
    """A TOML file, unchecked. Raises ConfigError, which names it."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}") from error


AnyPlugin = Annotated[
    SerializeAsAny[Station], BeforeValidator(plugin.options, json_schema_input_type=str | dict[str, Any])
]


def _with_preset(schema: dict[str, Any]) -> None:
    """The one key of a file that is no setting; see `Config.parse`."""
    schema["properties"]["preset"] = {"enum": sorted(plugin.presets()), "description": "settings of a paper's method"}


class Config(Station):
    """A worker, from Kafka to Kafka.

    Raises:
        ConfigError: names every fault by its path, and the nearest known name for an unknown one.
    """

    model_config = ConfigDict(json_schema_extra=_with_preset)

    name: str = New(pattern=r"^[A-Za-z0-9._-]{1,100}$", description="of the application; prefix of its control topic")
    task: Task = New("binary", description="what a label is: 0 or 1, a class, or a number")
    tasks: dict[Annotated[str, Field(pattern="^[a-z][a-z0-9_]{0,31}$")], FurtherTask] = New(
        {},
        max_length=16,
        description="further labels beside that of a binary task, by name",
    )
    seed: int = New(0, ge=0, lt=1 << 63, description="of everything random")
    events: Events
    labels: Labels | None = None
    predictions: str | None = Free(None, description="URL that predictions are sent to")
    predictions_codec: str = Stop("json", description="how predictions are written: json, avro, protobuf")
    outcomes: str | None = Free(
        None, description="URL that learned outcomes are sent to, for the error memory of read replicas; -SHARD follows"
    )
    dead_letters: str | None = Free(
        None, description="URL of bad records; default: NAME-dead-letters beside the events"
    )
    control: str | None = Free(None, description="URL of the control log; default: NAME-control beside the events")
    commands: str | None = Stop(
        None,
        description="URL of commands (`streamcl forget`): scheme and host of events.url, a partition for each shard",
    )
    join: Join = Join()
    features: dict[FieldPath, Feature] = New(min_length=1, description="by name; dots go into nested objects")
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    loss: Loss = Loss()
    sample: Sample = Sample()
    replay: Replay = Replay()
    error_memory: tuple[Memory, ...] = Stop((), max_length=8, description="forms in a row: knn, sketch, key")
    plasticity: tuple[Plasticity, ...] = Stop(
        (), max_length=8, description="rules in a row; one that resets units is the last"
    )
    diagnostics: Diagnostics = Diagnostics()
    plugins: tuple[AnyPlugin, ...] = Stop(
        (), max_length=32, description="methods of continual learning in a row, by kind or module:Class"
    )
    river: str | None = New(
        None, description="a River model instead: module:NAME of a class, a function that builds one, or a pipeline"
    )
    river_categories: Literal["one_hot", "strings"] = New(
        "one_hot", description="what a River model sees of a category: {'field=row': 1}, or {'field': 'row'}"
    )
    trust_pickle: bool = Free(False, description="allow checkpoints that hold a pickle: needed by a River model only")
    metrics: Metrics = Metrics()
    drift: Drift = Drift()
    boundaries: tuple[Boundary, ...] = Stop(
        (), max_length=8, description="who else sends signals: segment, clock, detector, surprise, new_class"
    )
    checkpoint: Checkpoint = Checkpoint()
    deltas: Deltas = Deltas()
    shard: Shard = Shard()
    group: GroupConfig = GroupConfig()
    worker: Worker = Worker()
    delivery: Delivery = Delivery()
    telemetry: Telemetry = Telemetry()
    kafka: Kafka = Kafka()
    registry: Registry = Registry()
    serve: Serve = Serve()

    @model_validator(mode="after")
    def _urls_are_some(self) -> Self:
        for name, url in self._urls.items():
            try:
                user = "@" in urlsplit(url or "").netloc
            except ValueError as error:  # brackets that don't hold an IPv6 address
                raise ValueError(f"{name}: not a URL: {error}") from error
            if user:
                raise ValueError(f"{name}: no user or password in a URL; see [kafka] and [registry]")
        return self

    @model_validator(mode="after")
    def _labels_fit(self) -> Self:
        if self.labels is None and self.events.label is None:
            raise ValueError("events.label: no label; set it (inline) or a [labels] table (their own stream)")
        if self.events.label in self.features:
            raise ValueError(f"features.{self.events.label}: is the label; nothing is learned from being told")
        if self.labels is None:
            return self
        if self.events.id is None:
            raise ValueError("events.id: needed to join labels")
        if _site(self.labels.url) != _site(self.events.url):
            raise ValueError("labels.url: must have the scheme and host of events.url")
        if self.labels.url == self.events.url:
            raise ValueError("labels.url: equals events.url")
        if self.labels.default is not None and not self.allows(self.labels.default):
            raise ValueError(f"labels.default: no label of task {self.task}")
        return self

    @model_validator(mode="after")
    def _derived_fit(self) -> Self:
        if fault := derived.fault(self.features, self.task):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _metrics_fit(self) -> Self:
        if fault := traits.fault(self.metrics, self.events, self.features, self.task, self.sample.negatives):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _commands_fit(self) -> Self:
        if self.commands is None:
            return self
        if _site(self.commands) != _site(self.events.url):
            raise ValueError("commands: must have the scheme and host of events.url")
        outlets = self.predictions, self.dead_letters_url, self.control_url
        if self.commands in (self.events.url, self.labels and self.labels.url, *outlets):
            raise ValueError("commands: they need a topic of their own")
        return self

    @model_validator(mode="after")
    def _readable(self) -> Self:
        for name, station in (("events", self.events), ("labels", self.labels)):
            if station is not None and _site(station.url)[0] == "file" and station.codec.kind != "json":
                raise ValueError(f"{name}.codec: the rows of a file are JSON")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.replay.retention == "class_balanced" and self.task == "regression":
            raise ValueError("replay.retention: class_balanced needs classes; regression has reservoir and recency")
        if self.replay.retention == "none" and self.replay.per_event:
            raise ValueError("replay.per_event: nothing to replay with retention none; set replay.retention")
        if self.worker.engine == "graph" and self.worker.device != "cuda":
            raise ValueError(f"worker.engine: graph replays CUDA graphs, and worker.device is {self.worker.device}")
        if self.worker.device == "cuda" and self.river is not None:
            raise ValueError("worker.device: a River model computes on the CPU; leave it out")
        if self.river is not None and not self.trust_pickle:
            raise ValueError("river: is saved as a pickle; set trust_pickle = true if you trust the checkpoint folder")
        if self.exactly_once and self.predictions is None:
            raise ValueError("delivery.mode: exactly_once has nothing to deliver; set predictions")
        if self.exactly_once and _site(self.predictions or "") != _site(self.control_url):
            raise ValueError("delivery.mode: exactly_once needs predictions and control on the same brokers")
        if self.exactly_once and any(_site(url) != _site(self.control_url) for url in self.published):
            raise ValueError("delivery.mode: exactly_once needs outcomes and control on the same brokers")
        if self.exactly_once and _site(self.control_url)[0] == "file":
            raise ValueError("delivery.mode: files know no transactions; exactly_once needs Kafka")
        if self.deltas.url and self.river is not None:
            raise ValueError("deltas.url: a River model has no rows to send; its replicas follow snapshots alone")
        others = {*self.inputs.values(), self.predictions, self.dead_letters_url, self.control_url}
        if self.outcomes_url in others - {None}:
            raise ValueError("outcomes: they need a topic of their own")
        if self.deltas_url in (others | {self.outcomes_url}) - {None}:
            raise ValueError("deltas.url: they need a place of their own")
        return self

    @model_validator(mode="after")
    def _memory_fits(self) -> Self:
        offered = {"ids", *(["embedding"] if self.model.kind != "logistic" else [])}
        offered |= {"hidden"} if self.model.keyed else set()
        for index, memory in enumerate(self.error_memory):
            where = f"error_memory.{index}.key: {memory.key!r}"
            if self.river is not None:
                raise ValueError(f"error_memory.{index}: a River model offers none of what it needs")
            if isinstance(memory, KeyMemory):
                if not isinstance(self.features.get(memory.key), Categorical):
                    raise ValueError(f"{where} is no categorical feature")
            elif memory.key not in offered and ":" not in memory.key:
                known = ", ".join(sorted(offered))
                raise ValueError(f"{where}: model {self.model.kind} offers {known}, or module:function")
        self._delays_fit()
        if self.loss.kind == "reloop" and (self.task != "binary" or self.river is not None):
            raise ValueError("loss.kind: reloop is for binary labels, and no River model")
        labels = {"binary": 2, "multiclass": self.model.classes, "regression": 0}[self.task]
        if (weights := len(self.loss.class_weights)) not in (0, labels) or (weights and self.river is not None):
            raise ValueError(f"loss.class_weights: {weights} are given; {self._weighable(labels)}")
        return self

    def _delays_fit(self) -> None:
        kind, wait_s = self.loss.kind, self.join.wait_s
        if kind in ("fnw", "fnc", "dfm", "es_dfm"):
            if self.task != "binary" or self.river is not None:
                raise ValueError(f"loss.kind: {kind} is for binary labels, and no River model")
            if self.labels is None:
                raise ValueError(f"loss.kind: {kind} is for labels that come late; add a [labels] table")
            if self.error_memory or self.plugins:
                raise ValueError(f"loss.kind: {kind} goes with no error_memory and no plugins")
            if kind in ("fnw", "fnc") and wait_s != 0.0:
                raise ValueError(f"join.wait_s: {kind} wants every event as a negative at once; set 0")
            if kind == "es_dfm" and wait_s is None:
                raise ValueError("join.wait_s: es_dfm needs it: how long a positive is waited for at first")
            if kind == "dfm" and self.replay.per_event:
                raise ValueError("replay.per_event: dfm learns from elapsed times, which replayed rows haven't; set 0")
        if wait_s is not None and self.error_memory:
            raise ValueError("join.wait_s: an error memory would take negatives for now for errors; leave one out")
        if not self.allows(self.join.default):
            raise ValueError(f"join.default: {self.join.default:g} is no label of task {self.task}")
        if self.task != "regression" and self.join.aggregate in ("sum", "mean", "count"):
            raise ValueError(f"join.aggregate: {self.join.aggregate} is for regression; {self.task} has no such labels")
        if self.sample.negatives < 1.0 and (self.task != "binary" or kind not in ("task", "reloop") or self.river):
            raise ValueError("sample.negatives: for binary labels, loss.kind task or reloop, and no River model")

    def _weighable(self, labels: int) -> str:
        if self.river is not None:
            return "a River model takes none"
        return f"{self.task} labels have {labels}" if labels else "regression has no classes"

    @model_validator(mode="after")
    def _plasticity_fits(self) -> Self:
        kinds = [rule.kind for rule in self.plasticity]
        resetting = [rule.kind for rule in self.plasticity if isinstance(rule, Resetting)]
        if self.river is not None and kinds:
            raise ValueError("plasticity: a River model has no hidden units")
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"plasticity: each kind once; these are {', '.join(kinds)}")
        if len(resetting) > 1:
            raise ValueError(f"plasticity: one rule makes units anew, not {' and '.join(resetting)}")
        if resetting and kinds[-1] != resetting[0]:
            raise ValueError(f"plasticity: {resetting[0]} comes last, so that nothing is done to units made anew")
        if resetting and not self.model.deep:
            raise ValueError(f"model.kind: {self.model.kind} has no hidden units, which {resetting[0]} would make anew")
        if resetting and not self.model.hidden:
            raise ValueError(f"model.hidden: no hidden units, which {resetting[0]} would make anew")
        if "upgd" in kinds and self.optimizer.kind != "sgd":
            raise ValueError(f"optimizer.kind: upgd is a form of SGD, which {self.optimizer.kind} would undo; set sgd")
        for rule in self.plasticity if self.optimizer.kind == "ftrl" else ():
            if isinstance(rule, WeightClipping) or (isinstance(rule, ShrinkAndPerturb) and not rule.scaled):
                raise ValueError(f"optimizer.kind: ftrl makes weights of sums, whatever {rule.kind} has done to them")
        return self

    @model_validator(mode="after")
    def _model_fits(self) -> Self:
        if self.river is None and (found := list(faults(self.model, self.features, self.task))):
            raise ValueError("; ".join(found))
        if self.tasks and (self.task != "binary" or self.river is not None):
            raise ValueError("tasks: they stand beside a binary task, and a River model has none")
        for name, each in self.tasks.items():
            if each.label in self.features and self.labels is None:
                raise ValueError(f"features.{each.label}: is the label of tasks.{name}")
        return self

    @model_validator(mode="after")
    def _states_fit(self) -> Self:
        for name, url in (("deltas.url", self.deltas.url), ("outcomes", self.outcomes)):
            if self.model.kind == "recurrent" and url:
                raise ValueError(f"{name}: what a recurrent model holds of each key stays in the worker; leave it out")
        return self

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        for name, feature in self.features.items() if self.river is not None else ():
            if getattr(feature, "table", None) is not None:
                raise ValueError(f"features.{name}.table: a River model has no rows; leave it out")
        for name, feature in self.features.items():
            if isinstance(feature, Category) and (fault := self._row_fault(feature)):
                raise ValueError(f"features.{name}.{fault}")
        return self

    def _row_fault(self, feature: Category) -> str | None:
        """What does not fit of a field's own settings for its rows."""
        dim, own, whole = feature.embedding_dim, feature.optimizer, self.optimizer
        if self.river is not None and (dim is not None or own is not None):
            return f"{'optimizer' if dim is None else 'embedding_dim'}: a River model has no rows; leave it out"
        if dim is not None and self.model.kind == "logistic":
            return "embedding_dim: a logistic model has no embeddings; leave it out"
        if dim is not None and dim > self.model.embedding_dim:
            return f"embedding_dim: {dim} is more than model.embedding_dim {self.model.embedding_dim}"
        if own is None:
            return None
        kind = own.kind or whole.kind
        if kind != "sgd" and any(rule.kind == "upgd" for rule in self.plasticity):
            return f"optimizer.kind: upgd is a form of SGD, which {kind} would undo; set sgd"
        if feature.table is not None and (kind != whole.kind or kind == "ftrl"):
            return "optimizer: beside a dynamic table it can have another learning_rate or l2, but not of or with ftrl"
        return None

    @model_validator(mode="after")
    def _plugins_fit(self) -> Self:
        found = [plugin.resolve(str(station.kind)) for station in self.plugins]  # type: ignore[attr-defined]
        if self.river is not None and found:
            raise ValueError("plugins: a River model is none of theirs")
        kinds = [str(station.kind) for station in self.plugins]  # type: ignore[attr-defined]
        for kind, each in zip(kinds, found, strict=True):
            if kinds.count(kind) > 1 and (each.provides or issubclass(each, plugin.Rule | plugin.Recall)):
                raise ValueError(f"plugins: {kind} once; two would keep what they have learned in one place")
        keepers = sum(issubclass(each, plugin.Retention) for each in found)
        if keepers != (self.replay.retention == "plugin"):
            raise ValueError(f"replay.retention: {self.replay.retention}, and {keepers} of the plugins say who stays")
        if sum(issubclass(each, plugin.Draw) for each in found) > 1:
            raise ValueError("plugins: one says which rows are drawn, not several")
        if self.deltas.url and any(issubclass(each, plugin.Recall) for each in found):
            raise ValueError("deltas.url: deltas don't carry what plugins recall; its replicas follow snapshots alone")
        return self

    @model_validator(mode="after")
    def _boundaries_fit(self) -> Self:
        names = [boundary.source for boundary in self.boundaries]
        for index, boundary in enumerate(self.boundaries):
            where = f"boundaries.{index}"
            if boundary.source in names[:index]:
                raise ValueError(f"{where}.name: {boundary.source!r} is taken; two of a kind need names")
            if boundary.kind == "segment" and self.events.segment is None:
                raise ValueError(f"{where}: needs events.segment")
            if boundary.kind == "new_class" and self.task == "regression":
                raise ValueError(f"{where}: regression knows no classes")
            if isinstance(boundary, ClockBoundary) and (boundary.every_events is None) == (boundary.every_s is None):
                raise ValueError(f"{where}: set every_events, or else every_s")
        return self

    def allows(self, label: float) -> bool:
        """Whether a finite number is a label of the task."""
        if self.task == "regression":
            return True
        return label in (0.0, 1.0) if self.task == "binary" else label.is_integer() and 0 <= label < self.model.classes

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a TOML file; relative paths in it mean relative to the working folder."""
        return cls.parse(table_of(path), str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "config") -> Self:
        """`preset = "NAME"` stands for the settings of a paper's method; those that are written here go before them."""
        try:
            return cls.model_validate(plugin.with_preset(data))
        except PluginError as error:
            raise ConfigError(f"{where}: {error}") from error
        except ValidationError as error:
            raise ConfigError("\n".join(f"{where}: {line}" for line in explain(error, cls))) from error

    @property
    def _urls(self) -> dict[str, str | None]:
        """All that are configured, by setting."""
        own = {name: getattr(self, name) for name in ("predictions", "outcomes", "dead_letters", "control", "commands")}
        inputs = {f"{name}.url": url for name, url in self.inputs.items() if name != COMMANDS}
        return inputs | own | {"deltas.url": self.deltas.url, "registry.url": self.registry.url}

    @property
    def inputs(self) -> dict[str, str]:
        """URL by input name."""
        labels = {LABELS: self.labels.url} if self.labels else {}
        return {EVENTS: self.events.url} | labels | ({COMMANDS: self.commands} if self.commands else {})

    def of_shard(self, index: int, count: int | None = None) -> Self:
        """The same worker on shard `index`, of `count` if that is to be another."""
        change = {"index": index, "count": count or self.shard.count, "indices": None}
        return self.model_copy(update={"shard": self.shard.model_copy(update=change)})

    @property
    def exactly_once(self) -> bool:
        return self.delivery.mode == "exactly_once"

    @property
    def outputs(self) -> int:
        """Width O of the model's raw output."""
        if self.task == "multiclass":
            return self.model.classes
        return 1 + HEADS.get(self.loss.kind, 0)

    @property
    def heads(self) -> int:
        """Width of what the model says of all tasks, the first one's O in front."""
        return self.outputs + len(self.tasks)

    @property
    def published(self) -> list[str]:
        """URLs that a turn's results go to; in exactly-once delivery together with its order."""
        return [url for url in (self.predictions, self.outcomes_url) if url]

    @property
    def outcomes_url(self) -> str | None:
        """Each shard's own, as `control_url` is: outcomes are numbered by shard, and have one order."""
        return self.outcomes + self._of_shard if self.outcomes else None

    @property
    def deltas_url(self) -> str | None:
        """Each shard's own, as `outcomes_url` is."""
        return self.deltas.url.rstrip("/") + self._of_shard if self.deltas.url else None

    @property
    def dead_letters_url(self) -> str:
        return self.dead_letters or self._beside("dead-letters")

    @property
    def control_url(self) -> str:
        """Each shard's own: with several its index is part of the name."""
        return self.control + self._of_shard if self.control else self._beside("control", own=True)

    @property
    def _of_shard(self) -> str:
        return f"-{self.shard.index}" if self.shard.count > 1 else ""

    def _beside(self, suffix: str, own: bool = False) -> str:
        """`own`: one for each shard."""
        url = urlsplit(self.events.url)
        if url.scheme == "file":
            # A file's neighbour, but in a folder of ours: the events' own folder may be read-only. It has one writer.
            return (self.checkpoint.folder.resolve() / f"{self.name}-{suffix}{self._of_shard}.jsonl").as_uri()
        return urlunsplit((url.scheme, url.netloc, f"/{self.name}-{suffix}{self._of_shard if own else ''}", "", ""))

    def settings(self) -> Iterator[tuple[str, Change, Any]]:
        """(path, what changing it means, value) of every setting."""
        yield from _settings(self, "")


def _settings(station: BaseModel, prefix: str) -> Iterator[tuple[str, Change, Any]]:
    for name, info in type(station).model_fields.items():
        value, path = getattr(station, name), f"{prefix}{name}"
        if isinstance(value, BaseModel):
            yield from _settings(value, f"{path}.")
            continue
        extra = info.json_schema_extra
        change: Any = extra.get("change", "new") if isinstance(extra, dict) else "new"
        if isinstance(value, tuple):
            value = [_plain(item) for item in value]
        if isinstance(value, dict):
            value = {
                k: item.model_dump(mode="json") if isinstance(item, BaseModel) else item for k, item in value.items()
            }
        yield path, change, str(value) if isinstance(value, Path) else value


def _plain(item: Any) -> Any:
    return item.model_dump(mode="json") if isinstance(item, BaseModel) else item


def _remade(old: Config, config: Config) -> Iterator[str]:
    """Options of plug-ins that are there before and after, and whose change means other state."""
    before = {str(station.kind): station for station in old.plugins}  # type: ignore[attr-defined]
    for station in config.plugins:
        kind = str(station.kind)  # type: ignore[attr-defined]
        for name, info in type(station).model_fields.items():
            extra = info.json_schema_extra
            new = isinstance(extra, dict) and extra.get("change") == "new"
            if new and kind in before and getattr(before[kind], name, None) != getattr(station, name):
                yield f"plugins.{kind}.{name}"


def changes(old: Mapping[str, Any], config: Config) -> list[tuple[str, Change]]:
    """What has changed since a checkpoint's configuration (`Config.model_dump(mode="json")`), and what that needs.

    Raises:
        ConfigError: this version doesn't understand the checkpoint's configuration.
    """
    before = {path: value for path, _, value in Config.parse(old, "checkpoint").settings()}
    after = {path: (change, value) for path, change, value in config.settings()}
    found = [(path, change) for path, (change, value) in after.items() if before.get(path, value) != value]
    found += [(path, "new") for path in _remade(Config.parse(old, "checkpoint"), config)]
    # A whole table that came or went ([labels]) has paths on one side only.
    found += [(path, "new") for path in sorted(before.keys() ^ after.keys())]
    return sorted(set(found))


def fingerprint(config: Config, kinds: Collection[Change] = ("new", "stop")) -> str:
    """A hash of every setting that state depends on, or of those of some kinds."""
    state = {path: value for path, change, value in config.settings() if change in kinds}
    return hashlib.sha256(orjson.dumps(state, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


TAGGED = {"features": KINDS, "error_memory": MEMORIES, "plasticity": PLASTICITY, "boundaries": BOUNDARIES}
"""Tables whose `kind` says which keys they have."""


def _site(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def explain(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    """One line for each fault: its path in the file of a `root`, and the nearest known name for an unknown one."""
    for item in error.errors(include_url=False):
        # pydantic puts a feature's kind behind its name; no user has written it there.
        loc = [part for i, part in enumerate(item["loc"]) if i != 2 or item["loc"][0] not in TAGGED]
        path = ".".join(map(str, loc))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = list(_fields_at(root, item["loc"][:-1]))
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
            message = "unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
        yield f"{path}: {message}" if path else message


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    if len(loc) >= 3 and loc[0] in TAGGED:
        model, loc = TAGGED[str(loc[0])][str(loc[2])], loc[3:]
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        choices = (annotation, *getattr(annotation, "__args__", ()))  # Labels | None
        model = next(t for t in choices if isinstance(t, type) and issubclass(t, BaseModel))
    return [info.alias or name for name, info in model.model_fields.items()]
