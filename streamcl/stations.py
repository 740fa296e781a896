"""The configuration of each station of the journey: units in names, a typo is an error that names its path.

Each field says in its `change` metadata what changing it means for a checkpoint that exists:

- `free`: takes effect at the next start (where things are, how much work a turn is, what is exported);
- `stop`: needs a clean stop first, for what lies between checkpoint and control position would not repeat;
- `new`: other state; start in another checkpoint folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic_core.core_schema import CoreSchema, no_info_before_validator_function

Change = Literal["free", "stop", "new"]
Task = Literal["binary", "multiclass", "regression"]


HALF_LIFE = 10_000.0
"""Of the decayed metrics: examples (count)."""


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


class _NamedKind:
    """A table that says no more than its kind may be written as that: in configurations and in their JSON Schema."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_before_validator_function(
            lambda value: {"kind": value} if isinstance(value, str) else value, handler(source)
        )

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        table = handler(core)
        if "discriminator" in table:
            kinds: dict[str, Any] = {"enum": sorted(table["discriminator"]["mapping"])}
        else:
            kind = handler.resolve_ref_schema(table)["properties"]["kind"]
            kinds = {name: kind[name] for name in ("type", "enum") if name in kind}
        return {"anyOf": [kinds, table]}


NamedKind = _NamedKind()


class Payload(Station):
    """How payloads are written. `codec = "avro"` is short for `codec = {kind = "avro"}`.

    Avro and Protobuf come in the Confluent wire format, their schemas from the [registry]; or, with `schema_file`, raw.
    """

    kind: str = Stop("json", description="json, avro, protobuf, or what a package has registered")
    schema_file: Path | None = Stop(
        None, description="payloads are raw, of this schema: an .avsc file, or a serialized FileDescriptorSet"
    )
    message: str | None = Stop(None, description="Protobuf: full name of the message in schema_file")


PayloadOrKind = Annotated[Payload, NamedKind]


class Events(Station):
    """Where events come from, and where in the payload things are (dots go into nested objects)."""

    url: str = Free(description="kafka://host:port/topic, file:///path/to/events.jsonl, memory://name/topic")
    codec: PayloadOrKind = Payload()
    id: FieldPath | None = Stop(None, description="field of the event id; without it the id is input:partition:offset")
    key: FieldPath | None = Stop(None, description="field of the key (user, session); without it the record's key")
    time: FieldPath | None = Stop(None, description="field of the event time; without it the record's timestamp")
    time_unit: Literal["s", "ms"] = Stop("s", description="unit of the time field, unless the codec knows it")
    label: FieldPath | None = Stop(None, description="field of an inline label; may be absent in single events")
    weight: FieldPath | None = Stop(
        None, description="field of how much the event counts, in learning and in metrics; absent: 1"
    )
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
    """What waiting for a label means. All times are event time, in seconds.

    With `wait_s` an event is taken for a negative as soon as that, for now: it is learned from, and goes on waiting. A
    label within the attribution window is then a late positive, learned from as a second example; metrics hear of what
    the window came to, and of nothing else.
    """

    attribution_window_s: float = Stop(1800.0, gt=0, description="a label counts that comes this soon after its event")
    on_close: Literal["negative", "drop"] = Stop("negative", description="what a window without a label means")
    wait_s: float | None = Stop(
        None,
        ge=0,
        description="an event is a negative for now once it has waited so long; none: when its window closes",
    )
    late: Literal["drop", "reemit"] = Stop(
        "drop",
        description="a label other than `default` that comes up to one more window late; reemit: it is learned from,"
        " as a second example",
    )
    aggregate: Literal["first", "last", "sum", "mean", "max", "min", "count", "any"] = Stop(
        "first",
        description="what several labels of an event come to, in order of (event time, place in the log): `first`"
        " counts as it comes, the others when the window closes",
    )
    default: float = Stop(0.0, description="the label of an event whose window closes without one")
    allowed_lateness_s: float = Stop(0.0, ge=0, description="how far the watermark stays behind the newest event")
    idle_s: float = Stop(60.0, gt=0, description="a partition this far behind the others doesn't hold the watermark")
    orphan_s: float = Stop(60.0, ge=0, description="how long a label waits for an event that it overtook")
    max_tickets: int = Stop(1_000_000, ge=1, description="beyond it the ticket that came first is dropped, counted")
    memory_tickets: int = Stop(
        1_000_000,
        ge=2,
        description="tickets, and closed ids, held in memory; beyond it those that came first go to disk",
    )
    max_expiries_per_event: int = Stop(100, ge=1, description="bounds the work of one event after a gap in the stream")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.wait_s is not None and self.wait_s >= self.attribution_window_s:
            raise ValueError(
                f"wait_s: {self.wait_s:g} must be below attribution_window_s {self.attribution_window_s:g}"
            )
        if self.wait_s is not None and self.on_close == "drop":
            raise ValueError("wait_s: what means nothing when its window closes can't mean a negative before")
        for name, set_ in (("wait_s", self.wait_s is not None), ("late = 'reemit'", self.late == "reemit")):
            if set_ and self.aggregate != "first":
                raise ValueError(f"aggregate: {self.aggregate} is known when the window closes, not beside {name}")
        return self


