"""Where steps are computed. No GPU is needed: fake tensors of torch's own say where they lie, and can't be asked."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from streamcl.config import Config, ConfigError
from streamcl.engine import device
from streamcl.engine.choice import Choice, engine_of
from streamcl.learner import Learner
from streamcl.plugin import Plan, Rows, Step
from streamcl.snapshot import environment
from streamcl.state import copied
from tests.test_config import fault
from tests.test_engine_fused import KNN, LIVELY
from tests.test_learner import TASKS, config

AWAY = torch.device("lazy")
"""Stands for a GPU: fake tensors of CUDA need a driver on the way back through autograd."""
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")


def on(kind: str, engine: str = "auto", **more: Any) -> Config:
    return config(worker={"device": kind, "engine": engine}, **more)


@no_gpu
def test_a_gpu_that_is_not_there_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"worker\.device: cuda, and torch \S+ finds no CUDA device; set cpu"):
        Learner(on("cuda"))


def test_what_only_serves_needs_no_gpu() -> None:
    assert Learner(on("cuda"), serving=True).engine.device == device.CPU


def test_auto_is_the_cpu_and_its_fused_engine_until_a_gpu_has_been_measured() -> None:
    assert Learner(on("auto")).described() == {"engine": "fused"}
    assert engine_of(on("auto")) == Choice("fused")
    assert engine_of(on("auto", plasticity=[{"kind": "l2_init"}])) == Choice("eager", "plasticity.0: l2_init")


@pytest.mark.parametrize(
    ("engine", "more", "choice"),
    [
        ("auto", {}, Choice("eager")),
        ("eager", {}, Choice("eager")),
        ("fused", {}, Choice("fused")),
        ("graph", {}, Choice("graph")),
        ("graph", {"optimizer": {"kind": "adam"}}, Choice("graph")),
        ("fused", {"optimizer": {"kind": "adam"}}, Choice("eager", "optimizer.kind: adam")),
        ("graph", {"plasticity": [{"kind": "l2_init"}]}, Choice("eager", "plasticity.0: l2_init")),
    ],
    ids=str,
)
def test_on_a_gpu_auto_is_eager_and_an_engine_has_to_be_asked_for(engine: str, more: Any, choice: Choice) -> None:
    assert engine_of(on("cuda", engine, **more)) == choice


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"plugins": ["ema"]}, "plugins: ema"),
        ({"model": {"kind": "recurrent"}}, "model.kind: recurrent"),
        ({"features": {"user": {"kind": "categorical", "table": {"max_rows": 64}}}}, "features.user.table: dynamic"),
        ({"features": {"user": {"kind": "categorical", "embedding_dim": 2}}}, "features.user.embedding_dim"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_computed_on_the_cpu_alone_is_named(more: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=f"worker.device: cuda has no form of {named}"):
        Learner(on("cuda", **more))


def test_a_river_model_has_no_device() -> None:
    more = {"river": "river.linear_model:LogisticRegression", "trust_pickle": True}
    assert "worker.device: a River model computes on the CPU" in fault(worker={"device": "cuda"}, **more)


def test_an_environment_names_a_gpu_and_is_as_it_was_on_a_cpu() -> None:
    assert "device" not in environment("eager")
    assert environment("eager", "cuda")["device"] == f"cuda {torch.version.cuda}"


def fake(learner: Learner, mode: FakeTensorMode) -> None:
    """Let all that the engine holds lie on a device that is not there."""

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return mode.from_tensor(tensor).to(AWAY)

    engine, dense = learner.engine, learner.engine.dense
    with mode:
        engine.device = AWAY
        dense.flat, dense.slots = moved(dense.flat), tuple(map(moved, dense.slots))
        for name in dense.params:
            owner, _, part = name.rpartition(".")
            setattr(engine.model.get_submodule(owner), part, nn.Parameter(dense.part(dense.flat, name)))
            dense.params[name] = engine.model.get_parameter(name)
        for module in engine.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, moved(buffer))
        engine.table, engine.row_slots = moved(engine.table), tuple(map(moved, engine.row_slots))
        for name in ("slot_field", "task_weights", "gradient_norm", "class_weights"):
            if (value := getattr(engine, name)) is not None:
                setattr(engine, name, moved(value))
        for rule in learner.rules.values():
            for name in ("mean_use", "mean", "born"):
                setattr(rule, name, moved(getattr(rule, name)))
            rule._whole = rule._part(slice(None))  # type: ignore[attr-defined]
        if learner.diagnostics is not None:
            learner.diagnostics.ring = moved(learner.diagnostics.ring)


def rows(learner: Learner, n: int) -> Rows:
    slots = learner.memory.ids.shape[1]
    y, dense = torch.zeros(n, dtype=learner.engine.dtype), torch.zeros(n, learner.numbers, dtype=learner.engine.dtype)
    return Rows(torch.ones(n, slots, dtype=torch.int64), torch.ones(n, slots), dense, y)


@pytest.mark.parametrize("kind", ["logistic", "fm", "ffm", "mlp", "deepfm", "xdeepfm", "dcnv2", "autoint"])
@pytest.mark.parametrize("task", TASKS)
def test_a_step_mixes_no_devices_and_asks_its_own_one_thing(task: str, kind: str) -> None:
    deep = kind in ("mlp", "deepfm")
    weights = {"loss": {"class_weights": [1.0, 2.0]}} if task == "binary" else {}
    learner = Learner(
        config(
            task,
            model={"kind": kind, **({"hidden": [6, 5]} if deep else {})},
            worker={"engine": "eager"},
            optimizer={"kind": "adam"},
            plasticity=[LIVELY] if deep else [],
            error_memory=[{**KNN, "key": "ids"}],
            **weights,
        )
    )
    mode, asked = FakeTensorMode(), []

    def usable(norm: torch.Tensor) -> bool:
        asked.append(norm.device)
        return True

    learner.engine._usable = usable  # type: ignore[method-assign]
    fake(learner, mode)
    with mode:
        live, replay = rows(learner, 1), rows(learner, 3)
        share = torch.ones(4, dtype=learner.engine.dtype)
        step = Step(0, Plan(), live, replay, share)
        step.touched = torch.ones(1, dtype=torch.int64)  # on the host: a fake has no content to look at
        assert learner.engine.step(step)
        assert asked == [AWAY]
        assert step.losses is not None and step.losses.device == AWAY
        if learner.diagnostics is not None:
            learner.diagnostics.observe(learner.engine.gradient_norm)
        given = [each.to(AWAY) for each in live[:3]]
        assert all(each.device == AWAY for each in learner.engine.look(*given))


def test_a_step_that_is_sent_is_the_same_step() -> None:
    learner = Learner(config(worker={"engine": "eager"}))
    live, replay = rows(learner, 1), rows(learner, 3)
    ids = torch.tensor([[7, 3, 3, 9]])
    step = Step(0, Plan(), live._replace(ids=ids), replay, torch.arange(4.0), columns={"hits": torch.arange(3)})
    whole = step.rows
    step.send(device.CPU)
    assert step.touched.tolist() == [1, 3, 7, 9] and step.touched.dtype == torch.int64
    for mine, theirs in zip(step.rows[:4], whole[:4], strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert step.live is not None and torch.equal(step.live.ids, ids)
    assert step.replay is not None and torch.equal(step.replay.ids, replay.ids)
    assert torch.equal(step.share, torch.arange(4.0))


def test_what_a_snapshot_is_given_lies_on_the_cpu() -> None:
    with FakeTensorMode():
        assert copied(torch.zeros(3, device="lazy")).device == device.CPU


@gpu
@pytest.mark.parametrize("engine", ["eager", "graph", "fused"])
def test_a_gpu_and_the_cpu_come_to_the_same_and_take_over_from_each_other(engine: str) -> None:
    from tests.test_engine_fused import furthest, journey
    from tests.test_learner import stream

    more: dict[str, Any] = {"plasticity": [LIVELY], "error_memory": [KNN], "replay": {"per_event": 3, "capacity": 40}}
    model = {"dtype": "float64", "hidden": [6, 5]}
    cpu, cuda = (
        Learner(config(worker={"device": where, "engine": how}, model=model, **more))
        for where, how in (("cpu", "eager"), ("cuda", engine))
    )
    outcomes = stream("binary", 300)
    (said, taken), (also, as_well) = journey(cpu, outcomes), journey(cuda, outcomes, 64)
    assert taken == as_well
    assert abs(said - also).max() < 1e-5
    assert furthest(cpu, cuda) < 1e-7
    cpu.load_state_dict(cuda.state_dict())
    assert furthest(cpu, cuda) == 0.0


@gpu
def test_a_step_asks_a_gpu_one_thing() -> None:
    learner = Learner(on("cuda", "eager"))
    step = Step(0, Plan(), rows(learner, 1), None, torch.ones(1, dtype=learner.engine.dtype))
    assert learner.engine.step(step)  # libraries are loaded
    learner.engine._usable = lambda norm: norm.device.type == "cuda"  # type: ignore[method-assign]
    step = Step(1, Plan(), rows(learner, 1), None, torch.ones(1, dtype=learner.engine.dtype))
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert learner.engine.step(step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
