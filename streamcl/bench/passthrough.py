"""Other engines' shortest pipeline: consume, add a field, produce. A script for the interpreter that holds them.

    python passthrough.py quix|faust|bytewax BOOTSTRAP TOPIC OUT COUNT

It prints one JSON object: the seconds of wall clock and of processor from the first record to the last acknowledged
answer. It imports nothing of ours, for our dependencies and theirs do not go together.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

started: list[float] = []


def enrich(event: dict[str, Any]) -> dict[str, Any]:
    if not started:
        started[:] = [time.perf_counter(), time.process_time()]
    return {**event, "score": 0.5}


def report(count: int) -> None:
    wall_s, cpu_s = time.perf_counter() - started[0], time.process_time() - started[1]
    print(json.dumps({"events": count, "wall_s": wall_s, "cpu_s": cpu_s}), flush=True)


def quix(bootstrap: str, topic: str, out: str, count: int) -> None:
    """At least once, JSON, its defaults."""
    from quixstreams import Application  # type: ignore[import-not-found]

    app = Application(
        broker_address=bootstrap, consumer_group=f"{out}-quix", auto_offset_reset="earliest", loglevel="ERROR"
    )
    frame = app.dataframe(app.topic(topic, value_deserializer="json"))
    frame = frame.apply(enrich)
    frame.to_topic(app.topic(out, value_serializer="json"))
    app.run(count=count, collect=False)
    report(count)


def bytewax(bootstrap: str, topic: str, out: str, count: int) -> None:
    """orjson in the flow, for it brings no codec."""
    import bytewax.operators as op  # type: ignore[import-not-found]
    import orjson
    from bytewax.connectors.kafka import KafkaSink, KafkaSinkMessage, KafkaSource  # type: ignore[import-not-found]
    from bytewax.dataflow import Dataflow  # type: ignore[import-not-found]
    from bytewax.testing import run_main  # type: ignore[import-not-found]

    flow = Dataflow("passthrough")
    records = op.input("in", flow, KafkaSource([bootstrap], [topic], tail=False))
    answers = op.map("enrich", records, lambda r: KafkaSinkMessage(r.key, orjson.dumps(enrich(orjson.loads(r.value)))))
    op.output("out", answers, KafkaSink([bootstrap], out))
    run_main(flow)
    report(count)


def faust(bootstrap: str, topic: str, out: str, count: int) -> None:
    """At least once, JSON, its defaults."""
    import faust as engine  # type: ignore[import-not-found]

    app = engine.App(f"{out}-faust", broker=f"kafka://{bootstrap}", store="memory://", web_enabled=False)
    source, sink = app.topic(topic, value_type=bytes, value_serializer="json"), app.topic(out, value_serializer="json")

    @app.agent(source)  # type: ignore[untyped-decorator]
    async def agent(stream: Any) -> None:
        done, pending = 0, []
        async for event in stream:
            pending.append(await sink.send(value=enrich(event)))
            done += 1
            if done == count:
                for sent in pending:
                    await sent
                report(count)
                sys.stdout.flush()
                import os

                os._exit(0)  # its worker takes half a minute to leave

    engine.Worker(app, loglevel="ERROR", redirect_stdouts=False).execute_from_commandline()


if __name__ == "__main__":
    name, bootstrap, topic, out, count = sys.argv[1:]
    {"quix": quix, "bytewax": bytewax, "faust": faust}[name](bootstrap, topic, out, int(count))
