"""The configuration of each station of the journey: units in names, a typo is an error that names its path.

Each field says in its `change` metadata what changing it means for a checkpoint that exists:

- `free`: takes effect at the next start (where things are, how much work a turn is, what is exported);
- `stop`: needs a clean stop first, for what lies between checkpoint and control position would not repeat;
- `new`: other state; start in another checkpoint folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

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


class Station(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


FieldPath = Annotated[str, Field(pattern=r"^[^.]+(\.[^.]+)*$")]
"""The name of a field of the payload; dots go into nested objects."""


def named_kind(value: Any) -> Any:
    """A table that says no more than its kind may be written as that."""
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


PayloadOrKind = Annotated[Payload, BeforeValidator(named_kind)]


class Events(Station):
    """Where events come from, and where in the payload things are (dots go into nested objects)."""

    url: str = Free(description="kafka://host:port/topic, file:///path/to/events.jsonl, memory://name/topic")
    codec: PayloadOrKind = Payload()
    id: FieldPath | None = Stop(None, description="field of the event id; without it the id is input:partition:offset")
    key: FieldPath | None = Stop(None, description="field of the key (user, session); without it the record's key")
    time: FieldPath | None = Stop(None, description="field of the event time; without it the record's timestamp")
    time_unit: Literal["s", "ms"] = Stop("s", description="unit of the time field, unless the codec knows it")
    label: FieldPath | None = Stop(None, description="field of an inline label; may be absent in single events")
    segment: FieldPath | None = Stop(
        None, description="field that names the part of the stream (task, season): for boundaries and evaluators alone"
    )
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
    """A number, standardised by running mean and deviation. A missing one reads as the mean, or unscaled as 0."""

    kind: Literal["numeric"] = "numeric"
    scale: Literal["standard", "none"] = New(
        "standard", description="none: taken as it comes; for what has a scale of its own, such as pixels"
    )


KINDS: dict[str, type[Station]] = {"categorical": Categorical, "bag": Bag, "numeric": Numeric}
Feature = Annotated[Categorical | Bag | Numeric, Field(discriminator="kind"), BeforeValidator(named_kind)]


class Recurrent(Station):
    """What model `recurrent` carries from one event of a key to the next; see `streamcl.models.linear_state`.

    With credit every key, waiting ticket and replayed row holds traces: about 8 x units x inputs bytes for min_gru,
    25 kB for 16 units and 192 inputs. Set `keys`, `join.max_tickets`, `replay.capacity` to suit, or credit detached.
    """

    cell: Literal["min_gru", "min_lstm", "lssl", "retnet", "legs"] = New("min_gru", description="the recurrence")
    units: int = New(16, ge=1, le=4096, description="of the recurrence (count); legs: coefficients per input")
    credit: Literal["exact", "fixed", "detached"] = New(
        "exact",
        description="for what older events did to the state: exact traces (element-wise cells), fixed feedback, none",
    )
    feedback: float = New(0.9, ge=0, lt=1, description="credit fixed: what a trace keeps from event to event")
    horizon: float = New(64.0, gt=1, description="gated cells: longest memory at first (events)")
    timed: bool = New(False, description="the time between a key's events counts, not their number alone")
    unit_s: float = New(1.0, gt=0, description="timed: of event time (seconds)")
    keys: int = New(100_000, ge=1, description="keys whose state is held; the one seen longest ago gives way (count)")

    @model_validator(mode="after")
    def _credited(self) -> Self:
        if self.cell in ("retnet", "legs") and self.credit != "detached":
            raise ValueError(f"credit: {self.cell} is no element-wise recurrence; set detached")
        return self


class Model(Station):
    kind: Literal["logistic", "fm", "mlp", "deepfm", "dcnv2", "recurrent"] = New(
        "deepfm", description="what learns, unless river is set"
    )
    recurrent: Recurrent = Recurrent()
    embedding_dim: int = New(16, ge=1, le=1024, description="width of a row (count)")
    hidden: tuple[Annotated[int, Field(ge=1, le=65_536)], ...] = New((64, 32), description="units per hidden layer")
    cross_layers: int = New(2, ge=1, le=64, description="dcnv2 only (count)")
    classes: int = New(2, ge=2, description="classes of a multiclass task; labels are 0 .. classes-1")
    init_scale: float = New(0.01, gt=0, description="standard deviation of a fresh embedding")
    dtype: Literal["float32", "float64"] = New("float32", description="of weights and of what the optimiser holds")
    warm_start: Path | None = Free(
        None,
        description="weights that a first start begins with: a file, or a snapshot's folder; see streamcl.warm_start",
    )
    layer_norm: bool = New(False, description="each hidden layer's sums at mean 0 and deviation 1, before its ReLU")

    @property
    def deep(self) -> bool:
        """Whether there may be hidden layers."""
        return self.kind not in ("logistic", "fm")


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
    retention: Literal["none", "reservoir", "recency", "class_balanced", "plugin"] = New(
        "none", description="who stays; plugin: one of [[plugins]] says"
    )
    capacity: int = New(20_000, ge=1, description="most examples held (count)")
    per_event: int = Stop(0, ge=0, description="rows replayed beside each live example")
    weight: float = Stop(1.0, ge=0, description="weight of the replayed rows' mean loss; the live example's is 1")


class Loss(Station):
    """What a step pulls down. `reloop` adds to the cross-entropy what the model was better at when it served the event.

    Source: ReLoop, Cai et al. 2022 (SIGIR), arXiv 2204.11165: alpha x self-correction + (1 - alpha) x cross-entropy.
    """

    kind: Literal["task", "reloop"] = Stop("task", description="task: cross-entropy, or half the squared error")
    alpha: float = Stop(0.5, gt=0, lt=1, description="reloop only: the share of the self-correction")
    class_weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Stop(
        (), description="how much an example's loss counts, by its label 0, 1, ...; none: all alike"
    )


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


class Deltas(Station):
    """What changes between two checkpoints, for read replicas that are to be seconds behind instead of a checkpoint."""

    url: str | None = Free(
        None,
        description="where deltas go: kafka://host:port/topic, or a folder or object store that fsspec knows"
        " (file:///path, s3://bucket/prefix); none: there are none; -SHARD follows",
    )
    every_events: int = Stop(1000, ge=1, description="records between two deltas")
    retain: int = Free(1000, ge=1, description="most deltas kept in a folder or an object store")


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
    engine: Literal["auto", "eager", "fused"] = Stop(
        "auto", description="how steps are computed; auto: fused if all that is configured has a compiled form"
    )
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
