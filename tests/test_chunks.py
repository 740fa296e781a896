"""Large arrays are shared between snapshots; nothing that a snapshot names is ever deleted, or rotten unseen."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamcl import checkpoint, chunks
from streamcl.checkpoint import Damaged, Store
from streamcl.state import digest


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 64 bytes, for arrays of 128 or more."""
    monkeypatch.setattr(checkpoint, "CHUNKED_BYTES", 128)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64)


def state(rows: int = 40) -> dict[str, Any]:
    return {"table": torch.arange(float(rows)), "small": torch.ones(2), "n": 1}


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "chunks").iterdir()}


def test_what_has_not_changed_is_not_written_again(tmp_path: Path) -> None:
    store, learned = Store(tmp_path), state()
    first = store.save(learned, {})
    assert len(files(tmp_path)) == 3  # 160 bytes
    learned["table"][0] = 7.0
    second = store.save(learned, {})
    assert len(files(tmp_path)) == 4
    assert first.size_bytes == pytest.approx(second.size_bytes, abs=20)
    assert first.written_bytes - second.written_bytes == pytest.approx(96, abs=20)
    for name, value in ((first.name, 0.0), (second.name, 7.0)):
        assert store.load(name).state["table"][0] == value


def test_retention_deletes_the_chunks_that_nobody_names(tmp_path: Path) -> None:
    store, learned = Store(tmp_path, retain=1), state()
    for number in range(4):
        learned["table"][0] = float(number)
        store.save(learned, {})
    assert len(files(tmp_path)) == 3
    (tmp_path / "chunks" / ".left-by-a-death").write_bytes(b"half")
    store.save(learned, {})
    assert len(files(tmp_path)) == 3


@pytest.mark.parametrize("damage", ["flipped", "torn", "gone"])
def test_a_damaged_chunk_is_a_damaged_snapshot_and_is_written_anew_by_the_next(tmp_path: Path, damage: str) -> None:
    learned = state()
    snapshot = Store(tmp_path).save(learned, {})
    path = sorted((tmp_path / "chunks").iterdir())[0]
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:-1] if damage == "torn" else bytes([data[0] ^ 1]) + data[1:])
    store = Store(tmp_path)
    with pytest.raises(Damaged, match="chunk"):
        store.load(snapshot.name)
    again = store.save(learned, {})
    assert digest(store.load(again.name).state) == digest(learned)


def test_chunks_come_back_in_every_dtype_and_shape(tmp_path: Path) -> None:
    kinds = (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.uint8,
        torch.bool,
    )
    learned: dict[str, Any] = {str(k): (torch.arange(200) % 2).to(k).reshape(2, 50, 2) for k in kinds}
    store = Store(tmp_path)
    name = store.save(learned, {}).name
    assert digest(store.load(name).state) == digest(learned)


CHANGES = st.tuples(st.just("change"), st.integers(0, 39))
STEPS = st.lists(CHANGES | st.tuples(st.sampled_from(["save", "die", "reopen"]), st.just(0)), max_size=25)


@settings(max_examples=60, deadline=None)
@given(STEPS, st.integers(1, 3))
def test_after_any_changes_saves_and_deaths_every_snapshot_is_whole(steps: list[tuple[str, int]], retain: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store, learned, saved = Store(Path(folder), retain), state(), {}
        for step, row in steps:
            if step == "change":
                learned["table"][row] += 1.0
            elif step == "save":
                saved[store.save(learned, {}).name] = digest(learned)
            elif step == "die":  # behind the chunks, before the manifest
                store.chunks.write({"table": learned["table"]})
                store = Store(Path(folder), retain)
            else:
                store = Store(Path(folder), retain)
        names = [snapshot.name for snapshot in store.ls()]
        assert names == sorted(saved)[-retain:]
        for name in names:
            assert digest(Store(Path(folder)).load(name).state) == saved[name]
