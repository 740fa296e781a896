"""Three dashboards: is it healthy and does it learn; how well; and what the machine does."""

from __future__ import annotations

from deploy.panels import SELECTED, Board, Panel, Row

R = "$__rate_interval"
WHO = "{{instance}}"


def m(name: str, labels: str = "") -> str:
    """A metric of the chosen workers."""
    whole = name if name.startswith("process_") else f"streamcl_{name}"
    return f"{whole}{{{SELECTED}{',' if labels else ''}{labels}}}"


def rate(name: str, labels: str = "", by: str = "instance") -> str:
    return f"sum by ({by}) (rate({m(name, labels)}[{R}]))"


def quantile(q: float, name: str, by: str = "instance", labels: str = "") -> str:
    return f"histogram_quantile({q}, sum by ({by}, le) (rate({m(f'{name}_bucket', labels)}[{R}])))"


LIVE = 'window="recent",role!="shadow"'


def quality(name: str, labels: str = LIVE) -> str:
    return f"max by (instance, shard) ({m(name, labels)})"


def by(name: str, *keep: str, f: str = "max", labels: str = "") -> str:
    return f"{f} by ({', '.join(('instance', *keep))}) ({m(name, labels)})"


OURS = 'role!="shadow"'
ALONE, ENDED = 'fate="joined"', 'fate=~"joined|expired|dropped"'
JOINED = 'fate=~"joined|late_joined|inline"'

HEALTH = Row(
    "Is it healthy?",
    (
        Panel(
            "Ready",
            "none",
            "1: caught up, and its brokers answer. 0: `/readyz` says why; see the runbook, StreamclNotReady.",
            ((f"min by (instance) ({m('ready')})", WHO),),
            "stat",
            4,
            1,
            low=True,
        ),
        Panel(
            "Brokers away",
            "none",
            "1: no broker of the inputs is connected. Nothing is lost, but nothing is answered: StreamclBrokersAway.",
            ((by("brokers_away"), WHO),),
            "stat",
            4,
            1,
            may_be_empty="only a source on brokers tells it",
        ),
        Panel(
            "Records that wait",
            "short",
            "All partitions together. It should hover near 0; when it climbs look at *Lag in seconds* and at"
            " *Time of a turn by stage*: StreamclLagging.",
            ((by("lag_records", f="sum"), WHO),),
            "stat",
            4,
        ),
        Panel(
            "Checkpoint age",
            "s",
            "Since the last one that succeeded. Much beyond its usual: StreamclCheckpointFailing, ...Stale.",
            ((f"max by (instance) (time() - {m('checkpoint_last_success_timestamp_seconds')})", WHO),),
            "stat",
            4,
        ),
        Panel(
            "Memory of its limit",
            "percentunit",
            "At 90 % it is close to being killed: StreamclMemoryNearLimit. *Memory* on the board Operations"
            " says of what.",
            (
                (
                    f"max by (instance) ({m('process_resident_memory_bytes')}) / "
                    f"max by (instance) ({m('memory_limit_bytes')})",
                    WHO,
                ),
            ),
            "stat",
            4,
            0.9,
        ),
        Panel(
            "Dead letters",
            "percentunit",
            "Share of the records that could not be used. Above 1 %: StreamclDeadLetters; by reason further down.",
            ((f"{rate('dead_letters_total')} / {rate('events_consumed_total')}", WHO),),
            "stat",
            4,
            0.01,
        ),
    ),
)

