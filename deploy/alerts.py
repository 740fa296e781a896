"""When somebody is woken, and what they do then: Prometheus rules, two tests of each, and the runbook.

Everything that is time in a rule comes from one number, `scale`: a test runs the same expressions in seconds.
An alert names one cause. Where one trouble brings another about (labels that stop spoil calibration), the second is
silent while the first speaks.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

BY = "by (namespace, job, pod, instance)"
ON = "on (namespace, job, pod, instance)"
RUNBOOK = "docs/runbook.md"
LABELLED = 'fate=~"joined|late_joined|inline"'


@dataclass(frozen=True)
class Case:
    """Samples of a test, a minute apart, in promtool's notation."""

    series: dict[str, str]
    at: str = "2h"


@dataclass(frozen=True)
class Alert:
    """One rule. `fires` and `silent` are what its two tests are made of.

    Attributes:
        summary: What is wrong, in a line.
        description: With `$labels` and `$value`, what is seen.
        action: What whoever is woken does, step by step; goes to the runbook.
        wait_s: How long the expression has to hold.
    """

    name: str
    severity: Literal["critical", "warning"]
    expr: str
    wait_s: float
    summary: str
    description: str
    action: Sequence[str]
    fires: Case
    silent: Case = field(default_factory=lambda: Case({}))


JOB = 'job=~".*streamcl.*"'
_UP = {'up{job="streamcl",instance="a"}': "1x200"}
_WHO = 'job="streamcl",instance="a"'


def _s(name: str, labels: str = "") -> str:
    return f"streamcl_{name}{{{_WHO}{',' if labels else ''}{labels}}}"


