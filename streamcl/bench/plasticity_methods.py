"""The methods that the plasticity bench sets side by side, and how differences over seeds are told."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from streamcl.bench.options import Options
from streamcl.bench.plasticity_learner import Method
from streamcl.bench.quality import Floats, paired_p

J = TypeVar("J")
T = TypeVar("T")

BACKPROP, CONTINUAL = "backprop", "continual_backprop"


def by_name(methods: Iterable[Method]) -> dict[str, Method]:
    return {method.name: method for method in methods}


def chosen(options: Options, methods: Mapping[str, Method]) -> list[Method]:
    """All of them; with `--method` that one and the two that bars are about. Raises OptionError for an unknown one."""
    if options.method is None:
        return list(methods.values())
    wanted = {BACKPROP, CONTINUAL, options.choice("method", methods, CONTINUAL)}
    return [method for name, method in methods.items() if name in wanted]


def side_by_side(work: Callable[[J], T], jobs: Sequence[J]) -> list[T]:
    """One result for each job, in order; a thread on every core, for the kernel needs no interpreter."""
    with ThreadPoolExecutor(min(len(jobs), os.cpu_count() or 1)) as pool:
        return list(pool.map(work, jobs))


def standard_error(values: Floats) -> float:
    """Of the mean over seeds; NaN for a single one."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def compared(name: str, ours: Floats, theirs: Floats) -> dict[str, float]:
    """The paired difference over seeds, ours - theirs, with its standard error and p."""
    return {
        name: float((ours - theirs).mean()),
        f"{name}_se": standard_error(ours - theirs),
        f"{name}_p": paired_p(ours, theirs),
    }