FLOW = Row(
    "Flow",
    (
        Panel(
            "Events per second",
            "eps",
            "Records taken, answered, and labels joined. Taken falls to 0 while records wait: StreamclStalled. Joined"
            " falls alone: StreamclLabelsStopped.",
            (
                (rate("events_consumed_total"), f"taken {WHO}"),
                (rate("events_total", 'fate="predicted"'), f"answered {WHO}"),
                (rate("events_total", JOINED), f"joined {WHO}"),
            ),
        ),
        Panel(
            "Lag in seconds",
            "s",
            "Age of the newest record taken, while any waits; and the clock minus the event time answered last. If only"
            " the second grows, events come late to the topic: look upstream.",
            ((by("lag_seconds"), f"lag {WHO}"), (by("event_delay_seconds"), f"event time {WHO}")),
        ),
        Panel(
            "What became of events",
            "eps",
            "`expired` beside few `joined`: labels don't come or ids don't match. `orphaned`: labels without an event."
            " `quarantined`, `dead_letter`: see the reasons. `overflowed`: raise `join.max_tickets`.",
            ((rate("events_total", by="instance, fate") + " > 0", f"{{{{fate}}}} {WHO}"),),
        ),
    ),
)

LEARNING = Row(
    "Does it learn?",
    (
        Panel(
            "Log-loss: live and frozen weights",
            "none",
            "Over the same sampled labels. Live should lie below frozen, the more the longer the process runs. Above it"
            " learning does harm: StreamclWorseThanFrozen.",
            ((by("sampled_log_loss", "weights"), f"{{{{weights}}}} {WHO}"),),
        ),
        Panel(
            "NE, recent window",
            "none",
            "Log-loss over the entropy of the base rate. 1 is as good as a constant, lower is better. A jump"
            " that stays:"
            " look for drift marks and at *Drift of features*.",
            ((quality("ne"), f"served {WHO}"), (quality("base_ne"), f"without error memory {WHO}")),
        ),
        Panel(
            "Calibration, recent window",
            "none",
            "Sum of scores over sum of labels; 1 is calibrated. Off by more than a quarter: StreamclCalibrationOff. It"
            " swings when labels stop: then that is the cause.",
            ((quality("calibration"), f"served {WHO}"), (quality("base_calibration"), f"without error memory {WHO}")),
        ),
    ),
)

OVERVIEW = Board(
    "streamcl-overview",
    "Overview",
    "Is it healthy, and does it learn? Start here.",
    (HEALTH, FLOW, LEARNING),
)

QUALITY = Row(
    "Quality",
    (
        Panel(
            "Log-loss",
            "none",
            "In nats, of what was served before its label was known: of the recent window and of the whole stream. The"
            " recent above the whole for long: the model no longer follows.",
            ((by("log_loss", "window", labels=OURS), f"{{{{window}}}} {WHO}"),),
        ),
        Panel(
            "NE: served, without error memory, live and frozen weights",
            "none",
            "What each mechanism brings. `without error memory` below `served`: it does harm; set its lambda to auto or"
            " 0. Replay and plasticity are compared by `streamcl shadow`.",
            (
                (quality("ne"), f"served {WHO}"),
                (quality("base_ne"), f"without error memory {WHO}"),
                (by("sampled_ne", "weights"), f"{{{{weights}}}} weights {WHO}"),
            ),
        ),
        Panel(
            "NE: live and in shadow",
            "none",
            "Another configuration beside the live one, on the same labels: without replay, or without a rule of"
            " plasticity, it says what that brings. Shadow below live for a day: `streamcl shadow promote`.",
            ((by("ne", "role", labels='window="recent",role=~"live|shadow"'), f"{{{{role}}}} {WHO}"),),
            may_be_empty="only beside a shadow",
        ),
        Panel(
            "AUC",
            "none",
            "Exact over the recent window, binned over the whole stream. .5 is a coin. It falls while NE holds:"
            " the model"
            " still knows the base rate, but no longer who is who.",
            ((by("auc", "window", labels=OURS), f"{{{{window}}}} {WHO}"),),
        ),
        Panel(
            "gAUC and ECE, recent window",
            "none",
            "gAUC is AUC within groups (`metrics.group_by`): what a ranking needs, where AUC may only tell"
            " users apart. ECE"
            " is the distance of score and label by parts of the scores: it sees what calibration averages out. gAUC"
            " falls alone: look at item features.",
            ((quality("gauc"), f"gAUC {WHO}"), (quality("ece"), f"ECE {WHO}")),
        ),
        Panel(
            "Ranking of lists",
            "none",
            "NDCG of the first k of recent closed lists (`metrics.ranking`). It falls while AUC holds: the top"
            " is wrong;"
            " look at what changed in how candidates are chosen.",
            ((by("ranking_ndcg", "k"), f"NDCG at {{{{k}}}} {WHO}"),),
            may_be_empty="only with metrics.ranking.group_by",
        ),
        Panel(
            "Calibration of live and frozen weights",
            "none",
            "Sum of scores over sum of labels on the same sampled labels. Frozen off and live at 1: the world has moved"
            " and learning keeps up. Both off: look at the labels.",
            ((by("sampled_calibration", "weights"), f"{{{{weights}}}} {WHO}"),),
        ),
        Panel(
            "Base rate and mean score",
            "none",
            "Share of positive labels, and the mean of what was served. They should run together. A base rate"
            " that falls"
            " to 0: labels have stopped.",
            (
                (quality("base_rate"), f"labels {WHO}"),
                (f"{rate('served_score_sum')} / {rate('served_score_count')}", f"scores {WHO}"),
            ),
        ),
        Panel(
            "Distribution of scores",
            "short",
            "Sampled. All in one bucket: the model has collapsed to a constant; look at *Gradient norm* and the"
            " learning"
            " rate. Mass at both ends that was not there before: it is too sure of itself.",
            ((f"sum by (le) (increase({m('served_score_bucket')}[{R}]))", "{{le}}"),),
            "heat",
        ),
    ),
)

