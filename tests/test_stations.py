"""Every setting of every station is described, says what its change means, and names its unit."""

from __future__ import annotations

from typing import Any

from streamcl.config import Config


def properties(schema: Any) -> list[tuple[str, Any]]:
    stations = {"Config": schema, **schema["$defs"]}
    return [(f"{name}.{key}", item) for name, part in stations.items() for key, item in part["properties"].items()]


def test_every_setting_is_described_and_says_what_its_change_means() -> None:
    for path, item in properties(Config.model_json_schema()):
        station = "$ref" in item or (
            not item.get("description") and any("$ref" in way for way in item.get("anyOf", ()))
        )
        if station or "const" in item or path in ("Config.labels", "Config.preset"):
            continue  # a station has its own text; the kind of a feature is its name; a preset stands for settings
        assert item.get("description"), path
        assert item.get("change") in ("free", "stop", "new"), path


def test_every_duration_and_size_has_its_unit_in_its_name() -> None:
    for path, item in properties(Config.model_json_schema()):
        if "timeout" in path or "window_" in path or "wait" in path or "linger" in path:
            assert path.endswith("_s"), path
        if item.get("default") in (1 << 20, 64 << 20):
            assert path.endswith("_bytes"), path


def test_secrets_are_never_settings() -> None:
    names = [path for path, _ in properties(Config.model_json_schema())]
    secret = [n for n in names if any(word in n for word in ("password", "secret", "token"))]
    assert all(n.endswith(("_env", "_file")) for n in secret if n != "Kafka.sasl_token_url")
