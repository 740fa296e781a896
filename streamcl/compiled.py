"""How loops are compiled, and where the machine code is kept, so that only the first start on a machine waits for it.

It lies beside the source, or, where that can't be written, in the user's cache folder, or in the folder that the
environment variable NUMBA_CACHE_DIR names. A file of another CPU, version or source is not taken. Where nothing can be
written everything is compiled anew at each start (half a minute for the fused engine).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

import numba

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def _probe() -> None:
    """Is never called."""


def _keeps() -> bool:
    try:
        numba.njit(cache=True)(_probe)
    except RuntimeError:  # numba's word for: there is no place
        log.warning("compiled code can't be kept anywhere; set NUMBA_CACHE_DIR to a folder that can be written")
        return False
    return True


KEPT = _keeps()
_njit: Callable[..., Any] = numba.njit  # its own types leave out two options
_common = {"cache": KEPT, "nogil": True, "error_model": "numpy"}
_inner = {**_common, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

entry: Callable[[F], F] = _njit(**_common)
"""What Python calls."""
exact: Callable[[F], F] = _njit(**_inner)
"""What compiled code calls: the operations that are written, in their order."""
fast: Callable[[F], F] = _njit(**_inner, fastmath={"reassoc", "contract", "nsz", "arcp", "afn"})
"""The same, sums in any order and roots in quotients refined estimates; NaN and infinity keep their meaning."""
