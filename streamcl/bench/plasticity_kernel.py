"""The compiled learner of the plasticity bench: a ReLU net that learns one example at a time, by any of the methods.

Every draw is that of the product's rules (`streamcl.random`), and so is the order of what happens within a step:
forward, gradient, update, then what follows the step. Compiled apart from the product, it is compared with it in tests.

Shape:
    L layers of weights, at most O units and I inputs each: weights (L, O, I), biases (L, O), padded; what is kept by
    hidden unit (L - 1, O). One step of 784-100-100-100-10 takes about 15 µs, of 20-5-1 about .2 µs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numba
import numpy as np

_fast = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)
SPREAD = math.sqrt((65_536.0**2 - 1.0) / 3.0)  # standard deviation of a sum of four 16-bit numbers
LAYER_NORM_EPSILON = 1e-5


class Net(NamedTuple):
    """Weights, what they began as, and room for one example's values and gradients."""

    widths: Any  # (L + 1,) int64
    weights: Any  # (L, O, I)
    biases: Any  # (L, O)
    initial_weights: Any
    initial_biases: Any
    values: Any  # (L + 1, max) of the example: the input, then each layer's output
    deltas: Any  # (L, O) gradients of the loss at a layer's sums
    scales: Any  # (L,) of the layer norm: 1 / deviation
    back: Any  # (max,) room for gradients on their way back


class Rules(NamedTuple):
    """What a method does beside the gradient step; 0 switches a part off. Names as in the product's configuration."""

    classes: bool  # softmax cross-entropy instead of the squared error
    layer_norm: bool
    learning_rate: float
    l2: float
    l2_init: float
    noise: float  # sigma of shrink-and-perturb
    clipping: float  # zeta of weight clipping
    replacement_rate: float  # of continual backpropagation
    maturity: int
    decay: float
    bias_transfer: bool
    upgd: bool
    upgd_decay: float  # beta
    upgd_noise: float
    upgd_l2: float
    key: Any  # uint64, of the method's noise


class Units(NamedTuple):
    """What is known of hidden units, and of each layer of them."""

    age: Any  # (L - 1, O) int64 steps since the last reset
    mean_abs: Any  # (L - 1, O)
    mean: Any  # (L - 1, O)
    fired: Any  # (L - 1, O) int64: examples with a value above 0, since somebody set it to 0
    eligible_steps: Any  # (L - 1,) int64
    replaced: Any  # (L - 1,) int64
    due: Any  # (L - 1,) int64: how many begin anew in this step
    chosen: Any  # (L - 1, O) int64: which
    bases: Any  # (L - 1,) uint64: where the layer's redraws begin
    utility: Any  # (L, O, I) of UPGD
    bias_utility: Any  # (L, O)


