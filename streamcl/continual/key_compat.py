"""Keys that stay comparable while the weights move: what was stored is moved after them, or they are held to it.

Keys are what entered the model's last layer: of the error memory's records (kind `knn`, key `hidden`), and of the
replay memory's rows (column `hidden`).
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from streamcl.memory.forms import KNN
from streamcl.plugin import Context, PluginError, Rule, Shape, Step, Term
from streamcl.protocols import State
from streamcl.random import bits, uniform_array
from streamcl.records import Encoded, Signal
from streamcl.stations import Stop

Floats = NDArray[np.float64]


def old_to_new(old: Floats, new: Floats, ridge: float) -> tuple[Floats, Floats]:
    """The map x -> linear @ x + shift that takes old (n, d) to new (n, d) with the least squares, drawn to x -> x.

    Minimises mean |linear x + shift - y|^2 + ridge x v x |linear - 1|^2, v the mean variance of an old number.
    """
    centre_old, centre_new = old.mean(0), new.mean(0)
    x, y = old - centre_old, new - centre_new
    count, width = x.shape
    pull = (ridge * x.var(0).mean() + 1e-12) * np.eye(width)
    linear = np.linalg.solve(x.T @ x / count + pull, x.T @ y / count + pull).T
    return linear, centre_new - linear @ centre_old


class DriftCompensation(Rule):
    """Moves stored hidden vectors after the model: at signals and every `every` steps a map old -> new is fitted.

    It is fitted to `rows` rows of the replay memory, whose stored vector is the old one, and which the model reads
    again for the new one. Then every stored vector is moved by it. What was written since the last fit has only part of
    the way to go, in proportion to its age. One fit costs `rows` forward passes, O(rows x H^2 + H^3), and O(H^2) for
    each row of the replay memory and each record of the error memory; between two fits nothing.

    Source:
        GCAB, Cotogni et al. 2022, arXiv 2211.12292, section 3.3: feature drift compensation by a projection of the old
        features onto the new, learned at the end of a task; after Yu et al. 2020 (CVPR), arXiv 2004.00440.

    Differs from the source:
        Least squares in closed form, with an affine map drawn to the identity, instead of a trained projection; fitted
        to replayed rows, for the paper keeps none. No gated class attention. Keys that wait in tickets are not moved.
    """

    class Options(Rule.Options):
        kind: Literal["drift_compensation"] = "drift_compensation"
        on: tuple[str, ...] = Stop(("boundary",), description="signals that bring a fit")
        every: int = Stop(500, ge=0, description="steps from one fit to the next; 0: at signals alone")
        rows: int = Stop(256, ge=2, description="of the replay memory, that a map is fitted to (count)")
        least: int = Stop(32, ge=2, description="with fewer rows held no map is fitted (count)")
        ridge: float = Stop(0.01, ge=0, description="pull of the map to the identity, in variances of a number")

    options: Options
    needs = frozenset({"hidden", "written"})

    def bind(self, context: Context) -> None:
        if not context.engine.widths[1]:
            raise PluginError(f"plugins: {self.kind}: model {context.config.model.kind} has no hidden layer")
        if not context.memory.capacity:
            raise PluginError(f"plugins: {self.kind}: there are no rows to fit to; set replay.retention")
        super().bind(context)
        self.key = context.key("drift_compensation.rows")
        stages = context.errors.keyed_by("hidden")
        self.forms = [stage.form for stage in stages if isinstance(stage.form, KNN)]
        self._begin()

    def _begin(self) -> None:
        self.called, self.steps, self.last, self.fits = False, 0, 0, 0
        self.written = [0 for _ in self.forms]  # records of the error memory, at the last fit
        self.error = 1.0  # what the last fit left of the drift, mean square by mean square

    def on_signal(self, signal: Signal) -> None:
        self.called = self.called or signal.kind in self.options.on

    def after(self, step: Step) -> None:
        self.steps = step.number + 1
        due = self.options.every and self.steps - self.last >= self.options.every
        if (due or self.called) and len(self.context.memory) >= self.options.least:
            self._move()

    def _move(self) -> None:
        """One fit, and everything moved by it."""
        memory, size = self.context.memory, len(self.context.memory)
        hidden, age = memory.columns["hidden"], self.steps - memory.columns["written"][:size]
        share = np.clip(age / max(self.steps - self.last, 1), 0.0, 1.0)
        index = self._sample(share)
        old, new = (each.astype(np.float64) for each in (hidden[index], self.again(index)))
        linear, shift = old_to_new(old, new, self.options.ridge)
        self.error = float(((old @ linear.T + shift - new) ** 2).sum() / max(((old - new) ** 2).sum(), 1e-12))
        stored = hidden[:size].astype(np.float64)
        hidden[:size] = stored + share[:, None] * (stored @ linear.T + shift - stored)
        for place, form in enumerate(self.forms):
            self._move_records(place, form, linear, shift)
        self.last, self.called, self.fits = self.steps, False, self.fits + 1

    def _sample(self, share: Floats) -> NDArray[np.int64]:
        """Rows that have gone all the way, as far as there are enough; else the oldest."""
        order = np.argsort(-share, kind="stable")
        whole = order[: max(int((share >= 1.0).sum()), self.options.least)]
        lots = uniform_array(bits(self.key, self.steps), len(whole))
        return np.asarray(whole[np.argsort(lots, kind="stable")[: self.options.rows]], np.int64)

    def again(self, index: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n, H) what the live weights make of these rows."""
        rows = self.context.rows(self.context.memory, torch.from_numpy(index))
        found: NDArray[np.float32] = self.context.engine.out(rows).hidden.numpy()
        return found

    def _move_records(self, place: int, form: KNN, linear: Floats, shift: Floats) -> None:
        size = len(form)
        age = (form.writes - 1 - np.arange(size)) % max(form.config.capacity, 1) if size else np.zeros(0)
        since = max(form.writes - self.written[place], 1)
        form.move(linear, shift, np.clip((age + 1) / since, 0.0, 1.0))
        self.written[place] = form.writes

    def read(self) -> dict[str, float]:
        return {"fits": float(self.fits), "left": self.error}

    def state_dict(self) -> State:
        names = ("called", "steps", "last", "fits", "error")
        return {**{name: getattr(self, name) for name in names}, "written": list(self.written)}

    def load_state_dict(self, state: State) -> None:
        self._begin()
        if state:
            self.called, self.error = bool(state["called"]), float(state["error"])
            self.steps, self.last, self.fits = (int(state[name]) for name in ("steps", "last", "fits"))
            written = [int(each) for each in state["written"]]
            self.written = written if len(written) == len(self.forms) else self.written


