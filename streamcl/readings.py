"""What parts say about themselves, as Prometheus families: by shard, whole tellings, texts for people."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from streamcl.records import Stream

QUALITY = {
    "log_loss": "Mean log-loss of what was served, in nats.",
    "ne": "Log-loss divided by the entropy of the base rate; below 1 is better than a constant.",
    "calibration": "Sum of scores divided by sum of labels; 1 is calibrated.",
    "accuracy": "Share of labels that the score was on the right side of.",
    "no_change_accuracy": "Accuracy of predicting the label before; what a model has to beat.",
    "base_rate": "Share of positive labels.",
    "auc": "Area under the ROC curve; over the whole stream to within auc_bound.",
    "gauc": "AUC within the groups of metrics.group_by, weighted by their examples.",
    "gauc_left_out": "Share of the examples whose group is unknown, or has one class only: they are not in gauc.",
    "ece": "Distance of score and label, mean over 15 parts of equally many examples by score; 0 is calibrated.",
    "ne_recalibrated": "NE after the one shift of all logits that was best for the window before.",
    "mae": "Mean absolute error, in the label's unit.",
    "rmse": "Root mean squared error, in the label's unit.",
    "baseline_rmse": "Root mean squared error of predicting the mean so far; what a model has to beat.",
}
ALONE = {name: text for name, text in QUALITY.items() if not name.startswith("gauc")}
"""Without groups, and without what would have been served: of samples; and of tasks, which are binary."""
RECENT, DECAYED = ("ece", "ne_recalibrated"), ("log_loss", "ne", "calibration", "base_rate")
"""What is only of the recent window, and what there is of decayed weights."""
QUALITY |= {f"base_{name}": f"{text} As if there were no error memory." for name, text in ALONE.items()}
"""Readings that come several times: over the whole stream, and over the others of `WINDOWS`, as far as defined."""
WINDOWS = {"whole": "", "recent": "_window", "decayed": "_decayed", "since": "_since"}
"""What a metric is over, and how its reading ends: all labels, the recent ones, all of them by a weight that decays,
those since a shadow began.
"""
DECILES = {
    "decile_calibration": "Calibration within a tenth of the recent window's examples; the first has the lowest scores."
}
DECILES |= {f"{of}_decile_calibration": text for text in DECILES.values() for of in ("base", "live")}
"""Readings that come once for each tenth, under a name that ends in its number, from 1 to 10."""
PARTS = {
    "deltas_sent": ("deltas_sent", "Deltas published since the shard was built (count)."),
    "deltas_sent_bytes": ("deltas_sent_bytes", "The same in bytes."),
    "deltas_lost": ("deltas_lost", "Deltas that could not be written since then (count)."),
    "tickets": ("tickets", "Events that wait for their label (count)."),
    "tickets_on_disk": ("tickets_on_disk", "Of those, how many wait in segments (count)."),
    "tickets_bytes": ("tickets_disk_bytes", "Size of the segments."),
    "join_hit_ratio": ("join_hit_ratio", "Share of the ended windows that a label came for, since the very first."),
    "orphans": ("waiting_labels", "Labels that wait for their event (count)."),
    "watermark_s": ("watermark_timestamp_seconds", "Event time before which nothing more is expected."),
    "key_states": ("key_states", "Keys whose state a recurrent model holds (count)."),
    "replay_rows": ("replay_rows", "Examples in the replay memory (count)."),
    "replay_fill": ("replay_fill_ratio", "Share of the replay memory that holds an example."),
    "replay_age_s": ("replay_age_seconds", "Mean event time from its examples to the one written last."),
    "weights_version": ("weights_version", "Learning steps behind the current weights (count)."),
    "examples": ("scored_examples", "Labelled examples in the metrics over the whole stream (count)."),
    "unscored": ("unscored_examples", "Labelled examples whose loss was not finite (count)."),
    "auc_bound": ("auc_bound", "Largest error of auc over the whole stream."),
    "drift_suppressed": (
        "drift_suppressed",
        "Alarms in the refractory period since the start of the stream (count).",
    ),
    "drift_improvements": ("drift_improvements", "Falls of the mean loss since the start of the stream (count)."),
    "drift_restarts": ("drift_restarts", "Detectors begun afresh after a change of River's version (count)."),
    "sink_inflight_records": ("producer_inflight_records", "Predictions not yet acknowledged (count)."),
    "sink_inflight_bytes": ("producer_inflight_bytes", "The same in bytes."),
    "sink_rebuilds": ("producer_rebuilds", "Producers replaced since the shard was built (count)."),
    "sink_rejections": (
        "producer_rejections",
        "Predictions that the broker refused since then (count).",
    ),
    "outcomes_sink_inflight_records": ("outcomes_inflight_records", "Outcomes not yet acknowledged (count)."),
    "outcomes_sink_inflight_bytes": ("outcomes_inflight_bytes", "The same in bytes."),
    "outcomes_sink_rebuilds": ("outcomes_rebuilds", "Their producers replaced since the shard was built (count)."),
    "outcomes_sink_rejections": ("outcomes_rejections", "Outcomes that the broker refused since then (count)."),
    "outcomes_applied": ("outcomes_applied", "Outcomes that error memories here were made of (count)."),
    "outcomes_lag": ("outcomes_lag_records", "Records of outcomes that wait (count)."),
    "outcomes_gaps": ("outcomes_gaps", "Holes met in the numbers of outcomes (count)."),
    "outcomes_repeats": ("outcomes_repeats", "Outcomes that came again after a worker's crash: dropped (count)."),
    "outcomes_undecodable": ("outcomes_undecodable", "Records that were no outcome of this model: skipped (count)."),
    "outcomes_failures": ("outcomes_failures", "Times that outcomes could not be read (count)."),
    "outcomes_away": ("outcomes_away", "1 while outcomes can't be read, else 0."),
    "memory_age_outcomes": ("error_memory_age_outcomes", "Outcomes taken since the snapshot that is served (count)."),
    "checkpoint_overdue": (
        "checkpoint_interval_ratio",
        "Records since the last checkpoint divided by checkpoint.every_events; above 3 it is stale.",
    ),
    "group_ranks": ("group_ranks", "Ranks that this shard learns one model with, itself among them (count)."),
    "group_rounds": ("group_rounds", "Rounds that they have met behind, since the group began (count)."),
    "group_round_s": ("group_round_seconds", "Time from the last meeting but one to the last."),
    "group_wait_s": ("group_wait_seconds", "Of it, how long this rank waited for the slowest."),
    "group_merge_s": ("group_merge_seconds", "Of it, how long the exchange and the merge took."),
    "group_learned": ("group_round_examples", "Examples that all ranks had learned from in the last round (count)."),
    "group_sent_bytes": ("group_sent_bytes", "Sent to be merged since the shard was built."),
    "group_received_bytes": ("group_received_bytes", "Received to be merged since then."),
    "group_divergence": (
        "group_divergence_ratio",
        "How far ranks were apart before the last merge: the largest distance from their mean, divided by its norm.",
    ),
    "group_skew_s": ("group_event_time_skew_seconds", "Event time between the ranks farthest on and farthest back."),
    "lag_s": ("lag_seconds", "Age of the newest record taken, by its own timestamp, while records wait; else 0."),
    "checkpoints_deferred": ("checkpoints_deferred", "Put off, the one before being still written (count)."),
    "source_retries": ("poll_retries", "Polls that failed, brokers being away (count)."),
    "source_away": ("brokers_away", "1 while no broker of the inputs is connected, else 0."),
    "source_commit_failures": ("commit_failures", "Times that progress could not be shown to lag tools (count)."),
    "ranking_open": ("ranking_open_lists", "Lists that are not closed (count)."),
    "ranking_lists": ("ranking_closed_lists", "Lists that have been closed since the start of the stream (count)."),
    "ranking_list_events": ("ranking_list_events", "Examples of a list, mean over the recent closed ones (count)."),
    "ranking_left_out": ("ranking_left_out", "Share of the recent closed lists that have one class only."),
    "gradient_norm": ("gradient_norm", "Norm of the dense parameters' gradient, mean over recent sampled steps."),
    "dense_weight_magnitude": ("dense_weight_magnitude", "Mean absolute value of the dense parameters."),
    "diagnostics_examples": ("diagnostics_examples", "Sampled examples that a layer's figures are made of (count)."),
    "drift_mean_loss": ("drift_loss_mean", "Mean loss since the last change that the detector saw."),
}
COUNTED = ("examples", "unscored", "auc_bound")
"""Of `PARTS`, what every set of metrics tells beside the figures of `QUALITY`."""
for _name in COUNTED:
    PARTS[f"base_{_name}"] = (f"base_{PARTS[_name][0]}", f"{PARTS[_name][1]} As if there were no error memory.")
STREAMS = {
    "position": "Offset that is read next.",
    "lag_records": "Records that wait (count); at least 0.",
}
"""By input and partition."""
OF_ENDPOINTS = {key for key in PARTS if key.startswith("outcomes_") and "_sink_" not in key} | {"memory_age_outcomes"}
"""Of `PARTS`, what only an endpoint that serves has to tell."""
STAGES = {
    "rows": "Records that the stage may read (count).",
    "lambda": "Strength of the compensation; 0 is none.",
    "gamma": "Towards the mean label nearby (1), or by the mean residual (0).",
    "hit_ratio": "Share of labelled events that the stage knew something of.",
    "support": "Mean of how much it knew of those: neighbours, or a decayed count.",
    "compensation": "Mean move of a score that it knew something of.",
    "stale": "Labels of tickets that were served under other weights: counted, not written.",
    "refused": "Records whose key had no direction or was missing.",
    "resets": "Times that other weights emptied it.",
}
"""Readings of a stage of the error memory, under `error_memory_N_`."""
LAYERS = {
    "dormant_ratio": "Share of the layer's units that fired on less than 1 % of the recent sampled examples.",
    "dead_ratio": "Share of the layer's units that fired on none of them.",
    "effective_rank": "Of the last hidden layer on them: exp of the entropy of its singular values.",
    "approximate_rank": "How many of the layer's largest singular values make up .99 of the sum of all squares.",
    "stable_rank": "Sum of the squares of the layer's singular values divided by the largest square.",
    "absolute_rank": "How many of the layer's largest singular values make up .99 of the sum of all.",
    "weight_magnitude": "Mean absolute incoming weight of the layer.",
    "replacements": "Units of the layer made anew since the rules began (count).",
}
"""Readings of a hidden layer, under `layer_N_`; rules may have more."""
BOUNDARIES = {"signals": "Signals that it has sent since it began (count)."}
"""Readings of a source of signals, under `boundary_N_`: the Nth of the configuration."""
TABLES = {
    "rows": "Rows of the dynamic table (count).",
    "bytes": "Bytes of the most rows that it has held, with optimiser state and bookkeeping, and of its filter.",
    "admitted": "Ids that were given a row since it began (count).",
    "refused": "Times that it was full and refused one (count).",
    "hit_ratio": "Share of the ids of learned events that had a row already.",
    "oov_ratio": "Share of them that had none, and added nothing.",
    "oldest_last_seen_s": "Event time when the row that was learned from longest ago was learned from.",
    "evicted": "Rows that went since it began, by reason: ttl, lru, forget (count).",
}
"""Readings of a dynamic table, under `table:FIELD:`."""
SEGMENTS = {
    "events": "Labelled examples of the recent window with this value (count).",
    **{name: f"{QUALITY[name]} Of those." for name in ("log_loss", "ne", "calibration", "auc", "base_rate")},
}
"""Readings of a value of a field, under `segment:FIELD:VALUE:`."""
RANKING = {
    "ndcg": "NDCG of the first k of a list; mean over the recent closed lists.",
    "recall": "Share of a list's positives among its first k; mean over them.",
    "mrr": "1 / rank of a list's first positive, 0 beyond k; mean over them.",
}
"""Readings of lists, under `ranking_`; a name ends in `_at_K`."""
PERCENTILES = {
    "unit_age_steps": "Learning steps since a unit of the layer was made anew, or since the rule began.",
    "unit_utility": "Utility of a unit of the layer; comparable within a layer only.",
}
"""Readings of a hidden layer that come once for each percentile NN of its units, under a name that ends in `_pNN`."""
FEATURES = {
    "psi": "How far the feature's recent values are from the first ones of this process; above .25 it is another.",
    "missing_ratio": "Share of the recent sampled events without the feature.",
}
"""Readings of a feature, under `feature:NAME:`."""
WEIGHTS = {name: f"{text} Of a sample of labels, for live or frozen weights." for name, text in ALONE.items()}
"""Readings of live and of frozen weights over the same sampled labels, under `sampled:WEIGHTS:`."""
TASKS = {
    f"{name}{suffix}": f"{text} Of a further task."
    for suffix, has in {
        "": ALONE.keys() - {*RECENT},
        WINDOWS["recent"]: ALONE.keys(),
        WINDOWS["decayed"]: {*DECAYED},
    }.items()
    for name, text in ALONE.items()
    if name in has and name not in ("mae", "rmse", "baseline_rmse")
} | {name: f"{PARTS[name][1]} Of a further task." for name in COUNTED}
"""Readings of a further task, under `task_NAME.`; a name that ends in `_window` is of the recent window."""
_NUMBERED = (
    (re.compile(r"error_memory_(?P<stage>\d+)_(?P<name>\w+)"), "error_memory_", STAGES),
    (re.compile(r"(?P<name>(?:base_|live_)?decile_calibration)_(?P<decile>\d+)"), "", DECILES),
    (re.compile(r"task_(?P<task>\w+)\.(?P<name>decile_calibration)_(?P<decile>\d+)"), "task_", DECILES),
    (re.compile(r"task_(?P<task>\w+)\.(?P<name>\w+)"), "task_", TASKS),
    (re.compile(r"boundary_(?P<boundary>\d+)_(?P<name>\w+)"), "boundary_", BOUNDARIES),
    (re.compile(r"feature:(?P<feature>.+):(?P<name>\w+)"), "feature_", FEATURES),
    (re.compile(r"sampled:(?P<weights>\w+):(?P<name>\w+)"), "sampled_", WEIGHTS),
    (re.compile(r"table:(?P<field>.+):(?P<name>evicted):(?P<reason>\w+)"), "table_", TABLES),
    (re.compile(r"table:(?P<field>.+):(?P<name>\w+)"), "table_", TABLES),
    (re.compile(r"segment:(?P<field>.+?):(?P<value>.*):(?P<name>\w+)", re.DOTALL), "segment_", SEGMENTS),
    (re.compile(r"ranking_(?P<name>\w+)_at_(?P<k>\d+)"), "ranking_", RANKING),
    (re.compile(r"layer_(?P<layer>\d+)_(?P<name>\w+)_p(?P<percentile>\d\d)"), "", PERCENTILES),
    (re.compile(r"layer_(?P<layer>\d+)_(?P<name>\w+)"), "", LAYERS),
)
"""Readings of which there are several, told apart by labels: every group of the pattern but the name."""
_UNKNOWN = "Reported by a part of the worker."
MOST_SERIES = 1024
"""Of one family. What a plug-in or a wide configuration tells beyond it is dropped, and counted."""
MOST_FAMILIES = 128
"""Of readings that nothing here explains: each has a family of its own."""


class Tally(Collector):
    """A histogram that takes many values at once, by the values of one label: a scrape adds up, not the loop.

    Args:
        edges: Upper bounds, ascending; +Inf is one more.
        label, values: Every series that there is. "": one without a label.
    """

    def __init__(
        self, name: str, text: str, edges: Sequence[float], label: str = "", values: Sequence[str] = ("",)
    ) -> None:
        self.name, self.text, self.label = f"streamcl_{name}", text, label
        self.edges = list(edges)
        self._counts = {value: [0] * (len(edges) + 1) for value in values}
        self._sums = dict.fromkeys(values, 0.0)

    def add(self, values: Iterable[float], of: str = "") -> None:
        counts, edges, total = self._counts[of], self.edges, 0.0
        for value in values:
            counts[bisect_left(edges, value)] += 1
            total += value
        self._sums[of] += total

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(self.name, self.text, labels=[self.label] if self.label else [])
        names = [*map(str, self.edges), "+Inf"]
        for value, counts in self._counts.items():
            buckets = list(zip(names, accumulate(counts), strict=True))
            family.add_metric([value] if self.label else [], buckets, self._sums[value])
        yield family


class Reported:
    """What one shard's worker computed, as told last."""

    def __init__(self) -> None:
        self.position: Mapping[Stream, int] = {}
        self.lag: Mapping[Stream, int] = {}
        self.readings: Mapping[str, float] = {}