def alerts(scale: float = 1.0) -> list[Alert]:
    """All of them. `scale` multiplies every time: of an hour, .01 makes 36 s."""

    def t(seconds: float) -> str:
        return f"{max(1, round(seconds * scale))}s" if scale != 1.0 else _duration(seconds)

    minute, hour = 60.0, 3600.0
    consumed = f"sum {BY} (rate(streamcl_events_consumed_total[{t(10 * minute)}]))"
    lag = f"sum {BY} (streamcl_lag_records)"
    away = (
        f"(min {BY} (min_over_time(streamcl_ready[{t(2 * minute)}])) == 0 and {ON} "
        f"(max {BY} (streamcl_brokers_away) == 1 or "
        f'sum {BY} (increase(streamcl_recoveries_total{{cause="unavailable"}}[{t(10 * minute)}])) > 0))'
    )
    predicted = f'sum {BY} (rate(streamcl_events_total{{fate="predicted"}}[{t(15 * minute)}]))'
    labelled = f"sum {BY} (rate(streamcl_events_total{{{LABELLED}}}[{t(15 * minute)}]))"
    known = f"(max {BY} (streamcl_join_hit_ratio) > 0 or sum {BY} (streamcl_events_total{{{LABELLED}}}) > 0)"
    stopped = f"({labelled} == 0 and {ON} {predicted} > 0 and {ON} {known})"
    # What was told last stands on while nothing comes: that is no news of the model.
    learning = f'sum {BY} (rate(streamcl_events_total{{fate="learned"}}[{t(15 * minute)}])) > 0'
    bad_labels = (
        f'sum {BY} (increase(streamcl_dead_letters_total{{reason=~"non_finite|quarantined_label"}}[{t(15 * minute)}]))'
    )
    failing = f"sum {BY} (increase(streamcl_checkpoint_failures_total[{t(15 * minute)}])) > 0"
    storm = f"sum {BY} (increase(streamcl_drift_alarms_total[{t(6 * hour)}])) > 3"

    def share(range_s: float) -> str:
        joined, all_ = (
            f"sum {BY} (rate(streamcl_events_total{{{which}}}[{t(range_s)}]))"
            for which in ('fate="joined"', 'fate=~"joined|expired|dropped"')
        )
        return f"({joined} / {ON} {all_})"

    steady = {_s("ready"): "1x200", _s("brokers_away"): "0x200"}
    flowing = {
        _s("events_consumed_total"): "0+6000x200",
        _s("events_total", 'fate="predicted"'): "0+3000x200",
        _s("events_total", 'fate="learned"'): "0+3000x200",
    }
    joining = {
        _s("events_total", 'fate="joined"'): "0+600x200",
        _s("events_total", 'fate="expired"'): "0+2400x200",
        _s("join_hit_ratio"): "0.2x200",
    }
    healthy = {**_UP, **steady, **flowing, **joining, _s("lag_records", 'input="events",partition="0"'): "100x200"}

    def but(changes: dict[str, str]) -> Case:
        """What a worker in health shows, but for these."""
        return Case({**healthy, **changes})

    quiet = Case(healthy)
    return [
        Alert(
            "StreamclWorkerDown",
            "critical",
            f"max {BY} (max_over_time(up{{{JOB}}}[{t(2 * minute)}])) == 0 or absent(up{{{JOB}}})",
            3 * minute,
            "A worker, or a replica, does not answer its scrapes.",
            "{{ $labels.instance }} has not answered for five minutes, or no worker is scraped at all.",
            (
                "Does the process live? `kubectl get pods`, `kubectl logs --previous`, or the service's own log.",
                "It ended with 1: the last line says what failed. With 2: the configuration. With 3: another worker has"
                " its shard, and that one must live.",
                "It was killed: look at StreamclMemoryNearLimit's panel for the time before.",
                "Start it again. A kill costs nothing but time: it goes on from its newest checkpoint, bit for bit.",
            ),
            but({'up{job="streamcl",instance="a"}': "1x60 0x140"}),
            quiet,
        ),
        Alert(
            "StreamclRestarting",
            "warning",
            f"sum {BY} (changes(process_start_time_seconds{{{JOB}}}[{t(hour)}])) > 3",
            0,
            "A worker starts again and again.",
            "{{ $labels.instance }} has started {{ $value }} times within an hour.",
            (
                "Read the last lines before each end; `kubectl describe pod` says whether memory or a probe ended it.",
                "A poison record is no cause: it goes to the dead letters. A configuration is: `streamcl check`.",
            ),
            but({f"process_start_time_seconds{{{_WHO}}}": "0x90 100+100x5 700x100"}),
            but({f"process_start_time_seconds{{{_WHO}}}": "0x90 100x110"}),
        ),
        Alert(
            "StreamclBrokersAway",
            "critical",
            away,
            5 * minute,
            "A worker hears no broker.",
            "{{ $labels.instance }} is unready and no broker of its inputs is connected.",
            (
                "Do the brokers live, and does the worker's network reach them? `streamcl check CONFIG` from its pod.",
                "Have credentials, certificates or ACLs changed? The worker's log names the error.",
                "Nothing is lost: the worker recovers by itself, with a back-off of 30 s at most, when they are back.",
            ),
            but({_s("brokers_away"): "0x60 1x140", _s("ready"): "1x60 0x140"}),
            quiet,
        ),
        Alert(
            "StreamclStalled",
            "critical",
            f"({lag} > 0 and {ON} {consumed} == 0) unless {ON} {away}",
            10 * minute,
            "Records wait and none is taken.",
            "{{ $labels.instance }}: {{ $value }} records wait, and none has been taken for ten minutes.",
            (
                "What does `/readyz` say, and the last lines of the log? A worker that repeats its log after a crash is"
                " unready and says so: wait.",
                "Does `/livez` answer 200? If not, the loop hangs: take a stack (`py-spy dump --pid`), then restart.",
                "Is the sink slow or full? `streamcl_producer_inflight_records` at its bound means that it is.",
            ),
            but({_s("events_consumed_total"): "0+6000x60 360000x140"}),
            quiet,
        ),
        Alert(
            "StreamclNotReady",
            "warning",
            f"max {BY} (max_over_time(streamcl_ready[{t(5 * minute)}])) == 0 unless {ON} {away}",
            10 * minute,
            "A worker is not ready, though its brokers are there.",
            "{{ $labels.instance }} has been unready for more than ten minutes.",
            (
                "`/readyz` names the reason and the shard.",
                "`restoring` or `repeating the logged order`: a long way from the newest checkpoint; more frequent"
                " checkpoints (`checkpoint.every_events`) make it short.",
                "`waiting for the group`: does another member hang? See StreamclRebalanceStorm.",
            ),
            but({_s("ready"): "1x60 0x140"}),
            quiet,
        ),
        Alert(
            "StreamclLagging",
            "warning",
            f"{lag} / {ON} ({consumed} > 0) > {300 * scale:g} and {ON} "
            f"sum {BY} (deriv(streamcl_lag_records[{t(15 * minute)}])) > 0",
            10 * minute,
            "A worker falls behind.",
            "{{ $labels.instance }}: at its present pace the records that wait take {{ $value | humanizeDuration }},"
            " and more come.",
            (
                "Has traffic grown, or the worker slowed? Compare *Events per second* with *Time of a turn by stage*.",
                "Stage `engine`: fewer replayed rows (`replay.per_event`), or the fused engine. `send`: a slow broker."
                " `work`: decoding, or the eager engine (`streamcl check` says why it isn't fused).",
                "More shards need `streamcl reshard`; CPU limits that throttle show as a turn's time without"
                " any stage.",
            ),
            but(
                {
                    _s("lag_records", 'input="events",partition="0"'): "100+6000x200",
                    _s("events_consumed_total"): "0+6000x200",
                }
            ),
            but({_s("lag_records", 'input="events",partition="0"'): "900000-6000x140 100x60"}),
        ),
        Alert(
            "StreamclTurnsSlow",
            "warning",
            f"histogram_quantile(0.99, sum by (namespace, job, pod, instance, le) "
            f'(rate(streamcl_stage_seconds_bucket{{stage!="poll"}}[{t(15 * minute)}]))) > 1',
            15 * minute,
            "Turns take long, so answers are late.",
            "{{ $labels.instance }}: the slowest stage of one turn in a hundred takes {{ $value | humanizeDuration }}.",
            (
                "Which stage? The panel *Time of a turn by stage* says it; see StreamclLagging for each.",
                "`worker.max_records` bounds a turn: half of it halves the wait of an event, and changes no result.",
            ),
            but(
                {
                    _s("stage_seconds_bucket", 'stage="send",le="1.0"'): "0x200",
                    _s("stage_seconds_bucket", 'stage="send",le="2.5"'): "0+60x200",
                    _s("stage_seconds_bucket", 'stage="send",le="+Inf"'): "0+60x200",
                }
            ),
            but(
                {
                    _s("stage_seconds_bucket", 'stage="send",le="0.1"'): "0+60x200",
                    _s("stage_seconds_bucket", 'stage="send",le="1.0"'): "0+60x200",
                    _s("stage_seconds_bucket", 'stage="send",le="+Inf"'): "0+60x200",
                }
            ),
        ),
        Alert(
            "StreamclLabelsStopped",
            "critical",
            stopped,
            15 * minute,
            "No label comes any more: the model has stopped learning what is true.",
            "{{ $labels.instance }} answers events, and no label has been joined for fifteen minutes.",
            (
                "Is the producer of labels alive? Look at the end of the labels' topic.",
                "Do ids still match? `streamcl_waiting_labels` that grows means labels without an event.",
                'With `join.on_close = "negative"` the model is now taught that nobody clicks. If the outage'
                " lasts, stop"
                " the worker (SIGTERM) and start it when labels are back; `streamcl rollback` undoes what it learned.",
            ),
            but(
                {
                    _s("events_total", 'fate="joined"'): "0+600x60 36000x140",
                    _s("events_total", 'fate="expired"'): "0+3000x200",
                }
            ),
            quiet,
        ),
        Alert(
            "StreamclJoinRateDown",
            "warning",
            f"{share(hour)} < 0.5 * {share(24 * hour)} unless {ON} {stopped}",
            30 * minute,
            "Far fewer events get their label than usual.",
            "{{ $labels.instance }}: a share of {{ $value | humanizePercentage }} of the ended windows had a label in"
            " the last hour, less than half of the day's.",
            (
                "Did users change, or the pipeline? Compare the raw rate of labels with the rate of joined ones.",
                "Has their delay grown beyond `join.attribution_window_s`? See *Delay of labels*; `late` counts them.",
                "Does one partition of the labels lag? Labels behind their window are lost to learning.",
            ),
            Case(
                {
                    **{name: values.replace("x200", "x300") for name, values in healthy.items()},
                    _s("events_total", 'fate="joined"'): "0+600x180 108000+100x120",
                    _s("events_total", 'fate="expired"'): "0+2400x180 432000+2900x120",
                },
                "5h",
            ),
            quiet,
        ),
        Alert(
            "StreamclWorseThanFrozen",
            "critical",
            f'(max {BY} (avg_over_time(streamcl_sampled_log_loss{{weights="live"}}[{t(30 * minute)}])) > 1.02 * '
            f'max {BY} (avg_over_time(streamcl_sampled_log_loss{{weights="frozen"}}[{t(30 * minute)}])))'
            f" and {ON} {learning} unless {ON} {stopped} unless {ON} ({storm})",
            30 * minute,
            "Learning does harm: the weights that the process began with would do better.",
            "{{ $labels.instance }}: over the same labels live weights lose {{ $value }} nats, frozen ones at least 2 %"
            " less.",
            (
                "Since when? On the board *Learning* find the time when the two lines cross, and what came then: drift,"
                " a new configuration, other labels, dead letters.",
                "Labels may be wrong: look at their base rate and delay before you doubt the model.",
                "`streamcl rollback` goes back to a checkpoint from before; `streamcl shadow` tries other rates beside"
                " the live model.",
            ),
            but(
                {
                    _s("sampled_log_loss", 'weights="live"'): "0.5x60 0.6x140",
                    _s("sampled_log_loss", 'weights="frozen"'): "0.5x200",
                }
            ),
            but(
                {
                    _s("sampled_log_loss", 'weights="live"'): "0.45x200",
                    _s("sampled_log_loss", 'weights="frozen"'): "0.5x200",
                }
            ),
        ),
        Alert(
            "StreamclCalibrationOff",
            "warning",
            f'max {BY} (abs(log2(avg_over_time(streamcl_calibration{{window="recent",role!="shadow"}}'
            f"[{t(15 * minute)}])))) > 0.32 and {ON} {learning} "
            f"unless {ON} {stopped} unless {ON} ({storm}) unless {ON} {bad_labels} > 0",
            30 * minute,
            "Scores are more than a quarter too high or too low on average.",
            "{{ $labels.instance }}: served scores and labels differ by a factor of 2 to the {{ $value }} in the recent"
            " window.",
            (
                "Whoever bids or ranks by the score is wrong by that factor: tell them.",
                "Has the base rate moved (*Base rate and mean score*)? Then it closes by itself as the model learns.",
                "Is the label delay long beside the window? Negatives come first then: see `loss.kind` and"
                " `join.wait_s`.",
            ),
            but({_s("calibration", 'window="recent"'): "1x30 1.5x170"}),
            but({_s("calibration", 'window="recent"'): "1.1x200"}),
        ),
        Alert(
            "StreamclLossSpike",
            "warning",
            f'(max {BY} (avg_over_time(streamcl_ne{{window="recent",role!="shadow"}}[{t(15 * minute)}])) > 1.2 * '
            f'max {BY} (quantile_over_time(0.5, streamcl_ne{{window="recent",role!="shadow"}}[{t(24 * hour)}])))'
            f" and {ON} {learning} unless {ON} {stopped} unless {ON} ({storm})",
            30 * minute,
            "The normalised loss is a fifth above its median of the day.",
            "{{ $labels.instance }}: NE is {{ $value }} in the recent window.",
            (
                "Look at *Drift of features*: one feature that moved or went missing is the commonest cause.",
                "Then at the upstream's releases at that time. The model adapts by itself to what stays; watch"
                " it do so.",
            ),
            but({_s("ne", 'window="recent"'): "0.8x60 1.1x60"}),
            but({_s("ne", 'window="recent"'): "0.8x60 0.85x140"}),
        ),
        Alert(
            "StreamclBadLabels",
            "critical",
            f"{bad_labels} > 0",
            0,
            "Labels or values that are not finite arrive; they are kept from the weights.",
            "{{ $labels.instance }}: about {{ $value | humanize }} records in fifteen minutes were NaN, infinite, or"
            " would have made the weights so.",
            (
                "Read the dead-letter topic: headers name topic, partition and offset of each, and the field.",
                "Nothing was learned from them and the weights are clean. Repair the producer.",
                "Only `quarantined_label`, with finite labels: the gradient exploded. Lower the learning rate.",
            ),
            but({_s("dead_letters_total", 'reason="non_finite"'): "0x110 1+1x90"}),
            but({_s("dead_letters_total", 'reason="non_finite"'): "7x200"}),
        ),
        Alert(
            "StreamclDeadLetters",
            "warning",
            f'sum {BY} (rate(streamcl_dead_letters_total{{reason!~"non_finite|quarantined_label"}}[{t(10 * minute)}]))'
            f" / {ON} ({consumed} > 0) > 0.01",
            10 * minute,
            "More than one record in a hundred can't be used.",
            "{{ $labels.instance }}: a share of {{ $value | humanizePercentage }} goes to the dead letters.",
            (
                "*Dead letters by reason* and the topic itself say what is wrong with them.",
                "`schema` or `undecodable`: a producer has changed its format. `duplicate_ticket`: ids repeat.",
                "Above `worker.max_bad_ratio` of the last 1,000 records the worker stops by itself.",
            ),
            but({_s("dead_letters_total", 'reason="schema"'): "0+600x200"}),
            but({_s("dead_letters_total", 'reason="schema"'): "0+6x200"}),
        ),
        Alert(
            "StreamclRecordsSkipped",
            "critical",
            f'sum {BY} (increase(streamcl_events_total{{fate="skipped"}}[{t(hour)}])) > 0',
            0,
            "Records were gone before the worker could take them.",
            "{{ $labels.instance }}: {{ $value | humanize }} records were skipped, as `kafka.on_gap` allows.",
            (
                "Retention overtook the worker. It has gone on behind the gap, counted and in the control log.",
                "Raise the topic's retention above the longest outage that you plan for.",
            ),
            but({_s("events_total", 'fate="skipped"'): "0x100 5000x100"}),
            quiet,
        ),
        Alert(
            "StreamclDriftStorm",
            "warning",
            storm,
            0,
            "Drift is signalled again and again.",
            "{{ $labels.instance }}: {{ $value | humanize }} alarms within six hours.",
            (
                "One alarm is the stream's business, a storm is somebody's: look for a producer that flips between two"
                " versions, labels that come in bursts, or a feature that comes and goes (*Drift of features*).",
                "If the world really is like that, raise `drift.refractory_events`, or the detector's `delta`.",
            ),
            but({_s("drift_alarms_total", 'source="loss"'): "0x60 1+1x10 12x100"}),
            but({_s("drift_alarms_total", 'source="loss"'): "0x60 1x140"}),
        ),
        Alert(
            "StreamclCheckpointFailing",
            "critical",
            failing,
            5 * minute,
            "Checkpoints can't be written.",
            "{{ $labels.instance }}: {{ $value | humanize }} writes failed within fifteen minutes. It serves"
            " and learns on.",
            (
                "`streamcl_checkpoint_failures_total` says why: disk_full, denied, read_only, io, other.",
                "Free or grow the volume, or set its mode right. The worker tries again by itself; nothing is lost.",
                "Don't restart it before: a restart repeats everything since the last checkpoint.",
            ),
            but({_s("checkpoint_failures_total", 'cause="disk_full"'): "0x100 1+1x100"}),
            but({_s("checkpoint_failures_total", 'cause="disk_full"'): "3x200"}),
        ),
        Alert(
            "StreamclCheckpointStale",
            "critical",
            f"min {BY} (min_over_time(streamcl_checkpoint_interval_ratio[{t(5 * minute)}])) > 3 unless {ON}"
            f" ({failing})",
            5 * minute,
            "The newest checkpoint is more than three intervals old, and no write has failed.",
            "{{ $labels.instance }} has taken {{ $value }} times `checkpoint.every_events` records since the last one.",
            (
                "A write hangs or is slower than the interval: look at *Time and size of a checkpoint* and the disk.",
                "`streamcl_checkpoints_deferred` that grows: longer intervals, or a faster disk.",
            ),
            but({_s("checkpoint_interval_ratio"): "0.5x60 0.5+0.1x140"}),
            but({_s("checkpoint_interval_ratio"): "0 0.3 0.6 0.9 1.2 0.1 0.4 0.7 1 0x190"}),
        ),
        Alert(
            "StreamclCheckpointDamaged",
            "critical",
            f"sum {BY} (streamcl_checkpoint_damaged_total) > 0 and {ON} "
            f"max {BY} (time() - process_start_time_seconds{{{JOB}}}) < {hour * scale:g}",
            0,
            "A damaged checkpoint was passed over at the start.",
            "{{ $labels.instance }} began from an older checkpoint: {{ $value }} newer ones did not match their"
            " checksum.",
            (
                "State is right all the same: the worker repeated what followed the older one.",
                "The disk or what copies it is not: check it, before the older ones are damaged too.",
            ),
            Case(
                {
                    **healthy,
                    _s("checkpoint_damaged_total"): "1x200",
                    f"process_start_time_seconds{{{_WHO}}}": "6000x200",
                }
            ),
            Case(
                {**healthy, _s("checkpoint_damaged_total"): "1x200", f"process_start_time_seconds{{{_WHO}}}": "0x200"}
            ),
        ),
        Alert(
            "StreamclPlasticityLost",
            "warning",
            f"max {BY} (avg_over_time(streamcl_dormant_ratio[{t(hour)}])) > 0.5",
            hour,
            "More than half of a hidden layer's units no longer fire.",
            "{{ $labels.instance }}: a share of {{ $value | humanizePercentage }} of a layer is dormant.",
            (
                "The model still answers, but learns what is new ever worse: see *Effective rank* and the NE of weeks.",
                "Switch continual backpropagation on (`docs/learning.md`), or lower the learning rate. Both are changes"
                " that need a clean stop; `streamcl shadow` shows beforehand what they bring.",
            ),
            Case({**healthy, _s("dormant_ratio", 'layer="0"'): "0.7x200"}, "3h"),
            Case({**healthy, _s("dormant_ratio", 'layer="0"'): "0.2x200"}, "3h"),
        ),
        Alert(
            "StreamclMemoryNearLimit",
            "critical",
            f"max {BY} (min_over_time(process_resident_memory_bytes{{{JOB}}}[{t(5 * minute)}])) / {ON} "
            f"max {BY} (streamcl_memory_limit_bytes) > 0.9",
            5 * minute,
            "A worker is about to be killed for its memory.",
            "{{ $labels.instance }} takes {{ $value | humanizePercentage }} of what it may.",
            (
                "What grew? *Tickets*, *Rows of dynamic tables* and *Replay memory* stand beside each other.",
                "Bound it: `join.memory_tickets`, `table.max_rows`, `replay.capacity`. Or raise the limit.",
                "A kill is survived, but comes again: each restart repeats the way to the same size.",
            ),
            but(
                {
                    f"process_resident_memory_bytes{{{_WHO}}}": "1e9x60 1.95e9x140",
                    _s("memory_limit_bytes"): "2e9x200",
                }
            ),
            but({f"process_resident_memory_bytes{{{_WHO}}}": "1e9x200", _s("memory_limit_bytes"): "2e9x200"}),
        ),
        Alert(
            "StreamclDiskNearlyFull",
            "warning",
            f"predict_linear(streamcl_checkpoint_disk_free_bytes[{t(6 * hour)}], {4 * hour * scale:g}) < 0",
            30 * minute,
            "The checkpoints' disk will be full within four hours.",
            "{{ $labels.instance }}: at the present pace {{ $value | humanize1024 }}B would be left then.",
            (
                "Grow the volume, or keep less: `checkpoint.retain`, `deltas.retain`.",
                "Tickets that wait on disk (`streamcl_tickets_disk_bytes`) grow with the attribution window.",
            ),
            but({_s("checkpoint_disk_free_bytes"): "1e10-6e7x160 1e9x40"}),
            but({_s("checkpoint_disk_free_bytes"): "1e10-1e5x200"}),
        ),
        Alert(
            "StreamclProducerRebuilding",
            "warning",
            f"sum {BY} (increase(streamcl_producer_rebuilds[{t(15 * minute)}])) > 3",
            0,
            "The producer of predictions breaks again and again.",
            "{{ $labels.instance }} has replaced its producer {{ $value | humanize }} times within fifteen minutes.",
            (
                "The log names each cause. A record that the broker refuses is isolated and goes to the dead letters.",
                "Authorisation and unknown topics are not: set the ACL, or make the topic.",
            ),
            but({_s("producer_rebuilds"): "0x100 1+1x100"}),
            but({_s("producer_rebuilds"): "0x100 1x100"}),
        ),
        Alert(
            "StreamclRebalanceStorm",
            "warning",
            f"sum {BY} (increase(streamcl_group_rebalances[{t(15 * minute)}])) > 5",
            0,
            "Shards move between workers all the time.",
            "{{ $labels.instance }}: {{ $value | humanize }} rebalances within fifteen minutes.",
            (
                "A member leaves and comes back: one that restarts, or whose turn outlasts"
                " `shard.max_poll_interval_s`.",
                "Stable names (`shard.group_instance_id_env`) and `shard.session_timeout_s` above a restart calm it.",
            ),
            but({_s("group_rebalances"): "0x100 1+1x100"}),
            but({_s("group_rebalances"): "0x100 1x100"}),
        ),
        Alert(
            "StreamclGroupStalled",
            "critical",
            f"(max {BY} (changes(streamcl_group_rounds[{t(15 * minute)}])) == 0 and {ON} {lag} > 0) unless {ON} {away}",
            5 * minute,
            "A group of ranks has not met for fifteen minutes, and records wait.",
            "{{ $labels.instance }}: the ranks that learn together have not closed a round.",
            (
                "*Rounds a minute* and *Waiting for the slowest*: the rank that does not wait is the one that holds the"
                " others up. Its log and its CPU say why: a frozen process, a partition with most of the records.",
                "A rank that keeps the others waiting for `group.timeout_s` is given up: all end and, under `torchrun"
                " --max-restarts`, go on from the newest round that every rank has a checkpoint of.",
                "A group that starts again and again: *Starts and recoveries*, and the first error of any rank.",
            ),
            but({_s("group_rounds"): "0+1x60 60x140"}),
            but({_s("group_rounds"): "0+1x200"}),
        ),
    ]


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("m", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds:g}s"


