"""From URLs and names to connectors and codecs, so that the core imports none of them.

Both are found through entry points: `streamcl.connectors` by URL scheme, `streamcl.codecs` by name. A package that
registers there is used like the built-in ones.
"""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any
from urllib.parse import urlsplit

from streamcl.config import Config
from streamcl.protocols import Codec, Codecs, Connector, ConnectorError, ControlLog, Format, Membership, Sink, Source
from streamcl.records import EVENTS, LABELS

CONNECTORS = "streamcl.connectors"
CODECS = "streamcl.codecs"


def connector(url: str) -> Connector:
    """The connector of a URL's scheme.

    Raises:
        ConnectorError: no such scheme (the known ones are listed), or its package can't be imported.
    """
    scheme = urlsplit(url).scheme
    if not scheme:
        raise ConnectorError(f"{url!r} is no URL: it needs a scheme, one of {_known(CONNECTORS)}")
    found: Connector = _load(CONNECTORS, scheme, "connector for the scheme")
    return found


def codec(name: str, config: Config, place: str) -> Codec:
    """The codec registered as `name`, for what is read or written at `place`; see `protocols.Format`.

    Raises:
        ConnectorError: as for `connector`, or what the codec needs can't be had.
    """
    found: Format = _load(CODECS, name, "codec")
    return found.open(config, place)


def codecs(config: Config) -> Codecs:
    """The codecs that the config names, ready to work."""
    return Codecs(**{place: codec(name, config, place) for place, name in _codec_names(config).items()})


def check_codecs(config: Config) -> list[str]:
    """One line for each finding; nothing is changed. Raises as `codecs` does."""
    found: list[str] = []
    for place, name in _codec_names(config).items():
        made: Format = _load(CODECS, name, "codec")
        found += [f"{place}: {line}" for line in made.check(config, place)]
    return found


def _codec_names(config: Config) -> dict[str, str]:
    labels = config.labels.codec.kind if config.labels else "json"  # never asked when there are none
    answers = config.predictions_codec if config.predictions else "json"
    return {EVENTS: config.events.codec.kind, LABELS: labels, "predictions": answers}


def open_source(config: Config) -> Source:
    """The inputs of this shard, all of them behind one source."""
    return connector(config.events.url).open_source(config.inputs, config)


def open_sink(url: str, config: Config) -> Sink:
    """Where `url` points: the predictions', or the dead letters'."""
    return connector(url).open_sink(url, config)


def open_control(config: Config) -> ControlLog:
    """This shard's control log. Its `open`, which fences predecessors, is left to the caller."""
    return connector(config.control_url).open_control(config.control_url, config)


def join_group(config: Config) -> Membership:
    """A seat in the consumer group that hands out the shards.

    Raises:
        ConnectorError: the scheme of `events.url` knows no groups.
    """
    url = config.events.url
    join = getattr(connector(url), "join_group", None)
    if join is None:
        raise ConnectorError(f"shard.assignment: {urlsplit(url).scheme}:// knows no groups; set it to 'static'")
    found: Membership = join(url, config)
    return found


def _load(group: str, name: str, kind: str) -> Any:
    found = list(entry_points(group=group, name=name))
    if not found:
        raise ConnectorError(f"no {kind} {name!r}; known: {_known(group)}")
    try:
        return found[0].load()
    except ImportError as error:
        raise ConnectorError(
            f"the {kind} {name!r} ({found[0].value}) can't be imported: {error}; is its package installed?"
        ) from error


def _known(group: str) -> str:
    return ", ".join(sorted({point.name for point in entry_points(group=group)})) or "none: streamcl is not installed"
