"""Built-in models: from pooled rows of the table to raw outputs. `Network` says what the engine asks of each.

- `tower`: START HERE: `Network` and `Shape`, and `MLP`, the hidden layers that most have
- here: `Logistic`, `FM`, `FFM`, `DeepFM`, `XDeepFM`, `DCNv2`
- `attention`: `AutoInt`, fields that attend to fields; `DIN`, a target that attends to a user's history
- `two_tower`: a user's vector times an item's
- `multitask`: a shared bottom or a mixture of experts, and a tower for each task
- `key_state`: a minGRU, or another recurrence, for what each user has done
- `own`: a user's module, by import path
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcl.architectures import Model
from streamcl.config import Config
from streamcl.features import Layout
from streamcl.models import own
from streamcl.models.attention import DIN, AutoInt
from streamcl.models.key_state import KeyStateModel, build_cell
from streamcl.models.multitask import MultiTask
from streamcl.models.tower import MLP, Network, Shape
from streamcl.models.two_tower import TwoTower
from streamcl.random import key_of, uniform_array

__all__ = [
    "DIN",
    "FFM",
    "FM",
    "MLP",
    "MODELS",
    "AutoInt",
    "DCNv2",
    "DeepFM",
    "KeyStateModel",
    "Logistic",
    "MultiTask",
    "Network",
    "Shape",
    "TwoTower",
    "XDeepFM",
    "build_model",
]


class Logistic(Network):
    """A linear model on one weight per category and output: the baseline that is hard to beat on ids alone."""

    first_order, embedding = True, False

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.weight = nn.Parameter(torch.zeros(shape.outputs, shape.numerics))
        self.bias = nn.Parameter(torch.zeros(shape.outputs))

    @property
    def base(self) -> nn.Parameter:
        return self.bias

    def forward(self, first: Tensor, _vectors: Tensor, dense: Tensor) -> Tensor:
        out: Tensor = first.sum(1) + functional.linear(dense, self.weight, self.bias)  # (B, O)
        return out


class FM(Network):
    """A factorisation machine: first-order weights + interactions of all pairs of fields, on their embeddings.

    Source:
        Rendle 2010 (ICDM), equation 1; lemma 3.1 for the sum over pairs.

    Differs from the source:
        Numerics enter the linear part, not the pairs. With several outputs the pairs keep their D products, projected
        to the outputs, for their sum would be the same for every class.
    """

    first_order = True

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.linear = Logistic(shape)
        self.pairs = nn.Linear(shape.dim, shape.outputs, bias=False) if shape.outputs > 1 else None

    @property
    def base(self) -> nn.Parameter:
        return self.linear.bias

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        out: Tensor = self.linear(first, vectors, dense) + pairwise(vectors, self.pairs)
        return out


def pairwise(vectors: Tensor, projection: nn.Linear | None) -> Tensor:
    """(B, O) of embeddings (B, F, D): the sum over all pairs of fields of their products, by the sum of squares."""
    total = vectors.sum(1)  # (B, D)
    products = 0.5 * (total * total - (vectors * vectors).sum(1))
    return products.sum(1, keepdim=True) if projection is None else projection(products)


class FFM(Network):
    """A field-aware factorisation machine: a category has a vector for each field that it may meet.

    Source:
        Juan et al. 2016 (RecSys), equation 4: the sum over pairs of fields i < j of <v_i towards j, v_j towards i>.

    Differs from the source:
        As `FM` does; and with first-order weights, which the equation leaves out. A category has no vector towards its
        own field, which has one value, or a bag that is pooled before it meets others.

    Shape:
        `dim` is (F - 1) x k: a row holds k = `model.embedding_dim` numbers towards each other field, in their order.
    """

    first_order = True

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.linear = Logistic(shape)
        self.dim, self.k = (shape.fields - 1) * shape.dim if shape.fields else 0, shape.dim
        self.pairs = nn.Linear(shape.dim, shape.outputs, bias=False) if shape.outputs > 1 else None
        pairs = list(itertools.combinations(range(shape.fields), 2))
        # Places in (F x (F - 1)): field i's vector towards j stands at j - 1 if j > i, at j if j < i.
        others = shape.fields - 1
        self.lower: Tensor
        self.upper: Tensor
        for name, at in (
            ("lower", [i * others + j - 1 for i, j in pairs]),
            ("upper", [j * others + i for i, j in pairs]),
        ):
            self.register_buffer(name, torch.tensor(at, dtype=torch.int64, device="cpu"), persistent=False)

    @property
    def base(self) -> nn.Parameter:
        return self.linear.bias

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        towards = vectors.reshape(len(vectors), -1, self.k)  # (B, F x (F - 1), k)
        products = (towards[:, self.lower] * towards[:, self.upper]).sum(1)  # (B, k)
        pairs = products.sum(1, keepdim=True) if self.pairs is None else self.pairs(products)
        out: Tensor = self.linear(first, vectors, dense) + pairs
        return out


class DeepFM(Network):
    """A factorisation machine + a deep part, on shared embeddings.

    Source:
        Guo et al. 2017, arXiv 1703.04247, equations 1 to 4.

    Differs from the source:
        As `FM` does.
    """

    first_order = beside = True

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.linear = Logistic(shape)
        self.deep = MLP(shape)
        self.pairs = nn.Linear(shape.dim, shape.outputs, bias=False) if shape.outputs > 1 else None

    @property
    def tower(self) -> MLP:
        return self.deep

    @property
    def base(self) -> nn.Parameter:
        return self.linear.bias

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        pairs = pairwise(vectors, self.pairs)
        out: Tensor = self.linear(first, vectors, dense) + pairs + self.deep(first, vectors, dense)
        return out


class XDeepFM(Network):
    """Products of ever more fields, each number of the embeddings for itself, beside a linear and a deep part.

    A layer's map h is sum_ij W^h_ij (x_i * e_j): x_i the maps of the layer before, e_j the fields, which are also the
    maps of layer 0. What a map holds is summed up, and the sums of all layers' maps have a weight each.

    Source:
        Lian et al. 2018 (KDD), arXiv 1803.05170, equations 6 (the layers), 7 and 8 (the sums), 10 (the three parts).

    Differs from the source:
        Numerics enter the linear and the deep part alone.
    """

    first_order = beside = True

    def __init__(self, shape: Shape, maps: Sequence[int]) -> None:
        super().__init__(shape)
        self.linear = Logistic(shape)
        self.deep = MLP(shape)
        widths = (shape.fields, *maps)
        self.project = nn.ModuleList(
            nn.Linear(before * shape.fields, width, bias=False) for before, width in itertools.pairwise(widths)
        )
        self.sums = nn.Linear(sum(maps), shape.outputs, bias=False)

    @property
    def tower(self) -> MLP:
        return self.deep

    @property
    def base(self) -> nn.Parameter:
        return self.linear.bias

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        fields = x = vectors.transpose(1, 2)  # (B, D, F)
        sums = []
        for layer in self.project:
            x = layer((x.unsqueeze(3) * fields.unsqueeze(2)).flatten(2))  # (B, D, maps)
            sums.append(x.sum(1))
        compressed = self.sums(torch.cat(sums, 1))
        out: Tensor = self.linear(first, vectors, dense) + compressed + self.deep(first, vectors, dense)
        return out


class DCNv2(Network):
    """Cross layers, each multiplying by what came in once more, then hidden ReLU layers: the stacked form.

    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, x_0 the embeddings and numerics.

    Source:
        Wang et al. 2021 (WWW), arXiv 2008.13535, equation 1 and figure 1a.

    Differs from the source:
        W_l is of full rank; neither low rank nor a mixture of experts.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        width = shape.fields * shape.dim + shape.numerics
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(shape.cross))
        self.deep = MLP(shape)

    @property
    def tower(self) -> MLP:
        return self.deep

    def forward(self, _first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        given = x = torch.cat((vectors.flatten(1), dense), 1)  # (B, F*D + N)
        for layer in self.cross:
            x = given * layer(x) + x
        return self.deep.of(x)


MODELS: dict[str, type[Network]] = {
    "logistic": Logistic,
    "fm": FM,
    "ffm": FFM,
    "mlp": MLP,
    "deepfm": DeepFM,
    "dcnv2": DCNv2,
}
"""Those that a shape is enough for."""


def build_model(config: Config, layout: Layout) -> Network:
    """The configured model, freshly initialised from the seed alone.

    Raises:
        ConfigError: a model of the user's can't be had, or doesn't keep the contract; see `streamcl.models.own`.
    """
    model = config.model
    shape = Shape(
        *(len(layout.fields), model.embedding_dim, len(layout.numerics), config.heads, model.hidden),
        *(model.layer_norm, model.cross_layers, layout.fields, layout.numerics, tuple(layout.slot_field.tolist())),
        1 + len(config.tasks),
    )
    if ":" in model.kind:
        return own.build(model.kind, shape, model.options, config.seed)
    cell = None
    if model.kind == "recurrent":  # its cell draws its own weights
        cell = build_cell(model.recurrent, shape.fields * shape.dim + shape.numerics, config.seed)
    with torch.device("meta"):  # no draw from the global generator
        built = _built(model, shape) if cell is None else KeyStateModel(shape, cell, model.recurrent.timed)
    for name, param in list(built.named_parameters()):
        if param.is_meta:
            owner, _, attribute = name.rpartition(".")
            fresh = nn.Parameter(torch.empty_like(param, device="cpu"))
            setattr(built.get_submodule(owner), attribute, fresh)
            _initialise(name, fresh, config.seed)
    if model.prior is not None:
        with torch.no_grad():
            built.base[0] = math.log(model.prior / (1.0 - model.prior))
    return built


def _built(model: Model, shape: Shape) -> Network:
    match model.kind:
        case "xdeepfm":
            return XDeepFM(shape, model.xdeepfm.maps)
        case "autoint":
            return AutoInt(shape, model.autoint)
        case "din":
            return DIN(shape, model.din)
        case "two_tower":
            return TwoTower(shape, model.two_tower)
        case "shared_bottom" | "mmoe":
            return MultiTask(shape, model.multitask, model.multitask.experts if model.kind == "mmoe" else 1)
        case _:
            return MODELS[model.kind](shape)


GAINS = {"hidden": 6.0, "expert": 6.0, "cross": 3.0, "project": 3.0}


def _initialise(name: str, param: nn.Parameter, seed: int) -> None:
    """He's uniform initialisation of hidden weights, LeCun's of layers that cross or project; all else zero, so that
    the first scores are the prior.
    """
    gain = next((gain for part, gain in GAINS.items() if part in name), 0.0)
    bound = math.sqrt(gain / param.shape[1]) if name.endswith("weight") and param.numel() else 0.0
    draw = (2.0 * uniform_array(key_of(seed, f"model.{name}"), param.numel()) - 1.0) * bound
    with torch.no_grad():
        param.copy_(torch.from_numpy(draw).view_as(param))