LABELS = Row(
    "Labels",
    (
        Panel(
            "Windows that ended with a label",
            "percentunit",
            "Of those that ended now. Down to half of its usual: StreamclJoinRateDown; to 0: StreamclLabelsStopped.",
            ((f"{rate('events_total', ALONE)} / {rate('events_total', ENDED)}", WHO),),
        ),
        Panel(
            "Delay of labels",
            "s",
            "In event time, of joined ones: median and 99 %. Close to `join.attribution_window_s`: labels are"
            " being lost"
            " behind it; make it longer, or learn with `join.wait_s`.",
            (
                (quantile(0.5, "label_delay_seconds"), f"median {WHO}"),
                (quantile(0.99, "label_delay_seconds"), f"99 % {WHO}"),
            ),
        ),
        Panel(
            "What waits",
            "short",
            "Events that wait for a label, and labels that wait for their event. Growing without end: the watermark"
            " stands still (a silent partition: `join.idle_s`), or ids don't match.",
            ((by("tickets", f="sum"), f"tickets {WHO}"), (by("waiting_labels", f="sum"), f"labels {WHO}")),
        ),
    ),
)

DRIFT = Row(
    "Drift",
    (
        Panel(
            "Drift alarms",
            "short",
            "Rises of the loss that the detector calls real, in the last hour. One is the world's doing. Many:"
            " StreamclDriftStorm.",
            ((f"sum by (instance) (increase({m('drift_alarms_total')}[1h]))", WHO),),
            limit=4,
        ),
        Panel(
            "Drift of features (PSI), the ten furthest",
            "none",
            "Recent values against those at the process's start, on a sample. Above .1 moved, above .25 another"
            " feature:"
            " ask whoever produces it. It begins anew with each restart.",
            ((f"topk(10, {m('feature_psi')})", f"{{{{feature}}}} {WHO}"),),
            limit=0.25,
        ),
        Panel(
            "Missing features, the ten worst",
            "percentunit",
            "Share of sampled events without the feature. A step up is a producer's release: ask before the model has"
            " learned to live without.",
            ((f"topk(10, {m('feature_missing_ratio')})", f"{{{{feature}}}} {WHO}"),),
        ),
    ),
)