class Admission(Station):
    """How an id earns a row of a dynamic table; until then it adds nothing to a score, and nothing is learned of it.

    count: at its `threshold`th occurrence among the last `capacity` of ids without a row, counted in a filter that
    forgets its oldest seventh at a time. bloom: the same in two halves. Both over-estimate, so that a share `error` of
    ids comes in too early, none too late. probabilistic: at each occurrence with probability 1 - .05^(1 / threshold),
    so that 95 % are in after `threshold`; no counters. all: at once.
    """

    kind: Literal["count", "bloom", "probabilistic", "all"] = New("count", description="the policy")
    threshold: int = New(2, ge=1, le=200, description="occurrences (count)")
    capacity: int = New(1 << 18, ge=14, le=1 << 28, description="count, bloom: occurrences remembered (count)")
    error: float = New(0.01, gt=0, lt=1, description="count, bloom: share of ids that are taken for others")


class Dynamic(Station):
    """A table without collisions, bounded by `max_rows` or `max_bytes`, whose rows come and go. Times are event time.

    Of an id it holds vector, optimiser state, count, and the times when it was first and last learned from; all that
    goes when the row goes. Only learning admits, counts and renews; an id that comes back begins anew.
    """

    max_rows: int | None = New(
        None, ge=1, le=1 << 28, description="most rows (count); default, without max_bytes: 2^20"
    )
    max_bytes: int | None = New(
        None, ge=1, description="most bytes of rows, with optimiser state and bookkeeping, and of the filter"
    )
    admission: Annotated[Admission, NamedKind] = Admission()
    ttl_s: float | None = New(None, gt=0, description="a row goes that nothing was learned of for so long; none: never")
    sweep: int = New(4, ge=1, le=1024, description="rows looked at for that behind each learned event (count)")
    min_keep: int = New(0, ge=0, description="ttl_s takes none below so many rows (count)")
    max_evict_ratio: float = New(1.0, gt=0, le=1, description="most that one sweep of the table takes of its rows")
    full: Literal["evict_lru", "refuse"] = New(
        "evict_lru", description="for a new row the one learned from longest ago goes; or there is no new row"
    )

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.max_rows is not None and self.max_bytes is not None:
            raise ValueError("max_rows, max_bytes: set one of them")
        if self.max_rows is not None and self.min_keep > self.max_rows:
            raise ValueError(f"min_keep: {self.min_keep} rows, max_rows {self.max_rows}")
        return self


def named_table(value: Any) -> Any:
    """`table = "dynamic"` is the table without settings, `table = "hashed"` none."""
    named: dict[str, Any] = {"dynamic": {}, "hashed": None}
    if isinstance(value, str) and value not in named:
        raise ValueError(f"{value!r} is no table; set hashed, dynamic, or the settings of a dynamic one")
    return named[value] if isinstance(value, str) else value


Table = Annotated[
    Dynamic | None,
    BeforeValidator(named_table, json_schema_input_type=Literal["hashed", "dynamic"] | Dynamic | None),
]


class RowOptimizer(Station):
    """How rows of a field are learned; what it leaves out is as [optimizer] says."""

    kind: Literal["sgd", "adagrad", "adam", "ftrl"] | None = New(None, description="default: that of [optimizer]")
    learning_rate: float | None = Stop(None, gt=0, description="default: that of all rows")
    l1: float | None = Stop(None, ge=0, description="FTRL only")
    l2: float | None = Stop(None, ge=0, description="times the weight, part of its gradient")


