"""The hidden layers of a module: whose units may be made anew, and what they say while a step is computed."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from streamcl.protocols import StreamclError

if TYPE_CHECKING:
    from streamcl.models.tower import MLP

WEIGHT_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)

UNITWISE_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.ReLU6, nn.PReLU),
    *(nn.Tanh, nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Flatten, *NORMS),
)
"""What keeps one unit apart from the next; a norm over units moves the others a little when one is made anew."""
UNITWISE_FUNCTIONS: set[Any] = {
    *(torch.relu, torch.tanh, torch.sigmoid, torch.flatten, functional.relu, functional.leaky_relu, functional.elu),
    *(functional.selu, functional.gelu, functional.silu, functional.mish, functional.softplus, functional.tanh),
    *(functional.sigmoid, functional.hardtanh, functional.dropout, functional.layer_norm, functional.max_pool1d),
    *(functional.max_pool2d, functional.avg_pool1d, functional.avg_pool2d, functional.adaptive_avg_pool2d),
}
UNITWISE_METHODS = {"relu", "relu_", "tanh", "sigmoid", "flatten", "contiguous"}


class LayerError(StreamclError):
    """Hidden layers that can't be found, or named ones that don't fit. The text names the module."""


@dataclass(frozen=True, slots=True)
class Hidden:
    """One hidden layer, by the names of modules.

    Args:
        incoming: The layer whose rows (filters) are the units' incoming weights.
        outgoing: The layers that read the units; S columns each for one unit (a kernel, or a position of a map).
        norms: Normalisations in between, with parameters of their own.
        units: n, how many units.
    """

    incoming: str
    outgoing: tuple[str, ...]
    norms: tuple[str, ...]
    units: int


def find(module: nn.Module) -> list[Hidden]:
    """The hidden layers of a module, in the order of its computation.

    A unit is an output of a linear or convolutional layer that reaches other such layers, and nothing else, through
    activations, pooling, norms, dropout and flattening. So the output, residual streams, what is concatenated, and
    layers that are used twice are none.

    While torch.fx follows the module, it stands in for `nn.Module.__call__` of the whole process: call this before
    other threads use any module. The built-in models need none of it, see `of_tower`.

    Raises:
        LayerError: torch.fx can't follow the module (control flow that depends on data): its layers must be named.
    """
    try:
        graph = fx.Tracer().trace(module)
    except Exception as error:  # whatever the module's own code makes of a proxy
        raise LayerError(f"the hidden layers of {type(module).__name__} can't be found ({error}); name them") from error
    modules = dict(module.named_modules())
    uses = Counter(node.target for node in graph.nodes if node.op == "call_module")
    found = []
    for node in graph.nodes:
        if not _is_weight_layer(node, modules) or uses[node.target] > 1:
            continue
        outgoing: list[str] = []
        norms: list[str] = []
        if _follow(node, modules, outgoing, norms) and all(uses[name] == 1 for name in (*outgoing, *norms)):
            found.append(named(module, str(node.target), outgoing, norms))
    return found


def of_tower(module: nn.Module, tower: MLP | None) -> list[Hidden]:
    """The hidden layers of a built-in model, by its tower."""
    if tower is None:
        return []
    names = {id(part): name for name, part in module.named_modules()}
    stack = [names[id(layer)] for layer in (*tower.hidden, tower.head)]
    return [named(module, incoming, [outgoing]) for incoming, outgoing in itertools.pairwise(stack)]


def of_towers(module: nn.Module, towers: Sequence[MLP]) -> list[Hidden]:
    """Of all of them, one tower after the other."""
    return [layer for tower in towers for layer in of_tower(module, tower)]


def among(layers: Sequence[Hidden], pairs: Sequence[tuple[str, str]]) -> list[int]:
    """The places of some of a model's layers, by the names of each and of one that reads it. LayerError: no such."""
    known = {(layer.incoming, reader): place for place, layer in enumerate(layers) for reader in layer.outgoing}
    for pair in pairs:
        if pair not in known:
            there = ", ".join(f"({a!r}, {b!r})" for a, b in known) or "none"
            raise LayerError(f"layers: {pair} is no hidden layer of the model and its reader; there are {there}")
    return sorted({known[pair] for pair in pairs})


def named(module: nn.Module, incoming: str, outgoing: Sequence[str], norms: Sequence[str] = ()) -> Hidden:
    """A hidden layer that a user names. Raises LayerError for what is not there or doesn't fit."""
    modules = dict(module.named_modules())
    for name in (incoming, *outgoing):
        if not isinstance(modules.get(name), WEIGHT_LAYERS):
            known = ", ".join(n for n, m in modules.items() if isinstance(m, WEIGHT_LAYERS)) or "none"
            raise LayerError(f"{name!r} is no linear or convolutional layer of the model; it has {known}")
        if getattr(modules[name], "groups", 1) != 1:
            raise LayerError(f"{name!r}: grouped convolutions have no units of their own")
    units = len(modules[incoming].get_parameter("weight"))
    for name in outgoing:
        inputs = modules[name].get_parameter("weight").shape[1]
        if not inputs or inputs % units or (inputs != units and not isinstance(modules[name], nn.Linear)):
            raise LayerError(f"{name!r} reads {inputs} inputs, {incoming!r} has {units} units")
    return Hidden(incoming, tuple(outgoing), tuple(norms), units)