MEMORY = Row(
    "Memory",
    (
        Panel(
            "Replay memory: how full",
            "percentunit",
            "Share of `replay.capacity`. It fills and stays full. It falls: somebody was forgotten (`streamcl"
            " forget`).",
            ((by("replay_fill_ratio"), WHO),),
        ),
        Panel(
            "Replay memory: how old",
            "s",
            "Mean event time of its examples behind the newest. A reservoir's grows with the stream, a recency buffer's"
            " stands. If what is old does harm after drift, choose `recency`.",
            ((by("replay_age_seconds"), WHO),),
        ),
        Panel(
            "Rows of dynamic tables",
            "short",
            "Near `max_rows` with refusals: raise it, or let rows go earlier (`ttl`).",
            ((by("table_rows", "field", f="sum"), f"{{{{field}}}} {WHO}"),),
            may_be_empty="only where a table is dynamic",
        ),
        Panel(
            "Error memory: strength and use",
            "none",
            "Lambda 0: it has switched itself off, for it did not help. A hit ratio near 0: its key never comes again.",
            (
                (by("error_memory_lambda", "stage"), f"lambda {{{{stage}}}} {WHO}"),
                (by("error_memory_hit_ratio", "stage"), f"hits {{{{stage}}}} {WHO}"),
            ),
        ),
        Panel(
            "Error memory: how far scores move",
            "none",
            "Mean move of a score that it knew something of. Large for long: the weights don't learn what it corrects;"
            " raise the learning rate, or look at what is quarantined.",
            ((by("error_memory_compensation", "stage"), f"{{{{stage}}}} {WHO}"),),
        ),
    ),
)

PLASTICITY = Row(
    "Plasticity",
    (
        Panel(
            "Dormant units",
            "percentunit",
            "Share of a hidden layer that fires on less than 1 % of events. Above a half: StreamclPlasticityLost.",
            ((by("dormant_ratio", "layer"), f"layer {{{{layer}}}} {WHO}"),),
            limit=0.5,
        ),
        Panel(
            "Effective rank of the last hidden layer",
            "none",
            "How many directions it uses. A slow fall over weeks is lost plasticity: continual backpropagation"
            " (`docs/learning.md`) holds it.",
            ((by("effective_rank", "layer"), f"layer {{{{layer}}}} {WHO}"),),
        ),
        Panel(
            "Weights",
            "none",
            "Mean absolute weight of each layer, and of all dense parameters. Growth without end: lower the learning"
            " rate or add weight decay.",
            (
                (by("weight_magnitude", "layer"), f"layer {{{{layer}}}} {WHO}"),
                (by("dense_weight_magnitude"), f"all {WHO}"),
            ),
        ),
        Panel(
            "Gradient norm",
            "none",
            "Mean over recent sampled steps. Spikes go with quarantined labels; a fall to 0 with a model that has"
            " collapsed.",
            ((by("gradient_norm"), WHO),),
        ),
        Panel(
            "Units made anew",
            "short",
            "By continual backpropagation, a second. None for long although units are dormant: its rate or its maturity"
            " is set too careful.",
            ((f"sum by (instance, layer) (rate({m('replacements')}[{R}]))", f"layer {{{{layer}}}} {WHO}"),),
            may_be_empty="only with a rule that makes units anew",
        ),
    ),
)

LEARNS = Board(
    "streamcl-learning",
    "Learning",
    "How well it learns: quality, labels, drift, memory, plasticity.",
    (QUALITY, LABELS, DRIFT, MEMORY, PLASTICITY),
)

LAG = Row(
    "Lag",
    (
        Panel(
            "Records that wait, by partition",
            "short",
            "One partition alone: a hot key, or a producer that favours it. All together: see *Time of a turn"
            " by stage*.",
            ((by("lag_records", "input", "partition"), f"{{{{input}}}} {{{{partition}}}} {WHO}"),),
        ),
        Panel(
            "Time to drain",
            "s",
            "Records that wait over the rate at which they are taken. Above five minutes and growing: StreamclLagging.",
            ((f"{by('lag_records', f='sum')} / ({rate('events_consumed_total')} > 0)", WHO),),
            limit=300,
        ),
        Panel(
            "Watermark behind the clock",
            "s",
            "Event time before which nothing more is expected. It stands still: a partition is silent (`join.idle_s`),"
            " and windows don't close.",
            ((f"max by (instance) (time() - {m('watermark_timestamp_seconds')})", WHO),),
        ),
    ),
)

