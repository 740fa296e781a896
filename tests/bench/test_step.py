import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from streamcl.bench import scale, step, step_plain, worker_clicks
from streamcl.bench.step_feed import Stream
from streamcl.worker import Worker


def test_the_engines_agree_on_the_stream_of_the_bench() -> None:
    found = step.agreement(150, 20, 1)
    assert all(bar.ok for bar in step._agreement_bars(found))
    assert found["replayed_alike"] and found["reset_alike"]


def test_plain_torch_learns_what_there_is_to_learn() -> None:
    stream = Stream(6_000)
    for plain in (step_plain.Torch(), step_plain.Torch(8, renewing=True)):
        hits = []
        for ids, label in zip(stream.plain, stream.y.tolist(), strict=True):
            hits.append((plain.predict(ids) > 0.5) == (label > 0.5))
            plain.learn(ids, label)
        assert np.mean(hits[-1000:]) > 0.6  # the best possible is about .7, the base rate .5


def test_numpy_by_hand_takes_the_step_that_autograd_takes() -> None:
    hand, river = step_plain.NumPy(5, 4, 2), step_plain.DeepRiver(5, 4, 2)
    x = np.arange(1.0, 6.0, dtype=np.float32)
    hand.w2[:] = np.linspace(-1.0, 1.0, 8, dtype=np.float32).reshape(2, 4)
    with torch.no_grad():
        for layer, weights, bias in ((river.net[0], hand.w1, hand.b1), (river.net[2], hand.w2, hand.b2)):
            assert isinstance(layer, nn.Linear)
            layer.weight.copy_(torch.from_numpy(weights))
            layer.bias.copy_(torch.from_numpy(bias))
    before = float(functional.cross_entropy(river.net(torch.from_numpy(x)[None]), torch.tensor([0])))
    hand.learn(x, 0)
    river.learn_one({str(i): float(value) for i, value in enumerate(x)}, 0)
    assert float(functional.cross_entropy(river.net(torch.from_numpy(x)[None]), torch.tensor([0]))) < before
    for layer, weights, bias in ((river.net[0], hand.w1, hand.b1), (river.net[2], hand.w2, hand.b2)):
        assert isinstance(layer, nn.Linear)
        np.testing.assert_allclose(layer.weight.detach().numpy(), weights, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.bias.detach().numpy(), bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", scale.KINDS)
def test_growth_is_measured_at_the_size_that_is_said(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "MEASURED", 64)
    monkeypatch.setattr(scale, "_best", lambda work, _count: (work(), 1.0)[1])
    found = dict(scale.KINDS[task]((64, 640)))
    assert list(found) == [64, 640]
    held = {"replay": "replayed", "tickets": "waiting"}.get(task)
    if held:
        assert [values[held] for values in found.values()] == [64, 640]


def test_a_worker_with_a_plain_learner_answers_and_learns_as_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = worker_clicks.Clicks(1_200)
    counts = []
    closed = Worker.close

    def watched(worker: Worker) -> None:
        counts.append(dict(worker.counts))
        closed(worker)

    monkeypatch.setattr(Worker, "close", watched)
    for engine, plain in (("eager", True), ("eager", False), ("fused", False)):
        assert stage.worker(engine, {}, 1_000, plain=plain).cpu_s > 0.0
    assert counts[0] == counts[1] == counts[2] and counts[0]["learned"] >= 1_000
    assert sum(stage.stages(1_000).values()) > 0.0
