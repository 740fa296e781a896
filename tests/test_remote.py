"""A shard goes on where its machine is gone: from the copy of its snapshots in an object store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from streamcl import snapshot
from streamcl.checkpoint import Store
from streamcl.config import ConfigError
from streamcl.protocols import Fenced
from streamcl.recovery import Keeper, store_of
from streamcl.remote import Remote
from streamcl.snapshot import CheckpointError
from streamcl.worker import build
from tests.journey import die_after, fill, finish, repeat, settings
from tests.test_recovery import STREAM


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place for snapshots, with chunks for every array of some size."""
    monkeypatch.setattr(snapshot, "CHUNKED_BYTES", 64)
    yield "memory://bucket/shop" if request.param == "memory" else (tmp_path / "bucket").as_uri()
    if request.param == "memory":
        fsspec.filesystem("memory").rm("/bucket", recursive=True)


def test_a_lost_disk_is_no_lost_state(tmp_path: Path, url: str) -> None:
    fill(STREAM)
    config = settings(tmp_path, checkpoint={"folder": str(tmp_path / "disk"), "every_events": 7, "remote": url})
    die_after(config, 9)
    shutil.rmtree(tmp_path / "disk")
    assert finish(config).digest == repeat(config).digest


def test_the_newest_of_both_places_is_taken(tmp_path: Path, url: str) -> None:
    here, there = (Store(tmp_path / name, remote=Remote(url)) for name in ("here", "there"))
    here.save({"n": 1}, {})
    loaded = there.newest()
    assert loaded is not None
    assert loaded.state == {"n": 1}
    there.save({"n": 2}, {})
    there.save({"n": 3}, {})
    loaded = here.newest()
    assert loaded is not None
    assert (loaded.state, loaded.snapshot.name) == ({"n": 3}, "0000000003-0")


def test_chunks_travel_once_and_leave_with_the_last_snapshot_that_names_them(tmp_path: Path, url: str) -> None:
    store = Store(tmp_path / "here", retain=2, remote=Remote(url))
    files, root = fsspec.core.url_to_fs(url)
    table = torch.arange(40.0)
    for number in range(5):
        table[0] = float(number)
        store.save({"table": table}, {})
    assert len(files.ls(f"{root}/chunks")) == 2
    assert len(files.ls(root)) == 3  # two snapshots, and the folder of the chunks
    loaded = Store(tmp_path / "there", remote=Remote(url)).newest()
    assert loaded is not None
    assert torch.equal(loaded.state["table"], table)


def test_a_copy_without_its_manifest_is_none(tmp_path: Path, url: str) -> None:
    store = Store(tmp_path / "here", remote=Remote(url))
    store.save({"n": 1}, {})
    name = store.save({"n": 2}, {}).name
    files, root = fsspec.core.url_to_fs(url)
    files.rm_file(f"{root}/{name}/manifest.json")  # as if it had died before that
    loaded = Store(tmp_path / "there", remote=Remote(url)).newest()
    assert loaded is not None
    assert loaded.state == {"n": 1}


def test_a_worker_whose_shard_was_taken_over_on_another_machine_writes_nothing_more(tmp_path: Path, url: str) -> None:
    fill(STREAM)
    keepers = []
    for machine in ("a", "b"):
        place = {"folder": str(tmp_path / machine), "every_events": 7, "remote": url}
        config = settings(tmp_path, checkpoint=place)
        keepers.append(Keeper(build(config), store_of(config), beside=False, lease_s=0))
        keepers[-1].restore()
    with pytest.raises(Fenced):
        keepers[0].save()
    keepers[1].save()


def test_a_store_that_can_t_be_written_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "bucket").write_text("a file, no folder")
    store = Store(tmp_path / "here", remote=Remote((tmp_path / "bucket").as_uri()))
    with pytest.raises(CheckpointError, match="bucket"):
        store.save({"n": 1}, {})


def test_a_copy_that_a_death_left_half_there_is_completed_by_the_next(tmp_path: Path, url: str) -> None:
    """A folder's file, unlike an object, may be torn."""
    store = Store(tmp_path / "here", remote=Remote(url))
    table = torch.arange(40.0)
    store.save({"t": table}, {})
    files, root = fsspec.core.url_to_fs(url)
    (chunk,) = files.ls(f"{root}/chunks", detail=False)
    files.pipe_file(chunk, files.cat_file(chunk)[:9])
    store.save({"t": table}, {})
    loaded = Store(tmp_path / "there", remote=Remote(url)).newest()
    assert loaded is not None
    assert loaded.snapshot.name == "0000000002-0"


