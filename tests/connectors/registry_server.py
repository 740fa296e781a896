"""A small schema registry with Confluent's REST paths and answers, on a free port of loopback.

Differs from a real one: schemas are equal when their texts are, compatibility is a switch, and what is registered as
text is compiled by protoc when it is asked for as `serialized`.
"""

from __future__ import annotations

import base64
import json
import ssl
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

Body = dict[str, Any]


class Answer(Exception):
    """What is answered instead of the content."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body: Any = {"error_code": code, "message": message}


class SchemaRegistry:
    """A registry, served as long as the context lasts.

    Attributes:
        asked: Every request so far, as `GET /path`.
        logins: The Authorization header of each, "" where there is none.
        login: (user, password) that every request must bring; None: everybody is let in.
        fault: Called for every request; may raise an Answer.
        incompatible: Refuse every new schema of a subject that exists.
        kinds: What it says that it takes.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.schemas: dict[int, Body] = {}
        self.subjects: dict[str, list[int]] = {}
        self.asked: list[str] = []
        self.logins: list[str] = []
        self.login: tuple[str, str] | None = None
        self.fault: Callable[[str], None] = lambda _: None
        self.incompatible = False
        self.kinds = ["JSON", "PROTOBUF", "AVRO"]
        self.text_only = False
        self._tls = tls
        self._port = 0
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}"

    def add(self, subject: str, schema: str, kind: str = "AVRO", references: Any = ()) -> int:
        """Register, as a producer would; the id."""
        body = {"schema": schema, "schemaType": kind, "references": list(references)}
        number = next((n for n, known in self.schemas.items() if known == body), len(self.schemas) + 101)
        self.schemas[number] = body
        versions = self.subjects.setdefault(subject, [])
        if number not in versions:
            versions.append(number)
        return number

    def start(self) -> None:
        """Answer, on the port of last time if there was one."""
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler())
        self._port = self._server.server_port
        if self._tls:
            self._server.socket = self._tls.wrap_socket(self._server.socket, server_side=True)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Be away: connections are refused."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            timeout = 5

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._answer({})

            def do_POST(self) -> None:
                self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def _answer(self, body: Body) -> None:
                registry.asked.append(f"{self.command} {self.path}")
                registry.logins.append(self.headers.get("Authorization", ""))
                try:
                    registry._admit(self.headers.get("Authorization", ""))
                    registry.fault(self.path)
                    status, content = 200, registry.answer(self.command, self.path, body)
                except Answer as error:
                    status, content = error.status, error.body
                raw = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/vnd.schemaregistry.v1+json")
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        return Handler

    def _admit(self, header: str) -> None:
        if self.login and header != "Basic " + base64.b64encode(":".join(self.login).encode()).decode():
            raise Answer(401, 401, "Unauthorized")

    def answer(self, method: str, target: str, body: Body) -> Any:
        parts = urlsplit(target)
        path = [unquote(each) for each in parts.path.strip("/").split("/")]
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        match method, path:
            case "GET", ["schemas", "types"]:
                return self.kinds
            case "GET", ["schemas", "ids", number]:
                return self._content(self._schema(int(number)), query.get("format", ""))
            case "GET", ["subjects", subject, "versions", version]:
                return self._version(subject, version, query.get("format", ""))
            case "POST", ["subjects", subject, "versions"]:
                return {"id": self._register(subject, body)}
            case "POST", ["subjects", subject]:
                return self._lookup(subject, body)
        raise Answer(404, 404, "HTTP 404 Not Found")

    def _schema(self, number: int) -> Body:
        if number not in self.schemas:
            raise Answer(404, 40403, f"Schema {number} not found")
        return self.schemas[number]

    def _content(self, schema: Body, format: str) -> Body:
        shown = {"schema": schema["schema"]}
        if schema["schemaType"] != "AVRO":
            shown["schemaType"] = schema["schemaType"]
            if format == "serialized" and not self.text_only:
                shown["schema"] = base64.b64encode(self._compiled(schema)).decode()
        return shown | ({"references": schema["references"]} if schema["references"] else {})

    def _version(self, subject: str, version: str, format: str) -> Body:
        if subject not in self.subjects:
            raise Answer(404, 40401, f"Subject '{subject}' not found.")
        versions = self.subjects[subject]
        place = len(versions) if version == "latest" else int(version)
        if not 0 < place <= len(versions):
            raise Answer(404, 40402, f"Version {version} not found.")
        number = versions[place - 1]
        return {"subject": subject, "version": place, "id": number, **self._content(self.schemas[number], format)}

    def _register(self, subject: str, body: Body) -> int:
        kind = body.get("schemaType", "AVRO")
        if kind == "AVRO" and not isinstance(json.loads(body["schema"]), dict):
            raise Answer(422, 42201, "Invalid schema")
        wanted = self._same(subject, body)
        if wanted is None and subject in self.subjects and self.incompatible:
            raise Answer(409, 409, "Schema being registered is incompatible with an earlier schema")
        return self.add(subject, body["schema"], kind, body.get("references", ()))

    def _lookup(self, subject: str, body: Body) -> Body:
        if subject not in self.subjects:
            raise Answer(404, 40401, f"Subject '{subject}' not found.")
        number = self._same(subject, body)
        if number is None:
            raise Answer(404, 40403, "Schema not found")
        version = self.subjects[subject].index(number) + 1
        return {"subject": subject, "version": version, "id": number, **self._content(self.schemas[number], "")}

    def _same(self, subject: str, body: Body) -> int | None:
        kind, references = body.get("schemaType", "AVRO"), list(body.get("references", ()))
        wanted = {"schema": body["schema"], "schemaType": kind, "references": references}
        return next((n for n in self.subjects.get(subject, ()) if self.schemas[n] == wanted), None)

    def _compiled(self, schema: Body) -> bytes:
        """A serialized FileDescriptorProto of a schema that was registered as text, or as that already."""
        if not schema["schema"].lstrip().startswith(("syntax", "//", "package", "import")):
            return base64.b64decode(schema["schema"])
        files = {"main.proto": schema["schema"]}
        self._collect(schema, files)
        [*_, file] = descriptors(files).file
        return bytes(file.SerializeToString())

    def _collect(self, schema: Body, files: dict[str, str]) -> None:
        for reference in schema["references"]:
            inner = self.schemas[self.subjects[reference["subject"]][reference["version"] - 1]]
            files[reference["name"]] = inner["schema"]
            self._collect(inner, files)


def descriptors(files: dict[str, str], main: str = "main.proto") -> descriptor_pb2.FileDescriptorSet:
    """.proto files compiled by protoc, what `main` imports before it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        made = Path(folder) / "made.set"
        own = Path(protoc.__file__).parent / "_proto"
        flags = [f"-I{folder}", f"-I{own}", f"--descriptor_set_out={made}", "--include_imports", main]
        assert protoc.main(["protoc", *flags]) == 0
        return descriptor_pb2.FileDescriptorSet.FromString(made.read_bytes())
