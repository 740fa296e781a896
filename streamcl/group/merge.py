"""What the ranks of a group say to each other at a round's end, and the model that comes out of it.

| | `average` | `outer`; where not said, as in `average` |
|---|---|---|
| dense weights, rows | see `blend` | see `outer` |
| optimiser slots | see `blend` | likewise |
| dynamic tables | by id: see `tables` | likewise |
| running statistics of numerics and label, `version` | sums: those of all events of all ranks | likewise |
| average of the weights (`ema`) | as far behind the merged weights as before | likewise |
| continual backpropagation | one record of units; renewed on one rank is renewed on all | likewise |
| error memory | sketch and sums by key: sums add up; kNN rows: each rank's own | likewise |
| rates, counts, histories of the past | by value: sums add up; of the shard key: the rank's own | likewise |
| replayed rows, draws, steps, metrics, drift, diagnostics, key states, admission filters | each rank's own | likewise |

`gradient` takes one step of the optimiser along the sum of the ranks' gradients (see `gradient`), in the eager engine,
with hashed tables; statistics, error memory and past as above. `none` merges nothing.

Every rank gathers what all say (tensors, no pickle) and merges for itself, in the order of
ranks, so all come to the same bits. A round costs O(dense weights + touched rows + touched sums) bytes of each rank,
never O(table), and every rank receives what all the others say.

With one rank `average` and `gradient` change nothing, to the bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
import xxhash
from safetensors.torch import load, save
from torch import Tensor

from streamcl.config import Config, ConfigError
from streamcl.delta import served
from streamcl.group.beside import Averages, Renewals, Statistics
from streamcl.group.errors import Errors
from streamcl.group.gradient import Gradients
from streamcl.group.outer import Outer
from streamcl.group.past import PastSums
from streamcl.group.ranks import Ranks
from streamcl.group.tables import Ids
from streamcl.group.weights import Part, Said, Weights
from streamcl.plasticity.continual_backprop import ContinualBackprop
from streamcl.protocols import State, StreamclError
from streamcl.state import digest

if TYPE_CHECKING:
    from streamcl.engine.weights import Average
    from streamcl.learner import Learner
    from streamcl.past import Past


class Met(NamedTuple):
    """What a meeting came to: bytes that this rank has sent to each other one, and has received from all; and how far
    the ranks had gone apart: the largest ||w_k - mean|| / ||mean|| of dense weights, before they were merged.
    """

    bytes_out: int
    bytes_in: int
    divergence: float


class Merge:
    """The meetings of one rank.

    Whoever holds it calls `meet` at the end of every round, once the learner has settled, on every rank; or, where one
    process holds all ranks, `say` of each and then `hear` of each.
    """

    def __init__(self, ranks: Ranks, parts: Mapping[str, Part], learner: Learner) -> None:
        self.ranks, self.parts, self.learner = ranks, dict(parts), learner
        self.begun = ""  # what these processes began with, until they have met

    def meet(self, examples: int) -> Met:
        """Collective: merge what all ranks have learned in the round, this one from so many examples.

        Raises:
            RankLost: another rank can't be reached; nothing has been changed.
            StreamclError: see `hear`.
        """
        said = self.say(examples)
        heard = [
            bytes(each.numpy()) for each in self.ranks.all_gather(torch.frombuffer(bytearray(said), dtype=torch.uint8))
        ]
        return self.hear(heard)

    def say(self, examples: int) -> bytes:
        """What this rank tells the others; nothing is changed."""
        told: dict[str, Tensor] = {"examples": torch.tensor([examples])}
        for name, part in self.parts.items():
            told |= {f"{name}.{what}": tensor.contiguous() for what, tensor in part.say().items()}
        told.setdefault("weights.flat", self.learner.engine.dense.flat.detach())
        weights = self.parts.get("weights")
        start = weights.start() if isinstance(weights, Weights) else 0
        told["start"] = torch.tensor([start ^ xxhash.xxh32_intdigest(self.begun.encode())])
        return save(told)

    def hear(self, said: Sequence[bytes]) -> Met:
        """Take over what all have said, this rank included, in their order.

        Raises:
            StreamclError: the ranks did not begin the round with one model; nothing has been changed.
        """
        heard = [load(each) for each in said]
        if len({int(each["start"]) for each in heard}) > 1:
            raise StreamclError(
                "group.merge: the ranks have not begun with one model; begin all of them anew, or from one manifest"
            )
        self.begun = ""
        examples = [int(each["examples"]) for each in heard]
        mine = len(said[self.ranks.rank])
        met = Met(mine * (len(said) - 1), sum(map(len, said)) - mine, divergence([e["weights.flat"] for e in heard]))
        # The past hears of events whose labels are still to come, too.
        learned = self.parts if any(examples) else [name for name in self.parts if name == "past"]
        for name in learned:
            self.parts[name].hear([_of(name, each) for each in heard], examples)
        weights = self.parts.get("weights")
        if any(examples) and isinstance(weights, Weights):
            weights.close()
        return met

    def state_dict(self) -> State:
        return {name: part.state_dict() for name, part in self.parts.items() if isinstance(part, Outer)}

    def load_state_dict(self, state: State) -> None:
        """Once the learner has its own: a round begins with what it holds."""
        self.begun = digest(dict(served(self.learner))) if self.parts else ""
        for part in self.parts.values():
            part.begin()
        for name, part in self.parts.items():
            if isinstance(part, Outer):
                part.load_state_dict(state.get(name, {}))


def divergence(flats: Sequence[Tensor]) -> float:
    """max over ranks of ||w_k - mean|| / ||mean||; 0 where there are no weights or all are 0."""
    mean = flats[0].double()
    for each in flats[1:]:
        mean = mean + each.double()
    mean = mean / len(flats)
    length = float(torch.linalg.vector_norm(mean))
    return max(float(torch.linalg.vector_norm(each.double() - mean)) for each in flats) / length if length else 0.0


def merge_of(config: Config, learner: Learner, ranks: Ranks, past: Past | None = None) -> Merge:
    """What `group.merge` says, for one rank's learner, and what it keeps of the past stream.

    Raises:
        ConfigError: something of the learner has no meaning in a group.
    """
    if config.group.merge == "none" or (ranks.world == 1 and config.group.merge != "outer"):
        return Merge(ranks, {}, learner)
    refuse(config, learner)
    engine, parts = learner.engine, dict[str, Part]()
    kinds: dict[str, type[Weights]] = {"average": Weights, "outer": Outer, "gradient": Gradients}
    weights = kinds[config.group.merge](config, learner)
    for rule in learner.rules.values():
        if isinstance(rule, ContinualBackprop):
            parts["renewals"] = Renewals(rule, weights)
    parts["weights"] = weights
    if engine.tables is not None:
        parts["tables"] = Ids(engine.tables, weights)
    if "ema" in engine.sets:
        parts["ema"] = Averages(learner, cast("Average", engine.sets["ema"]), weights)
    parts["statistics"] = Statistics(learner)
    if learner.recall.stages:
        parts["errors"] = Errors(config, learner.recall)
    if past is not None:
        parts["past"] = PastSums(config, past)
    return Merge(ranks, parts, learner)


SHARED_RULES = frozenset(("continual_backprop", "l2", "l2_init", "weight_clipping"))
"""Rules of plasticity that a group can have: the last three remember nothing that learning moves."""


def refuse(config: Config, learner: Learner) -> None:
    """Raises ConfigError for what holds something of the weights that has no meaning yet where ranks meet."""
    where, known = f"group.merge: {config.group.merge} has no meaning yet for", SHARED_RULES
    if config.group.merge == "gradient":
        if learner.fused is not None:
            raise ConfigError(
                "group.merge: gradient needs worker.engine = eager; a fused step shows nobody its gradient"
            )
        if learner.tables is not None:
            raise ConfigError(f"{where} dynamic tables: features.{learner.tables.names[0]}.table")
        if learner.planners or learner.engine.sets:
            raise ConfigError(f"{where} plug-ins that plan steps, or keep other weights")
        known = frozenset(("l2",))
    if others := sorted(set(learner.rules) - known):
        raise ConfigError(f"{where} plasticity {', '.join(others)}")
    if others := sorted(set(learner.engine.sets) - {"ema"}):
        raise ConfigError(f"{where} plug-ins that keep other weights: {', '.join(others)}")
    if others := sorted({*learner.engine.dense.anchors, *learner.engine.dense.traces} - SHARED_RULES):
        raise ConfigError(f"{where} plug-ins that keep something of each weight: {', '.join(others)}")


def _of(name: str, said: Said) -> Said:
    return {what.removeprefix(f"{name}."): each for what, each in said.items() if what.startswith(f"{name}.")}
