"""A client of schema registries that speak Confluent's REST interface, and the frame that names a payload's schema.

A framed payload is a zero byte, the schema's id in four bytes (big-endian), and what the schema describes. Not
supported: logging in by token, and ids that stand in a header.

What an id means never changes, so an answer is kept for as long as the process lives, and decoding stays a pure
function of the payload. Two things are not the payload's fault, and never make it a dead letter. A registry that is
away is asked again, with back-off, while the loop waits (`registry.patience_s`), and then the shard recovers; one that
refuses us stops the worker at once. Only its own answer that it has no such schema makes a payload bad: 404 with the
code 40403, for any other 404 comes from a wrong URL or a proxy.

That answer can change, for an id may be registered later. It is believed at once, because waiting would only move the
moment, and for `registry.unknown_id_s`. So there is one thing that recovery can see otherwise than the first run did:
records behind the last snapshot whose unknown id was registered in between, dead letters first, then learned. Ids are
given out by registering, so this takes a replica of the registry that lags, a restored registry, or a forged id.
"""

from __future__ import annotations

import logging
import os
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import httpx

from connectors.kafka_client import backoff_s
from streamcl.config import Config
from streamcl.protocols import BadInput, ConnectorError, Unavailable
from streamcl.records import EVENTS, LABELS
from streamcl.services import Registry as Settings
from streamcl.stations import Payload

log = logging.getLogger(__name__)

HEADER = 5
_MEDIA = "application/vnd.schemaregistry.v1+json"
_UNKNOWN_SCHEMA, _UNKNOWN_SUBJECT = 40403, 40401
_PASSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_MOST_UNKNOWN = 10_000


def framed(schema_id: int, body: bytes) -> bytes:
    """The frame, and `body` behind it."""
    return b"\x00" + schema_id.to_bytes(4, "big") + body


def schema_id(value: bytes) -> int:
    """The id in a framed payload. Raises BadInput."""
    if value[:1] != b"\x00":
        raise BadInput("undecodable", "no magic byte: not in the wire format of a schema registry")
    if len(value) < HEADER:
        raise BadInput("undecodable", f"the payload ends within the schema id, after {len(value)} bytes")
    return int.from_bytes(value[1:HEADER], "big")


class Reference(NamedTuple):
    """What a schema imports, under the name that it has there."""

    name: str
    subject: str
    version: int


class Schema(NamedTuple):
    """A schema as the registry gives it. `kind` is AVRO, PROTOBUF or JSON."""

    kind: str
    text: str
    references: tuple[Reference, ...] = ()


class _Refused(Exception):
    """An answer of the registry that asking again would not change."""

    def __init__(self, status: int, code: int, text: str) -> None:
        super().__init__(f"{status} {text}")
        self.code = code


