"""What the chart is told: wrong values are refused before anything is installed, by their paths."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.conftest import Chart, Failed, Render


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"workers": {}}, "additional properties 'workers' not allowed"),
        ({"worker": {"replicas": 0}}, "'/worker/replicas': minimum: got 0, want 1"),
        ({"worker": {"replicas": "two"}}, "'/worker/replicas': got string, want integer"),
        (
            {"worker": {"probes": {"startup": {"period": 3}}}},
            "'/worker/probes/startup': additional properties 'period'",
        ),
        ({"worker": {"resources": {"limits": {"memory": "4 GB"}}}}, "'/worker/resources/limits/memory'"),
        ({"image": {"digest": "abc"}}, "'/image/digest': 'abc' does not match pattern"),
        ({"image": {"variant": "gpu"}}, "'/image/variant': value must be one of 'cpu', 'cuda'"),
        ({"persistence": {"mode": "nfs"}}, "'/persistence/mode': value must be one of 'perPod', 'shared'"),
        ({"metrics": {"serviceMonitor": {"interval": "15"}}}, "'/metrics/serviceMonitor/interval'"),
        ({"existingSecrets": {"Kafka_1": "x"}}, "'/existingSecrets': "),
        ({"config": {"name": None}}, "'/config/name': got null, want string"),
        (
            {"config": {"join": {"atribution_window_s": 3}}},
            "'/config/join': additional properties 'atribution_window_s'",
        ),
        ({"config": {"optimizer": {"learning_rate": 0}}}, "'/config/optimizer/learning_rate': exclusiveMinimum"),
        ({"config": {"features": {"user": "categoric"}}}, "'/config/features/user': value must be one of 'bag'"),
        (
            {"config": {"features": {"age": {"kind": "numeric", "bin": 3}}}},
            "'/config/features/age': additional properties 'bin'",
        ),
        ({"config": {"plasticity": ["l3"]}}, "'/config/plasticity/0': value must be one of 'continual_backprop'"),
        ({"config": {"error_memory": [{"kind": "knn", "size": 1}]}}, "additional properties 'size' not allowed"),
        ({"worker": {"replicas": 3}}, "worker.replicas: 3, but config.shard.count is 1"),
        ({"config": {"shard": {"index": 1, "count": 2}}}, "config.shard.index, config.shard.indices: the chart gives"),
        ({"config": {"shard": {"assignment": "group"}}}, "config.shard.assignment: a group moves shards"),
        (
            {"config": {"telemetry": {"host": "127.0.0.1"}}},
            "config.telemetry.host: probes and scrapes come from outside",
        ),
        ({"config": {"telemetry": {"port": 0}}}, "config.telemetry.port: 0 switches off"),
        ({"config": {"serve": {"port": 0}}}, "config.serve.port: 0 is any port"),
        ({"config": {"checkpoint": {"folder": "/data/c"}}}, "config.checkpoint.folder: /data/c is not below"),
        ({"config": {"serve": {"in_worker": True}, "shard": {"count": 2}}}, "config.serve.in_worker: needs one shard"),
        ({"replica": {"enabled": True}}, "replica.enabled: replicas read the workers' checkpoints"),
        ({"persistence": {"existingClaim": "mine"}}, "persistence.existingClaim: one claim is for the mode shared"),
        ({"replica": {"autoscaling": {"enabled": True}, "keda": {"enabled": True}}}, "undo each other"),
        ({"replica": {"keda": {"enabled": True}}}, "replica.keda.triggers: KEDA needs one"),
        (
            {"config": {"registry": {"password_file": "/etc/streamcl/secrets/registry/password"}}},
            "/etc/streamcl/secrets/registry/password, but existingSecrets has no registry",
        ),
    ],
    ids=lambda value: str(value)[:60] if isinstance(value, dict) else "",
)
def test_bad_values_are_refused_by_name(render: Render, values: dict[str, Any], said: str) -> None:
    with pytest.raises(Failed) as caught:
        render(**values)
    assert said in str(caught.value)


def test_without_values_it_says_what_it_needs(chart: Chart) -> None:
    with pytest.raises(Failed, match="'/config': missing properties 'name', 'events', 'features'"):
        chart.render({})
