"""What a bench may be asked: one set of options for all of them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from streamcl.protocols import StreamclError

_EVERY_BENCH = {"quick", "json", "plot"}


class OptionError(StreamclError):
    """An option that can't be met; the text names it."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options of `streamcl bench NAME`; None means the bench's own default.

    Args:
        data: Folder of recorded streams (`ml-100k/ml-100k.inter.gz`, `elec.csv.gz`, ...).
        stream: Which stream.
        preset: Hyper-parameters by name.
        task, method: What the bench runs, where it knows several.
        device: Where it runs.
        quick: A small run, within 60 s on two cores, with limits of its own.
        seeds: How many seeds (count), 0, 1, ...
        json: One JSON object on stdout instead of a table.
        plot: Where to draw the curves; the suffix chooses the format.
        via: URL whose topics the events travel through, e.g. `kafka://localhost:9092`.
        kills: How often a process is killed (count).
        events: How many events are streamed (count).
        minutes: How long a run lasts that has no end by itself.
        simulate: Reckon instead of measuring.
    """

    data: Path | None = None
    stream: str | None = None
    preset: str | None = None
    task: str | None = None
    method: str | None = None
    device: str | None = None
    quick: bool = False
    seeds: int | None = None
    json: bool = False
    plot: Path | None = None
    via: str | None = None
    kills: int | None = None
    events: int | None = None
    minutes: float | None = None
    simulate: bool = False

    def require_read_by(self, bench: str, reads: Collection[str]) -> None:
        """Raises OptionError for an option that was given and would be ignored."""
        for item in fields(self):
            given = getattr(self, item.name) not in (None, False)
            if given and item.name not in _EVERY_BENCH and item.name not in reads:
                raise OptionError(f"--{item.name}: bench {bench} has no use for it; it reads {_flags(reads)}")

    def choice(self, name: str, known: Collection[str], default: str) -> str:
        """The value of option `name`, one of `known`."""
        value: str = getattr(self, name) or default
        if value not in known:
            raise OptionError(f"--{name}: {value!r} is none of {', '.join(known)}")
        return value

    def seed_list(self, default: int) -> list[int]:
        """0, 1, ... as many as asked for."""
        return list(range(self.count("seeds", default)))

    def count(self, name: str, default: int) -> int:
        """The value of option `name`, at least 1."""
        given: int | None = getattr(self, name)
        value = default if given is None else given
        if value < 1:
            raise OptionError(f"--{name}: {value} is below 1")
        return value


def _flags(reads: Collection[str]) -> str:
    return ", ".join(f"--{name}" for name in sorted({*reads, *_EVERY_BENCH}))