class Registry:
    """Asks a registry, over a new connection each time: a schema is asked for once.

    Args:
        serialized: Ask for Protobuf schemas as serialized descriptors.

    Raises (all of it):
        Unavailable: away for longer than `registry.patience_s`.
        ConnectorError: it refuses us, or isn't a registry. Names the URL and what was asked, never the password.
    """

    def __init__(
        self,
        settings: Settings,
        serialized: bool = False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        if settings.url is None:
            raise ConnectorError("registry.url: needed to read or write schemas")
        self.url = settings.url.rstrip("/")
        self._settings = settings
        self._format = {"format": "serialized"} if serialized else {}
        self._auth = _login(settings)
        self._tls = _tls(settings)
        self._clock, self._sleep = clock, sleep
        self._schemas: dict[int, Schema] = {}
        self._ids: dict[tuple[str, int], int] = {}
        self._unknown: dict[int, float] = {}  # when to ask again

    def by_id(self, number: int) -> Schema:
        """Raises BadInput(`undecodable`) when the registry says that it has none."""
        if number not in self._schemas:
            self._schemas[number] = self._fetched(number)
        return self._schemas[number]

    def _fetched(self, number: int) -> Schema:
        unknown = BadInput("undecodable", f"schema id {number} is unknown to the registry")
        if self._unknown.get(number, 0.0) > self._clock():
            raise unknown
        try:
            answer = self._ask("GET", f"/schemas/ids/{number}", params=self._format)
        except _Refused as error:
            if error.code != _UNKNOWN_SCHEMA:
                raise self._fault(f"schema id {number}", error) from None
            if len(self._unknown) >= _MOST_UNKNOWN:
                self._unknown.clear()
            self._unknown[number] = self._clock() + self._settings.unknown_id_s
            raise unknown from None
        try:
            references = [Reference(r["name"], r["subject"], int(r["version"])) for r in answer.get("references") or ()]
            return Schema(str(answer.get("schemaType") or "AVRO"), str(answer["schema"]), tuple(references))
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._fault(f"schema id {number}", "the answer holds no schema") from None

    def references(self, schema: Schema) -> dict[str, Schema]:
        """Everything that a schema refers to, by name, each behind what it refers to itself."""
        found: dict[str, Schema] = {}
        for reference in schema.references:
            if reference.name not in found:
                inner = self.by_id(self._id_of(reference))
                found |= {name: each for name, each in self.references(inner).items() if name not in found}
                found[reference.name] = inner
        return found

    def _id_of(self, reference: Reference) -> int:
        key = (reference.subject, reference.version)
        if key not in self._ids:
            # A schema may refer to what has been deleted since: that hides it, and removes nothing.
            path = f"/subjects/{quote(reference.subject, safe='')}/versions/{reference.version}"
            what = f"subject {reference.subject}, version {reference.version}"
            try:
                self._ids[key] = int(self._ask("GET", path, params={"deleted": "true"})["id"])
            except _Refused as error:
                raise self._fault(what, error) from None
            except (KeyError, TypeError, ValueError):
                raise self._fault(what, "the answer holds no id") from None
        return self._ids[key]

    def register(self, subject: str, schema: Schema) -> int:
        """The id of a schema of ours, which is registered unless it is there already."""
        try:
            return self._posted(subject, "/versions", schema)
        except _Refused as error:
            raise self._fault(f"subject {subject}", error) from None

    def find(self, subject: str, schema: Schema) -> int | None:
        """The id of a schema of ours; None when it isn't registered under `subject`."""
        try:
            return self._posted(subject, "", schema)
        except _Refused as error:
            if error.code in (_UNKNOWN_SCHEMA, _UNKNOWN_SUBJECT):
                return None
            raise self._fault(f"subject {subject}", error) from None

    def _posted(self, subject: str, path: str, schema: Schema) -> int:
        body = {"schema": schema.text} | ({} if schema.kind == "AVRO" else {"schemaType": schema.kind})
        answer = self._ask("POST", f"/subjects/{quote(subject, safe='')}{path}", body)
        try:
            return int(answer["id"])
        except (KeyError, TypeError, ValueError):
            raise self._fault(f"subject {subject}", "the answer holds no id") from None

    def kinds(self) -> Sequence[str]:
        """The kinds of schemas that it takes: a question that costs nothing, to see whether it answers."""
        try:
            return sorted(map(str, self._ask("GET", "/schemas/types")))
        except _Refused as error:
            raise self._fault("its kinds of schemas", error) from None
        except TypeError:
            raise self._fault("its kinds of schemas", "not the answer of a schema registry") from None

    def _fault(self, what: str, cause: object) -> ConnectorError:
        user = f" as {self._settings.username!r}" if self._auth else ""
        return ConnectorError(f"registry {self.url}{user}: {what}: {cause}")

    def _ask(self, method: str, path: str, body: object = None, params: Mapping[str, str] | None = None) -> Any:
        """The answer's JSON; asked again while the registry is away."""
        began, failures = self._clock(), 0
        while True:
            answer = self._once(method, path, body, params)
            if not isinstance(answer, str):
                if failures:
                    log.warning("registry %s: answers again", self.url)
                return self._content(answer, path)
            waited_s = self._clock() - began
            if waited_s >= self._settings.patience_s:
                raise Unavailable(str(self._fault(path, f"{answer}; gave up after {waited_s:.0f} s")))
            if not failures:
                log.warning("registry %s: %s: %s; trying again until it answers", self.url, path, answer)
            self._sleep(min(backoff_s(failures), self._settings.patience_s - waited_s))
            failures += 1

    def _once(self, method: str, path: str, body: object, params: Mapping[str, str] | None) -> httpx.Response | str:
        """An answer, or why there is none that counts."""
        headers = {"Accept": _MEDIA} | ({"Content-Type": _MEDIA} if body is not None else {})
        # The environment could bring in a proxy, or a login from a .netrc.
        client = httpx.Client(auth=self._auth, verify=self._tls, timeout=self._settings.timeout_s, trust_env=False)
        try:
            with client:
                answer = client.request(method, self.url + path, json=body, params=params, headers=headers)
        except httpx.TransportError as error:
            return f"{type(error).__name__}: {error}"
        except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
            raise self._fault(path, f"{type(error).__name__}: {error}") from None
        return f"{answer.status_code} {answer.reason_phrase}" if answer.status_code in _PASSES else answer

    def _content(self, answer: httpx.Response, path: str) -> Any:
        try:
            content = answer.json()
        except ValueError:
            content = None
        if answer.status_code == 200 and content is not None:
            return content
        if answer.status_code in (401, 403):
            raise self._fault(path, f"{answer.status_code} {answer.reason_phrase}: wrong user or password, or no right")
        code = content.get("error_code") if isinstance(content, dict) else None
        if not isinstance(code, int):
            raise self._fault(path, f"{answer.status_code}: not the answer of a schema registry; wrong URL?")
        raise _Refused(answer.status_code, code, f"{content.get('message', '')} (error code {code})")


def _login(settings: Settings) -> tuple[str, str] | None:
    if settings.username is None:
        return None
    if settings.password_env is not None:
        if (found := os.environ.get(settings.password_env)) is None:
            raise ConnectorError(f"registry.password_env: {settings.password_env} is not set")
        return settings.username, found
    if settings.password_file is None:
        raise ConnectorError("registry.username needs registry.password_env or registry.password_file")
    try:
        return settings.username, settings.password_file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        cause = type(error).__name__
        raise ConnectorError(f"registry.password_file: {settings.password_file}: {cause}") from None


def _tls(settings: Settings) -> ssl.SSLContext | bool:
    if not (settings.url or "").startswith("https:"):
        return False
    try:
        context = ssl.create_default_context(cafile=settings.ssl_cafile)
        if settings.ssl_certfile is not None:
            context.load_cert_chain(settings.ssl_certfile, settings.ssl_keyfile, password="")
    except (OSError, ValueError) as error:  # an SSLError is an OSError; it shows no key
        cause = f"{type(error).__name__}: {error}"
        raise ConnectorError(f"registry.ssl_cafile, ssl_certfile or ssl_keyfile: {cause}") from None
    return context


def enrol(config: Config, schema: Schema) -> int:
    """The id of the predictions' schema, registered unless `registry.register_schema` says no.

    Raises:
        ConnectorError: also when it isn't there and not to be registered, or doesn't suit its subject.
    """
    registry, subject = Registry(config.registry), subject_of(config)
    if config.registry.register_schema:
        return registry.register(subject, schema)
    return _found(registry, subject, schema)


def _found(registry: Registry, subject: str, schema: Schema) -> int:
    if (found := registry.find(subject, schema)) is not None:
        return found
    raise ConnectorError(
        f"registry {registry.url}: subject {subject}: the predictions' schema is not there; register it, or set "
        "registry.register_schema"
    )


def check(config: Config, kind: str, schema: Schema | None = None) -> Sequence[str]:
    """Proves that the registry answers and takes schemas of this kind, and looks for the predictions' schema.

    Raises:
        ConnectorError: it does not, at the first attempt; or that schema should be there and isn't.
    """
    registry = Registry(config.registry.model_copy(update={"patience_s": 0.0}))
    kinds = registry.kinds()
    if kind not in kinds:
        raise ConnectorError(f"registry {registry.url}: takes no {kind} schemas, only {', '.join(kinds) or 'none'}")
    lines = [f"{kind.lower()}, registry {registry.url} answers"]
    if schema is not None:
        subject = subject_of(config)
        known = registry.find(subject, schema) if config.registry.register_schema else _found(registry, subject, schema)
        state = "will be registered" if known is None else f"has schema id {known}"
        lines.append(f"{kind.lower()}, subject {subject} {state}")
    return lines


def subject_of(config: Config) -> str:
    """The subject of the predictions' schema."""
    return config.registry.subject or f"{urlsplit(config.predictions or '').path.strip('/')}-value"


def payload_of(config: Config, place: str) -> Payload:
    """How payloads are written at `place`. Predictions have a schema of their own, in the registry."""
    stations = {EVENTS: config.events.codec, LABELS: config.labels.codec if config.labels else Payload()}
    return stations.get(place, Payload())
