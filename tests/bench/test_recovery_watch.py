"""Broken disks, broken networks and poison: how they are brought about, and what is seen of a worker meanwhile."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from streamcl.bench import recovery, recovery_broker, recovery_disk, recovery_poison
from streamcl.bench.brokers import Broker
from streamcl.bench.options import OptionError, Options
from streamcl.bench.proxy import Proxy
from streamcl.bench.recovery_chaos import Broken
from streamcl.bench.recovery_poison import Pair
from streamcl.bench.recovery_traffic import inline
from streamcl.bench.recovery_verifier import learned_hash
from streamcl.bench.recovery_watch import POSITION, Sample, Watch, free_port, scrape
from streamcl.bench.report import Report, Row
from streamcl.progress import Progress
from streamcl.records import Origin


def _sample(at_s: float, *positions: float) -> Sample:
    return Sample(at_s, {f'{POSITION}{{input="events",partition="{i}"}}': p for i, p in enumerate(positions)})


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Of a worker that does not answer; tests write the samples."""
    found = Watch(free_port())
    yield found
    found.close()


def test_a_metric_is_summed_over_its_labels_and_no_other_name() -> None:
    metrics: Mapping[str, float] = {'a{x="1"}': 1.0, 'a{x="2"}': 2.0, "ab": 4.0}
    assert Sample(0.0, metrics).total("a") == 3.0
    assert Sample(0.0, metrics).total("none") == 0.0


def test_a_worker_that_repeats_records_makes_no_progress(watch: Watch) -> None:
    watch.samples[:] = [_sample(0, 5, 5), _sample(1, 6, 5), _sample(2, 2, 0), _sample(7, 6, 5), _sample(8, 6, 6)]
    assert watch.furthest() == 12
    assert watch.furthest(2.0) == 11
    assert watch.still_s(0.0, 9.0) == 7.0


def test_a_worker_that_stands_still_to_the_end_has_stood_still_until_then(watch: Watch) -> None:
    watch.samples[:] = [_sample(0, 5), _sample(1, 6), _sample(2, 6)]
    assert watch.still_s(0.0, 10.0) == 9.0


def test_nobody_answers_on_a_free_port() -> None:
    assert scrape(free_port(), 0.5) == {}


def test_the_slowest_recovery_is_looked_for_among_the_rows_of_its_method() -> None:
    rows = [Row("a: x", {"recovers_s": 1.0}), Row("a: y", {"recovers_s": 3.0}), Row("b: x", {"recovers_s": 9.0})]
    assert recovery_broker._slowest([*rows, Row("a: in all", {"events": 7})], "a") == 3.0


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection, contextlib.suppress(ConnectionResetError):
                    while data := connection.recv(100):
                        connection.sendall(data)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


def _say(client: socket.socket) -> bytes:
    client.sendall(b"x")
    return client.recv(1)


def test_a_proxy_cuts_and_refuses_and_lets_through_again(echo: int) -> None:
    with Proxy(free_port(), echo) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10.0) as client:
            assert _say(client) == b"x"
            proxy.set("stall")
            client.settimeout(0.3)
            with pytest.raises(TimeoutError):
                _say(client)
            proxy.set("ok")
            client.settimeout(10.0)
            assert client.recv(1) == b"x"
            proxy.reset()
            with pytest.raises(ConnectionError):
                assert _say(client)  # an end without RST reads as b""
                raise AssertionError
        proxy.set("refuse")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", proxy.port), timeout=10.0)


def test_a_slow_network_delays_each_way(echo: int) -> None:
    with (
        Proxy(free_port(), echo, delay_s=0.1) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10.0) as client,
    ):
        _say(client)
        proxy.set("delay")
        began = time.monotonic()
        assert _say(client) == b"x"
        assert time.monotonic() - began >= 0.2


def test_a_folder_that_is_gone_can_not_be_made_until_it_may(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "snapshot").touch()
    with recovery_disk._gone(checkpoints), pytest.raises(NotADirectoryError):
        (checkpoints / "shard").mkdir()
    checkpoints.mkdir()
    assert not list(checkpoints.iterdir())


def test_a_full_disk_takes_nothing_and_is_empty_again(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with recovery_disk._small_disk(disk) as mounted:
        if not mounted:
            pytest.skip("mounting a tmpfs needs root")
        with recovery_disk._full(disk), pytest.raises(OSError, match="No space left"):
            (disk / "more").write_bytes(b"x" * 8192)
        (disk / "more").write_bytes(b"x" * 8192)
    assert not list(disk.iterdir())


def test_a_worker_that_leaves_by_itself_is_a_bar_that_was_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks_off(_: Options) -> Report:
        raise Broken("life-3.err: left with 1: why")

    monkeypatch.setitem(recovery.TASKS, "disk", (breaks_off, set()))
    report = recovery.run(Options(task="disk"))
    assert report.exit_code == 1
    assert report.notes == ["life-3.err: left with 1: why"]


@pytest.mark.parametrize(("task", "options"), [("broker", {"via": "kafka://x"}), ("disk", {"kills": 3})])
def test_a_task_refuses_an_option_that_it_would_ignore(task: str, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"recovery --task {task} has no use for it"):
        recovery.run(Options(task=task, **options))


def test_damage_is_one_bit(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(9))
    recovery_disk._flip_a_bit(tmp_path / "f")
    assert sum(byte.bit_count() for byte in (tmp_path / "f").read_bytes()) == 1


def test_batches_are_poisoned_and_clean_in_turn_and_hold_equally_many_good_events() -> None:
    records = inline(0, 1500, 2, 1000.0)
    batches = list(recovery_poison._batches(records, 300))
    assert [sum(not record.bad for record in batch) for batch in batches] == [300] * 5
    assert [any(record.bad for record in batch) for batch in batches] == [True, False, True, False, True]
    values = [record.value for batch in batches for record in batch if not record.bad]
    assert values == [record.value for record in records if not record.bad]


def test_the_ratio_is_that_of_the_medians() -> None:
    pairs = [Pair(100, 90, 1, 1), Pair(200, 110, 1, 1), Pair(110, 100, 1, 1)]
    assert recovery_poison._ratio(pairs) == pytest.approx(100 / 110)


def test_the_verifier_adds_up_what_the_worker_says_it_has_learned() -> None:
    progress, origins = Progress(), [Origin("events", 1, 2), Origin("events", 0, 7)]
    for origin in origins:
        progress.learn([origin])
    assert progress.state_dict()["learned"] == learned_hash(map(str, origins))
    assert progress.state_dict()["learned"] != learned_hash([str(origins[0])])


def test_poison_ends_in_the_dead_letters_and_all_good_events_are_learned(broker: Broker) -> None:
    options = Options(quick=True, via=broker.url, method="at_least_once", events=1000)
    report = recovery_poison.run(options)
    # How fast, a busy machine may decide; and so few events hold few bad ones.
    failed = {bar.name for bar in report.bars if not bar.ok}
    assert failed <= {"at_least_once: rate of good events, poisoned to clean", "at_least_once: bad records"}
    [row] = report.rows
    assert row.values["dead_letters"] == row.values["bad"]
    assert row.values["learned"] == row.values["events"] == 1250
