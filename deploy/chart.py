"""Write what of the deployment follows from elsewhere: `python -m deploy.chart`, or `make generate`.

| file | follows from |
|---|---|
| helm/streamcl/values.schema.json | `deploy.values`, and so the config's own models |
| helm/streamcl/README.md | Chart.yaml, and the comments of values.yaml, as helm-docs reads them |
| helm/streamcl/Chart.yaml, deploy/compose.yaml | the version of streamcl |
| helm/streamcl/files/ | deploy/prometheus/rules.yaml, deploy/grafana/*.json: Helm reads nothing outside of a chart |
"""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

import streamcl
from deploy.values import Values

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "helm" / "streamcl"


def files() -> dict[Path, str]:
    """What each file should hold."""
    return {
        CHART / "values.schema.json": json.dumps(schema(), indent=1) + "\n",
        CHART / "README.md": readme(),
        CHART / "Chart.yaml": _with_version(CHART / "Chart.yaml", r'^(version: |appVersion: ")[^"\s]+'),
        ROOT / "deploy" / "compose.yaml": _with_version(ROOT / "deploy" / "compose.yaml", r"(STREAMCL_VERSION:-)[^}]+"),
        **dict(_copies()),
    }


def stale() -> Iterator[Path]:
    """Files that hold something else, and copies of what is no more."""
    wanted = files()
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            yield path
    yield from (path for path in (CHART / "files").rglob("*") if path.is_file() and path not in wanted)


def schema() -> dict[str, Any]:
    """Of values.yaml, as Helm checks it."""
    found: dict[str, Any] = _plain(Values.model_json_schema())
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **found}


def _plain(node: Any) -> Any:
    """Without what no validator reads, and with one branch for each kind: an error then speaks of that kind alone."""
    if isinstance(node, list):
        return [_plain(each) for each in node]
    if not isinstance(node, dict):
        return node
    if "discriminator" in node:
        kinds = node["discriminator"]["mapping"]
        asked = {"type": "object", "required": ["kind"], "properties": {"kind": {"enum": sorted(kinds)}}}
        branches = [_when({"properties": {"kind": {"const": kind}}}, {"$ref": ref}) for kind, ref in kinds.items()]
        return {**asked, "allOf": branches}
    if len(node.get("anyOf", ())) == 2 and "discriminator" in node["anyOf"][1]:
        short, table = (_plain(each) for each in node["anyOf"])
        return {"if": {"type": "string"}, "then": short, "else": table}
    # pydantic lets names that no pattern knows pass in its schema, though not in its models.
    closed = {"additionalProperties": False} if "patternProperties" in node else {}
    return closed | {
        name: {key: _plain(each) for key, each in value.items()} if name in ("properties", "$defs") else _plain(value)
        for name, value in node.items()
        if name not in ("title", "change")
    }


def _when(condition: dict[str, Any], then: dict[str, Any]) -> dict[str, Any]:
    return {"if": condition, "then": then}


def _with_version(path: Path, pattern: str) -> str:
    return re.sub(pattern, rf"\g<1>{streamcl.__version__}", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


def _copies() -> Iterator[tuple[Path, str]]:
    rules = ROOT / "deploy" / "prometheus" / "rules.yaml"
    for path in [rules] if rules.exists() else []:
        yield CHART / "files" / path.name, path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "deploy" / "grafana").glob("*.json")):
        yield CHART / "files" / "dashboards" / path.name, path.read_text(encoding="utf-8")


def readme() -> str:
    """For the chart's folder, as helm-docs would write it."""
    about = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    rows = "\n".join(f"| {name} | {kind} | {default} | {text} |" for name, kind, default, text in documented())
    paths = sorted((CHART / "examples").glob("*.yaml"))
    examples = "\n".join(f"| `examples/{path.name}` | {_about(path)} |" for path in paths)
    return f"""# {about["name"]}

{about["description"]} Written by `make generate`, of Chart.yaml and the comments in values.yaml; how to install it,
change it and what of it is unproven stands in `docs/deploy.md`.

Kubernetes {about["kubeVersion"]}, Helm 3.18 or newer.

```
helm install clicks helm/streamcl -f helm/streamcl/examples/small.yaml
helm test clicks
```

| example | |
|---|---|
{examples}

## Values

Unknown keys are errors, those of `config` too: values.schema.json has them all.

| key | type | default | |
|---|---|---|---|
{rows}
"""


def _about(example: Path) -> str:
    """The first sentence of the comment that it begins with."""
    lines = example.read_text(encoding="utf-8").splitlines()
    comment = itertools.takewhile(lambda line: line.startswith("#"), lines)
    return " ".join(line.removeprefix("# ") for line in comment).partition(". ")[0].rstrip(".")


def documented() -> Iterator[tuple[str, str, str, str]]:
    """(path, type, default, what its comment says) of every value: of leaves, and of tables that have a comment."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    yield from _rows(yaml.compose(text), text.splitlines(), "")


def _rows(node: yaml.Node | None, lines: list[str], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    assert isinstance(node, yaml.MappingNode)  # noqa: S101 - the file is ours
    for key, value in node.value:
        path = f"{prefix}{key.value}"
        text, shown = _comment(lines, key.start_mark.line)
        if isinstance(value, yaml.MappingNode) and value.value and not text and shown is None:
            yield from _rows(value, lines, f"{path}.")
            continue
        default = yaml.SafeLoader("").construct_document(value)
        kind = {dict: "object", list: "list", str: "string", bool: "bool", int: "int"}[type(default)]
        yield path, kind, shown or f"`{json.dumps(default)}`", text


def _comment(lines: list[str], at: int) -> tuple[str, str | None]:
    """The `# -- ` comment above a line, and its `@default`, where there is one."""
    above: list[str] = []
    while at and lines[at - 1].lstrip().startswith("#"):
        at -= 1
        above.insert(0, lines[at].strip().removeprefix("#").strip())
    if not above or not above[0].startswith("-- "):
        return "", None
    shown = next((line.removeprefix("@default -- ") for line in above if line.startswith("@default")), None)
    text = " ".join(line for line in above if not line.startswith("@default")).removeprefix("-- ")
    return text.replace("|", "\\|"), shown


def main() -> None:
    texts = files()
    for path in list(stale()):
        text = texts.get(path)
        if text is None:
            path.unlink()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        print(f"{'removed' if text is None else 'wrote'} {path.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
