"""Every byte of a snapshot is checked, no code runs in reading it, and older formats are read for ever."""

from __future__ import annotations

import ctypes
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from streamcl import snapshot
from streamcl.checkpoint import Store
from streamcl.protocols import State
from streamcl.snapshot import ARRAYS, MANIFEST, REST, CheckpointError, difference, environment
from streamcl.state import digest
from tests.test_checkpoint import newest_version, saved

GOLDEN = Path(__file__).parent / "data" / "checkpoint-format-1"
GOLDEN_DIGEST = "494f00139fd387117bfafdd605dfccfbc02022cf40928744878f99ef7fbf45ef"


def damages(data: bytes) -> Iterator[bytes]:
    for i in range(len(data)):
        yield data[:i]
        yield data[:i] + bytes([data[i] ^ (1 << i % 8)]) + data[i + 1 :]
    yield data + b" "


@pytest.mark.parametrize("file", [ARRAYS, REST, MANIFEST])
def test_any_byte_lost_or_flipped_falls_back_to_the_snapshot_before(tmp_path: Path, file: str) -> None:
    saved(tmp_path, 2)
    path = tmp_path / "0000000002-100" / file
    for data in damages(path.read_bytes()):
        path.write_bytes(data)
        store = Store(tmp_path)
        loaded = store.newest()
        assert loaded is not None
        assert loaded.state["version"] == 0
        assert [name for name, _ in store.damaged] == ["0000000002-100"]


@pytest.mark.parametrize("file", [ARRAYS, REST, MANIFEST])
def test_a_missing_file_is_damage_that_is_logged_once_with_folder_and_cause(
    tmp_path: Path, file: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 2)
    (tmp_path / "0000000002-100" / file).unlink()
    store = Store(tmp_path)
    with caplog.at_level(logging.WARNING):
        store.newest()
        store.newest()
    assert len(caplog.messages) == len(store.damaged) == 1
    assert "0000000002-100" in caplog.messages[0]
    assert file in caplog.messages[0]


def test_files_swapped_between_snapshots_are_damage(tmp_path: Path) -> None:
    saved(tmp_path, 2)
    shutil.copy(tmp_path / "0000000001-0" / ARRAYS, tmp_path / "0000000002-100" / ARRAYS)
    assert newest_version(tmp_path) == 0


def test_a_pickle_is_neither_saved_nor_loaded_unless_trusted(tmp_path: Path) -> None:
    tree = {"learner": {"pickle": np.zeros(3, np.uint8)}}
    with pytest.raises(CheckpointError, match=r"pickle at /learner/pickle: set trust_pickle"):
        Store(tmp_path).save(tree, {})
    Store(tmp_path, trust_pickle=True).save(tree, {})
    with pytest.raises(CheckpointError, match=r"pickle at /learner/pickle: set trust_pickle"):
        Store(tmp_path).newest()
    assert Store(tmp_path, trust_pickle=True).newest() is not None


def save_as(folder: Path, version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "FORMAT", version)
        Store(folder).save({"weight": torch.ones(2)}, {"topic": "clicks"})


def test_arrays_of_ever_new_lengths_leave_nothing_behind(tmp_path: Path) -> None:
    """Types that ctypes makes of a length stay for good."""
    store = Store(tmp_path, retain=1)
    before = len(ctypes.Array.__subclasses__())
    for length in range(3000, 3050):
        state = {"tickets": torch.arange(length), "scores": np.arange(length, dtype=np.float32)}
        store.save(state, {})
        found = store.newest()
        assert found is not None
        assert digest(found.state) == digest(state)
    assert len(ctypes.Array.__subclasses__()) == before


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (2, 3)])
def test_every_kind_and_shape_of_array_comes_back(tmp_path: Path, kind: torch.dtype, shape: tuple[int, ...]) -> None:
    state = {"a": torch.ones(shape, dtype=kind), "b": torch.zeros(shape, dtype=kind)}
    store = Store(tmp_path)
    store.save(state, {})
    found = store.newest()
    assert found is not None
    assert digest(found.state) == digest(state)


def test_a_migration_brings_an_older_format_to_the_present_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(old: State, manifest: dict[str, Any]) -> tuple[State, dict[str, Any]]:
        return {"w": old["weight"]}, {"url": manifest["topic"]}

    save_as(tmp_path, 0, monkeypatch)
    loaded = Store(tmp_path, migrations={0: rename} | snapshot.MIGRATIONS).newest()
    assert loaded is not None
    assert torch.equal(loaded.state["w"], torch.ones(2))
    assert loaded.manifest == {"url": "clicks"}
    assert loaded.snapshot.format == 0


def test_migrations_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stamp(version: int) -> snapshot.Migration:
        return lambda old, manifest: (old | {"seen": [*old.get("seen", []), version]}, manifest)

    save_as(tmp_path, 0, monkeypatch)
    monkeypatch.setattr(snapshot, "FORMAT", 3)
    loaded = Store(tmp_path, migrations={v: stamp(v) for v in (2, 0, 1)}).newest()
    assert loaded is not None
    assert loaded.state["seen"] == [0, 1, 2]


def test_a_format_without_migration_and_a_newer_one_stop_with_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_as(tmp_path / "old", 0, monkeypatch)
    with pytest.raises(CheckpointError, match="no migration from format 0"):
        Store(tmp_path / "old").newest()
    save_as(tmp_path / "new", 4, monkeypatch)
    with pytest.raises(CheckpointError, match=r"newer streamcl \(format 4, this one reads up to 3\)"):
        Store(tmp_path / "new").newest()


def test_the_golden_checkpoint_of_format_1_loads_for_ever() -> None:
    loaded = Store(GOLDEN).newest()
    assert loaded is not None
    assert loaded.snapshot.format == 1
    assert loaded.snapshot.digest == GOLDEN_DIGEST
    assert loaded.manifest["records"] == 7
    if snapshot.FORMAT == 1:
        assert digest(loaded.state) == digest(golden()) == GOLDEN_DIGEST


def golden() -> State:
    """What stands in the golden checkpoint."""
    return {
        "learner": {
            "table": torch.linspace(-1, 1, 6).reshape(2, 3),
            "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
            "empty": torch.zeros(0, 3),
            "version": 7,
        },
        "join": {"ids": ["a", "é", "漢"], "time_s": np.array([0.1, 2.0**60]), "open": np.array([True, False])},
        "metrics": {"best": float("inf"), "last": float("nan"), "mean": 0.1, "none": None, "seen": 2**80},
        "memory": {"rows": np.arange(6, dtype=np.uint64).reshape(3, 2), "$odd/~key": {"": []}},
    }


def test_an_environment_is_equal_to_itself_and_a_difference_is_named() -> None:
    here = environment()
    assert difference(here, environment()) == []
    assert environment("fused").keys() - here.keys() == {"host"}
    assert difference({"python": "3.0"}, {"python": "3.0", "engine": "fused"}) == ["engine: eager -> fused"]
    assert {
        "engine",
        "python",
        "streamcl",
        "torch",
        "numpy",
        "numba",
        "river",
        "machine",
        "cpu",
        "threads",
    } == here.keys()
    assert difference(here, here | {"threads": 64}) == [f"threads: {here['threads']} -> 64"]
