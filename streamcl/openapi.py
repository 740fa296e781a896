"""The endpoint's own description: an OpenAPI 3.1 document made from the config, and the same for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import orjson

from streamcl import __version__
from streamcl.config import Config
from streamcl.derived import Feature, Read
from streamcl.features import FLOAT32_MAX
from streamcl.services import Serve
from streamcl.stations import Bag, Numeric

Schema = dict[str, Any]

CATEGORY = ["string", "integer", "boolean"]
ERRORS = {
    400: "Not a JSON object, or a field that can't be used; the message names it.",
    401: "No key, or a wrong one.",
    408: "The request took too long to arrive.",
    413: "The body is too large, or has too many instances.",
    415: "Not `Content-Type: application/json`.",
    431: "The head of the request is too large.",
    503: "No model yet (`unready`), or too many requests at once (`overloaded`, with Retry-After).",
}


def document(config: Config, limits: Serve) -> Schema:
    """OpenAPI 3.1: what can be asked of a model of this config, and what is answered."""
    keyed = limits.api_key_env is not None or limits.api_key_file is not None
    schemas = {
        "Instance": instance(config),
        "Instances": _instances(limits),
        "Prediction": _prediction(config),
        "Model": _object({"name": "string", "snapshot": "string", "records": "integer", "version": "integer"}),
        "Error": {
            **_object({}),
            "properties": {"error": _object({"reason": "string", "message": "string"})},
            "required": ["error"],
        },
        "Health": _object({"ok": "boolean", "reason": "string"}),
    }
    components: Schema = {"schemas": schemas}
    if keyed:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": f"{config.name}: predictions",
            "version": __version__,
            "description": "An event is scored as the worker would score it. A missing feature is no error; the"
            " label, the id and the time are not needed. Requests at the same time share a pass of the model, which"
            " may move the last digits of a score.",
        },
        "security": [{"key": []}] if keyed else [],
        "paths": _paths(),
        "components": components,
    }


def instance(config: Config) -> Schema:
    """The JSON Schema of one event's payload: dotted names of features are nested objects."""
    root: Schema = {"type": "object", "properties": {}, "description": "One event, label not needed."}
    for name, feature in sorted(config.features.items()):
        if not isinstance(feature, Read):  # made here, of other fields and of the past
            continue
        *parents, last = name.split(".")
        place = root
        for parent in parents:
            place = place["properties"].setdefault(parent, {"properties": {}})
        place["properties"].setdefault(last, {}).update(_feature(feature))
        if isinstance(feature, Bag) and feature.weights:
            beside = {"type": ["array", "null"], "items": {"type": "number"}, "description": f"Weights of {name}."}
            root["properties"].setdefault(feature.weights.partition(".")[0], beside)
    if config.events.unknown_fields == "dead_letter":
        events = config.events
        other = (events.id, events.key, events.time, events.label, events.segment)
        for name in (name.partition(".")[0] for name in other if name):
            root["properties"].setdefault(name, {"description": "Not read by the model."})
        root["additionalProperties"] = False
    return root


def _feature(feature: Feature) -> Schema:
    if isinstance(feature, Numeric):
        bounds = {"minimum": -FLOAT32_MAX, "maximum": FLOAT32_MAX}
        return {"type": ["number", "null"], **bounds, "description": "A number, standardised by what was learned."}
    if isinstance(feature, Bag):
        text = f"A list of categories; items beyond {feature.max_items} are ignored."
        return {"type": ["array", "object", "null"], "items": {"type": CATEGORY}, "description": text}
    return {"type": [*CATEGORY, "null"], "description": "A category."}


def _instances(limits: Serve) -> Schema:
    items = {"type": "array", "items": {"$ref": "#/components/schemas/Instance"}, "maxItems": limits.max_instances}
    return {"type": "object", "properties": {"instances": items}, "required": ["instances"]} | {
        "additionalProperties": False,
        "description": "Several events, answered in their order.",
    }


def _prediction(config: Config) -> Schema:
    if config.task != "multiclass":
        score: Schema = {"type": "number"} | ({"minimum": 0, "maximum": 1} if config.task == "binary" else {})
        chance = {"type": "number", "minimum": 0, "maximum": 1}
        tasks = {"type": "object", "properties": dict.fromkeys(sorted(config.tasks), chance)}
        properties = {"score": score, **({"tasks": tasks} if config.tasks else {})}
        return {"type": "object", "properties": properties, "required": list(properties)}
    chances = {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 1}}
    leading = {"type": "integer", "description": "The class of the largest probability."}
    return {"type": "object", "properties": {"score": chances, "class": leading}, "required": ["score", "class"]}


def _object(fields: Mapping[str, str]) -> Schema:
    properties = {name: {"type": kind} for name, kind in fields.items()}
    return {"type": "object", "properties": properties, "required": list(fields)}


