"""The Triton program in Triton's interpreter, beside the eager engine; for a process of its own.

The interpreter has to be chosen before anything imports Triton, and then holds for all of the process.
"""

import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter

from streamcl.engine.triton_scan import TritonScan
from tests.test_engine_fused import KNN, LIVELY, furthest, journey
from tests.test_engine_graph import engines
from tests.test_learner import stream

_patched: set[int] = set()


def _call(self: Any, *args: Any, **more: Any) -> Any:
    """Its own version patches all of `triton.language` at each call of a function by another: ten milliseconds."""
    if id(self.fn.__globals__) not in _patched:
        _patched.add(id(self.fn.__globals__))
        interpreter._patch_lang(self.fn)
    return self.rewrite()(*args, **more)


interpreter.InterpretedFunction.__call__ = _call


def agree(kind: str, rule: str, hidden: str, draw: str, norm: str) -> None:
    """Both engines come to the same with replay, resets and an error memory."""
    widths = [int(width) for width in hidden.split("-")]
    eager, scanned = engines(
        TritonScan,
        model={"kind": kind, "hidden": widths},
        optimizer={
            "kind": rule,
            "learning_rate": 0.05,
            "l2": 1e-3,
            "l1": 1e-3,
            "max_grad_norm": float(norm),
        },
        replay={"retention": "reservoir", "per_event": int(draw), "capacity": 40},
        plasticity=[LIVELY],
        error_memory=[KNN],
        diagnostics={"sample_every_steps": 3, "window": 20, "report_every_steps": 50},
    )
    outcomes = stream("binary", 200)
    (said, taken), (also, as_well) = journey(eager, outcomes), journey(scanned, outcomes, 64)
    assert taken == as_well
    assert (float(norm) > 100.0) == all(taken), sum(taken)
    assert abs(said - also).max() < 1e-6  # served in float32
    replaced = [each.rules["continual_backprop"].replaced for each in (eager, scanned)]  # type: ignore[attr-defined]
    assert replaced[0] == replaced[1], replaced
    assert sum(replaced[0]) > 10 or not all(taken), replaced
    apart = furthest(eager, scanned)
    assert apart < 1e-7, apart


if __name__ == "__main__":
    agree(*sys.argv[1:])
