"""A state as it stands now, whose large arrays a child process copies, so that who asks for it goes on at once.

The child is a fork: the system gives it every page as it was, and copies for it those that the parent writes to. It
runs machine code alone, takes no lock, leaves Python alone, and holds no file or socket that a dead parent would seem
to hold. Copying a gigabyte takes it a second, and no turn.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numba import types
from numpy.typing import NDArray

from streamcl.compiled import entry
from streamcl.protocols import State
from streamcl.snapshot import CheckpointError
from streamcl.state import copied, private, sharing

log = logging.getLogger(__name__)

LARGE_BYTES = 1 << 20
"""An array of this size or more is left to the child."""
FORK_BYTES = 32 << 20
"""Less than this in all is copied faster than a child is made."""

_libc = ctypes.CDLL(None)
FORKS = sys.platform == "linux" and all(hasattr(_libc, name) for name in ("_Fork", "close_range"))
"""`_Fork` is the fork that runs no library's handlers and takes no lock: glibc has it since 2.34, musl since 1.2.2."""


def prepare() -> None:
    """Have the machine code at hand before the first save: numba's own start takes .4 s."""
    if FORKS:
        compiled: Any = _copy_beside
        compiled.compile((types.int64[:, ::1], types.uint8[::1]))


class Capture:
    """What `take` returns now, for one reader, later.

    Large arrays on the CPU come in memory that a child fills; everything else is copied here and now, and all of it is
    where there can be no child.

    Args:
        take: Makes the state; `cut` copies nothing in it.
        forks: False copies all at once.

    Attributes:
        child: Its process id; 0 without one.
    """

    def __init__(self, take: Callable[[], State], forks: bool = True) -> None:
        self.child = 0
        self._moves: list[tuple[int, int, int]] = []  # to, from, bytes
        with sharing():
            state = take()
            self._state: State = private(state, self._promised if forks and FORKS else copied)
        self._copy()  # `state` still holds what is to be read

    def _promised(self, array: Any) -> Any:
        """An array like this one, to be filled by `_copy`."""
        if not _movable(array):
            return copied(array)
        try:
            made = np.asarray(Shared(array.nbytes))
        except OSError:
            return copied(array)
        tensor = isinstance(array, torch.Tensor)
        source = array.data_ptr() if tensor else array.ctypes.data
        self._moves.append((made.ctypes.data, source, array.nbytes))
        if tensor:
            return torch.from_numpy(made).view(array.dtype).view(array.shape)
        return made.view(array.dtype).reshape(array.shape)

    def _copy(self) -> None:
        if sum(size for _, _, size in self._moves) >= FORK_BYTES:
            self.child = self._forked()
        if not self.child:
            for to, source, size in self._moves:
                ctypes.memmove(to, source, size)

    def _forked(self) -> int:
        """The child's process id; 0: the system makes none, for it has no room for another process."""
        # The child inherits the mask: what is sent to the whole group, as Ctrl-C is, must not end in Python's handler.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            self._done = np.asarray(Shared(mmap.PAGESIZE))
            child = max(0, int(_copy_beside(np.array(self._moves, np.int64), self._done)))
        except OSError:
            child = 0
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if not child:
            log.info("no process could be made that copies the state: it is copied within the turn")
            return 0
        with contextlib.suppress(OSError):  # where memory is short, the copy goes before the worker does
            Path(f"/proc/{child}/oom_score_adj").write_text("1000", encoding="ascii")
        return child

    def state(self) -> State:
        """The state, once all of it is there.

        Raises:
            CheckpointError: the child was killed, as where memory is short.
        """
        if self.child:
            told = "its status is not known"
            with contextlib.suppress(ChildProcessError):  # somebody else of this process has waited for it
                told = f"exit status {os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])}"
            self.child = 0
            if not self._done[0]:
                self._state = {}
                raise CheckpointError(f"the process that copied the state has died before its end ({told})")
        return self._state


class Shared:
    """Zeros that a child process can write for its parent.

    Given back without Python's lock, which `mmap` would hold for a quarter of a second for each gigabyte.

    Raises:
        OSError: the system has no room.
    """

    def __init__(self, size: int) -> None:
        self.size = 0
        protection, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS
        address = _mmap(None, size, protection, flags, -1, 0)
        if address in (None, _FAILED):
            raise OSError(f"no room for {size} bytes of shared memory")
        self.size, self.address = size, int(address)

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return {"version": 3, "typestr": "|u1", "shape": (self.size,), "data": (self.address, False)}

    def __del__(self) -> None:
        if self.size:
            _munmap(self.address, self.size)


_FAILED = ctypes.c_void_p(-1).value
_mmap, _munmap = _libc.mmap, _libc.munmap
_mmap.restype, _mmap.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def _movable(array: Any) -> bool:
    """Whether it lies in one piece in memory that a child has too."""
    if array.nbytes < LARGE_BYTES:
        return False
    if isinstance(array, torch.Tensor):
        plain = array.device.type == "cpu" and array.layout is torch.strided and array.is_contiguous()
        return plain and not (array.is_conj() or array.is_neg())
    return type(array) is np.ndarray and bool(array.flags.carray) and not array.dtype.hasobject


_external: Callable[..., Any] = types.ExternalFunction
if FORKS:
    _Fork = _external("_Fork", types.int32())
    _close_range = _external("close_range", types.int32(types.uint32, types.uint32, types.int32))
    _memmove = _external("memmove", types.intp(types.intp, types.intp, types.intp))
    _exit = _external("_exit", types.void(types.int32))


@entry
def _copy_beside(moves: NDArray[np.int64], done: NDArray[np.uint8]) -> int:
    """Fork; the child copies (n, 3) to, from, bytes, and ends. Returns its process id; negative: there is none.

    It closes first what it has inherited: a lock or a connection of a parent that dies is free at once.
    """
    child: int = _Fork()
    if child != 0:
        return child
    _close_range(0, 0xFFFFFFFF, 0)
    for i in range(len(moves)):
        _memmove(moves[i, 0], moves[i, 1], moves[i, 2])
    done[0] = 1
    _exit(0)
    return 0
