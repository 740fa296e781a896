"""A streaming online-learning engine: Kafka in, one example at a time, predictions and metrics out.

Table of contents, in the order of the journey (start with `worker`):

    worker         the loop, one screen
    evolve         a checkpoint carried over to other features and more classes
    recovery       the one recovery path, and the checkpoints that it starts from
    host           shards in one process, and the recovery of each while the others go on
    reshard        N shards become M, offline
    summary        what a run has come to
    bootstrap      learning from history before going live
    records        what travels: Record, Event, Ticket, Outcome, Prediction, Turn, Position
    protocols      the seams: Source, Sink, ControlLog, Stateful, Codec
    stations       one pydantic model per station of the journey
    architectures  the stations of the model, and of further tasks
    methods        the stations of what learns or mends beside the optimiser
    plugin         the points where a method of continual learning takes part, and what it is told
    signalling     the stations of what sends signals
    services       the stations that face outside: brokers, the schema registry, HTTP
    config         all stations together: read, checked, compared with a checkpoint's
    connect        URL to connector, name to codec: through entry points
    decode         record to event or label
    commands       record to an order to the shard itself: to forget
    traits         what of an event its metrics are told apart by
    derived        kinds of features made of other fields, of event time, of the past
    features       event to arrays
    past           what the engine keeps of the past stream, and the features read from it
    join           tickets waiting for labels
    observations   what several labels of an event come to
    archive        tickets that wait on disk
    segments       their rows, in immutable files
    places         where an id's row is
    verdicts       what an outcome is good for: to be learned from, to be measured
    key_states     what a recurrent model carries from event to event, by key
    learner        model, memories, plug-ins and engine: predict and learn
    continual      methods of continual learning, one module for each idea
    river_learner  a River model in the learner's place
    river_api      the learner as a River classifier or regressor: StreamClassifier, StreamRegressor
    engine         how the arithmetic is done: eager, fused; on a GPU as CUDA graphs or by Triton
    models         logistic to mixtures of experts, and a user's own; recurrent backbones with a state per key
    memory         replay and its retention policies; the error memory
    plasticity     what keeps a net able to learn: continual backpropagation and relatives; figures of how it fares
    metrics        prequential metrics
    drift          detectors, and the signals they emit
    boundaries     who says that a part of the stream has ended: ids, clocks, detectors, surprise, new labels
    progress       where a shard stands, and a proof of what it has learned from
    state          a state tree as JSON and arrays, and its digest
    writer         snapshots written beside learning
    lease          one writer of a shard's snapshots at a time
    chunks         large arrays in pieces that snapshots share
    snapshot       the files of one snapshot, and the check of every byte
    remote         copies of snapshots in an object store
    checkpoint     the snapshots of a shard: atomic, retained, mended
    audit          what has been forgotten, on record
    delta          what serving needs of everything that changed: base + deltas = the full snapshot
    outlets        where results go: predictions, outcomes, dead letters, deltas
    channel        where deltas go and come from: a folder, an object store, a topic
    readings       what parts say about themselves, as Prometheus families
    group          several workers that learn one model together: ranks, rounds, what is merged, common snapshots
    sampled        from a sample: how far features have moved, and what frozen weights would have served
    memory_limit   how much memory a process may take
    telemetry      turns to Prometheus
    traces         OpenTelemetry's spans of a few events
    logs           lines on stderr: text, or JSON
    status         the status page, of the hour that `history` keeps
    outcomes       what was learned after a snapshot: the error memory of a replica
    follow         a replica's way from a snapshot to the newest delta
    replica        the newest snapshot of a worker, followed
    openapi        the endpoint's description, for programs and for people
    listen         HTTP connections: limits, deadlines, order
    traffic        what an endpoint tells Prometheus
    families       every metric that there is, for its table
    endpoint       what is asked over HTTP, and its answers
    live           the worker's own endpoint
    serve          the endpoint on its socket, its key and its certificate
    gate           two threads at one state, in turn
    random         counter-based random numbers
    compiled       how loops are compiled, and where their code is kept
    garbage        Python's collector, kept from stopping the process
    testing        contract checks for connectors and parts
    backtest       the loop over a recorded stream, publishing nothing
    sweep          `streamcl replay --sweep`: configurations over one log, compared
    bench          `streamcl bench NAME`
    demo           `streamcl demo`
    page           one HTML file with its plots inside
    console        how a command answers
    inspection     `streamcl checkpoint`: a look at snapshots
    forget         `streamcl forget`: to every shard, and their answers
    cli            the command line
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamcl.river_api import StreamClassifier, StreamRegressor

__all__ = ["StreamClassifier", "StreamRegressor", "__version__"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """River's estimators need torch and River; whoever imports something else need not wait for them."""
    if name not in ("StreamClassifier", "StreamRegressor"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # By name: an import statement here would stand above every layer that asks for the version.
    return getattr(import_module("streamcl.river_api"), name)
