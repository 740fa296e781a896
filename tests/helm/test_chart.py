"""The chart's manifests: what Kubernetes gets, by the real Helm, checked offline against Kubernetes' own schemas."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.chart import CHART, stale
from streamcl import __version__
from streamcl.cli import _with_shards
from streamcl.config import Config
from tests.helm.conftest import Chart, Failed, Manifest, Render, Rendered
from tests.helm.kubernetes import check

EXAMPLES = sorted((CHART / "examples").glob("*.yaml"))
SHARED = {"persistence": {"mode": "shared"}}
REPLICAS = {**SHARED, "replica": {"enabled": True}}
EVERYTHING: dict[str, Any] = {
    **SHARED,
    "replica": {
        "enabled": True,
        "keda": {"enabled": True, "triggers": [{"type": "cpu", "metadata": {"value": "60"}}]},
    },
    "existingSecrets": {"kafka": "shop-kafka", "api": "shop-key"},
    "config": {"shard": {"count": 3}, "serve": {"api_key_file": "/etc/streamcl/secrets/api/key"}},
    "worker": {"replicas": 2, "extraArgs": ["--bootstrap"]},
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
        "dashboards": {"enabled": True},
    },
}


def config_of(manifests: Rendered, file: str = "streamcl.toml", folder: Path = Path("/nowhere")) -> Config:
    (found,) = (each for each in manifests.of("ConfigMap") if file in each["data"])
    path = folder / file
    path.write_text(found["data"][file])
    return Config.load(path)


def container(pod: Manifest) -> Manifest:
    (found,) = pod["spec"]["containers"]
    return dict(found)


def test_generated_files_are_in_step() -> None:
    assert list(stale()) == [], "make generate"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_lints_and_fits_kubernetes_and_streamcl(chart: Chart, path: Path, tmp_path: Path) -> None:
    chart.run("lint", "--strict", str(chart.folder), "--values", str(path))
    manifests = chart.render(path)
    check(manifests)
    config = config_of(manifests, folder=tmp_path)
    given = yaml.safe_load(path.read_text())["config"]
    assert config == Config.parse(
        {**given, **{name: config.model_dump()[name] for name in ("telemetry", "serve", "checkpoint", "shard")}}
    )


def test_everything_at_once_fits(render: Render) -> None:
    manifests = render(**EVERYTHING)
    check(manifests)
    assert {"ScaledObject", "ServiceMonitor", "NetworkPolicy", "PersistentVolumeClaim"} <= {
        m["kind"] for m in manifests
    }
    check(render(replica={"enabled": True, "autoscaling": {"enabled": True}}, **SHARED))


def test_a_packaged_chart_renders_the_same(chart: Chart, tmp_path: Path) -> None:
    said = chart.run("package", str(chart.folder), "--destination", str(tmp_path))
    assert said.strip().endswith(f"streamcl-{__version__}.tgz")
    packaged = Chart(chart.helm, tmp_path / f"streamcl-{__version__}.tgz")
    large = CHART / "examples" / "large.yaml"
    assert packaged.render(large) == chart.render(large)


def test_every_pod_is_restricted(render: Render) -> None:
    pods = list(render(**EVERYTHING).pods())
    assert len(pods) == 1 + 3 + 1
    for pod in pods:
        spec, its = pod["spec"], container(pod)
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert its["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
        assert not any("hostPath" in volume for volume in spec.get("volumes", ()))
        assert its["resources"]["limits"]["memory"]


def test_probes_ask_ports_that_are_there(render: Render) -> None:
    manifests = render(**EVERYTHING)
    config = {"telemetry": {"port": 9999}, "serve": {"port": 8443, "ssl_certfile": "/tls/c", "ssl_keyfile": "/tls/k"}}
    other = render(**REPLICAS, config=config)
    for found, ports, scheme in ((manifests, (9464, 8080), "HTTP"), (other, (9999, 8443), "HTTPS")):
        worker, replica = (found.of(kind)[0]["spec"]["template"] for kind in ("StatefulSet", "Deployment"))
        for pod, port, told, paths in (
            (worker, ports[0], "HTTP", ("/readyz", "/readyz", "/livez")),
            (replica, ports[1], scheme, ("/livez", "/readyz", "/livez")),
        ):
            its = container(pod)
            named = {each["name"]: each["containerPort"] for each in its["ports"]}
            for name, path in zip(("startupProbe", "readinessProbe", "livenessProbe"), paths, strict=True):
                get = its[name]["httpGet"]
                assert (named[get["port"]], get["path"], get["scheme"]) == (port, path, told)


def test_the_checksum_follows_the_config_and_nothing_else(render: Render) -> None:
    def sums(**values: Any) -> set[str]:
        pods = [each for each in render(**values).pods() if "test" not in each["metadata"].get("name", "")]
        return {each["metadata"]["annotations"]["checksum/config"] for each in pods}

    before = sums(**REPLICAS)
    assert len(before) == 1
    assert sums(**REPLICAS, worker={"resources": {"limits": {"memory": "9Gi"}}}) == before
    assert sums(**REPLICAS, config={"metrics": {"window": 77}}) != before


def test_null_is_as_if_it_were_not_said(render: Render, tmp_path: Path) -> None:
    said = {"labels": None, "events": {"key": None, "label": "clicked"}, "loss": {"unit_s": None}}
    config = config_of(render(config=said), folder=tmp_path)
    assert (config.labels, config.events.key, config.loss.unit_s) == (None, None, None)


def test_workers_share_out_the_shards(render: Render, tmp_path: Path) -> None:
    manifests = render(worker={"replicas": 3}, config={"shard": {"count": 8}})
    stateful = manifests.the("StatefulSet")
    its = container(stateful["spec"]["template"])
    (index,) = (each["valueFrom"]["fieldRef"]["fieldPath"] for each in its["env"] if each["name"] == "POD_INDEX")
    assert index == "metadata.labels['apps.kubernetes.io/pod-index']"
    (flag,) = (each.removeprefix("--shards=") for each in its["args"] if each.startswith("--shards="))
    config = config_of(manifests, folder=tmp_path)
    pods = [_with_shards(config, flag.replace("$(POD_INDEX)", str(k))).shard.here for k in range(3)]
    assert sorted(shard for pod in pods for shard in pod) == list(range(8))
    assert stateful["spec"]["podManagementPolicy"] == "Parallel"


def test_a_group_hands_out_the_shards_to_named_members(render: Render, tmp_path: Path) -> None:
    manifests = render(**SHARED, worker={"replicas": 2}, config={"shard": {"count": 4, "assignment": "group"}})
    its = container(manifests.the("StatefulSet")["spec"]["template"])
    assert its["args"] == ["run", "/etc/streamcl/config/streamcl.toml"]
    assert config_of(manifests, folder=tmp_path).shard.group_instance_id_env == "POD_NAME"
    assert {"name": "POD_NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}} in its["env"]


def test_state_lies_on_each_workers_volume_or_on_a_shared_one(render: Render) -> None:
    alone = render().the("StatefulSet")["spec"]
    (claim,) = alone["volumeClaimTemplates"]
    assert claim["spec"]["accessModes"] == ["ReadWriteOnce"]
    assert alone["persistentVolumeClaimRetentionPolicy"] == {"whenDeleted": "Retain", "whenScaled": "Retain"}
    shared = render(**REPLICAS)
    assert "volumeClaimTemplates" not in shared.the("StatefulSet")["spec"]
    claim = shared.the("PersistentVolumeClaim")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    for each in ("StatefulSet", "Deployment"):
        volumes = {each["name"]: each for each in shared.the(each)["spec"]["template"]["spec"]["volumes"]}
        assert volumes["state"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    mounts = container(shared.the("Deployment")["spec"]["template"])["volumeMounts"]
    assert {"name": "state", "mountPath": "/var/lib/streamcl", "readOnly": True} in mounts
    given = render(persistence={"mode": "shared", "existingClaim": "mine"})
    assert given.of("PersistentVolumeClaim") == []


def test_every_shard_has_replicas_of_its_own(render: Render, tmp_path: Path) -> None:
    manifests = render(**REPLICAS, config={"shard": {"count": 2}}, worker={"replicas": 2})
    deployments = manifests.of("Deployment", "replica")
    assert [each["metadata"]["name"] for each in deployments] == ["shop-streamcl-replica-0", "shop-streamcl-replica-1"]
    for index, (deployment, service) in enumerate(zip(deployments, manifests.of("Service", "replica"), strict=True)):
        pod = deployment["spec"]["template"]
        command, path = container(pod)["args"]
        config = config_of(manifests, Path(path).name, tmp_path)
        assert (command, config.shard.index, config.shard.count) == ("serve", index, 2)
        labels = pod["metadata"]["labels"]
        assert service["spec"]["selector"].items() <= labels.items()
        others = [other["spec"]["template"]["metadata"]["labels"] for other in deployments if other is not deployment]
        assert not any(service["spec"]["selector"].items() <= other.items() for other in others)


def test_selectors_select(render: Render) -> None:
    manifests = render(**EVERYTHING)
    pods = [pod["metadata"]["labels"] for pod in manifests.pods()]
    services = manifests.of("Service")
    for service in services:
        assert any(service["spec"]["selector"].items() <= labels.items() for labels in pods)
    for each in [*manifests.of("StatefulSet"), *manifests.of("Deployment"), *manifests.of("PodDisruptionBudget")]:
        wanted = each["spec"]["selector"]["matchLabels"].items()
        assert sum(wanted <= labels.items() for labels in pods) == 1
    for policy in manifests.of("NetworkPolicy"):
        assert any(policy["spec"]["podSelector"]["matchLabels"].items() <= labels.items() for labels in pods)
    for monitor in manifests.of("ServiceMonitor"):
        found = [
            s for s in services if monitor["spec"]["selector"]["matchLabels"].items() <= s["metadata"]["labels"].items()
        ]
        assert found
        (endpoint,) = monitor["spec"]["endpoints"]
        for service in found:
            assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    assert manifests.the("StatefulSet")["spec"]["serviceName"] in {each["metadata"]["name"] for each in services}


def test_disruption_takes_one_at_a_time(render: Render) -> None:
    manifests = render(**REPLICAS)
    assert [each["spec"]["maxUnavailable"] for each in manifests.of("PodDisruptionBudget")] == [1, 1]
    off = {"podDisruptionBudget": {"enabled": False}}
    assert not render(**SHARED, worker=off, replica={"enabled": True, **off}).of("PodDisruptionBudget")


def test_policies_open_what_is_needed(render: Render) -> None:
    urls = {
        "predictions": "kafka://b-1:19092,b-2:19093/scores",
        "registry": {"url": "http://registry:8081"},
        "kafka": {"client": "librdkafka"},
        "outcomes": "kafka://plain/outcomes",
    }
    manifests = render(**REPLICAS, config=urls, networkPolicy={"kafkaPorts": [9094]})
    for component, port in (("worker", "metrics"), ("replica", "http")):
        policy = manifests.the("NetworkPolicy", component)["spec"]
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        (ingress,) = policy["ingress"]
        assert ingress["ports"] == [{"port": port, "protocol": "TCP"}]
        dns, brokers = policy["egress"]
        assert {each["port"] for each in dns["ports"]} == {53}
        assert [each["port"] for each in brokers["ports"]] == [8081, 9092, 9094, 19092, 19093]
    (scrapes,) = manifests.the("NetworkPolicy", "worker")["spec"]["ingress"]
    monitoring, tests = scrapes["from"]
    assert monitoring["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "monitoring"}
    assert tests["podSelector"]["matchLabels"].items() <= manifests.the("Pod")["metadata"]["labels"].items()
    assert "from" not in manifests.the("NetworkPolicy", "replica")["spec"]["ingress"][0]
    live = render(config={"serve": {"in_worker": True}}).the("NetworkPolicy")["spec"]
    assert [each["ports"][0]["port"] for each in live["ingress"]] == ["metrics", "http"]
    assert not render(networkPolicy={"enabled": False}).of("NetworkPolicy")


def test_monitors_show_the_key_that_replicas_ask_for(render: Render) -> None:
    manifests = render(**EVERYTHING)
    worker, replica = (manifests.the("ServiceMonitor", each) for each in ("worker", "replica"))
    assert {each["metadata"]["labels"]["release"] for each in (worker, replica)} == {"prometheus"}
    assert "authorization" not in worker["spec"]["endpoints"][0]
    (endpoint,) = replica["spec"]["endpoints"]
    assert endpoint["authorization"]["credentials"] == {"name": "shop-key", "key": "key"}
    jobs = [each["spec"]["endpoints"][0]["relabelings"][0]["replacement"] for each in (worker, replica)]
    assert jobs == ["streamcl", "streamcl-replica"]
    assert not render().of("ServiceMonitor")


def test_secrets_are_mounted_never_written(render: Render) -> None:
    for pod in [pod for pod in render(**EVERYTHING).pods() if "volumes" in pod["spec"]]:
        volumes = {each["name"]: each for each in pod["spec"]["volumes"]}
        mounts = {each["mountPath"]: each for each in container(pod)["volumeMounts"]}
        mount = mounts["/etc/streamcl/secrets/kafka"]
        assert mount["readOnly"] is True
        assert volumes[mount["name"]]["secret"] == {"secretName": "shop-kafka", "defaultMode": 0o440}
    assert not render(**EVERYTHING).of("Secret")


def test_one_scales_or_another_or_a_number_stands(render: Render) -> None:
    deployment = render(**REPLICAS).the("Deployment")
    assert deployment["spec"]["replicas"] == 2
    scaled = render(**SHARED, replica={"enabled": True, "autoscaling": {"enabled": True, "maxReplicas": 5}})
    assert "replicas" not in scaled.the("Deployment")["spec"]
    target = scaled.the("HorizontalPodAutoscaler")["spec"]
    assert (target["scaleTargetRef"]["name"], target["maxReplicas"]) == ("shop-streamcl-replica", 5)


def test_the_image_follows_the_version(render: Render) -> None:
    def image(**values: Any) -> str:
        (found,) = {container(pod)["image"] for pod in render(image=values, **REPLICAS).pods()}
        return str(found)

    digest = f"sha256:{'0' * 64}"
    assert image() == f"streamcl:{__version__}"
    assert image(variant="cuda") == f"streamcl:{__version__}-cuda"
    assert image(repository="registry.example.com/ml/streamcl", tag="2") == "registry.example.com/ml/streamcl:2"
    assert image(digest=digest) == f"streamcl@{digest}"


def test_alerts_and_boards_travel_with_the_chart_unread_by_its_templates(chart: Chart, tmp_path: Path) -> None:
    folder = tmp_path / "streamcl"
    shutil.copytree(CHART, folder)
    shutil.rmtree(folder / "files", ignore_errors=True)
    (folder / "files" / "dashboards").mkdir(parents=True)
    rule = {"alert": "Down", "expr": "up == 0", "annotations": {"summary": "{{ $labels.pod }} is {{ $value }}"}}
    rules = {"groups": [{"name": "streamcl", "rules": [rule]}]}
    (folder / "files" / "rules.yaml").write_text(yaml.safe_dump(rules))
    (folder / "files" / "dashboards" / "overview.json").write_text('{"title": "{{pod}}"}')
    manifests = Chart(chart.helm, folder).render(CHART / "examples" / "large.yaml")
    check(manifests)
    found = manifests.the("PrometheusRule")
    assert found["spec"] == rules
    assert found["metadata"]["labels"]["release"] == "prometheus"
    (board,) = (each for each in manifests.of("ConfigMap") if "overview.json" in each["data"])
    assert board["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert board["metadata"]["annotations"] == {"grafana_folder": "streamcl"}
    assert board["data"]["overview.json"].strip() == '{"title": "{{pod}}"}'


def test_helm_test_asks_every_pod_and_replica(render: Render) -> None:
    pod = render(**EVERYTHING).the("Pod")
    assert pod["metadata"]["annotations"]["helm.sh/hook"] == "test"
    script, *urls = container(pod)["args"]
    compile(script, "test", "exec")
    assert urls == [
        *(f"http://shop-streamcl-{k}.shop-streamcl.prod:9464/{p}" for k in range(2) for p in ("readyz", "metrics")),
        *(f"http://shop-streamcl-replica-{shard}.prod:80/readyz" for shard in range(3)),
    ]
    done = subprocess.run([sys.executable, "-c", script, Path(__file__).as_uri()], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_pods_of_a_group_are_ranks_that_torchrun_starts(render: Render) -> None:
    group = {"worker": {"replicas": 3, "group": {"enabled": True}}, "config": {"shard": {"count": 3}}}
    manifests = render(networkPolicy={"enabled": True}, **group)
    check(manifests)
    [workers] = manifests.of("StatefulSet")
    its = container(workers["spec"]["template"])
    assert its["command"][:3] == ["python", "-m", "torch.distributed.run"]
    assert {"--nnodes=3", "--node-rank=$(POD_INDEX)", "--nproc-per-node=1"} <= {*its["command"]}
    assert not any(argument.startswith("--shards") for argument in its["args"])
    [policy] = [each for each in manifests.of("NetworkPolicy") if each["metadata"]["name"].endswith("worker")]
    themselves = [{"podSelector": policy["spec"]["podSelector"]}]
    assert {"from": themselves} in policy["spec"]["ingress"]
    assert {"to": themselves} in policy["spec"]["egress"]


def test_each_rank_has_a_shard_of_its_own(render: Render) -> None:
    with pytest.raises(Failed, match=r"set config.shard.count to 2"):
        render(worker={"replicas": 2, "group": {"enabled": True}}, config={"shard": {"count": 4}})
