"""The draws of `streamcl.random` for compiled code, number by number the same."""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)
SPREAD = math.sqrt((65_536.0**2 - 1.0) / 3.0)  # standard deviation of a sum of four 16-bit numbers


@numba.njit(cache=True, nogil=True)
def mixed(z: Any) -> Any:
    """The finaliser of SplitMix64."""
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    return z ^ (z >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def uniform(base: Any, place: int) -> float:
    """Element `place` of `streamcl.random.uniform_array`; `base` is its mixed key."""
    z = mixed(base + np.uint64(place + 1) * GOLDEN)
    return (np.float64(z >> np.uint64(12)) + 0.5) * 2.0**-52


@numba.njit(cache=True, nogil=True)
def noise(base: Any, place: int) -> float:
    """Element `place` of `streamcl.random.noise_array`; `base` is its mixed key and step."""
    z = mixed(base + np.uint64(place + 1) * GOLDEN)
    low = np.uint64(0xFFFF)
    fields = (z & low) + ((z >> np.uint64(16)) & low) + ((z >> np.uint64(32)) & low) + (z >> np.uint64(48))
    return (np.float64(np.int64(fields)) - 131_070.0) / SPREAD
