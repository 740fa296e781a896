"""The configuration of what learns or mends beside the optimiser: error memories, rules for plasticity, diagnostics."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from streamcl.stations import NamedKind, Station, Stop


class Compensation(Station):
    """How a score is put right: by lambda x (gamma x (label mean - score) + (1 - gamma) x mean residual).

    With `auto` they are those of the lowest recent loss, from a grid that contains lambda 0.
    """

    model_config = ConfigDict(populate_by_name=True, serialize_by_alias=True)

    lambda_: Literal["auto"] | Annotated[float, Field(ge=0, le=1)] = Stop(
        "auto", alias="lambda", description="strength of the compensation, 0 to 1"
    )
    lambda_half_life_events: float = Stop(2000.0, gt=0, description="auto: how long a loss counts (labelled events)")
    on_new_weights: Literal["reset", "keep"] = Stop(
        "reset", description="in a read replica, whose weights are swapped; a worker's move with every example"
    )


class VectorMemory(Compensation):
    key: str = Stop(
        "embedding",
        description="embedding: what enters the hidden layers, each field at unit length; hidden: the last of them;"
        " ids: fixed random numbers of each category; or module:function(features, embedding, hidden)",
    )
    gamma: Literal[0, 1, "auto"] = Stop(0, description="0: the mean residual nearby; 1: towards the mean label nearby")


class KNNMemory(VectorMemory):
    """The last records one by one; the mean is over the nearest."""

    kind: Literal["knn"] = "knn"
    capacity: int = Stop(5000, ge=1, description="records held, first in, first out (count)")
    neighbours: int = Stop(70, ge=1, description="nearest records that enter the mean (count)")
    tau: float = Stop(0.1, gt=0, description="temperature of the softmax over cosine similarities")
    half_life_events: float | None = Stop(None, gt=0, description="age at which a record weighs half (records)")
    min_support: int = Stop(1, ge=1, description="with fewer records held nothing is compensated")
    error_threshold: float | None = Stop(None, gt=0, description="keep only larger errors; bends gamma 1")


class SketchMemory(VectorMemory):
    """Counts and sums in SimHash buckets: for more records than can be held."""

    kind: Literal["sketch"] = "sketch"
    bits: int = Stop(12, ge=1, le=20, description="of a bucket's number: 2^bits buckets an array")
    arrays: int = Stop(40, ge=1, le=1024, description="independent arrays (count)")
    half_life_events: float | None = Stop(2000.0, gt=0, description="age at which a record weighs half (records)")
    min_support: float = Stop(0.0, ge=0, description="a bucket with a lower decayed count is left out")


class KeyMemory(Compensation):
    """The mean residual of each value of a categorical feature (user, item, session)."""

    kind: Literal["key"] = "key"
    key: str = Stop(description="name of a categorical feature")
    capacity: int = Stop(100_000, ge=1, description="values held; the one seen longest ago gives way (count)")
    shrinkage: float = Stop(5.0, ge=0, description="records of residual 0 that each value begins with (count)")
    half_life_events: float | None = Stop(2000.0, gt=0, description="age at which a record weighs half (records)")
    min_support: float = Stop(0.0, ge=0, description="a value with a lower decayed count is left out")


MEMORIES: dict[str, type[Station]] = {"knn": KNNMemory, "sketch": SketchMemory, "key": KeyMemory}
Memory = Annotated[KNNMemory | SketchMemory | KeyMemory, Field(discriminator="kind"), NamedKind]


class L2(Station):
    """Dense weights are pulled to zero. See `streamcl.plasticity.l2`."""

    kind: Literal["l2"] = "l2"
    strength: float = Stop(1e-3, ge=0, description="lambda: times the weight, part of its gradient (1 / step)")


class L2Init(Station):
    """Dense weights are pulled to where they began. Source: Kumar et al. 2023, arXiv 2308.11958."""

    kind: Literal["l2_init"] = "l2_init"
    strength: float = Stop(
        1e-2, ge=0, description="lambda: times weight - first weight, part of its gradient (1 / step)"
    )


class ShrinkAndPerturb(Station):
    """Dense weights shrink and are disturbed. Source: Ash & Adams 2020, arXiv 1910.08475; at each step Dohare et al."""

    kind: Literal["shrink_and_perturb"] = "shrink_and_perturb"
    strength: float = Stop(1e-4, ge=0, description="lambda: times the weight, part of its gradient (1 / step)")
    sigma: float = Stop(1e-5, ge=0, description="standard deviation of the noise that a weight gets at each step")
    scaled: bool = Stop(False, description="the noise is part of the gradient, so the learning rate scales it")


class WeightClipping(Station):
    """No dense weight or bias leaves +-bound / sqrt(fan_in). Source: Elsayed et al. 2024, arXiv 2407.01704."""

    kind: Literal["weight_clipping"] = "weight_clipping"
    bound: float = Stop(2.0, gt=0, description="zeta: in units of PyTorch's bound of initial weights; 1 to 3")
    output_layer: bool = Stop(True, description="clip what makes the logits too; false where a label is rare")


class UPGD(Station):
    """Useful dense weights are kept, others learned and disturbed. Source: Elsayed & Mahmood 2024, arXiv 2404.00781."""

    kind: Literal["upgd"] = "upgd"
    decay: float = Stop(0.9999, ge=0, lt=1, description="beta: of the running mean of utilities")
    sigma: float = Stop(0.1, ge=0, description="standard deviation of the noise in the gradient")
    strength: float = Stop(0.01, ge=0, description="lambda: times the weight, part of its gradient (1 / step)")
    local: bool = Stop(False, description="compare utilities among the weights of a unit, not among all")
    protecting: bool = Stop(True, description="keep useful weights from the gradient too, not from the noise alone")


class Resetting(Station):
    """A rule that makes hidden units anew."""

    layers: tuple[tuple[str, str], ...] | None = Stop(
        None, min_length=1, description="(layer, the one that reads it) by module name; default: found in the model"
    )


class ReDo(Resetting):
    """Hidden units that say next to nothing are made anew, all at once. Source: Sokar et al. 2023, arXiv 2302.12902."""

    kind: Literal["redo"] = "redo"
    tau: float = Stop(0.025, ge=0, description="dormant: at most this share of its layer's mean activation; .025 to .1")
    every_steps: int = Stop(1000, ge=1, description="learning steps from one look to the next, and averaged over")


class SelfNormalizedResets(Resetting):
    """Hidden units silent for longer than they used to be are made anew. Source: Farias & Jozefiak 2024,
    arXiv 2410.20098.
    """

    kind: Literal["self_normalized_resets"] = "self_normalized_resets"
    percentile: float = Stop(0.99, gt=0, le=1, description="of a unit's silences, that its threshold contracts to")
    expansion: float = Stop(2.0, ge=1, description="factor of a threshold that was no longer than that")
    revisit_steps: int = Stop(10_000, ge=1, description="learning steps from one look at the thresholds to the next")
    initial_steps: int = Stop(1000, ge=1, description="first threshold: learning steps of silence")
    shortest_steps: int = Stop(100, ge=1, description="no threshold is below")
    longest_steps: int = Stop(10_000, ge=1, le=1 << 30, description="no threshold is above; another: it begins anew")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.shortest_steps <= self.initial_steps <= self.longest_steps:
            raise ValueError("initial_steps: must lie between shortest_steps and longest_steps")
        return self


class ContinualBackprop(Resetting):
    """Hidden units of the lowest utility are made anew, a few at a time.

    Source: Dohare et al. 2024, Nature 632:768-774.
    """

    kind: Literal["continual_backprop"] = "continual_backprop"
    replacement_rate: float | None = Stop(
        None,
        ge=0,
        le=1,
        description="units replaced per eligible unit and learning step; default: 1e-4 in a layer of up to 128 units,"
        " 1e-5 up to 1000, 1e-6 above",
    )
    maturity: int = Stop(100, ge=0, description="learning steps during which a new unit is safe")
    decay: float = Stop(0.99, ge=0, lt=1, description="of the running means that a utility is made of")
    utility: Literal["contribution", "mean_corrected", "adaptable", "adaptation", "weight", "random"] = Stop(
        "contribution", description="what makes a unit worth keeping; random is the control"
    )
    exact: bool = Stop(False, description="multiply by the weights at every step, not when a reset is due; slower")
    bias_transfer: bool = Stop(True, description="move a replaced unit's mean contribution into the next bias")


PLASTICITY: dict[str, type[Station]] = {
    "l2": L2,
    "l2_init": L2Init,
    "shrink_and_perturb": ShrinkAndPerturb,
    "weight_clipping": WeightClipping,
    "upgd": UPGD,
    "continual_backprop": ContinualBackprop,
    "redo": ReDo,
    "self_normalized_resets": SelfNormalizedResets,
}
AnyRule = L2 | L2Init | ShrinkAndPerturb | WeightClipping | UPGD | ContinualBackprop | ReDo | SelfNormalizedResets
Plasticity = Annotated[AnyRule, Field(discriminator="kind"), NamedKind]


class Diagnostics(Station):
    """Figures of the hidden layers: units that fall silent, ranks that shrink, weights that grow.

    They cost nothing of what is learned; after a change of `window` they begin anew.
    """

    sample_every_steps: int = Stop(
        16, ge=0, description="learning steps from one sampled example to the next; 0: no figures"
    )
    window: int = Stop(512, ge=2, le=4096, description="sampled examples that figures are made of (count)")
    report_every_steps: int = Stop(
        10_000, ge=1, description="learning steps from one reckoning of ranks and weights to the next"
    )