LATENCY = Row(
    "Latency",
    (
        Panel(
            "Time of a turn by stage, 99 %",
            "s",
            "`poll` waits for records: long is idle. `log`, `send`: the broker. `engine`: the model. `work`: decoding,"
            " joining, and the model of the eager engine. Above 1 s: StreamclTurnsSlow.",
            ((quantile(0.99, "stage_seconds", "instance, stage"), f"{{{{stage}}}} {WHO}"),),
        ),
        Panel(
            "Time of a turn",
            "s",
            "Median and 99 %, with its poll. An event waits for one turn at most before it is answered.",
            ((quantile(0.5, "turn_seconds"), f"median {WHO}"), (quantile(0.99, "turn_seconds"), f"99 % {WHO}")),
        ),
        Panel(
            "Answers not yet acknowledged",
            "short",
            "Near its bound inputs are paused: the broker of the predictions is slow or away.",
            ((by("producer_inflight_records", f="sum"), f"predictions {WHO}"),),
            may_be_empty="only a sink on brokers tells it",
        ),
    ),
)

CHECKPOINTS = Row(
    "Checkpoints",
    (
        Panel(
            "Time of a checkpoint",
            "s",
            "Median and 99 %, written beside learning. Longer than the interval: StreamclCheckpointStale follows.",
            (
                (quantile(0.5, "checkpoint_seconds"), f"median {WHO}"),
                (quantile(0.99, "checkpoint_seconds"), f"99 % {WHO}"),
            ),
        ),
        Panel(
            "Size of a checkpoint",
            "bytes",
            "Of all it refers to. Steady growth comes from tickets or dynamic tables.",
            ((by("checkpoint_bytes"), WHO),),
        ),
        Panel(
            "Records since the last, in intervals",
            "none",
            "A saw between 0 and 1. Above 3: StreamclCheckpointStale. A restart repeats that much.",
            ((by("checkpoint_interval_ratio"), WHO),),
            limit=3,
        ),
        Panel(
            "Checkpoints that failed",
            "short",
            "By cause, a second. The worker serves on; free the disk or set its mode right: StreamclCheckpointFailing.",
            ((rate("checkpoint_failures_total", by="instance, cause"), f"{{{{cause}}}} {WHO}"),),
        ),
        Panel(
            "Free on the disk",
            "bytes",
            "Of `checkpoint.folder`. Falling towards 0: StreamclDiskNearlyFull.",
            ((by("checkpoint_disk_free_bytes"), WHO),),
        ),
        Panel(
            "Starts and recoveries",
            "short",
            "In the last hour: starts by what they began from, shards recovered in the process, by cause. `damaged`: a"
            " checkpoint did not match its checksum.",
            (
                (
                    f"sum by (instance, result) (increase({m('checkpoint_restores_total')}[1h]))",
                    f"{{{{result}}}} {WHO}",
                ),
                (f"sum by (instance, cause) (increase({m('recoveries_total')}[1h]))", f"{{{{cause}}}} {WHO}"),
                (f"sum by (instance) (changes({m('process_start_time_seconds')}[1h]))", f"restarts {WHO}"),
            ),
        ),
    ),
)

FAULTS = Row(
    "Faults",
    (
        Panel(
            "Dead letters by reason",
            "eps",
            "`non_finite`, `quarantined_label`: StreamclBadLabels. `schema`, `undecodable`: a producer has changed its"
            " format. The topic of dead letters has each with its offset.",
            ((rate("dead_letters_total", by="instance, reason"), f"{{{{reason}}}} {WHO}"),),
        ),
        Panel(
            "Producers rebuilt, polls that failed, commits that failed",
            "short",
            "Since the shard was built. Steps go with trouble on the brokers; the log names each.",
            (
                (by("producer_rebuilds", f="sum"), f"rebuilt {WHO}"),
                (by("poll_retries", f="sum"), f"polls {WHO}"),
                (by("commit_failures", f="sum"), f"commits {WHO}"),
            ),
            may_be_empty="only connectors on brokers tell it",
        ),
        Panel(
            "Series left out",
            "short",
            "Above 0 a plug-in or a very wide configuration tells more than a scrape takes: name fewer things.",
            ((by("series_dropped"), WHO),),
            limit=1,
        ),
    ),
)

