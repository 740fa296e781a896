"""The compiled learner of the plasticity bench: a ReLU net that learns one example at a time, by any of the methods.

Every draw is that of the product's rules (`streamcl.random`), and so is the order of what happens within a step:
forward, gradient, update, then what follows the step. Compiled apart from the product, it is compared with it in tests.

Shape:
    L layers of weights, at most O units and I inputs each: weights (L, O, I), biases (L, O), padded; what is kept by
    hidden unit (L - 1, O). One step of 784-100-100-100-10 takes about 15 µs, of 20-5-1 about .2 µs.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from streamcl.bench.plasticity_draws import GOLDEN, mixed, noise, uniform
from streamcl.bench.plasticity_state import Net, Rules, Units

_fast = numba.njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})

LAYER_NORM_EPSILON = 1e-5


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
        elif rules.redo_every:
            _recycle(net, rules, units, step + t + 1)
        elif rules.silence:
            _end_silences(net, rules, units, step + t + 1)


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
    sharp = 1.0 / ((1.0 - rules.upgd_decay ** (step + 1)) * max(float(most), 1e-300))  # none useful: none kept
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
            unit = units.chosen[layer, n]
            if rules.bias_transfer:
                _transfer(net, rules, units, layer, unit)
            _renew(net, rules, units, layer, unit)
            units.age[layer, unit] = 0
            units.mean_abs[layer, unit] = units.mean[layer, unit] = 0


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
def _transfer(net: Net, rules: Rules, units: Units, layer: int, unit: int) -> None:
    """What a unit has contributed on average moves into the biases of the next layer."""
    mean = units.mean[layer, unit] / (1.0 - rules.decay ** units.age[layer, unit])
    for k in range(net.widths[layer + 2]):
        net.biases[layer + 1, k] += net.weights.dtype.type(mean * net.weights[layer + 1, k, unit])


@_fast
def _renew(net: Net, rules: Rules, units: Units, layer: int, unit: int) -> None:
    """Incoming weights drawn anew, bias and outgoing weights 0."""
    inputs, nexts = net.widths[layer], net.widths[layer + 2]
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
    units.replaced[layer] += 1


@_fast
def _renew_chosen(net: Net, rules: Rules, units: Units) -> None:
    """The units in `chosen`, `due` of each layer, front to back."""
    for layer in range(len(units.age)):
        for n in range(units.due[layer]):
            _renew(net, rules, units, layer, units.chosen[layer, n])


@_fast
def _recycle(net: Net, rules: Rules, units: Units, step: int) -> None:
    """ReDo: every so often, units that say next to nothing beside the others of their layer; step is 1, 2, ..."""
    for layer in range(len(units.age)):
        for i in range(net.widths[layer + 1]):
            units.mean_abs[layer, i] += abs(net.values[layer + 1, i])
    if step % rules.redo_every:
        return
    for layer in range(len(units.age)):
        width = net.widths[layer + 1]
        total = 0.0
        for i in range(width):
            total += units.mean_abs[layer, i]
        units.due[layer] = 0
        for i in range(width):
            if units.mean_abs[layer, i] <= rules.redo_tau * (total / width):
                units.chosen[layer, units.due[layer]] = i
                units.due[layer] += 1
    _renew_chosen(net, rules, units)
    units.mean_abs[:] = 0


@_fast
def _end_silences(net: Net, rules: Rules, units: Units, step: int) -> None:
    """Self-normalised resets: units silent for longer than they used to be; step is 1, 2, ..."""
    due_in_all = 0
    for layer in range(len(units.age)):
        units.due[layer] = 0
        for i in range(net.widths[layer + 1]):
            if net.values[layer + 1, i] > 0:
                if units.age[layer, i]:
                    _note_silence(units, layer, i)
                continue
            units.age[layer, i] += 1
            if units.age[layer, i] >= units.threshold[layer, i]:
                _note_silence(units, layer, i)
                units.chosen[layer, units.due[layer]] = i
                units.due[layer] += 1
        due_in_all += units.due[layer]
    if due_in_all:
        _renew_chosen(net, rules, units)
    if step % rules.revisit == 0:
        for layer in range(len(units.age)):
            for i in range(net.widths[layer + 1]):
                _move_threshold(rules, units, layer, i)


@_fast
def _note_silence(units: Units, layer: int, unit: int) -> None:
    """It is over: count it."""
    place = 0
    while place < len(units.bins) - 1 and units.bins[place] < units.age[layer, unit]:
        place += 1
    units.histogram[layer, unit, place] += 1
    units.age[layer, unit] = 0


@_fast
def _move_threshold(rules: Rules, units: Units, layer: int, unit: int) -> None:
    """To the percentile of the silences, if that is lower; else wider. A unit never silent keeps it."""
    total = units.histogram[layer, unit].sum()
    if not total:
        return
    place, counted = 0, units.histogram[layer, unit, 0]
    while counted < rules.percentile * total:
        place += 1
        counted += units.histogram[layer, unit, place]
    threshold = units.threshold[layer, unit]
    moved = units.bins[place] if units.bins[place] < threshold else int(threshold * rules.expansion)
    units.threshold[layer, unit] = min(max(moved, rules.shortest), rules.longest)
    units.histogram[layer, unit] = 0