class Rotation(nn.Module):
    """An orthonormal (H, H) matrix, the identity at first: Cayley's (1 - A)(1 + A)^-1 of a skew-symmetric A."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(width, width))

    def matrix(self, raw: Tensor) -> Tensor:
        skew = raw - raw.T
        one = torch.eye(len(raw))
        found: Tensor = torch.linalg.solve(one + skew, one - skew)
        return found


class CompatibleKeys(Term):
    """Holds a block of the keys to what the previous weights make of the same rows, after a rotation; the rest is free.

    Key of an event: the first `block` x H numbers of Q h, h the last hidden layer and Q orthonormal and learned, and 0
    in the others. Loss: the mean square of (Q h)[:block] - (Q' h')[:block] over the rows of the step, ' of the set
    `previous`, by the mean square of the latter. The error memory's records under the key `hidden` are found by that
    key. Needs the plug-in `previous` before it; until its first boundary nothing is held. O(H^3) per step and answer.

    Source:
        BT^2, Zhou et al. 2023 (ICCV), arXiv 2211.03989: an orthonormal change of basis, part of whose numbers are
        compatible with the old model's and part of which are free for what is new.

    Differs from the source:
        Width is fixed: the free numbers take the place of the paper's extra dimensions, and are no part of the key. One
        rotation by Cayley's map, which leaves out rotations by 180 degrees. A square loss instead of a contrastive one.
    """

    class Options(Term.Options):
        kind: Literal["compatible_keys"] = "compatible_keys"
        block: float = Stop(0.5, gt=0, le=1, description="share of the key's numbers that are held")

    options: Options
    needs = frozenset({"previous"})

    def module(self, shape: Shape) -> nn.Module | None:
        if not shape.hidden:
            raise PluginError(f"plugins: {self.kind}: the model has no hidden layer")
        return Rotation(shape.hidden)

    def bind(self, context: Context) -> None:
        super().bind(context)
        if "previous" not in context.engine.sets:
            raise PluginError(f"plugins: {self.kind}: no weights 'previous'; put {{kind = 'previous'}} before it")
        self.width = max(1, round(self.options.block * context.engine.widths[1]))
        rotation = next(each for each in context.engine.own.values() if isinstance(each, Rotation))
        [self.name] = [name for name, each in context.engine.dense.params.items() if each is rotation.raw]
        self.rotation: Any = rotation
        for stage in context.errors.keyed_by("hidden") if self.options.weight else ():
            stage.keys = self._key

    def _key(self, _features: Encoded, _embedding: NDArray[np.float32], hidden: NDArray[np.float32]) -> NDArray[Any]:
        with torch.no_grad():
            return self.keys(torch.from_numpy(hidden)[None], self.rotation.raw)[0].numpy()

    def keys(self, hidden: Tensor, raw: Tensor) -> Tensor:
        """(B, H) of hidden layers (B, H): the held numbers, and 0."""
        turned = hidden @ self.rotation.matrix(raw).T
        found: Tensor = torch.cat((turned[:, : self.width], torch.zeros_like(turned[:, self.width :])), 1)
        return found

    def loss(self, step: Step) -> Tensor:
        previous = self.context.engine.sets["previous"]
        if not previous.ready:
            return torch.zeros(())
        which = [name for name in ("live", "replay") if getattr(step, name) is not None]
        now = torch.cat([step.out(name).hidden for name in which])
        then = torch.cat([step.out(name, "previous").hidden for name in which])
        old = self.keys(then, previous.params()[self.name].detach())
        away: Tensor = self.keys(now, self.rotation.raw) - old
        return (away**2).sum() / (old**2).sum().clamp_min(1e-6)


PRESETS: dict[str, dict[str, Any]] = {
    "gcab": {
        "replay": {"retention": "reservoir", "per_event": 4},
        "error_memory": [{"kind": "knn", "key": "hidden"}],
        "plugins": [{"kind": "drift_compensation"}],
    },
    "bt2": {
        "replay": {"retention": "reservoir", "per_event": 4},
        "error_memory": [{"kind": "knn", "key": "hidden"}],
        "plugins": [{"kind": "previous"}, {"kind": "compatible_keys"}],
    },
}
