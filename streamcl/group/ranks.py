"""The ranks of a group and what they say to each other: a thin layer over `torch.distributed`, Gloo between CPUs.

Whoever is started by `torchrun` finds its place in the environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT). What
is exchanged is JSON and tensors, never a pickle: whoever reaches a rank's port must not be able to run code in it.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import orjson
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from streamcl.protocols import ConnectorError
from streamcl.stations import GroupConfig

_LOOK_S = 0.00002, 0.005
"""Between two looks at whether the others have come: at first, and at most."""


class RankLost(ConnectorError):
    """A rank has died, or was silent for `group.timeout_s`: this round can't be met any more.

    The cure is to end every rank and to begin all of them anew, as `torchrun --max-restarts` does.
    """


class Ranks:
    """A rank's seat among `world` ranks. Every method but `told` and `tell` is collective: all ranks call it, in the
    same order; it returns once all have, and raises `RankLost` when one can't.

    Attributes:
        waiting: Called again and again while others are waited for: who waits is alive.
    """

    def __init__(self, rank: int, world: int, store: Store | None = None) -> None:
        self.rank = rank
        self.world = world
        self._store = store
        self.waiting: Callable[[], None] = lambda: None

    @classmethod
    def alone(cls) -> Ranks:
        """One rank, which has nobody to wait for; it needs no process group."""
        return cls(0, 1)

    @classmethod
    def of_environment(cls, config: GroupConfig) -> Ranks:
        """What `torchrun` says in the environment; alone without it, and where nothing is merged.

        Raises:
            RankLost: the others could not be found.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1 or config.merge == "none":
            return cls.alone()
        with _named("the group can't be joined"):
            patience = datetime.timedelta(seconds=config.timeout_s)
            store, rank, world = next(iter(rendezvous("env://", timeout=patience)))
            store.set_timeout(patience)
            life = PrefixStore(_agreed(store, rank, world, config.timeout_s), store)
            dist.init_process_group("gloo", store=life, rank=rank, world_size=world, timeout=patience)
        return cls(rank, world, PrefixStore("streamcl", life))

    def tell(self, name: str, text: str) -> None:
        """Put something where the others may look; returns at once."""
        if self._store is not None:
            with _named("a rank can't tell the others"):
                self._store.set(name, text)

    def told(self, name: str) -> str:
        """What any rank has told last under that name, "" while none has; returns at once."""
        if self._store is None:
            return ""
        with _named("a rank can't hear the others"):
            return _look(self._store, name)

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, by rank: JSON values, some kilobytes at most."""
        if self.world == 1:
            return [orjson.loads(orjson.dumps(value))]
        return [orjson.loads(bytes(each.numpy())) for each in self.all_gather(_bytes(orjson.dumps(value)))]

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, by rank. First dimensions may differ; dtypes, and what is behind them, must not."""
        if self.world == 1:
            return [tensor.clone()]
        tensor = tensor.detach().contiguous()
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
        self._wait(dist.all_gather(counts, torch.tensor([len(tensor)]), async_op=True))
        lengths = [int(count) for count in counts]
        most = max(lengths)
        padded = tensor.new_zeros((most, *tensor.shape[1:]))
        padded[: len(tensor)] = tensor
        found = [torch.empty_like(padded) for _ in range(self.world)]
        if padded.numel():
            self._wait(dist.all_gather(found, padded, async_op=True))
        return [each[:length] for each, length in zip(found, lengths, strict=True)]

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place: the same bits on every rank, and at every run with as many ranks."""
        if self.world > 1:
            self._wait(dist.all_reduce(tensor, async_op=True))
        return tensor

    def barrier(self) -> None:
        """Return once every rank is here."""
        self.all_reduce(torch.zeros(1))

    def close(self) -> None:
        """Leave. The others' next call fails unless they leave too."""
        if self.world > 1 and dist.is_initialized():
            with contextlib.suppress(Exception):  # it may be the others who have left
                dist.destroy_process_group()

    def _wait(self, work: Any) -> None:
        """Not inside the library, where a signal would not be heard until the others have come."""
        with _named(f"rank {self.rank} has lost another one"):
            look_s, longest_s = _LOOK_S
            while not work.is_completed():
                time.sleep(look_s)
                self.waiting()
                look_s = min(2 * look_s, longest_s)
            work.wait()


def _agreed(store: Store, rank: int, world: int, timeout_s: float) -> str:
    """A name that these processes have for themselves alone.

    An agent's store outlives them, and still says where the ranks before them could be reached; and agents of several
    machines count restarts each for itself. So each process makes up a name, rank 0 tells each of the others its own
    in answer to theirs, and believes them once they have said that they know.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + timeout_s
    store.set(f"hello/{rank}", mine)
    while time.monotonic() < end:
        if rank:
            if told := _look(store, f"welcome/{mine}"):
                store.set(f"known/{told}/{rank}", mine)
                return told
        else:
            there = {other: _look(store, f"hello/{other}") for other in range(1, world)}
            if all(name and _look(store, f"known/{mine}/{other}") == name for other, name in there.items()):
                return mine
            for name in filter(None, there.values()):
                store.set(f"welcome/{name}", mine)
        time.sleep(_LOOK_S[1])
    raise RankLost(f"rank {rank}: {world} ranks are to begin, and some have not come within {timeout_s:g} s")


def _look(store: Store, name: str) -> str:
    return bytes(store.get(name)).decode() if store.check([name]) else ""


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the class of all errors of torch.distributed
        raise RankLost(f"{what}: {str(error).splitlines()[0]}") from error
