"""Through a broker: Avro comes, Protobuf goes, and a payload that is neither keeps its bytes in the dead letters."""

from __future__ import annotations

from pathlib import Path

import orjson

from connectors.avro import Avro
from connectors.protobuf import Protobuf
from connectors.registry import framed
from streamcl import connect
from streamcl.worker import build
from tests.connectors.registry_server import SchemaRegistry
from tests.kafka.conftest import Cluster

FIELDS = [("id", "string"), ("x", "double"), ("y", "int")]
SCHEMA = {"type": "record", "name": "E", "fields": [{"name": name, "type": kind} for name, kind in FIELDS]}


def test_avro_events_are_learned_and_answered_in_protobuf(broker: Cluster, tmp_path: Path) -> None:
    events, scores, dead = (broker.topic() for _ in range(3))
    with SchemaRegistry() as server:
        number = server.add(f"{events}-value", orjson.dumps(SCHEMA).decode())
        writer = Avro(schema=orjson.dumps(SCHEMA).decode())
        good = [framed(number, writer.encode({"id": f"e{n}", "x": n / 10, "y": n % 2})) for n in range(30)]
        payloads = [*good[:10], b"\x00\xff\xff\xff\xffhunter2", *good[10:]]
        broker.produce(events, [(0, payload, 1000 * n) for n, payload in enumerate(payloads)])
        config = broker.config(
            events,
            events={"url": f"{broker.url}/{events}", "id": "id", "label": "y", "codec": "avro"},
            predictions=f"{broker.url}/{scores}",
            predictions_codec="protobuf",
            dead_letters=f"{broker.url}/{dead}",
            checkpoint={"folder": str(tmp_path)},
            registry={"url": server.url},
        )
        findings = connect.check_codecs(config)
        worker = build(config)
        worker.source.seek({})
        for turn in worker.run():
            if not turn.records and worker.progress.records == len(payloads):
                worker.stop()
        worker.flush()
        worker.close()
        reader = Protobuf.open(config, "predictions")
        answers = [reader.decode(message.value) for message in broker.read(scores)]
        [letter] = broker.read(dead)
    assert findings[0] == f"events: avro, registry {server.url} answers"
    assert worker.counts == {"predicted": 30, "inline": 30, "learned": 30, "dead_letter": 1}
    assert [answer["id"] for answer in answers] == [f"e{n}" for n in range(30)]
    assert all(0.0 < answer["score"] < 1.0 for answer in answers)
    assert letter.value == payloads[10]
    assert dict(letter.headers)["streamcl-error"] == b"schema id 4294967295 is unknown to the registry"
    assert list(server.subjects) == [f"{events}-value", f"{scores}-value"]
