"""The configuration: one model per station of the journey, units in names, a typo is an error that names its path.

Each field says in its `change` metadata what changing it means for a checkpoint that exists:

- `free`: takes effect at the next start (where things are, how much work a turn is, what is exported);
- `stop`: needs a clean stop first, for what lies between checkpoint and control position would not repeat;
- `new`: other state; start in another checkpoint folder.
"""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit, urlunsplit

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from streamcl.protocols import StreamclError
from streamcl.records import EVENTS, LABELS

Change = Literal["free", "stop", "new"]
Task = Literal["binary", "multiclass", "regression"]


def Free(default: Any = ..., **kwargs: Any) -> Any:
    """A field that may change under a live checkpoint."""
    return Field(default, json_schema_extra={"change": "free"}, **kwargs)


def Stop(default: Any = ..., **kwargs: Any) -> Any:
    """A field that may change after a clean stop."""
    return Field(default, json_schema_extra={"change": "stop"}, **kwargs)


def New(default: Any = ..., **kwargs: Any) -> Any:
    """A field whose change means other state."""
    return Field(default, json_schema_extra={"change": "new"}, **kwargs)


class ConfigError(StreamclError):
    """What is wrong with the configuration, one line per fault, each with its path."""


class Station(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


FieldPath = Annotated[str, Field(pattern=r"^[^.]+(\.[^.]+)*$")]
"""The name of a field of the payload; dots go into nested objects."""


def _named_kind(value: Any) -> Any:
    return {"kind": value} if isinstance(value, str) else value


class Payload(Station):
    """How payloads are written. `codec = "avro"` is short for `codec = {kind = "avro"}`.

    Avro and Protobuf come in the Confluent wire format, their schemas from the [registry]; or, with `schema_file`, raw.
    """

    kind: str = Stop("json", description="json, avro, protobuf, or what a package has registered")
    schema_file: Path | None = Stop(
        None, description="payloads are raw, of this schema: an .avsc file, or a serialized FileDescriptorSet"
    )
    message: str | None = Stop(None, description="Protobuf: full name of the message in schema_file")


PayloadOrKind = Annotated[Payload, BeforeValidator(_named_kind)]


class Events(Station):
    """Where events come from, and where in the payload things are (dots go into nested objects)."""

    url: str = Free(description="kafka://host:port/topic, file:///path/to/events.jsonl, memory://name/topic")
    codec: PayloadOrKind = Payload()
    id: FieldPath | None = Stop(None, description="field of the event id; without it the id is input:partition:offset")
    key: FieldPath | None = Stop(None, description="field of the key (user, session); without it the record's key")
    time: FieldPath | None = Stop(None, description="field of the event time; without it the record's timestamp")
    time_unit: Literal["s", "ms"] = Stop("s", description="unit of the time field, unless the codec knows it")
    label: FieldPath | None = Stop(None, description="field of an inline label; may be absent in single events")
    max_bytes: int = Stop(1_048_576, ge=1, description="a larger payload goes to the dead letters")
    unknown_fields: Literal["ignore", "dead_letter"] = Stop("ignore", description="fields the config does not name")
    max_future_s: float = Stop(
        86_400.0, gt=0, description="an event time further ahead of its record's timestamp goes to the dead letters"
    )


class Labels(Station):
    """Labels on a stream of their own, joined to events by id."""

    url: str = Free(description="URL of the labels; same scheme and host as events.url")
    codec: PayloadOrKind = Payload()
    id: FieldPath = Stop("id", description="field of the event id")
    label: FieldPath = Stop("label", description="field of the label")
    default: float | None = Stop(None, description="the label when the field is absent: 1 for a stream of clicks")
    time: FieldPath | None = Stop(None, description="field of the label's time; without it the record's timestamp")
    time_unit: Literal["s", "ms"] = Stop("s", description="unit of the time field, unless the codec knows it")


class Join(Station):
    """What waiting for a label means. All times are event time, in seconds."""

    attribution_window_s: float = Stop(1800.0, gt=0, description="a label counts that comes this soon after its event")
    on_close: Literal["negative", "drop"] = Stop("negative", description="what a window without a label means")
    allowed_lateness_s: float = Stop(0.0, ge=0, description="how far the watermark stays behind the newest event")
    idle_s: float = Stop(60.0, gt=0, description="a partition this far behind the others doesn't hold the watermark")
    orphan_s: float = Stop(60.0, ge=0, description="how long a label waits for an event that it overtook")
    max_tickets: int = Stop(1_000_000, ge=1, description="beyond it the ticket that came first is dropped, counted")
    max_expiries_per_event: int = Stop(100, ge=1, description="bounds the work of one event after a gap in the stream")


class Categorical(Station):
    """A string, integer or boolean, hashed into `buckets` rows. A missing value has a row of its own."""

    kind: Literal["categorical"] = "categorical"
    buckets: int = New(1 << 16, ge=2, le=1 << 26, description="rows of the table (count)")


class Bag(Station):
    """A list of categories; their rows are pooled."""

    kind: Literal["bag"] = "bag"
    buckets: int = New(1 << 16, ge=2, le=1 << 26, description="rows of the table (count)")
    max_items: int = New(32, ge=1, le=4096, description="items beyond it are ignored")
    pooling: Literal["mean", "sum"] = New("mean", description="of the rows of its items")


class Numeric(Station):
    """A number, standardised by running mean and deviation. A missing one reads as the mean."""

    kind: Literal["numeric"] = "numeric"


KINDS: dict[str, type[Station]] = {"categorical": Categorical, "bag": Bag, "numeric": Numeric}
Feature = Annotated[Categorical | Bag | Numeric, Field(discriminator="kind"), BeforeValidator(_named_kind)]


class Model(Station):
    kind: Literal["logistic", "mlp", "deepfm"] = New("deepfm", description="what learns, unless river is set")
    embedding_dim: int = New(16, ge=1, le=1024, description="width of a row (count)")
    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = New((64, 32), description="units per hidden layer")
    classes: int = New(2, ge=2, description="classes of a multiclass task; labels are 0 .. classes-1")
    init_scale: float = New(0.01, gt=0, description="standard deviation of a fresh embedding")


class Optimizer(Station):
    kind: Literal["sgd", "adagrad", "adam", "ftrl"] = New("adagrad", description="its state is part of a checkpoint")
    learning_rate: float = Stop(0.05, gt=0, description="step size; FTRL: alpha")
    embedding_learning_rate: float | None = Stop(
        None, gt=0, description="for rows of the table; default: 2 x learning_rate"
    )
    l1: float = Stop(0.0, ge=0, description="FTRL only")
    l2: float = Stop(0.0, ge=0, description="times the weight, part of its gradient; FTRL: in the closed form")
    max_grad_norm: float = Stop(1e4, gt=0, description="an example whose gradient is larger is quarantined")


class Replay(Station):
    retention: Literal["none", "reservoir", "recency", "class_balanced"] = New("none", description="who stays")
    capacity: int = New(20_000, ge=1, description="most examples held (count)")
    per_event: int = Stop(0, ge=0, description="rows replayed beside each live example")
    weight: float = Stop(1.0, ge=0, description="weight of the replayed rows' mean loss; the live example's is 1")


class Metrics(Station):
    window: int = New(10_000, ge=1, description="labelled examples in the windowed metrics (count)")


class Drift(Station):
    detector: Literal["none", "adwin", "page_hinkley"] = New("adwin", description="watches the loss of what was served")
    delta: float | None = New(None, gt=0, description="sensitivity; default: the detector's own")
    threshold: float = New(50.0, gt=0, description="Page-Hinkley only")
    refractory_events: int = New(1000, ge=0, description="no second alarm within this many labelled examples")


class Checkpoint(Station):
    folder: Path = Free(Path("checkpoints"), description="one folder per shard is made in it")
    every_events: int = Free(50_000, ge=1, description="records between two checkpoints")
    retain: int = Free(3, ge=1, description="newest checkpoints kept")
    remote: str | None = Free(
        None,
        description="URL that fsspec knows (s3://bucket/prefix): where copies of snapshots are kept",
    )
    lease_s: float = Free(
        10.0, ge=0, description="a start waits this long to see whether the shard's last worker lives; 0: takes over"
    )


class Shard(Station):
    """Shard `index` of `count` holds the partitions p of every input with p % count == index.

    A process runs one shard, several, or with `assignment = "group"` those that a consumer group hands to it. A shard
    that moves is recovered where it arrives, so all members of a group need one `checkpoint.folder`.
    """

    index: int = New(0, ge=0, description="which shard this worker is, from 0")
    count: int = New(1, ge=1, description="of all shards; `streamcl reshard` changes it")
    indices: tuple[Annotated[int, Field(ge=0)], ...] | None = Free(
        None, min_length=1, description="several shards in this process, instead of index"
    )
    assignment: Literal["static", "group"] = Free("static", description="group: a consumer group hands out the shards")
    group_instance_id_env: str | None = Free(
        None, description="environment variable that names this member: it may restart within session_timeout_s"
    )
    session_timeout_s: float = Free(45.0, gt=0, description="a member that is silent for this long loses its shards")
    max_poll_interval_s: float = Free(300.0, gt=0, description="a member whose turn takes longer loses its shards")

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if self.index >= self.count:
            raise ValueError(f"index {self.index} must be below count {self.count}")
        if max(self.indices or (0,)) >= self.count:
            raise ValueError(f"indices {list(self.indices or ())} must be below count {self.count}")
        if self.assignment == "group" and self.indices is not None:
            raise ValueError("indices: a group hands out the shards; leave them out, or set assignment = 'static'")
        return self

    @property
    def here(self) -> tuple[int, ...]:
        """The shards that this process holds by itself."""
        return tuple(sorted(set(self.indices))) if self.indices else (self.index,)


class Worker(Station):
    max_records: int = Free(500, ge=1, description="most records of a turn; never changes a result")
    poll_timeout_s: float = Free(0.1, gt=0, description="a turn waits no longer for its first record")
    engine: Literal["auto", "eager"] = Stop("auto", description="how steps are computed")
    device: Literal["cpu"] = Stop("cpu", description="where steps are computed")
    threads: int = Stop(1, ge=1, description="torch threads; more than one is slower at batch size one")
    max_bad_ratio: float = Free(0.5, gt=0, le=1, description="stop when more of the last 1,000 records are bad")


class Delivery(Station):
    """What a reader of the predictions may see after a crash. What is learned is learned exactly once in both modes."""

    mode: Literal["at_least_once", "exactly_once"] = Stop(
        "at_least_once",
        description="exactly_once: a reader of committed records sees each prediction once, some milliseconds later",
    )


class Telemetry(Station):
    host: str = Free("127.0.0.1", description="where /metrics, /healthz and /readyz listen")
    port: int = Free(9464, ge=0, le=65535, description="0 switches it off")


_LOOPBACK = ("localhost", "127.0.0.1", "::1")


class _Security(Station):
    """How brokers are trusted and logged in to. Secrets are named, never written: an environment variable or a file."""

    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Free(
        "PLAINTEXT", description="SSL: with TLS; SASL: with a login"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512", "OAUTHBEARER"] | None = Free(
        None, description="how to log in; needed with SASL"
    )
    sasl_username: str | None = Free(None, description="who logs in (PLAIN, SCRAM)")
    sasl_password_env: str | None = Free(None, description="environment variable that holds the password")
    sasl_password_file: Path | None = Free(None, description="file that holds the password")
    sasl_token_file: Path | None = Free(None, description="file that holds a token (OAUTHBEARER); read when it changes")
    sasl_token_url: str | None = Free(None, description="or where tokens are asked for, by client credentials; https")
    sasl_client_id: str | None = Free(None, description="who asks for tokens")
    sasl_client_secret_env: str | None = Free(None, description="environment variable that holds the client's secret")
    sasl_client_secret_file: Path | None = Free(None, description="file that holds the client's secret")
    sasl_scope: str | None = Free(None, description="scope of the tokens asked for")
    ssl_cafile: Path | None = Free(None, description="PEM file of the authorities to trust; default: the system's")
    ssl_certfile: Path | None = Free(None, description="PEM file of the client's certificate (mTLS)")
    ssl_keyfile: Path | None = Free(None, description="PEM file of the client's key (mTLS)")
    ssl_key_password_env: str | None = Free(None, description="environment variable that holds the key's password")
    ssl_key_password_file: Path | None = Free(None, description="file that holds the key's password")
    ssl_check_hostname: bool = Free(True, description="whether a broker's certificate must name the host we asked")

    @model_validator(mode="after")
    def _one_way_in(self) -> Self:
        """Every field that is set has an effect, and every field that is needed is set."""
        for prefix, on in (("sasl_", "SASL" in self.security_protocol), ("ssl_", "SSL" in self.security_protocol)):
            if not on and (useless := self._set(prefix)):
                raise ValueError(
                    f"{useless[0]} has no effect with security_protocol {self.security_protocol}; set SASL_SSL"
                    + ("" if prefix == "sasl_" else " or SSL")
                )
        if "SASL" in self.security_protocol:
            self._login_fits()
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            there, lacking = (
                ("ssl_keyfile", "ssl_certfile") if self.ssl_certfile is None else ("ssl_certfile", "ssl_keyfile")
            )
            raise ValueError(f"{lacking} is needed by {there}")
        self._secret("ssl_key_password", "ssl_keyfile", required=False)
        return self

    def _login_fits(self) -> None:
        mechanism = self.sasl_mechanism
        if mechanism is None:
            raise ValueError(f"sasl_mechanism is needed by security_protocol {self.security_protocol}")
        bearer = mechanism == "OAUTHBEARER"
        prefixes = ("sasl_username", "sasl_password") if bearer else ("sasl_token", "sasl_client", "sasl_scope")
        if useless := [name for prefix in prefixes for name in self._set(prefix)]:
            raise ValueError(f"{useless[0]} has no effect with sasl_mechanism {mechanism}")
        if not bearer and not self.sasl_username:
            raise ValueError(f"sasl_username is needed by sasl_mechanism {mechanism}")
        if not bearer:
            self._secret("sasl_password", f"sasl_mechanism {mechanism}")
        elif (self.sasl_token_file is None) == (self.sasl_token_url is None):
            raise ValueError("sasl_mechanism OAUTHBEARER needs one of sasl_token_file and sasl_token_url")
        elif self.sasl_token_url is not None:
            self._token_url_fits(self.sasl_token_url)
        elif useless := self._set("sasl_client") + self._set("sasl_scope"):
            raise ValueError(f"{useless[0]} has no effect with sasl_token_file")

    def _token_url_fits(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "https" and (parts.scheme != "http" or parts.hostname not in _LOOPBACK):
            raise ValueError("sasl_token_url must begin with https://: the client's secret travels there")
        if "@" in parts.netloc:
            raise ValueError("sasl_token_url: no user or password in a URL; see sasl_client_id")
        if not self.sasl_client_id:
            raise ValueError("sasl_client_id is needed by sasl_token_url")
        self._secret("sasl_client_secret", "sasl_token_url")

    def _secret(self, name: str, owner: str, required: bool = True) -> None:
        """One of NAME_env and NAME_file, and only where there is something to open with it."""
        found = self._set(name)
        if len(found) > 1 or (required and not found):
            raise ValueError(f"one of {name}_env and {name}_file is needed by {owner}")
        if found and not required and getattr(self, owner) is None:
            raise ValueError(f"{found[0]} has no effect without {owner}")

    def _set(self, prefix: str) -> list[str]:
        """The fields that begin with `prefix` and differ from their default."""
        fields = type(self).model_fields
        return [name for name in fields if name.startswith(prefix) and getattr(self, name) != fields[name].default]


class Kafka(_Security):
    """Settings of the Kafka connector."""

    client: Literal["kafka-python", "librdkafka"] = Free(
        "kafka-python", description="library that talks to brokers; librdkafka needs streamcl[librdkafka]"
    )
    start_at: Literal["earliest", "latest"] = Free("earliest", description="where a shard without any state starts")
    on_gap: Literal["fail", "earliest", "latest"] = Free(
        "fail", description="where to go on when retention has removed what was to be read next"
    )
    request_timeout_s: float = Free(30.0, gt=0, description="how long a broker may take to answer")
    connect_timeout_s: float = Free(30.0, gt=0, description="how long a start waits for an unreachable broker")
    fetch_max_wait_s: float = Free(0.1, gt=0, description="how long a broker may wait for records to come")
    fetch_queue_bytes: int = Free(
        16 << 20, ge=1 << 20, description="what librdkafka fetches ahead; kafka-python holds one fetch per broker"
    )
    metadata_max_age_s: float = Free(60.0, gt=0, description="how often topics are looked at for new partitions")
    delivery_timeout_s: float = Free(120.0, gt=0, description="how long a prediction may be on its way")
    linger_s: float = Free(0.005, ge=0, description="how long a prediction waits for others to travel with")
    max_inflight_records: int = Free(20_000, ge=1, description="unacknowledged predictions; beyond it the loop waits")
    max_inflight_bytes: int = Free(64 << 20, ge=1024, description="the same in bytes")
    max_request_bytes: int = Free(1_048_576, ge=1024, description="a larger message is not sent")
    compression: Literal["none", "gzip", "lz4", "zstd"] = Free("lz4", description="of what is sent")
    compact_predictions: bool = Free(
        False,
        description="key predictions by event id, not by the event's key, and let their topic keep the last of each id"
        " (cleanup.policy, when the topic is made here)",
    )
    transaction_timeout_s: float = Free(60.0, gt=0, description="after it the brokers give up a silent worker's write")


class Registry(Station):
    """Where the schemas of Avro and Protobuf payloads are kept: a schema registry with Confluent's REST interface.

    Secrets are named, never written: an environment variable or a file.
    """

    url: str | None = Free(
        None, pattern="^https?://", description="http(s)://host:port[/path]; no proxy of the environment is used"
    )
    username: str | None = Free(None, description="who logs in (basic authentication)")
    password_env: str | None = Free(None, description="environment variable that holds the password")
    password_file: Path | None = Free(None, description="file that holds the password")
    ssl_cafile: Path | None = Free(None, description="PEM file of the authorities to trust; default: the system's")
    ssl_certfile: Path | None = Free(None, description="PEM file of the client's certificate")
    ssl_keyfile: Path | None = Free(None, description="PEM file of the client's key")
    timeout_s: float = Free(10.0, gt=0, description="how long one answer may take")
    patience_s: float = Free(
        10.0, ge=0, description="how long a turn waits for a registry that is away; then the shard recovers"
    )
    unknown_id_s: float = Free(60.0, ge=0, description="how long a schema id that it does not know is not asked again")
    subject: str | None = Stop(None, description="of the predictions' schema; default: TOPIC-value")
    register_schema: bool = Free(True, description="register the predictions' schema; else it must be there already")


class Config(Station):
    """A worker, from Kafka to Kafka.

    Raises:
        ConfigError: names every fault by its path, and the nearest known name for an unknown one.
    """

    name: str = New(pattern=r"^[A-Za-z0-9._-]{1,100}$", description="of the application; prefix of its control topic")
    task: Task = New("binary", description="what a label is: 0 or 1, a class, or a number")
    seed: int = New(0, ge=0, lt=1 << 63, description="of everything random")
    events: Events
    labels: Labels | None = None
    predictions: str | None = Free(None, description="URL that predictions are sent to")
    predictions_codec: str = Stop("json", description="how predictions are written: json, avro, protobuf")
    dead_letters: str | None = Free(
        None, description="URL of bad records; default: NAME-dead-letters beside the events"
    )
    control: str | None = Free(None, description="URL of the control log; default: NAME-control beside the events")
    join: Join = Join()
    features: dict[FieldPath, Feature] = New(min_length=1, description="by name; dots go into nested objects")
    model: Model = Model()
    optimizer: Optimizer = Optimizer()
    replay: Replay = Replay()
    river: str | None = New(None, description="a River model instead, e.g. river.linear_model:LogisticRegression")
    trust_pickle: bool = Free(False, description="allow checkpoints that hold a pickle: needed by a River model only")
    metrics: Metrics = Metrics()
    drift: Drift = Drift()
    checkpoint: Checkpoint = Checkpoint()
    shard: Shard = Shard()
    worker: Worker = Worker()
    delivery: Delivery = Delivery()
    telemetry: Telemetry = Telemetry()
    kafka: Kafka = Kafka()
    registry: Registry = Registry()

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
        if self.river is not None and not self.trust_pickle:
            raise ValueError("river: is saved as a pickle; set trust_pickle = true if you trust the checkpoint folder")
        if self.exactly_once and self.predictions is None:
            raise ValueError("delivery.mode: exactly_once has nothing to deliver; set predictions")
        if self.exactly_once and _site(self.predictions or "") != _site(self.control_url):
            raise ValueError("delivery.mode: exactly_once needs predictions and control on the same brokers")
        if self.exactly_once and _site(self.control_url)[0] == "file":
            raise ValueError("delivery.mode: files know no transactions; exactly_once needs Kafka")
        urls = self.inputs | {name: getattr(self, name) for name in ("predictions", "dead_letters", "control")}
        urls |= {"registry.url": self.registry.url}
        for name, url in urls.items():
            if "@" in urlsplit(url or "").netloc:
                raise ValueError(f"{name}: no user or password in a URL; see [kafka] and [registry]")
        return self

    def allows(self, label: float) -> bool:
        """Whether a finite number is a label of the task."""
        if self.task == "regression":
            return True
        return label in (0.0, 1.0) if self.task == "binary" else label.is_integer() and 0 <= label < self.model.classes

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a TOML file; relative paths in it mean relative to the working folder."""
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from error
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not TOML: {error}") from error
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: Mapping[str, Any], where: str = "config") -> Self:
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise ConfigError("\n".join(f"{where}: {line}" for line in _explain(error, cls))) from error

    @property
    def inputs(self) -> dict[str, str]:
        """URL by input name."""
        return {EVENTS: self.events.url} | ({LABELS: self.labels.url} if self.labels else {})

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
        return self.model.classes if self.task == "multiclass" else 1

    @property
    def dead_letters_url(self) -> str:
        return self.dead_letters or self._beside("dead-letters")

    @property
    def control_url(self) -> str:
        """Each shard's own: with several its index is part of the name."""
        suffix = f"-{self.shard.index}" if self.shard.count > 1 else ""
        return self.control + suffix if self.control else self._beside(f"control{suffix}")

    def _beside(self, suffix: str) -> str:
        url = urlsplit(self.events.url)
        if url.scheme == "file":
            # A file's neighbour, but in a folder of ours: the events' own folder may be read-only.
            return (self.checkpoint.folder.resolve() / f"{self.name}-{suffix}.jsonl").as_uri()
        return urlunsplit((url.scheme, url.netloc, f"/{self.name}-{suffix}", "", ""))

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
        if isinstance(value, dict):
            value = {key: item.model_dump(mode="json") for key, item in value.items()}
        yield path, change, str(value) if isinstance(value, Path) else value


def changes(old: Mapping[str, Any], config: Config) -> list[tuple[str, Change]]:
    """What has changed since a checkpoint's configuration (`Config.model_dump(mode="json")`), and what that needs.

    Raises:
        ConfigError: this version doesn't understand the checkpoint's configuration.
    """
    before = {path: value for path, _, value in Config.parse(old, "checkpoint").settings()}
    after = {path: (change, value) for path, change, value in config.settings()}
    found = [(path, change) for path, (change, value) in after.items() if before.get(path, value) != value]
    # A whole table that came or went ([labels]) has paths on one side only.
    found += [(path, "new") for path in sorted(before.keys() ^ after.keys())]
    return sorted(set(found))


def fingerprint(config: Config) -> str:
    """A hash of every setting that state depends on."""
    state = {path: value for path, change, value in config.settings() if change != "free"}
    return hashlib.sha256(orjson.dumps(state, option=orjson.OPT_SORT_KEYS)).hexdigest()[:16]


def _site(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc


def _explain(error: ValidationError, root: type[BaseModel]) -> Iterator[str]:
    for item in error.errors(include_url=False):
        # pydantic puts a feature's kind behind its name; no user has written it there.
        loc = [part for i, part in enumerate(item["loc"]) if i != 2 or item["loc"][0] != "features"]
        path = ".".join(map(str, loc))
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = list(_fields_at(root, item["loc"][:-1]))
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.5)
            message = "unknown key" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}")
        yield f"{path}: {message}" if path else message


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    if loc[:1] == ("features",) and len(loc) == 3:
        return list(KINDS[str(loc[2])].model_fields)
    for part in loc:
        annotation = model.model_fields[str(part)].annotation
        choices = (annotation, *getattr(annotation, "__args__", ()))  # Labels | None
        model = next(t for t in choices if isinstance(t, type) and issubclass(t, BaseModel))
    return list(model.model_fields)