def rules(scale: float = 1.0) -> dict[str, Any]:
    """A Prometheus rule file, as it is loaded from YAML; also the `spec` of a PrometheusRule."""
    return {
        "groups": [
            {
                "name": "streamcl",
                "rules": [
                    {
                        "alert": each.name,
                        "expr": each.expr,
                        "for": f"{max(0, round(each.wait_s * scale))}s" if scale != 1.0 else _duration(each.wait_s),
                        "labels": {"severity": each.severity},
                        "annotations": {
                            "summary": each.summary,
                            "description": each.description,
                            "runbook": "\n".join(f"{n}. {step}" for n, step in enumerate(each.action, 1)),
                            "runbook_url": f"{RUNBOOK}#{each.name.lower()}",
                        },
                    }
                    for each in alerts(scale)
                ],
            }
        ]
    }


def rule_tests(of: Sequence[Alert] | None = None) -> dict[str, Any]:
    """For `promtool test rules`: each alert fires in one case, alone, and is silent, like all others, in another.

    The silent case of many is a worker in health: that is looked at once.
    """
    told = alerts() if of is None else of
    cases = {f"{each.name} fires": (each.fires, [each.name]) for each in told}
    silent: dict[str, tuple[Case, list[str]]] = {f"{each.name} is silent": (each.silent, []) for each in told}
    seen: list[Case] = []
    for name, (case, expected) in silent.items():
        if case not in seen:
            cases[name] = (case, expected)
        seen.append(case)
    return {
        "rule_files": ["rules.yaml"],
        "evaluation_interval": "1m",
        "tests": [
            {
                "name": name,
                "interval": "1m",
                "input_series": [{"series": series, "values": values} for series, values in case.series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": case.at,
                        "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in expected],
                    }
                ],
            }
            for name, (case, expected) in cases.items()
        ],
    }


def to_yaml(data: dict[str, Any]) -> str:
    text: str = yaml.safe_dump(data, sort_keys=False, width=110, allow_unicode=True)
    return text


def runbook() -> str:
    """docs/runbook.md."""
    lines = [
        "# Runbook",
        "",
        "What to do when an alert of `deploy/prometheus/rules.yaml` fires. Written by `python -m deploy` from",
        "`deploy/alerts.py`; change it there. One cause, one alert: what follows from another trouble is silent.",
        "",
    ]
    for each in alerts():
        seen = re.sub(r"\{\{ *\$value[^}]*\}\}", "(the value)", each.description)
        seen = seen.replace("{{ $labels.instance }}", "the worker")
        hold = _duration(each.wait_s) if each.wait_s else "at once"
        lines += [f"## {each.name}", "", f"{each.summary} *{each.severity}, {hold}*", "", f"Seen: {seen}", ""]
        lines += [f"{n}. {step}" for n, step in enumerate(each.action, 1)]
        lines += ["", "```", each.expr, "```", ""]
    return "\n".join(lines).rstrip() + "\n"
