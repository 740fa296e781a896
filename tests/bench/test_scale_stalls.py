"""What a save costs the turns beside it is told apart from turns with nothing to save."""

import pytest

from streamcl.bench import scale_stalls


def test_turns_beside_a_save_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_stalls, "STEADY", 14)
    found = scale_stalls.turns(buckets=2_000, events=40_000)
    assert len(found.saves) == scale_stalls.SAVES
    assert found.saving and len(found.steady) > 14
    assert found.state_bytes == 2 * 4 * 16 * 12 * 2_001