@numba.njit(cache=True, nogil=True)
def mixed(z: Any) -> Any:
    """The finaliser of SplitMix64."""
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    return z ^ (z >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def uniform(base: Any, place: int) -> float:
    """Element `place` of `streamcl.random.uniform_array`; `base` is its mixed key."""
    z = mixed(base + np.uint64(place + 1) * GOLDEN)
    return (np.float64(z >> np.uint64(12)) + 0.5) * 2.0**-52


@numba.njit(cache=True, nogil=True)
def noise(base: Any, place: int) -> float:
    """Element `place` of `streamcl.random.noise_array`; `base` is its mixed key and step."""
    z = mixed(base + np.uint64(place + 1) * GOLDEN)
    low = np.uint64(0xFFFF)
    fields = (z & low) + ((z >> np.uint64(16)) & low) + ((z >> np.uint64(32)) & low) + (z >> np.uint64(48))
    return (np.float64(np.int64(fields)) - 131_070.0) / SPREAD


@_fast
def learn(
    net: Net, rules: Rules, units: Units, step: int, inputs: Any, scale: float, order: Any, columns: Any, targets: Any,
    losses: Any, hits: Any,
) -> None:  # fmt: skip
    """Test, then train, example by example; `step` were learned before.

    Example t is `scale * inputs[order[t], columns]`, its target `targets[order[t]]`: a value, or a class as a whole
    number. losses (n,) before learning: squared error, or cross-entropy in nats; hits (n,) of the largest output.
    """
    width = net.widths[0]
    factor = net.weights.dtype.type(scale)
    for t in range(len(order)):
        row = order[t]
        for k in range(width):
            net.values[0, k] = factor * inputs[row, columns[k]]
        _forward(net, rules.layer_norm)
        losses[t], hits[t] = _judge(net, rules.classes, targets[row])
        _backward(net, rules.layer_norm)
        for layer in range(len(units.fired)):
            for i in range(net.widths[layer + 1]):
                units.fired[layer, i] += net.values[layer + 1, i] > 0
        if rules.upgd:
            _protect(net, rules, units, step + t)
        elif rules.l2 or rules.l2_init:
            _descend_decayed(net, rules)
        else:
            _descend(net, rules)
        if rules.noise:
            _perturb(net, rules, step + t)
        if rules.clipping:
            _clip(net, rules)
        if rules.replacement_rate:
            _replace(net, rules, units)


@_fast
def _forward(net: Net, normalised: bool) -> None:
    last = len(net.weights) - 1
    zero = net.weights.dtype.type(0)
    for layer in range(last + 1):
        inputs, outputs = net.widths[layer], net.widths[layer + 1]
        for j in range(outputs):
            total = zero
            for k in range(inputs):
                total += net.weights[layer, j, k] * net.values[layer, k]
            net.values[layer + 1, j] = total + net.biases[layer, j]
        if layer < last:
            if normalised:
                _normalise(net, layer, outputs)
            for j in range(outputs):
                net.values[layer + 1, j] = max(net.values[layer + 1, j], zero)


@_fast
def _normalise(net: Net, layer: int, width: int) -> None:
    """Mean 0 and deviation 1; the sums stay in `deltas`, where the way back finds them."""
    mean = square = 0.0
    for j in range(width):
        mean += net.values[layer + 1, j]
    mean /= width
    for j in range(width):
        square += (net.values[layer + 1, j] - mean) ** 2
    net.scales[layer] = 1.0 / math.sqrt(square / width + LAYER_NORM_EPSILON)
    for j in range(width):
        net.values[layer + 1, j] = (net.values[layer + 1, j] - mean) * net.scales[layer]
        net.deltas[layer, j] = net.values[layer + 1, j]


@_fast
def _judge(net: Net, classes: bool, target: float) -> tuple[float, bool]:
    """The loss, whether the largest output is the target's, and the gradient at the outputs."""
    last = len(net.weights) - 1
    outputs = net.widths[last + 1]
    if not classes:
        error = net.values[last + 1, 0] - net.weights.dtype.type(target)
        net.deltas[last, 0] = error + error
        return float(error) ** 2, False
    label, best = int(target), 0
    for j in range(1, outputs):
        if net.values[last + 1, j] > net.values[last + 1, best]:
            best = j
    top, total = net.values[last + 1, best], net.weights.dtype.type(0)
    for j in range(outputs):
        net.deltas[last, j] = math.exp(net.values[last + 1, j] - top)
        total += net.deltas[last, j]
    for j in range(outputs):
        net.deltas[last, j] /= total
    loss = math.log(float(total)) - float(net.values[last + 1, label] - top)
    net.deltas[last, label] -= net.weights.dtype.type(1)
    return loss, best == label


@_fast
def _backward(net: Net, normalised: bool) -> None:
    """Gradients at the sums of every layer, from those at the outputs. Changes no weight."""
    zero = net.weights.dtype.type(0)
    for layer in range(len(net.weights) - 1, 0, -1):
        inputs, outputs = net.widths[layer], net.widths[layer + 1]
        below = layer - 1
        back = net.back
        for k in range(inputs):
            back[k] = zero
        for j in range(outputs):
            delta = net.deltas[layer, j]
            if delta != zero:
                for k in range(inputs):
                    back[k] += delta * net.weights[layer, j, k]
        for k in range(inputs):
            if not net.values[layer, k] > zero:
                back[k] = zero
        if normalised:
            mean = product = 0.0
            for k in range(inputs):
                mean += back[k]
                product += back[k] * net.deltas[below, k]
            mean, product = mean / inputs, product / inputs
            for k in range(inputs):
                net.deltas[below, k] = net.scales[below] * (back[k] - mean - net.deltas[below, k] * product)
        else:
            for k in range(inputs):
                net.deltas[below, k] = back[k]


@_fast
def _descend(net: Net, rules: Rules) -> None:
    """w <- w - lr g. A unit without a gradient keeps its weights as they are."""
    rate, zero = net.weights.dtype.type(rules.learning_rate), net.weights.dtype.type(0)
    for layer in range(len(net.weights)):
        for j in range(net.widths[layer + 1]):
            change = rate * net.deltas[layer, j]
            if change != zero:
                for k in range(net.widths[layer]):
                    net.weights[layer, j, k] -= change * net.values[layer, k]
                net.biases[layer, j] -= change


@_fast
def _descend_decayed(net: Net, rules: Rules) -> None:
    """w <- w - lr (g + l2 w + l2_init (w - w0))."""
    rate = net.weights.dtype.type(rules.learning_rate)
    pull, home = net.weights.dtype.type(rules.l2 + rules.l2_init), net.weights.dtype.type(rules.l2_init)
    for layer in range(len(net.weights)):
        for j in range(net.widths[layer + 1]):
            delta = net.deltas[layer, j]
            for k in range(net.widths[layer]):
                weight = net.weights[layer, j, k]
                gradient = delta * net.values[layer, k]
                gradient += pull * weight - home * net.initial_weights[layer, j, k]
                net.weights[layer, j, k] = weight - rate * gradient
            bias = net.biases[layer, j]
            net.biases[layer, j] = bias - rate * (delta + pull * bias - home * net.initial_biases[layer, j])


@_fast
def _perturb(net: Net, rules: Rules, step: int) -> None:
    """w <- w + sigma xi, of all parameters end to end: a layer's weights, then its biases."""
    base = mixed(np.uint64(rules.key) + np.uint64(step) * GOLDEN)
    sigma, place = rules.noise, 0
    for layer in range(len(net.weights)):
        inputs, outputs = net.widths[layer], net.widths[layer + 1]
        for j in range(outputs):
            for k in range(inputs):
                net.weights[layer, j, k] += net.weights.dtype.type(sigma * noise(base, place + k))
            place += inputs
        for j in range(outputs):
            net.biases[layer, j] += net.weights.dtype.type(sigma * noise(base, place + j))
        place += outputs


@_fast
def _clip(net: Net, rules: Rules) -> None:
    """No weight and no bias is further from 0 than zeta / sqrt(fan_in)."""
    for layer in range(len(net.weights)):
        inputs, outputs = net.widths[layer], net.widths[layer + 1]
        bound = net.weights.dtype.type(rules.clipping / math.sqrt(inputs))
        for j in range(outputs):
            for k in range(inputs):
                net.weights[layer, j, k] = min(max(net.weights[layer, j, k], -bound), bound)
            net.biases[layer, j] = min(max(net.biases[layer, j], -bound), bound)


@_fast
def _protect(net: Net, rules: Rules, units: Units, step: int) -> None:
    """UPGD: the more useful a weight is, beside the most useful of all, the less it is moved and perturbed."""
    beta = net.weights.dtype.type(rules.upgd_decay)
    fresh = net.weights.dtype.type(1.0 - rules.upgd_decay)
    most = net.weights.dtype.type(-np.inf)
    for layer in range(len(net.weights)):
        for j in range(net.widths[layer + 1]):
            delta = net.deltas[layer, j]
            for k in range(net.widths[layer]):
                gradient = delta * net.values[layer, k]
                utility = beta * units.utility[layer, j, k] - fresh * gradient * net.weights[layer, j, k]
                units.utility[layer, j, k] = utility
                most = max(most, utility)
            utility = beta * units.bias_utility[layer, j] - fresh * delta * net.biases[layer, j]
            units.bias_utility[layer, j] = utility
            most = max(most, utility)
    base = mixed(np.uint64(rules.key) + np.uint64(step) * GOLDEN)
    sharp = 1.0 / ((1.0 - rules.upgd_decay ** (step + 1)) * most)
    keep, place = 1.0 - rules.learning_rate * rules.upgd_l2, 0
    for layer in range(len(net.weights)):
        inputs, outputs = net.widths[layer], net.widths[layer + 1]
        for j in range(outputs):
            for k in range(inputs):
                gradient = net.deltas[layer, j] * net.values[layer, k] + rules.upgd_noise * noise(base, place + k)
                open = 1.0 / (1.0 + math.exp(sharp * units.utility[layer, j, k]))  # 1 - sigmoid
                net.weights[layer, j, k] = keep * net.weights[layer, j, k] - rules.learning_rate * gradient * open
            place += inputs
        for j in range(outputs):
            gradient = net.deltas[layer, j] + rules.upgd_noise * noise(base, place + j)
            open = 1.0 / (1.0 + math.exp(sharp * units.bias_utility[layer, j]))
            net.biases[layer, j] = keep * net.biases[layer, j] - rules.learning_rate * gradient * open
        place += outputs


@_fast
def _replace(net: Net, rules: Rules, units: Units) -> None:
    """Continual backpropagation: count, choose in every layer, then begin anew, front to back."""
    decay = net.weights.dtype.type(rules.decay)
    fresh = net.weights.dtype.type(1.0 - rules.decay)
    due_in_all = 0
    for layer in range(len(units.age)):
        eligible = 0
        for i in range(net.widths[layer + 1]):
            value = net.values[layer + 1, i]
            units.age[layer, i] += 1
            units.mean_abs[layer, i] = decay * units.mean_abs[layer, i] + fresh * abs(value)
            units.mean[layer, i] = decay * units.mean[layer, i] + fresh * value
            eligible += units.age[layer, i] > rules.maturity
        units.eligible_steps[layer] += eligible
        due = math.floor(rules.replacement_rate * units.eligible_steps[layer]) - units.replaced[layer]
        units.due[layer] = min(due, eligible)
        due_in_all += units.due[layer]
    if not due_in_all:
        return
    for layer in range(len(units.age)):
        for n in range(units.due[layer]):
            units.chosen[layer, n] = _least_useful(net, rules, units, layer, n)
    for layer in range(len(units.age)):
        for n in range(units.due[layer]):
            _renew(net, rules, units, layer, units.chosen[layer, n])


@_fast
def _least_useful(net: Net, rules: Rules, units: Units, layer: int, before: int) -> int:
    """The mature unit of least utility that is not among the `before` chosen ones; the first of equals."""
    least, which = np.inf, -1
    for i in range(net.widths[layer + 1]):
        if units.age[layer, i] <= rules.maturity:
            continue
        taken = False
        for n in range(before):
            taken |= units.chosen[layer, n] == i
        if taken:
            continue
        reach = 0.0
        for k in range(net.widths[layer + 2]):
            reach += abs(net.weights[layer + 1, k, i])
        utility = units.mean_abs[layer, i] / (1.0 - rules.decay ** units.age[layer, i]) * reach
        if utility < least or which < 0:
            least, which = utility, i
    return which


@_fast
def _renew(net: Net, rules: Rules, units: Units, layer: int, unit: int) -> None:
    inputs, nexts = net.widths[layer], net.widths[layer + 2]
    if rules.bias_transfer:
        mean = units.mean[layer, unit] / (1.0 - rules.decay ** units.age[layer, unit])
        for k in range(nexts):
            net.biases[layer + 1, k] += net.weights.dtype.type(mean * net.weights[layer + 1, k, unit])
    bound = math.sqrt(6.0 / inputs)
    start = units.replaced[layer] * inputs
    for k in range(inputs):
        weight = net.weights.dtype.type((2.0 * uniform(units.bases[layer], start + k) - 1.0) * bound)
        net.weights[layer, unit, k] = net.initial_weights[layer, unit, k] = weight
    net.biases[layer, unit] = net.initial_biases[layer, unit] = 0
    for k in range(nexts):
        net.weights[layer + 1, k, unit] = net.initial_weights[layer + 1, k, unit] = 0
    if rules.upgd:
        units.utility[layer, unit] = 0
        units.utility[layer + 1, :, unit] = 0
        units.bias_utility[layer, unit] = 0
    units.age[layer, unit] = 0
    units.mean_abs[layer, unit] = units.mean[layer, unit] = 0
    units.replaced[layer] += 1
