"""Built-in models: from pooled rows of the table to raw outputs.

Shape of every model's `forward`: first (B, F, O) first-order weights, vectors (B, F, D) embeddings, dense (B, N)
standardised numerics; returns (B, O) logits, or standardised values for regression. `first_order` and `embedding`
say which of the two a model reads, and so what a row of the table holds. `tower` is its hidden layers, if it has any.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from streamcl.config import Config
from streamcl.features import Layout
from streamcl.models.key_state import KeyStateModel, build_cell
from streamcl.models.tower import MLP, Shape
from streamcl.random import key_of, uniform_array


class Logistic(nn.Module):
    """A linear model on one weight per category and output: the baseline that is hard to beat on ids alone."""

    first_order, embedding = True, False
    tower: MLP | None = None

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape.outputs, shape.numerics))
        self.bias = nn.Parameter(torch.zeros(shape.outputs))

    def forward(self, first: Tensor, _vectors: Tensor, dense: Tensor) -> Tensor:
        out: Tensor = first.sum(1) + functional.linear(dense, self.weight, self.bias)  # (B, O)
        return out


class FM(nn.Module):
    """A factorisation machine: first-order weights + interactions of all pairs of fields, on their embeddings.

    Source:
        Rendle 2010 (ICDM), equation 1; lemma 3.1 for the sum over pairs.

    Differs from the source:
        Numerics enter the linear part, not the pairs. With several outputs the pairs keep their D products, projected
        to the outputs, for their sum would be the same for every class.
    """

    first_order, embedding = True, True
    tower: MLP | None = None

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.linear = Logistic(shape)
        self.pairs = nn.Linear(shape.dim, shape.outputs, bias=False) if shape.outputs > 1 else None

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        out: Tensor = self.linear(first, vectors, dense) + pairwise(vectors, self.pairs)
        return out


def pairwise(vectors: Tensor, projection: nn.Linear | None) -> Tensor:
    """(B, O) of embeddings (B, F, D): the sum over all pairs of fields of their products, by the sum of squares."""
    total = vectors.sum(1)  # (B, D)
    products = 0.5 * (total * total - (vectors * vectors).sum(1))
    return products.sum(1, keepdim=True) if projection is None else projection(products)


class DeepFM(nn.Module):
    """A factorisation machine + a deep part, on shared embeddings.

    Source:
        Guo et al. 2017, arXiv 1703.04247, equations 1 to 4.

    Differs from the source:
        As `FM` does.
    """

    first_order, embedding = True, True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.linear = Logistic(shape)
        self.deep = MLP(shape)
        self.pairs = nn.Linear(shape.dim, shape.outputs, bias=False) if shape.outputs > 1 else None

    @property
    def tower(self) -> MLP:
        return self.deep

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        pairs = pairwise(vectors, self.pairs)
        out: Tensor = self.linear(first, vectors, dense) + pairs + self.deep(first, vectors, dense)
        return out


class DCNv2(nn.Module):
    """Cross layers, each multiplying by what came in once more, then hidden ReLU layers: the stacked form.

    x_{l+1} = x_0 * (W_l x_l + b_l) + x_l, x_0 the embeddings and numerics.

    Source:
        Wang et al. 2021 (WWW), arXiv 2008.13535, equation 1 and figure 1a.

    Differs from the source:
        W_l is of full rank; neither low rank nor a mixture of experts.
    """

    first_order, embedding = False, True

    def __init__(self, shape: Shape) -> None:
        super().__init__()
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


Built = Logistic | FM | MLP | DeepFM | DCNv2 | KeyStateModel

MODELS: dict[str, type[Logistic] | type[FM] | type[MLP] | type[DeepFM] | type[DCNv2]] = {
    "logistic": Logistic,
    "fm": FM,
    "mlp": MLP,
    "deepfm": DeepFM,
    "dcnv2": DCNv2,
}


def build_model(config: Config, layout: Layout) -> Built:
    """The configured model, freshly initialised from the seed alone."""
    sizes = len(layout.fields), config.model.embedding_dim, len(layout.numerics), config.outputs
    shape = Shape(*sizes, config.model.hidden, config.model.layer_norm, config.model.cross_layers)
    cell = None
    if config.model.kind == "recurrent":  # its cell draws its own weights
        cell = build_cell(config.model.recurrent, shape.fields * shape.dim + shape.numerics, config.seed)
    with torch.device("meta"):  # no draw from the global generator
        model: Built
        if cell is None:
            model = MODELS[config.model.kind](shape)
        else:
            model = KeyStateModel(shape, cell, config.model.recurrent.timed)
    for name, param in list(model.named_parameters()):
        if param.is_meta:
            owner, _, attribute = name.rpartition(".")
            fresh = nn.Parameter(torch.empty_like(param, device="cpu"))
            setattr(model.get_submodule(owner), attribute, fresh)
            _initialise(name, fresh, config.seed)
    return model


def _initialise(name: str, param: nn.Parameter, seed: int) -> None:
    """He's uniform initialisation of hidden weights, LeCun's of cross layers'; all else zero, so that the first scores
    are the prior.
    """
    gain = 6.0 if "hidden" in name else 3.0 if "cross" in name else 0.0
    bound = math.sqrt(gain / param.shape[1]) if name.endswith("weight") and param.numel() else 0.0
    draw = (2.0 * uniform_array(key_of(seed, f"model.{name}"), param.numel()) - 1.0) * bound
    with torch.no_grad():
        param.copy_(torch.from_numpy(draw).view_as(param))
