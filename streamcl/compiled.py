"""How loops are compiled, and where the machine code is kept, so that only the first start on a machine waits for it.

It lies beside the source, or, where that can't be written, in the user's cache folder, or in the folder that the
environment variable NUMBA_CACHE_DIR names. A file of another CPU, version or source is not taken, be it the source of
something that is called, and one that can't be read is made anew. Where nothing can be written everything is compiled
at each start (half a minute for the fused engine).
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.dispatcher import Dispatcher

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])

_njit: Callable[..., Any] = numba.njit  # its own types leave out two options


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


def compiler(**options: Any) -> Callable[[F], F]:
    """A decorator: numba's `njit` with these options, whose code is kept."""

    def compiled(function: F) -> F:
        made = _njit(cache=KEPT, **options)(function)
        _sources[made] = files = _sources_of(function)
        if KEPT:
            made._cache._cache_file._source_stamp = tuple(map(_digest, sorted(files)))
            _forgive(made._cache, function.__name__)
        return made  # type: ignore[no-any-return]

    return compiled


_sources: dict[Any, set[str]] = {}
"""Of each compiled function."""


def _sources_of(function: Any) -> set[str]:
    """The files whose change makes kept code stale: numba itself looks at the function's own alone.

    Those of whatever compiled functions and classes its module knows, so more than need be.
    """
    files = {function.__code__.co_filename, __file__}
    package = function.__module__.partition(".")[0]
    for value in function.__globals__.values():
        if isinstance(value, type) and value.__module__.partition(".")[0] == package:
            files.add(
                str(getattr(sys.modules.get(value.__module__), "__file__", None) or function.__code__.co_filename)
            )
        elif isinstance(value, Dispatcher):
            files |= _sources.get(value, set())
    return files


@functools.cache
def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _forgive(cache: Any, name: str) -> None:
    """numba puts its files in place whole, but not on the disk: a machine that loses its power leaves halves of them.

    It would raise at each start for ever.
    """
    load = cache.load_overload

    def forgiving(*args: Any) -> Any:
        try:
            return load(*args)
        except Exception as error:  # noqa: BLE001 - a pickle that is cut off may raise anything
            log.warning("the kept machine code of %s can't be read (%r): it is compiled anew", name, error)
            cache.flush()
            return None

    cache.load_overload = forgiving


# Without numba's runtime no array is counted when it is looked at, and none can be made. Whoever calls holds them all.
# Each look at a field of a tuple, and each slice, cost an atomic addition and another: half the time of a small step.
_outer = {"nogil": True, "error_model": "numpy", "_nrt": False}
_inner = {**_outer, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}

entry: Callable[[F], F] = compiler(**_outer)
"""What Python calls. It makes no arrays."""
exact: Callable[[F], F] = compiler(**_inner)
"""What compiled code calls: the operations that are written, in their order."""
_reckless = {"reassoc", "contract", "nsz", "arcp", "afn"}
fast: Callable[[F], F] = compiler(**_inner, fastmath=_reckless)
"""The same, sums in any order and roots in quotients refined estimates; NaN and infinity keep their meaning."""
view: Callable[[F], F] = compiler(**_inner, inline="always")
"""What returns a part of an array that it was given."""
exact_inlined: Callable[[F], F] = compiler(**_inner, forceinline=True)
fast_inlined: Callable[[F], F] = compiler(**_inner, fastmath=_reckless, forceinline=True)
"""The same two, for what takes tuples of arrays: a call hands over each number of each array, which costs half a
microsecond.
"""
