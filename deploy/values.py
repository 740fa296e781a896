"""What the chart may be told, as models: `deploy.chart` makes values.schema.json of them; values.yaml has the defaults.

The schema is what `helm install` and `helm lint` check, so a typo in the worker's own configuration is found there too.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from streamcl.config import Config

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?([EPTGMk]i?|m)?$")]
Duration = Annotated[str, Field(pattern=r"^([0-9]+(ms|s|m|h))+$")]
Strings = dict[str, str]
Objects = list[dict[str, Any]]
Count = Annotated[int, Field(ge=1)]


class _Values(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Image(_Values):
    repository: Annotated[str, Field(min_length=1)]
    tag: str
    variant: Literal["cpu", "cuda"]
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64})?$")]
    pullPolicy: Literal["Always", "IfNotPresent", "Never"]
    pullSecrets: list[Name]


class Resources(_Values):
    requests: dict[str, Quantity | int | float] | None = None
    limits: dict[str, Quantity | int | float] | None = None
    claims: Objects | None = None


class Probe(_Values):
    initialDelaySeconds: Annotated[int, Field(ge=0)] | None = None
    periodSeconds: Count | None = None
    timeoutSeconds: Count | None = None
    failureThreshold: Count | None = None


class ReadinessProbe(Probe):
    successThreshold: Count | None = None


class Probes(_Values):
    startup: Probe
    readiness: ReadinessProbe
    liveness: Probe


class DisruptionBudget(_Values):
    enabled: bool
    maxUnavailable: Count | Annotated[str, Field(pattern=r"^[0-9]+%$")]


class Pods(_Values):
    """What workers and replicas have in common."""

    replicas: Annotated[int, Field(ge=0)]
    resources: Resources
    terminationGracePeriodSeconds: Annotated[int, Field(ge=10)]
    probes: Probes
    podDisruptionBudget: DisruptionBudget
    annotations: Strings
    labels: Strings
    nodeSelector: Strings
    tolerations: Objects
    affinity: dict[str, Any]
    topologySpreadConstraints: Objects
    priorityClassName: str
    runtimeClassName: str


class Group(_Values):
    enabled: bool
    port: Annotated[int, Field(ge=1, le=65535)]
    maxRestarts: Annotated[int, Field(ge=0)]


class Worker(Pods):
    replicas: Count
    group: Group
    extraArgs: list[str]


class Service(_Values):
    type: Literal["ClusterIP", "NodePort", "LoadBalancer"]
    port: Annotated[int, Field(ge=1, le=65535)]
    annotations: Strings


class Autoscaling(_Values):
    enabled: bool
    minReplicas: Count
    maxReplicas: Count
    targetCPUUtilizationPercentage: Annotated[int, Field(ge=1, le=100)]


class Trigger(_Values):
    type: Annotated[str, Field(min_length=1)]
    metadata: Strings
    name: str | None = None
    metricType: Literal["AverageValue", "Value", "Utilization"] | None = None
    authenticationRef: Strings | None = None


class Keda(_Values):
    enabled: bool
    minReplicas: Annotated[int, Field(ge=0)]
    maxReplicas: Count
    triggers: list[Trigger]


class Replica(Pods):
    enabled: bool
    service: Service
    autoscaling: Autoscaling
    keda: Keda


class Persistence(_Values):
    mode: Literal["perPod", "shared"]
    existingClaim: Name | Literal[""]
    size: Quantity
    storageClass: str
    annotations: Strings
    whenDeleted: Literal["Retain", "Delete"]
    whenScaled: Literal["Retain", "Delete"]


class ServiceAccount(_Values):
    create: bool
    name: str
    annotations: Strings


class NetworkPolicy(_Values):
    enabled: bool
    metricsFrom: Objects
    predictFrom: Objects
    kafkaTo: Objects
    kafkaPorts: list[Annotated[int, Field(ge=1, le=65535)]]
    extraEgress: Objects


class ServiceMonitor(_Values):
    enabled: bool
    labels: Strings
    interval: Duration
    scrapeTimeout: Duration
    tlsConfig: dict[str, Any]


class PrometheusRule(_Values):
    enabled: bool
    labels: Strings


class Dashboards(_Values):
    enabled: bool
    labels: Strings
    annotations: Strings


class Metrics(_Values):
    serviceMonitor: ServiceMonitor
    prometheusRule: PrometheusRule
    dashboards: Dashboards


class Values(_Values):
    """Of helm/streamcl."""

    model_config = ConfigDict(title="streamcl")

    nameOverride: Name | Literal[""]
    fullnameOverride: Name | Literal[""]
    image: Image
    config: Config
    existingSecrets: dict[Name, Name]
    env: Objects
    extraVolumes: Objects
    extraVolumeMounts: Objects
    worker: Worker
    persistence: Persistence
    replica: Replica
    serviceAccount: ServiceAccount
    podSecurityContext: dict[str, Any]
    securityContext: dict[str, Any]
    networkPolicy: NetworkPolicy
    metrics: Metrics
    # Helm's own: what an umbrella chart hands to all of its charts, and whether it wants this one.
    global_: Annotated[dict[str, Any], Field(alias="global")] = {}
    enabled: bool | None = None