def test_incomplete_copies_count_for_nothing_in_retention(tmp_path: Path, url: str) -> None:
    store = Store(tmp_path / "here", retain=2, remote=Remote(url))
    files, root = fsspec.core.url_to_fs(url)
    store.save({"n": 1}, {})
    for number in (2, 3, 4):
        files.rm_file(f"{root}/{store.save({'n': number}, {}).name}/manifest.json")
    store.save({"n": 5}, {})
    assert Remote(url).names() == ["0000000005-0", "0000000001-0"]
    assert len([path for path in files.ls(root, detail=False) if path.rpartition("/")[2].startswith("0")]) == 2


def test_a_damaged_newest_copy_is_passed_over_and_a_torn_chunk_is_fetched_again(tmp_path: Path, url: str) -> None:
    store, table = Store(tmp_path / "here", remote=Remote(url)), torch.arange(40.0)
    store.save({"table": table}, {})
    newest = store.save({"table": table + 1.0}, {}).name
    files, root = fsspec.core.url_to_fs(url)
    files.pipe_file(f"{root}/{newest}/state.json", b"{")
    for chunk in (tmp_path / "here" / "chunks").iterdir():  # as if an earlier fetch had died in the middle
        (tmp_path / "there" / "chunks").mkdir(parents=True, exist_ok=True)
        (tmp_path / "there" / "chunks" / chunk.name).write_bytes(b"torn")
    there = Store(tmp_path / "there", remote=Remote(url))
    loaded = there.newest()
    assert loaded is not None
    assert torch.equal(loaded.state["table"], table)
    assert [name for name, _ in there.damaged] == [newest]


def test_a_store_without_its_package_is_an_error_of_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"checkpoint\.remote: s3://bucket/.*Install s3fs"):
        store_of(settings(tmp_path, checkpoint={"folder": str(tmp_path), "remote": "s3://bucket"}))


def test_a_store_whose_client_errs_in_its_own_way_costs_a_worker_a_copy_and_nothing_else(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class ClientError(Exception):
        """No OSError."""

    def away(*_: object, **__: object) -> None:
        raise ClientError("could not connect to the endpoint")

    store = Store(tmp_path / "here", remote=Remote(url))
    files, _ = fsspec.core.url_to_fs(url)
    with monkeypatch.context() as broken:
        broken.setattr(files, "pipe_file", away)
        with pytest.raises(CheckpointError, match=f"{url}: could not connect"):
            store.save({"n": 1}, {})
    assert Store(tmp_path / "here").newest() is not None


@pytest.mark.parametrize("what", ["state.json", "manifest.json", "chunk", "half a chunk"])
def test_what_is_damaged_on_the_disk_is_mended_from_its_copy_and_kept_aside(
    tmp_path: Path, url: str, what: str
) -> None:
    store = Store(tmp_path / "here", remote=Remote(url))
    table = torch.arange(40.0)
    name = store.save({"t": table}, {}).name
    (chunk,) = (tmp_path / "here" / "chunks").iterdir()
    path = chunk if "chunk" in what else tmp_path / "here" / name / what
    path.write_bytes(path.read_bytes()[:-1] + (b"" if "half" in what else b"?"))
    reopened = Store(tmp_path / "here", remote=Remote(url))
    loaded = reopened.newest()
    assert loaded is not None
    assert loaded.snapshot.name == name
    assert torch.equal(loaded.state["t"], table)
    assert [damaged for damaged, _ in reopened.damaged] == [name]
    assert len(list((tmp_path / "here").glob(f"damaged-{name}-*"))) == 1
    assert Store(tmp_path / "here").newest() is not None


def test_what_can_t_be_mended_is_passed_over_and_its_copy_fetched_once(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "here", remote=Remote(url))
    store.save({"n": 1}, {})
    name = store.save({"n": 2}, {}).name
    (tmp_path / "here" / name / "state.json").write_bytes(b"{}")
    reader, tried = Store(tmp_path / "here", remote=Remote(url)), []

    def denied(name: str, *_: object) -> None:
        tried.append(name)
        raise PermissionError(13, "Permission denied")

    assert reader.remote is not None
    monkeypatch.setattr(reader.remote, "pull", denied)
    for _ in range(2):
        loaded = reader.newest()
        assert loaded is not None
        assert loaded.state == {"n": 1}
    assert tried == [name]