class Category(Station):
    """What features of rows have in common."""

    buckets: int = New(1 << 16, ge=2, le=1 << 26, description="rows of a hashed table (count)")
    embedding_dim: int | None = New(
        None, ge=0, description="numbers of its rows that are used, the rest is zero; default: all, model.embedding_dim"
    )
    optimizer: RowOptimizer | None = New(None, description="of its rows; default: as all rows")
    table: Table = New(
        None,
        description="hashed, or dynamic: a row for each id, without collisions, admitted and dropped; its settings",
    )

    @model_validator(mode="after")
    def _one_table(self) -> Self:
        if self.table is not None and self.buckets != type(self).model_fields["buckets"].default:
            raise ValueError("buckets: of a hashed table; a dynamic one has max_rows or max_bytes")
        return self


class Categorical(Category):
    """A string, integer or boolean, hashed into `buckets` rows. A missing value has a row of its own."""

    kind: Literal["categorical"] = "categorical"


class Bag(Category):
    """A list of categories, or an object of them with their weights; their rows are pooled."""

    kind: Literal["bag"] = "bag"
    max_items: int = New(32, ge=1, le=4096, description="items beyond it are ignored")
    pooling: Literal["mean", "sum", "sqrtn"] = New(
        "mean", description="of the rows of its items; weighted: sum(w x row) / sum(|w|), / 1, / sqrt(sum(w^2))"
    )
    weights: FieldPath | None = New(None, description="field that lists a number for each item; default: 1 for each")

    @model_validator(mode="after")
    def _room(self) -> Self:
        if self.table is not None and (self.table.max_rows or self.max_items) < self.max_items:
            raise ValueError(f"table.max_rows: an event may have {self.max_items} items, which must have room")
        return self


class Numeric(Station):
    """A number, standardised by running mean and deviation. A missing one reads as the mean, or unscaled as 0."""

    kind: Literal["numeric"] = "numeric"
    scale: Literal["standard", "none", "log"] = New(
        "standard",
        description="none: taken as it comes; for what has a scale of its own, such as pixels; log:"
        " sign(x) ln(1 + |x|), then standardised",
    )
    bins: int = New(0, ge=0, le=256, description="also a row for each of so many quantiles; 0: none")


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

    kind: Literal["task", "reloop", "fnw", "fnc", "dfm", "es_dfm"] = Stop(
        "task",
        description="task: cross-entropy, or half the squared error; fnw, fnc (join.wait_s = 0), es_dfm (join.wait_s),"
        " dfm: for labels that come late",
    )
    unit_s: float | None = Stop(
        None, gt=0, description="dfm only: of delays (seconds); default: a tenth of join.attribution_window_s"
    )
    alpha: float = Stop(0.5, gt=0, lt=1, description="reloop only: the share of the self-correction")
    class_weights: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] = Stop(
        (), description="how much an example's loss counts, by its label 0, 1, ...; none: all alike"
    )


class Sample(Station):
    """Negatives that are not learned from, so that there is time for the rest.

    Which, is drawn by their ids, after the join: no positive is lost with its negative. The loss is that of x - ln w,
    so that x stays the logit of the whole stream (among what stays, the odds of a positive are 1/w times as high), and
    metrics count each negative that stays 1/w times.

    Source: He et al. 2014, *Practical lessons from predicting clicks on ads at Facebook*, section 6.3, where what is
    served is corrected instead.
    """

    negatives: float = Stop(1.0, gt=0, le=1, description="share of the negatives that are learned from")


class Ranking(Station):
    """Metrics of lists, such as what a request was answered with; off without `group_by`.

    A list is what has been labelled of one value of `group_by`. It is closed once it holds `max_items`, or once
    `max_open` others have begun behind it; only then is it judged. With labels that wait for their window there must
    be room for the lists of a whole window, or a list's positives, which come early, are judged without its negatives.
    """

    group_by: FieldPath | None = Stop(
        None, description="field that names the list an event was shown in (request, session); events.key, or another"
    )
    k: tuple[Annotated[int, Field(ge=1)], ...] = Stop(
        (5, 20), min_length=1, max_length=8, description="how many of a list's first count (count)"
    )
    max_items: int = Stop(500, ge=2, description="a list with so many labelled events is closed (count)")
    max_open: int = Stop(1000, ge=1, description="lists that are open at once; the one that began first goes (count)")
    window: int = Stop(1000, ge=1, description="closed lists in the metrics (count)")