def _paths() -> Schema:
    answer = {
        "type": "object",
        "properties": {
            "predictions": {"type": "array", "items": {"$ref": "#/components/schemas/Prediction"}},
            "model": {"$ref": "#/components/schemas/Model"},
        },
        "required": ["predictions", "model"],
    }
    asked = {"anyOf": [{"$ref": f"#/components/schemas/{name}"} for name in ("Instance", "Instances")]}
    predict = {
        "operationId": "predict",
        "summary": "Score one event, or several.",
        "requestBody": {"required": True, "content": {"application/json": {"schema": asked}}},
        "responses": {"200": _content("Scores, and the model that made all of them.", answer), **_errors(*ERRORS)},
    }
    model = {"$ref": "#/components/schemas/Model"}
    return {
        "/v1/predict": {"post": predict},
        "/v1/model": {"get": _get("model", "What answers at the moment.", model, 503)},
        "/readyz": {"get": _get("ready", "Whether there is a model.", "Health", 503, open_to_all=True)},
        "/livez": {"get": _get("live", "Whether the process answers.", "Health", open_to_all=True)},
        "/healthz": {"get": _get("health", "The same as /livez.", "Health", open_to_all=True)},
        "/metrics": {"get": _text("metrics", "For Prometheus.", "text/plain")},
        "/openapi.json": {"get": _get("openapi", "This document.", {"type": "object"})},
        "/docs": {"get": _text("docs", "The same for people.", "text/html")},
    }


def _get(name: str, summary: str, schema: Schema | str, *errors: int, open_to_all: bool = False) -> Schema:
    shape = {"$ref": f"#/components/schemas/{schema}"} if isinstance(schema, str) else schema
    found = (*errors, 408, 431, 503) if open_to_all else (*errors, 401, 408, 431, 503)
    responses = {"200": _content(summary, shape), **_errors(*sorted(set(found)))}
    return {"operationId": name, "summary": summary, "responses": responses} | ({"security": []} if open_to_all else {})


def _text(name: str, summary: str, media_type: str) -> Schema:
    told = {"description": summary, "content": {media_type: {"schema": {"type": "string"}}}}
    responses = {"200": told, **_errors(401, 408, 431, 503)}
    return {"operationId": name, "summary": summary, "responses": responses}


def _content(text: str, schema: Schema) -> Schema:
    return {"description": text, "content": {"application/json": {"schema": schema}}}


def _errors(*statuses: int) -> Schema:
    return {str(status): _content(ERRORS[status], {"$ref": "#/components/schemas/Error"}) for status in statuses}


STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:56rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
h2{margin-top:2.5rem;border-top:1px solid #ccc;padding-top:1rem}code,pre{font:14px/1.4 ui-monospace,monospace}
pre{background:#f4f4f4;padding:1rem;overflow:auto}table{border-collapse:collapse}
td,th{border:1px solid #ccc;padding:.3rem .6rem;text-align:left;vertical-align:top}
@media(prefers-color-scheme:dark){body{color:#ddd;background:#181818}pre{background:#262626}}"""


def page(described: Schema) -> str:
    """The document as one HTML page that asks for nothing else."""
    return "\n".join(_html(described))


def _html(described: Schema) -> Iterator[str]:
    title, schemas = escape(described["info"]["title"]), described["components"]["schemas"]
    yield f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style>'
    yield f"<h1>{title}</h1><p>{escape(described['info']['description'])}</p><p>The same for programs: "
    yield '<a href="openapi.json"><code>openapi.json</code></a>, OpenAPI 3.1.</p>'
    example = orjson.dumps(_example(schemas["Instance"])).decode()
    key = " -H 'Authorization: Bearer KEY'" if described["security"] else ""
    ask = f"curl{key} -H 'Content-Type: application/json' -d '{example}' HOST/v1/predict"
    yield f"<h2>Try it</h2><pre>{escape(ask)}</pre>"
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {path}</code></h2><p>{escape(operation['summary'])}</p>"
            rows = [(status, told["description"]) for status, told in operation["responses"].items()]
            yield _table(("status", "meaning"), rows)
    yield "<h2>Fields of an event</h2>"
    yield _table(("field", "type", "meaning"), list(_fields(schemas["Instance"], "")))
    for name, schema in schemas.items():
        yield f"<h2>{name}</h2><pre>{escape(orjson.dumps(schema, option=orjson.OPT_INDENT_2).decode())}</pre>"
    yield "</html>"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    return f"<table><tr>{''.join(f'<th>{name}</th>' for name in head)}</tr><tr>{'</tr><tr>'.join(lines)}</tr></table>"


def _fields(schema: Schema, prefix: str) -> Iterator[tuple[str, ...]]:
    for name, field in schema.get("properties", {}).items():
        if "type" in field:
            yield f"{prefix}{name}", " or ".join(field["type"]), field.get("description", "")
        yield from _fields(field, f"{prefix}{name}.")


def _example(schema: Schema) -> Schema:
    """A payload that the schema allows."""
    given: Schema = {}
    for name, field in schema["properties"].items():
        kinds = field.get("type", [])
        if "properties" in field and not kinds:
            given[name] = _example(field)
        elif kinds:
            given[name] = 1.5 if "number" in kinds else ["a", "b"] if "array" in kinds else "a"
    return given
