"""A backtest: the configured loop over a recorded stream, with nothing published and nothing saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from streamcl import connect
from streamcl.config import Config, ConfigError
from streamcl.outlets import Outlets
from streamcl.records import COMMANDS, EVENTS, LABELS, Stream
from streamcl.worker import Worker, keeps_order


def redirected(config: Config, inputs: Mapping[str, str], predictions: str | None = None) -> Config:
    """The config that reads `inputs` (URL by name) instead, and publishes nothing but, if asked to, predictions.

    Raises:
        ConfigError: an input that the config has not.
    """
    data = config.model_dump(mode="json")
    if inputs and COMMANDS not in inputs:  # the recorded inputs' own, or none
        data[COMMANDS] = None
    for name, url in inputs.items():
        if name == COMMANDS:
            data[name] = url
            continue
        if data[name] is None:
            raise ConfigError(f"--input {name}: the config has no [{name}]")
        data[name] |= {"url": url} | ({"codec": "json"} if url.startswith("file:") else {})
    # A backtest has no order to commit its answers with, and no business in a schema registry.
    backtest: dict[str, Any] = {"predictions": predictions, "predictions_codec": "json", "delivery": {}}
    backtest |= {"outcomes": None}
    return Config.parse({**data, **backtest}, "--input")


def pair(text: str) -> tuple[str, str]:
    """NAME=URL of the command line."""
    name, _, url = text.partition("=")
    if name not in (EVENTS, LABELS, COMMANDS) or not url:
        raise ConfigError(f"{text}: expected events=URL, labels=URL or commands=URL")
    return name, url


def build(config: Config) -> Worker:
    """A worker on the inputs of a redirected config, not yet sought anywhere."""
    sink, codecs = connect.open_sink(config.predictions, config) if config.predictions else None, connect.codecs(config)
    return Worker(config, connect.open_source(config), codecs, Outlets(config, codecs.predictions, sink))


def order_of(config: Config, streams: Sequence[Stream]) -> str | None:
    """URL of the control log that says in which order the inputs were taken; None where they say it themselves."""
    return config.control_url if config.events.url.startswith("kafka:") and keeps_order(config, streams) else None