class Metrics(Station):
    """What is measured beside the metrics of a task. A part whose settings change begins anew."""

    window: int = New(10_000, ge=1, description="labelled examples in the windowed metrics (count)")
    half_life: float = Stop(
        HALF_LIFE, gt=0, description="an example counts half in the decayed metrics after so many more (count)"
    )
    group_by: FieldPath | None = Stop(
        None, description="gAUC within the values of this categorical feature, of events.key or events.segment"
    )
    segments: tuple[FieldPath, ...] = Stop(
        (), max_length=8, description="metrics for each value of these categorical features, or of events.segment"
    )
    max_segments: int = Stop(
        20,
        ge=1,
        le=1000,
        description="values of such a field that have series of their own, first come; others share one",
    )
    ranking: Ranking = Ranking()


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


class GroupConfig(Station):
    """How the workers that `torchrun` has started learn one model together; see `streamcl.group.rounds`.

    Each learns by itself from its own shard, and they meet in rounds. A rank closes its round when it has learned from
    `round_events` events, or once its event time passes a multiple of `round_s`.
    """

    merge: Literal["average", "outer", "gradient", "none"] = Stop(
        "average",
        description="what happens when ranks meet: average of the models; outer: a step of an outer optimiser along it;"
        " gradient: the sum of every step's; none: nothing, each shard has a model of its own",
    )
    round_events: int | None = Stop(
        None, ge=1, description="learned events of a rank in a round; default: 100, or 1 with merge gradient"
    )
    round_s: float | None = Stop(None, gt=0, description="or else event time of a round, in seconds")
    most_records: int | None = Stop(
        None,
        ge=1,
        description="a rank's round ends at the latest behind so many records, learned or not, so that nobody waits for"
        " it any longer; default: 10 times round_events, none with round_s",
    )
    outer_learning_rate: float = Stop(0.7, gt=0, description="of merge outer: of the outer optimiser")
    outer_momentum: float = Stop(0.9, ge=0, lt=1, description="of merge outer: Nesterov momentum of the same")
    timeout_s: float = Free(
        300.0, gt=0, description="a rank that keeps the others waiting for longer is lost, and all begin anew"
    )

    @model_validator(mode="after")
    def _one_measure(self) -> Self:
        if self.round_events is not None and self.round_s is not None:
            raise ValueError("round_events, round_s: set one of the two")
        if self.merge == "gradient" and (self.round_s is not None or self.round_events not in (None, 1)):
            raise ValueError("round_events: with merge gradient the ranks meet behind every event; leave it out")
        return self

    @property
    def learned(self) -> int | None:
        """Learned events that fill a rank's round (count); None: event time does."""
        if self.round_s is not None:
            return None
        return self.round_events or (1 if self.merge == "gradient" else 100)

    @property
    def most(self) -> int | None:
        """Records that end it in any case (count)."""
        return self.most_records or (None if self.learned is None else 10 * self.learned)


class Worker(Station):
    max_records: int = Free(500, ge=1, description="most records of a turn; never changes a result")
    poll_timeout_s: float = Free(0.1, gt=0, description="a turn waits no longer for its first record")
    engine: Literal["auto", "eager", "fused", "graph"] = Stop(
        "auto",
        description="how steps are computed; auto: fused if all that is configured has a compiled form, on a GPU eager;"
        " graph: CUDA graphs, on a GPU alone",
    )
    device: Literal["cpu", "cuda", "auto"] = Stop(
        "cpu", description="where steps are computed; auto: the CPU, until a GPU has been measured to be faster"
    )
    threads: int = Stop(1, ge=1, description="torch threads; more than one is slower at batch size one")
    max_bad_ratio: float = Free(0.5, gt=0, le=1, description="stop when more of the last 1,000 records are bad")


class Delivery(Station):
    """What a reader of the predictions may see after a crash. What is learned is learned exactly once in both modes."""

    mode: Literal["at_least_once", "exactly_once"] = Stop(
        "at_least_once",
        description="exactly_once: a reader of committed records sees each prediction once, some milliseconds later",
    )


class Telemetry(Station):
    host: str = Free("127.0.0.1", description="where /metrics, /healthz, /readyz and the status page listen")
    port: int = Free(9464, ge=0, le=65535, description="0 switches it off")
    page: bool = Free(True, description="a status page at /, and what it shows at /v1/status, both without a key")
    log_format: Literal["text", "json"] = Free("text", description="of the lines on stderr; json: an object a line")
    trace_share: float = Free(
        0.0, ge=0, le=1, description="share of the keys whose events are traced, by OpenTelemetry; needs streamcl[otel]"
    )
    sample_every: int = Free(
        64, ge=0, description="one labelled event in so many is looked at for drift of features; 0: none"
    )
    frozen: bool = Free(
        True, description="the same events are also scored by the weights that this process began with, up to 256 MiB"
    )
