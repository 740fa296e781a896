"""Built-in models: from pooled rows of the table to raw outputs.

Shape of every model's `forward`: first (B, F, O) first-order weights, vectors (B, F, D) embeddings, dense (B, N)
standardised numerics; returns (B, O) logits, or standardised values for regression. `first_order` and `embedding`
say which of the two a model reads, and so what a row of the table holds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from streamcl.config import Config
from streamcl.features import Layout
from streamcl.random import key_of, uniform_array


class Logistic(nn.Module):
    """A linear model on one weight per category and output: the baseline that is hard to beat on ids alone."""

    first_order, embedding = True, False

    def __init__(self, fields: int, dim: int, numerics: int, outputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.dense = nn.Linear(numerics, outputs)

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        out: Tensor = first.sum(1) + self.dense(dense)  # (B, O)
        return out


class MLP(nn.Module):
    """Embeddings and numerics through hidden ReLU layers."""

    first_order, embedding = False, True

    def __init__(self, fields: int, dim: int, numerics: int, outputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        widths = (fields * dim + numerics, *hidden)
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, hidden, strict=False))
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        h = torch.cat((vectors.flatten(1), dense), 1)  # (B, F*D + N)
        for layer in self.hidden:
            h = torch.relu(layer(h))
        out: Tensor = self.head(h)
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

    def __init__(self, fields: int, dim: int, numerics: int, outputs: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = Logistic(fields, dim, numerics, outputs, hidden)
        self.deep = MLP(fields, dim, numerics, outputs, hidden)
        self.pairs = nn.Linear(dim, outputs, bias=False) if outputs > 1 else None

    def forward(self, first: Tensor, vectors: Tensor, dense: Tensor) -> Tensor:
        total = vectors.sum(1)  # (B, D)
        products = 0.5 * (total * total - (vectors * vectors).sum(1))  # (B, D), eq. 2 by the sum-of-squares identity
        pairs = self.pairs(products) if self.pairs is not None else products.sum(1, keepdim=True)
        out: Tensor = self.linear(first, vectors, dense) + pairs + self.deep(first, vectors, dense)
        return out


MODELS: dict[str, type[Logistic] | type[MLP] | type[DeepFM]] = {"logistic": Logistic, "mlp": MLP, "deepfm": DeepFM}


def build_model(config: Config, layout: Layout) -> Logistic | MLP | DeepFM:
    """The configured model, freshly initialised from the seed alone."""
    kind = MODELS[config.model.kind]
    model = kind(
        len(layout.fields), config.model.embedding_dim, len(layout.numerics), config.outputs, config.model.hidden
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            output_layer = name.split(".")[-1] in ("head", "dense", "pairs")
            _initialise(module, key_of(config.seed, f"model.{name}"), output_layer)
    return model.requires_grad_(True)


def _initialise(layer: nn.Linear, key: int, output_layer: bool) -> None:
    """He's uniform initialisation; zero biases; an output layer starts at zero, so that the first scores are the prior."""
    with torch.no_grad():
        bound = 0.0 if output_layer else math.sqrt(6.0 / max(layer.in_features, 1))
        draw = (2.0 * uniform_array(key, layer.weight.numel()) - 1.0) * bound
        layer.weight.copy_(torch.from_numpy(draw).view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.zero_()
