import sys

import pytest

from streamcl.bench import peer_python
from streamcl.bench.peer_python import PYTHON, PeerError


def test_without_a_python_there_are_no_peers_and_the_error_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(PYTHON, "/nowhere/python")
    assert peer_python.interpreter() is None
    assert peer_python.versions("numpy") == {}
    with pytest.raises(PeerError, match=r"passthrough\.py: no Python to run it: `make peers`"):
        peer_python.answer("passthrough.py", "quix")


def test_versions_are_known_of_all_packages_or_of_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)
    assert peer_python.versions("numpy", "torch").keys() == {"numpy", "torch"}
    assert peer_python.versions("numpy", "no-such-package") == {}


def test_a_peer_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PYTHON, sys.executable)
    with pytest.raises(
        PeerError, match=r"(?s)passthrough\.py nobody host topic out 1 left with 1: .*KeyError: 'nobody'"
    ):
        peer_python.answer("passthrough.py", "nobody", "host", "topic", "out", 1)
