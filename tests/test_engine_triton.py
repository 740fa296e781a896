"""The Triton program beside the eager engine, which is the oracle: in Triton's interpreter, as here is no GPU."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamcl.engine.triton_scan import obstacle
from tests.test_engine_fused import LIVELY
from tests.test_learner import config


@pytest.mark.parametrize(
    ("kind", "rule", "hidden", "draw", "norm"),
    [
        ("mlp", "adagrad", "6-5", "3", "1e4"),
        ("deepfm", "ftrl", "6-5", "3", "1e4"),
        ("deepfm", "sgd", "7", "0", "1e4"),
        ("mlp", "sgd", "6-5", "2", "0.5"),
    ],
)
def test_the_program_comes_to_the_same_as_the_eager_engine(
    kind: str, rule: str, hidden: str, draw: str, norm: str
) -> None:
    pytest.importorskip("triton", reason="Triton comes with torch for CUDA alone")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.interpreted", kind, rule, hidden, draw, norm],
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert not done.returncode, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"model": {"kind": "dcnv2"}}, "model.kind: dcnv2"),
        ({"model": {"hidden": [4, 4, 4]}}, "model.hidden: 3 layers"),
        ({"optimizer": {"kind": "adam"}}, "optimizer.kind: adam"),
        ({"loss": {"class_weights": [1.0, 2.0]}}, "loss.class_weights"),
        ({"loss": {"kind": "reloop"}}, "loss.kind: reloop"),
        ({"plasticity": [{**LIVELY, "utility": "adaptable"}]}, "plasticity.0.utility: adaptable"),
        ({"plasticity": [{"kind": "l2_init"}]}, "plasticity.0: l2_init"),
        ({"plugins": ["ema"]}, "plugins: ema"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_has_no_form_in_the_program_is_named(more: dict[str, Any], named: str) -> None:
    assert obstacle(config(**more)) == named


def test_other_tasks_are_named() -> None:
    assert obstacle(config("multiclass")) == "task: multiclass"
