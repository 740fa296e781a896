import time

import pytest
import torch

from streamcl.bench import step, step_device
from streamcl.bench.options import OptionError, Options

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@no_gpu
def test_without_a_gpu_the_bench_says_so() -> None:
    with pytest.raises(OptionError, match=r"--device: cuda, and torch .* finds no CUDA device"):
        step.run(Options(device="cuda"))


def test_on_a_gpu_all_is_run_at_once() -> None:
    with pytest.raises(OptionError, match="--task: on a GPU all is run at once"):
        step.run(Options(device="cuda", task="speed"))


def test_every_shape_has_a_row_and_what_was_left_out_says_why() -> None:
    soon = time.perf_counter() + 600.0
    found = dict(step_device.speeds("cpu", soon, 0.01, {}, (0, 2), (8,), ("eager", "graph")))
    assert set(found) == {(engine, replay, 8) for engine in ("eager", "graph", "cpu") for replay in (0, 2)}
    assert all(found[engine, replay, 8]["steps_per_s"] > 0.0 for engine in ("eager", "cpu") for replay in (0, 2))
    assert "worker.engine: graph" in found["graph", 0, 8]["left_out"]
    late = dict(step_device.speeds("cpu", 0.0, 0.01, {}, (0,), (8,), ("eager",)))
    assert all(told == {"left_out": "no time"} for told in late.values())


def test_the_oracle_of_the_agreement_agrees_with_the_eager_engine() -> None:
    found = step_device.agreement("eager", 60, "cpu")
    assert max(found["weights"], found["rows"], found["scores"]) < step_device.LIMIT and found["reset_alike"]
