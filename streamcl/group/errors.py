"""The error memory of a group's ranks: what is a sum adds up.

A sketch and sums by key become what all had, and what each rank has written since they last met, decayed to the number
of records that all have written by now. Sums by the key that events are sharded by are one rank's, and stay there; so
do the last records of a kNN form, and the losses by which each rank chooses its lambda. Where one rank began anew (a
forget, other weights) all do, as far as what a round of the others has added.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from streamcl.config import Config
from streamcl.group.weights import Said
from streamcl.memory import ErrorMemory
from streamcl.memory.forms import ByKey, Floats, Sketch


class Errors:
    """Of every stage whose form is a sum."""

    def __init__(self, config: Config, memory: ErrorMemory) -> None:
        self.parts: dict[str, _Sketched | _Keyed] = {}
        for index, stage in enumerate(memory.stages):
            if isinstance(stage.form, Sketch):
                self.parts[f"{index}"] = _Sketched(stage.form)
            elif isinstance(stage.form, ByKey) and stage.config.key != config.events.key:
                self.parts[f"{index}"] = _Keyed(stage.form)

    def begin(self) -> None:
        for part in self.parts.values():
            part.begin()

    def say(self) -> dict[str, Tensor]:
        return {f"{at}.{name}": each for at, part in self.parts.items() for name, each in part.say().items()}

    def hear(self, said: Sequence[Said], _examples: Sequence[int]) -> None:
        for at, part in self.parts.items():
            part.hear(
                [{n.removeprefix(f"{at}."): t for n, t in each.items() if n.startswith(f"{at}.")} for each in said]
            )


class _Sketched:
    def __init__(self, form: Sketch) -> None:
        self.form = form
        self.begin()

    def begin(self) -> None:
        form = self.form
        self.sums, self.touched = form.sums.copy(), form.touched.copy()
        self.writes, self.since, self.latched = form.writes, form.since, form.latched.copy()
        self.count, self.mean = form.centre.count, form.centre.mean.copy()

    def _standing(self, now: int) -> Floats:
        """(K, 2^L, 1 + V) what all had, as it has decayed by then."""
        left = np.exp(-self.form.fade * (now - self.touched)) * (self.touched > self.since)
        return np.asarray(self.sums * left[:, :, None], np.float32)

    def say(self) -> dict[str, Tensor]:
        form = self.form
        anew = form.since != self.since or form.writes < self.writes
        written = form.touched > (form.since if anew else self.writes)
        left = np.exp(-form.fade * (form.writes - form.touched[written]))[:, None]
        added = form.sums[written] * left - (0.0 if anew else self._standing(form.writes)[written])
        return {
            "at": torch.from_numpy(np.flatnonzero(written)),
            "added": torch.from_numpy(added.astype(np.float32)),
            "writes": torch.tensor([form.writes - (form.since if anew else self.writes), int(anew)]),
            "seen": torch.tensor([form.centre.count]),
            "mean": torch.from_numpy(form.centre.mean),
        }

    def hear(self, said: Sequence[Said]) -> None:
        form = self.form
        anew = any(int(each["writes"][1]) for each in said)
        before = 0 if anew else self.writes
        now = before + sum(int(each["writes"][0]) for each in said)
        sums = np.zeros_like(self.sums) if anew else self._standing(now)
        flat, touched = sums.reshape(-1, sums.shape[2]), (self.touched * (not anew)).reshape(-1)
        for each in said:
            at = each["at"].numpy()
            flat[at] += each["added"].numpy()
        written = np.unique(np.concatenate([each["at"].numpy() for each in said]))
        form.sums[:] = self.sums * (not anew)
        form.sums.reshape(-1, sums.shape[2])[written] = flat[written]
        touched[written] = now
        form.touched[:] = touched.reshape(form.touched.shape)
        form.writes, form.since = now, 0 if anew else self.since
        self._centre(said)
        self.begin()

    def _centre(self, said: Sequence[Said]) -> None:
        """The mean of keys, by how many each rank has seen; latched when their number has doubled, as in `Sketch`."""
        form, news = self.form, [max(int(each["seen"][0]) - self.count, 0) for each in said]
        total, mean = sum(news), self.mean.astype(np.float64)
        for each, new in zip(said, news, strict=True):
            mean += (each["mean"].numpy() - self.mean) * (new / max(total, 1))
        form.centre.count, form.centre.mean = self.count + total, mean.astype(np.float32)
        doubled = (self.count + total).bit_length() > self.count.bit_length()
        form.latched = form.centre.mean.copy() if doubled else self.latched.copy()


class _Keyed:
    def __init__(self, form: ByKey) -> None:
        self.form = form
        self.begin()

    def begin(self) -> None:
        form = self.form
        self.base = {key: (entry, tuple(entry), form.owners[key]) for key, entry in form.sums.items()}
        self.writes = form.writes

    def _decayed(self, entry: Sequence[float], now: float) -> list[float]:
        left = 2.0 ** (-self.form.halving * (now - entry[0]))
        return [each * left for each in entry[1:]]

    def say(self) -> dict[str, Tensor]:
        form = self.form
        keys, added, gone = [], [], [key for key in self.base if key not in form.sums]
        for key in reversed(form.sums):  # the newest first
            entry = form.sums[key]
            if entry[0] <= self.writes:
                break
            new = self._decayed(entry, form.writes)
            if key in self.base:
                live, before, _ = self.base[key]
                if live is entry:
                    new = [a - b for a, b in zip(new, self._decayed(before, form.writes), strict=True)]
                else:  # it was lost, and has begun anew
                    gone.append(key)
            keys.append(key)
            added.append(new)
        numbers = np.array(added, np.float64).reshape(len(keys), 1 + form.width)
        return {
            "keys": torch.tensor(keys, dtype=torch.int64),
            "added": torch.from_numpy(numbers),
            "owners": torch.tensor([form.owners[key] for key in keys], dtype=torch.int64),
            "gone": torch.tensor(sorted(gone), dtype=torch.int64),
            "writes": torch.tensor([form.writes - self.writes]),
        }

    def hear(self, said: Sequence[Said]) -> None:
        form, base = self.form, self.base
        now = self.writes + sum(int(each["writes"][0]) for each in said)
        gone = {key for each in said for key in each["gone"].tolist()}
        new: dict[int, list[float]] = {}
        owners: dict[int, set[int]] = {}
        for each in said:
            columns = (each[name].tolist() for name in ("keys", "added", "owners"))
            for key, added, owner in zip(*columns, strict=True):
                if key not in new:
                    stays = key in base and key not in gone
                    new[key] = self._decayed(base[key][1], now) if stays else [0.0] * (1 + form.width)
                    owners[key] = {base[key][2]} if stays else set()
                new[key] = [a + b for a, b in zip(new[key], added, strict=True)]
                owners[key].add(owner)
        for key in gone | set(new):
            form.sums.pop(key, None)
            form.owners.pop(key, None)
            base.pop(key, None)
        for key in sorted(new):
            entry = form.sums[key] = [float(now), *new[key]]
            form.owners[key] = owners[key].pop() if len(owners[key]) == 1 else 0
            base[key] = entry, tuple(entry), form.owners[key]
        while len(form.sums) > form.config.capacity:
            oldest = next(iter(form.sums))
            del form.sums[oldest], form.owners[oldest], base[oldest]
        form.writes = self.writes = now
