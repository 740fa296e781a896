"""Run by `continual_avalanche` in a Python that has avalanche-lib 0.6: reads arrays, prints one line of JSON."""

from __future__ import annotations

import itertools
import json
import sys
import time
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from avalanche.benchmarks.scenarios.dataset_scenario import benchmark_from_datasets
from avalanche.benchmarks.scenarios.online import split_online_stream
from avalanche.benchmarks.utils.classification_dataset import _make_taskaware_tensor_classification_dataset
from avalanche.training.plugins import ReplayPlugin
from avalanche.training.storage_policy import ReservoirSamplingBuffer
from avalanche.training.supervised import Naive

REPLAYED = 10


def net(widths: list[int]) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [torch.nn.Linear(a, b), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def dataset(x: Any, y: Any) -> Any:
    tensors = torch.from_numpy(x), torch.from_numpy(y)
    return _make_taskaware_tensor_classification_dataset(*tensors, targets=1, task_labels=0)


def main(path: str) -> dict[str, Any]:
    with np.load(path) as found:
        course = dict(found)
    torch.set_num_threads(1)
    torch.manual_seed(int(course["seed"]))
    classes, tasks = int(course["y"].max()) + 1, int(course["segments"].max()) + 1
    model = net([course["x"].shape[1], *course["hidden"].tolist(), classes])
    capacity = int(course["capacity"])
    batch, storage = int(course["batch"]), ReservoirSamplingBuffer(capacity)
    replay = ReplayPlugin(capacity, batch_size=batch, batch_size_mem=REPLAYED, storage_policy=storage)
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=float(course["learning_rate"])),
        train_mb_size=batch,
        plugins=[replay],
        evaluator=None,
    )
    tests = torch.from_numpy(course["test_x"]), torch.from_numpy(course["test_y"]), course["test_segments"]
    parts = [np.flatnonzero(course["segments"] == task) for task in range(tasks)]
    stream = benchmark_from_datasets(train=[dataset(course["x"][part], course["y"][part]) for part in parts])
    accuracy, cpu_s, start = [look(model, *tests)], 0.0, time.perf_counter()
    for experience in stream.train_stream:
        began = time.process_time()
        for few in split_online_stream([experience], batch, shuffle=False):
            strategy.train(few, num_workers=0)  # shuffled: else the same rows are replayed
        cpu_s += time.process_time() - began
        accuracy.append(look(model, *tests))
    seconds = time.perf_counter() - start
    return {"accuracy": accuracy, "cpu_s": cpu_s, "seconds": seconds, "version": version("avalanche-lib")}


def look(model: torch.nn.Module, x: Any, y: Any, segments: Any) -> list[float]:
    """Share of right answers by task."""
    model.eval()
    with torch.inference_mode():
        hits = (model(x).argmax(1) == y).numpy()
    model.train()
    return [float(hits[segments == task].mean()) for task in range(int(segments.max()) + 1)]


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
