import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import logging
logging.basicConfig(level=logging.WARNING)
from streamcl.compiled import entry, exact

@exact
def inner(x):
    return 3 * x

@entry
def outer(x):
    return inner(x) + 1

print(outer(2))
"""


def answers(folder: Path) -> tuple[str, str]:
    """What a fresh process says, and logs."""
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder / "kept"), "PYTHONPATH": str(Path.cwd())}
    done = subprocess.run(
        [sys.executable, folder / "module.py"], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip(), done.stderr


def test_kept_code_is_stale_once_what_it_calls_has_changed(tmp_path: Path) -> None:
    inner, outer = MODULE.split("@entry")
    called = inner.replace("entry, ", "")
    caller = "from streamcl.compiled import entry\nfrom called import inner\n\n@entry" + outer
    (tmp_path / "module.py").write_text(caller)
    for factor, said in ((3, "7"), (5, "11")):
        (tmp_path / "called.py").write_text(called.replace("3 * x", f"{factor} * x"))
        assert answers(tmp_path) == (said, "")


@pytest.mark.parametrize("kind", ["nbi", "nbc"])
@pytest.mark.parametrize("size", [0, 40])
def test_kept_code_that_was_cut_off_is_made_anew_once(tmp_path: Path, kind: str, size: int) -> None:
    (tmp_path / "module.py").write_text(MODULE)
    assert answers(tmp_path) == ("7", "")
    files = sorted((tmp_path / "kept").rglob(f"*.{kind}"))
    assert len(files) >= 2
    for file in files:
        file.write_bytes(file.read_bytes()[:size])
    said, logged = answers(tmp_path)
    assert said == "7" and "outer can't be read" in logged
    assert answers(tmp_path) == ("7", "")
