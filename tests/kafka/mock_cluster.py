"""librdkafka's mock cluster, whose brokers answer with the errors they are told to: a child process, by ctypes.

Its API is experimental, so it is used for tests only and dies with its process. It knows no topics' configuration and
can't make topics on request: make them here.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Request by its key in the protocol.
REQUESTS = {
    "Produce": 0,
    "Fetch": 1,
    "ListOffsets": 2,
    "Metadata": 3,
    "OffsetCommit": 8,
    "FindCoordinator": 10,
    "JoinGroup": 11,
    "Heartbeat": 12,
    "SyncGroup": 14,
    "InitProducerId": 22,
    "AddPartitionsToTxn": 24,
    "EndTxn": 26,
}


def library() -> Path | None:
    """The librdkafka that comes with confluent-kafka's wheel."""
    spec = find_spec("confluent_kafka")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parents[1] / "confluent_kafka.libs"
    return next(iter(sorted(folder.glob("librdkafka-*.so*"))), None)


class MockCluster:
    """One broker. What it is asked for comes back only when it has been done."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.kafka.mock_cluster"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # that it has no brokers of its own
            text=True,
        )
        self.bootstrap = self._ask(do="start")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.communicate()

    def create_topic(self, name: str, partitions: int = 1) -> None:
        self._ask(do="topic", name=name, partitions=partitions)

    def push(self, request: str, code: int) -> None:
        """The next request of this kind is answered with this error."""
        self._ask(do="push", key=REQUESTS[request], code=code)

    def push_partition(self, request: str, code: int, topic: str) -> None:
        """The same in the part of the answer that is about partition 0 of `topic`."""
        self._ask(do="push_partition", key=REQUESTS[request], code=code, topic=topic)

    def set_topic(self, code: int, topic: str) -> None:
        """Metadata says this about the topic, until 0 is set."""
        self._ask(do="set_topic", code=code, topic=topic)

    def pending(self, request: str) -> int:
        """How many pushed errors nobody has met yet; forgets them."""
        found: int = self._ask(do="pending", key=REQUESTS[request])
        return found

    def _ask(self, **order: Any) -> Any:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        with self._lock:
            self._child.stdin.write(json.dumps(order) + "\n")
            self._child.stdin.flush()
            return json.loads(self._child.stdout.readline())


class _Library:
    """The few functions that are needed; every handle is a pointer, so that none is cut to 32 bits."""

    def __init__(self, path: Path) -> None:
        self._loaded = ctypes.CDLL(str(path))
        pointer, text, number = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
        configuration = self._call("conf_new", pointer)
        handle = self._call("new", pointer, (number, 0), (pointer, configuration), (pointer, None), (number, 0))
        self._mock = self._call("mock_cluster_new", pointer, (pointer, handle), (number, 1))
        delay_ms = (ctypes.c_int32, 100)
        self._call("mock_group_initial_rebalance_delay_ms", None, (pointer, self._mock), delay_ms)
        self.bootstrap = str(self._call("mock_cluster_bootstraps", text, (pointer, self._mock)).decode())

    def create_topic(self, name: str, partitions: int) -> None:
        arguments = (ctypes.c_char_p, name.encode()), (ctypes.c_int, partitions), (ctypes.c_int, 1)
        self._call("mock_topic_create", ctypes.c_int, (ctypes.c_void_p, self._mock), *arguments)

    def push(self, key: int, code: int) -> None:
        no_delay_ms = 0
        arguments = (ctypes.c_size_t, 1), (ctypes.c_int, code), (ctypes.c_int, no_delay_ms)
        self._on_broker("push_request_error_rtts", ctypes.c_int, (ctypes.c_int16, key), *arguments)

    def push_partition(self, key: int, code: int, topic: str) -> None:
        where = (ctypes.c_char_p, topic.encode()), (ctypes.c_int32, 0), (ctypes.c_int16, key)
        error = (ctypes.c_size_t, 1), (ctypes.c_int, code)
        self._call("mock_partition_push_request_errors", ctypes.c_int, (ctypes.c_void_p, self._mock), *where, *error)

    def set_topic(self, code: int, topic: str) -> None:
        arguments = (ctypes.c_char_p, topic.encode()), (ctypes.c_int, code)
        self._call("mock_topic_set_error", None, (ctypes.c_void_p, self._mock), *arguments)

    def pending(self, key: int) -> int:
        count = ctypes.c_size_t()
        pointer = ctypes.c_void_p, ctypes.addressof(count)
        self._on_broker("error_stack_cnt", ctypes.c_int, (ctypes.c_int16, key), pointer)
        self._call("mock_clear_request_errors", None, (ctypes.c_void_p, self._mock), (ctypes.c_int16, key))
        return count.value

    def _on_broker(self, name: str, result: Any, *arguments: tuple[Any, Any]) -> Any:
        broker = (ctypes.c_void_p, self._mock), (ctypes.c_int32, 1)
        return self._call(f"mock_broker_{name}", result, *broker, *arguments)

    def _call(self, name: str, result: Any, *arguments: tuple[Any, Any]) -> Any:
        function = getattr(self._loaded, f"rd_kafka_{name}")
        function.restype, function.argtypes = result, [kind for kind, _ in arguments]
        return function(*(value for _, value in arguments))


def _serve() -> None:
    path = library()
    assert path is not None
    mock = _Library(path)
    for line in sys.stdin:
        order = json.loads(line)
        answer: Any = mock.bootstrap
        match order["do"]:
            case "topic":
                mock.create_topic(order["name"], order["partitions"])
            case "push":
                mock.push(order["key"], order["code"])
            case "push_partition":
                mock.push_partition(order["key"], order["code"], order["topic"])
            case "set_topic":
                mock.set_topic(order["code"], order["topic"])
            case "pending":
                answer = mock.pending(order["key"])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        _serve()