ALONE = "only a rank of a group tells it"

GROUP = Row(
    "Group",
    (
        Panel(
            "Rounds a minute",
            "none",
            "The same on every rank. At 0 while records wait: StreamclGroupStalled.",
            ((f"sum by (instance) (rate({m('group_rounds')}[{R}])) * 60", WHO),),
            may_be_empty=ALONE,
        ),
        Panel(
            "Waiting for the slowest",
            "percentunit",
            "Share of the last round that a rank waited for the others. The rank near 0 is the one that they wait for:"
            " it has the most records, or the least CPU.",
            (
                (
                    f"sum by (instance) ({m('group_wait_seconds')}) / sum by (instance) ({m('group_round_seconds')})",
                    WHO,
                ),
            ),
            may_be_empty=ALONE,
        ),
        Panel(
            "Sent and received to be merged",
            "Bps",
            "Fewer, longer rounds (`group.round_events`) cost less, and ranks differ more before they meet.",
            (
                (f"sum by (instance) (rate({m('group_sent_bytes')}[{R}]))", f"sent {WHO}"),
                (f"sum by (instance) (rate({m('group_received_bytes')}[{R}]))", f"received {WHO}"),
            ),
            may_be_empty=ALONE,
        ),
        Panel(
            "Divergence before merging",
            "none",
            "Largest distance of a rank from the mean of all, divided by its norm. Growth: shorter rounds.",
            ((by("group_divergence_ratio"), WHO),),
            may_be_empty=ALONE,
        ),
        Panel(
            "Skew of event time",
            "s",
            "Between the ranks farthest on and farthest back. Much skew while nothing lags: an idle partition.",
            ((by("group_event_time_skew_seconds"), WHO),),
            may_be_empty=ALONE,
        ),
        Panel(
            "Time of a merge",
            "s",
            "Exchange and arithmetic, once all are there. Above a tenth of the round: longer rounds.",
            ((by("group_merge_seconds"), WHO),),
            may_be_empty=ALONE,
        ),
    ),
)

RESOURCES = Row(
    "Resources",
    (
        Panel(
            "Memory",
            "bytes",
            "Resident, and the limit. Growth: tickets, dynamic tables, replay, in this order.",
            ((by("process_resident_memory_bytes"), WHO), (by("memory_limit_bytes"), f"limit {WHO}")),
        ),
        Panel(
            "CPU",
            "none",
            "Cores in use. One is the most that the loop takes: near 1 with lag, more shards help, more cores don't.",
            ((f"sum by (instance) (rate({m('process_cpu_seconds_total')}[{R}]))", WHO),),
        ),
        Panel(
            "Python objects",
            "short",
            "Blocks that Python's allocator holds. Growth without end, while tickets stand still, is a leak:"
            " report it.",
            ((by("python_blocks"), WHO),),
        ),
        Panel(
            "Tickets on disk",
            "bytes",
            "Of tickets beyond `join.memory_tickets`. It grows with the attribution window and the rate of events.",
            ((by("tickets_disk_bytes", f="sum"), WHO),),
        ),
    ),
)

OPERATIONS = Board(
    "streamcl-operations",
    "Operations",
    "Lag, latency, checkpoints, faults, groups, resources.",
    (LAG, LATENCY, CHECKPOINTS, FAULTS, GROUP, RESOURCES),
)

BOARDS = {"overview": OVERVIEW, "learning": LEARNS, "operations": OPERATIONS}
"""By the name of their file in deploy/grafana/."""