def _is_weight_layer(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    return isinstance(module, WEIGHT_LAYERS) and getattr(module, "groups", 1) == 1


def _follow(node: fx.Node, modules: dict[str, nn.Module], outgoing: list[str], norms: list[str]) -> bool:
    """Collect what reads a node; False when anything does that units can't be told apart in."""
    if not node.users:
        return False
    for user in node.users:
        if user.args[:1] != (node,):  # as another argument it is no input that units keep their place in
            return False
        if _is_weight_layer(user, modules):
            outgoing.append(str(user.target))
            continue
        if not _unitwise(user, modules):
            return False
        if user.op == "call_module" and isinstance(modules[str(user.target)], NORMS):
            norms.append(str(user.target))
        if not _follow(user, modules, outgoing, norms):
            return False
    return True


def _unitwise(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], UNITWISE_MODULES)
    if node.op == "call_function":
        return node.target in UNITWISE_FUNCTIONS
    return node.op == "call_method" and node.target in UNITWISE_METHODS


_TAP = "_streamcl_tap"


class Tap:
    """Stands for a module's `forward` and keeps what enters it in a step; predictions are not listened to.

    A forward hook would take 13 us a layer, this 3. While nobody listens the module has its own `forward` back, and it
    costs nothing. A copy of the module gets a tap of its own.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.listeners = 0
        self.value: Tensor | None = None

    def __call__(self, value: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            self.value = value.detach()
        output: Tensor = type(self.module).forward(self.module, value)
        return output

    def listen(self, listening: bool) -> None:
        """One more listener, or one less."""
        self.listeners += 1 if listening else -1
        if self.listeners:
            vars(self.module)["forward"] = self  # past torch's own __setattr__, which is slow
        else:
            vars(self.module).pop("forward", None)


@contextmanager
def unheard(module: nn.Module) -> Iterator[None]:
    """What is computed here is not the step under way: taps keep what they have heard of that."""
    taps = [vars(part)[_TAP] for part in module.modules() if _TAP in vars(part)]
    values = [tap.value for tap in taps]
    try:
        yield
    finally:
        for tap, value in zip(taps, values, strict=True):
            tap.value = value


class Taps:
    """What the hidden units' values were in the last step, as the next layer received them.

    It listens from the beginning; several may listen to one layer, each to the steps that it wants.

    Args:
        layers: Those that are listened to, in the order of the computation.
        places: Their numbers in the model, which people see and draws are keyed by; 0, 1, ... if all are listened to.
    """

    def __init__(self, module: nn.Module, layers: Sequence[Hidden], places: Sequence[int] | None = None) -> None:
        self.layers = layers
        self.places = list(range(len(layers)) if places is None else places)
        self.taps = [_tap(module.get_submodule(layer.outgoing[0])) for layer in layers]
        self.listening = False
        self.listen(True)

    def listen(self, listening: bool) -> None:
        """Whether the steps to come are of interest; what others listen to stays."""
        if listening != self.listening:
            self.listening = listening
            for tap in self.taps:
                tap.listen(listening)

    def described(self) -> list[str]:
        """Which units they are: a state of other ones is of no use."""
        return [f"{layer.units} units: {layer.incoming} > {', '.join(layer.outgoing)}" for layer in self.layers]

    def vectors(self) -> list[Tensor]:
        """(B, n * S) of each layer. Raises LayerError before the first step."""
        values = [tap.value for tap in self.taps if tap.value is not None]
        if len(values) < len(self.taps):
            quiet = next(layer for layer, tap in zip(self.layers, self.taps, strict=True) if tap.value is None)
            raise LayerError(f"nothing has passed from {quiet.incoming!r} to {quiet.outgoing[0]!r} in a step yet")
        return values

    def __iter__(self) -> Iterator[Tensor]:
        """(B, n, S) of each layer: S positions of a map, 1 for a vector."""
        for layer, value in zip(self.layers, self.vectors(), strict=True):
            yield value.reshape(len(value), layer.units, -1)


def _tap(module: nn.Module) -> Tap:
    """The module's one tap, whoever asks."""
    tap = vars(module).setdefault(_TAP, Tap(module))
    assert isinstance(tap, Tap)  # noqa: S101 - nobody else writes there
    return tap