class Shards(Collector):
    """What others computed, by shard: a scrape sees whole tellings, and no series of a value that is gone.

    Args:
        labelled: Readings carry a label `shard`: there are several.
        role: Metrics of quality carry a label `role`, which is this; `live` of readings that begin with `live_`, for
            the same labels. "": there is but one.
    """

    def __init__(self, labelled: bool, role: str = "") -> None:
        self.labels = ["shard"] if labelled else []
        self.roles = [(role, ""), ("live", "live_")] if role else [("", "")]
        self.by_index: dict[int, Reported] = {}
        self._unexplained = 0  # families left out of the last scrape

    def collect(self) -> Iterator[GaugeMetricFamily]:
        dropped = 0
        for family in self._all():
            dropped += max(0, len(family.samples) - MOST_SERIES)
            del family.samples[MOST_SERIES:]
            yield family
        text = f"Series left out of the scrape: a family has {MOST_SERIES} at most (count)."
        yield GaugeMetricFamily("streamcl_series_dropped", text, value=dropped + self._unexplained)

    def _all(self) -> Iterator[GaugeMetricFamily]:
        told = dict(self.by_index)
        yield _by_stream("position", [each.position for each in told.values()])
        yield _by_stream("lag_records", [each.lag for each in told.values()])
        left = {index: dict(each.readings) for index, each in told.items()}
        for readings in left.values():
            for told_already in ("lag_records", "drift_alarms"):  # by partition, and as a counter
                readings.pop(told_already, None)
        yield from self._quality(left)
        for pattern, prefix, texts in _NUMBERED:
            yield from self._numbered(left, pattern, prefix, texts)
        keys = dict.fromkeys(key for readings in left.values() for key in readings)
        unexplained = [key for key in keys if key not in PARTS]
        self._unexplained = max(0, len(unexplained) - MOST_FAMILIES)
        for key in [key for key in keys if key in PARTS] + unexplained[:MOST_FAMILIES]:
            name, text = PARTS.get(key, (key, _UNKNOWN))
            family = GaugeMetricFamily(f"streamcl_{name}", text, labels=self.labels)
            for index, readings in left.items():
                if key in readings:
                    family.add_metric(self.values(index), readings[key])
            yield family

    def values(self, index: int) -> list[str]:
        return [str(index)] if self.labels else []

    def _quality(self, left: Mapping[int, dict[str, float]]) -> Iterator[GaugeMetricFamily]:
        """Takes out of `left` what has a window."""
        for name, text in QUALITY.items():
            labels = ["window", *(["role"] if self.roles[0][0] else []), *self.labels]
            family = GaugeMetricFamily(f"streamcl_{name}", text, labels=labels)
            for index, readings in left.items():
                for window, suffix in WINDOWS.items():
                    for role, prefix in self.roles:
                        if (key := f"{prefix}{name}{suffix}") in readings:
                            values = [window, *([role] if role else []), *self.values(index)]
                            family.add_metric(values, readings.pop(key))
            yield family

    def _numbered(
        self, left: Mapping[int, dict[str, float]], pattern: re.Pattern[str], prefix: str, texts: Mapping[str, str]
    ) -> Iterator[GaugeMetricFamily]:
        """Takes out of `left` what the pattern knows: a family by name, and labels for the rest."""
        labels = [group for group in pattern.groupindex if group != "name"]
        families: dict[str, GaugeMetricFamily] = {}
        for index, readings in left.items():
            for key in list(readings):
                if found := pattern.fullmatch(key):
                    name = f"{prefix}{found['name']}"
                    if name not in families:
                        text = texts.get(found["name"], _UNKNOWN)
                        families[name] = GaugeMetricFamily(f"streamcl_{name}", text, labels=[*labels, *self.labels])
                    values = [found[label] for label in labels]
                    families[name].add_metric([*values, *self.values(index)], readings.pop(key))
        yield from families.values()


def _by_stream(name: str, told: Sequence[Mapping[Stream, int]]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"streamcl_{name}", STREAMS[name], labels=["input", "partition"])
    for stream, value in [item for values in told for item in values.items()]:
        family.add_metric([stream.input, str(stream.partition)], max(0, value))
    return family


def explained() -> Iterator[tuple[str, tuple[str, ...], str]]:
    """Every family that words are here for: its name, its labels beside `shard` and `role`, what it means."""
    for name, text in STREAMS.items():
        yield f"streamcl_{name}", ("input", "partition"), text
    for name, text in QUALITY.items():
        yield f"streamcl_{name}", ("window",), text
    for pattern, prefix, texts in _NUMBERED:
        labels = tuple(group for group in pattern.groupindex if group != "name")
        for name, text in texts.items():
            slices = "decile" in labels and "task" in labels and name != "decile_calibration"
            if not slices and (prefix != "table_" or (name == "evicted") == ("reason" in labels)):
                yield f"streamcl_{prefix}{name}", labels, text
    for name, text in PARTS.values():
        yield f"streamcl_{name}", (), text
