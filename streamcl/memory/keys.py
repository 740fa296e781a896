"""What an event is remembered under: a feature's value, what the model made of it, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from streamcl.config import Config, ConfigError
from streamcl.features import Layout
from streamcl.memory.forms import NO_KEY, Floats
from streamcl.methods import KeyMemory, KNNMemory, SketchMemory
from streamcl.random import key_of, normal_array
from streamcl.records import Encoded

ID_NUMBERS = 16
"""Fixed random numbers of each field under `key = "ids"`."""

LEAST_LENGTH = np.float32(1e-30)
"""A shorter embedding has no direction."""

_NO_KEY = np.array([NO_KEY], np.int64)

Keys = Callable[[Encoded, Floats, Floats], NDArray[Any]]
"""(features, embedding (E,), hidden (H,)) -> the key of a form, (d,)."""


def keys_of(config: KNNMemory | SketchMemory | KeyMemory, main: Config, layout: Layout, where: str) -> Keys:
    """What makes a key of an event."""
    if isinstance(config, KeyMemory):
        slot = int(np.flatnonzero(layout.slot_field == layout.fields.index(config.key))[0])
        missing = int(layout.slot_base[slot])
        return lambda features, _e, _h: features.ids[slot : slot + 1] if features.ids[slot] != missing else _NO_KEY
    if config.key == "embedding":
        return directions(layout)
    if config.key == "hidden":
        return lambda _features, _embedding, hidden: hidden
    if config.key == "ids":
        return fixed_numbers(main.seed, layout)
    return _function(config.key, where)


def directions(layout: Layout) -> Keys:
    """What enters the hidden layers, each field's embedding scaled to unit length (0 stays 0); numerics as they are.

    An embedding grows with what was learned of it, but its direction tells one category from another from the start.
    Unscaled, the well known item outweighs the new user, whose errors are the ones to be remembered: on MovieLens-100k
    synced every 2,000 events kNN then gains a third of the AUC (`streamcl bench error-memory`).
    """
    fields, end = len(layout.fields), -len(layout.numerics) or None

    if not fields:
        return lambda _features, embedding, _hidden: embedding

    def unit(_features: Encoded, embedding: Floats, _hidden: Floats) -> Floats:
        parts = embedding[:end].reshape(fields, -1)
        lengths = np.sqrt(np.einsum("fd,fd->f", parts, parts))
        scaled = (parts / np.maximum(lengths, LEAST_LENGTH)[:, None]).ravel()
        return scaled if end is None else np.concatenate((scaled, embedding[end:]))

    return unit


def fixed_numbers(seed: int, layout: Layout) -> Keys:
    """Numbers that stand for a category for ever, whatever the weights do: (F x ID_NUMBERS,)."""
    key = key_of(seed, "error_memory.ids")

    def numbers(features: Encoded, _embedding: Floats, _hidden: Floats) -> Floats:
        out = np.zeros((len(layout.fields), ID_NUMBERS), np.float32)
        for field, row, weight in zip(layout.slot_field, features.ids.tolist(), features.weights, strict=True):
            if weight:
                # A dynamic table's id is a key by itself.
                own, start = (key, row * ID_NUMBERS) if row >= 0 else ((key + row) % (1 << 64), 0)
                out[field] += weight * normal_array(own, ID_NUMBERS, start).astype(np.float32)
        return out.ravel()

    return numbers


def _function(path: str, where: str) -> Keys:
    module, _, name = path.partition(":")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: {path!r}: {error}") from error

    def keys(features: Encoded, embedding: Floats, hidden: Floats) -> Floats:
        key = np.asarray(found(features, embedding, hidden), np.float32)
        if key.ndim != 1 or not len(key):
            raise ConfigError(f"{where}: {path!r} returned shape {key.shape}, not a vector")
        return key

    return keys
