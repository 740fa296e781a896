"""What Kubernetes would say of manifests, offline: its own schemas, strictly, and ours of what operators add."""

from __future__ import annotations

from typing import Any

import jsonschema_rs
import kubernetes_validate

from tests.helm.conftest import KUBERNETES, Rendered

_DURATION = {"type": "string", "pattern": "^[0-9]+(ms|s|m|h)$"}
_COUNT = {"type": "integer", "minimum": 0}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}, "minProperties": 1}
_SELECTOR = {"type": "object", "required": ["matchLabels"], "properties": {"matchLabels": _LABELS}}
_CREDENTIALS = {"type": "object", "required": ["name", "key"], "additionalProperties": {"type": "string"}}
_ENDPOINT = {
    "type": "object",
    "required": ["port"],
    "additionalProperties": False,
    "properties": {
        "port": {"type": "string"},
        "path": {"const": "/metrics"},
        "interval": _DURATION,
        "scrapeTimeout": _DURATION,
        "scheme": {"enum": ["http", "https"]},
        "tlsConfig": {"type": "object"},
        "authorization": {"properties": {"type": {"const": "Bearer"}, "credentials": _CREDENTIALS}},
        "relabelings": {"items": {"required": ["targetLabel", "replacement"]}},
    },
}
_SCALED = {
    "type": "object",
    "required": ["scaleTargetRef", "triggers"],
    "additionalProperties": False,
    "properties": {
        "scaleTargetRef": {"type": "object", "required": ["name"]},
        "minReplicaCount": _COUNT,
        "maxReplicaCount": _COUNT,
        "triggers": {"type": "array", "minItems": 1, "items": {"required": ["type", "metadata"]}},
    },
}
CUSTOM: dict[str, dict[str, Any]] = {
    "ServiceMonitor": {
        "type": "object",
        "required": ["selector", "endpoints"],
        "additionalProperties": False,
        "properties": {"selector": _SELECTOR, "endpoints": {"type": "array", "items": _ENDPOINT, "minItems": 1}},
    },
    "PrometheusRule": {
        "type": "object",
        "required": ["groups"],
        "additionalProperties": False,
        "properties": {"groups": {"type": "array", "minItems": 1}},
    },
    "ScaledObject": _SCALED,
}
"""Schemas of what the operators define, as far as the chart uses it; Kubernetes itself knows nothing of it."""


def check(manifests: Rendered) -> None:
    """Kubernetes would take them: no unknown field, no wrong type."""
    for each in manifests:
        if each["kind"] in CUSTOM:
            jsonschema_rs.validate(CUSTOM[each["kind"]], each["spec"])
        else:
            kubernetes_validate.validate(each, KUBERNETES.rpartition(".")[0], strict=True)
    names = [(each["kind"], each["metadata"]["name"]) for each in manifests]
    assert len(set(names)) == len(names)
