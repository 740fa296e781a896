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


class DeepFM(nn.Module):
    """First-order weights + pairwise interactions + a deep part, on shared embeddings.

    Source:
        Guo et al. 2017, arXiv 1703.04247, equations 1 to 4.

    Differs from the source:
        Numerics enter the deep part and the linear part, not the pairwise one. With several outputs the pairwise part
        keeps its D products, projected to the outputs, for their sum would be the same for every class.
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
        total = vectors.sum(1)  # (B, D)
        products = 0.5 * (total * total - (vectors * vectors).sum(1))  # (B, D), eq. 2 by the sum-of-squares identity
        pairs = self.pairs(products) if self.pairs is not None else products.sum(1, keepdim=True)
        out: Tensor = self.linear(first, vectors, dense) + pairs + self.deep(first, vectors, dense)
        return out


MODELS: dict[str, type[Logistic] | type[MLP] | type[DeepFM]] = {"logistic": Logistic, "mlp": MLP, "deepfm": DeepFM}


Built = Logistic | MLP | DeepFM | KeyStateModel


def build_model(config: Config, layout: Layout) -> Built:
    """The configured model, freshly initialised from the seed alone."""
    sizes = len(layout.fields), config.model.embedding_dim, len(layout.numerics), config.outputs
    shape = Shape(*sizes, config.model.hidden, config.model.layer_norm)
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
    """He's uniform initialisation of hidden weights; all else zero, so that the first scores are the prior."""
    hidden_weight = "hidden" in name and name.endswith("weight")
    bound = math.sqrt(6.0 / param.shape[1]) if hidden_weight and param.numel() else 0.0
    draw = (2.0 * uniform_array(key_of(seed, f"model.{name}"), param.numel()) - 1.0) * bound
    with torch.no_grad():
        param.copy_(torch.from_numpy(draw).view_as(param))
