"""f as PETSc's own integrators need it: on flat states of doubles, counted, checked, and compared between the passes.

Part:    sign f(sign s, y), in s = sign t, which increases
Linear:  f at one (s, y) with its graph: the products of J = df/dy and P = df/dtheta, and of their transposes
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError, ReplayError
from ..solving.marks import REMEDY, Marks
from ..solving.stats import Phase, Stats
from ..system.reached import Reached
from ..system.real import real, unreal
from ..system.start import PETSc
from ..system.torch_function import all_finite
from .setting import Setting


class Counter:
    """The counts of one run, of which `begin` says to which phase the evaluations to come belong."""

    def __init__(self, stats: Stats, phase: Phase) -> None:
        self._stats, self.phase = stats, phase

    def begin(self, phase: Phase) -> None:
        """Another phase begins."""
        self.phase = phase

    def add_evaluation(self) -> None:
        """Count one call of func."""
        self._stats.count(self.phase)

    def add_linear(self, ksp: PETSc.KSP, _b: PETSc.Vec, _x: PETSc.Vec) -> None:
        """Count the iterations of a linear solve that has ended."""
        self._stats.linear_iterations += ksp.getIterationNumber()


class Part:
    """func(t, y), or a part of it, on flat states in s = sign t: sign func(sign s, y), counted and checked."""

    def __init__(self, setting: Setting, func: Callable[[Tensor, Any], Any], counter: Counter, name: str) -> None:
        self._func, self._layout, self._counter, self._name = func, setting.layout, counter, name
        self._sign, self._dtype, self._device = setting.sign, setting.dtype, setting.device
        self._parameters, self._autocast = setting.parameters, setting.autocast
        self._casts = setting.autocast.enabled or setting.layout.narrow is not None
        self._known = _Known()

    def value(self, s: float, u: Tensor) -> Tensor:
        """f without a graph. Raises NonFiniteError."""
        with torch.no_grad():
            y = u.to(self._dtype)
            value = self._evaluate(s, y)
            if self._counter.phase != "backward":
                self._known.keep(s, y, value)
            return self._sign * value

    def linearise(self, s: float, u: Tensor) -> Linear:
        """f's graph at (s, u). Raises ReplayError, in the backward pass, where f is not what it was there."""
        with torch.enable_grad():
            y = u.to(self._dtype).requires_grad_()
            value = self._evaluate(s, y)
        if self._counter.phase == "backward" and not self._is_known(s, y.detach(), value.detach()):
            raise ReplayError(
                f"{self._name}, evaluated again for the backward pass at t={self._sign * s:.6g}, is not what it was in "
                f"the forward pass: {REMEDY}"
            )
        with torch.enable_grad():
            return Linear(y, self._sign * value, self._parameters)

    def _is_known(self, s: float, y: Tensor, value: Tensor) -> bool:
        """Whether f is what it was: with a graph, or else without, where some of torch's kernels are others."""
        if self._known.agrees(s, y, value):
            return True
        with torch.no_grad():
            return self._known.agrees(s, y, self._evaluate(s, y.clone()))

    def _evaluate(self, s: float, y: Tensor) -> Tensor:
        self._counter.add_evaluation()
        t, version = self._sign * s, y._version
        time = torch.tensor(t, dtype=self._layout.narrow or self._dtype, device=self._device)
        with self._autocast.active():
            value = self._func(time, self._layout.unflatten(y))
        value = self._layout.flatten(value, self._dtype, self._name, cast=self._casts)
        if y._version != version:
            raise RuntimeError(
                f"{self._name} changed y in place at t={t:.6g}: write y = y + ... instead of y += ... in it"
            )
        if not all_finite(value.detach()):
            raise NonFiniteError(
                f"{self._name} returned NaN or inf at t={t:.6g}: reduce step_size, use an implicit method for stiff "
                "problems, or check func and its parameters"
            )
        return value


class _Known:
    """What f gave at the states of the forward pass: a mark of it for each time and mark of a state.

    States that differ by rounding may have one mark, so f may differ by rounding as well.
    """

    def __init__(self) -> None:
        self._marks = Marks(alone=True)
        self._found: dict[tuple[float, float], float] = {}

    def keep(self, s: float, y: Tensor, value: Tensor) -> None:
        """f(s, y) = value."""
        self._found[s, self._marks.of([y])] = self._marks.of([value])

    def agrees(self, s: float, y: Tensor, value: Tensor) -> bool:
        """Whether it was so, or f was not evaluated there."""
        kept = self._found.get((s, self._marks.of([y])))
        mark = self._marks.of([value])
        return (
            kept is None or kept == mark or abs(kept - mark) <= 16 * torch.finfo(value.dtype).eps * float(value.norm())
        )


class Linear:
    """f at one (s, y) with the graph of its evaluation: the products of J = df/dy and P = df/dtheta."""

    def __init__(self, y: Tensor, out: Tensor, parameters: tuple[Tensor, ...]) -> None:
        self._y, self._out, self._parameters = y, out, parameters
        self._dual: tuple[Tensor, Tensor | None] | None = None  # w and J^T w as a function of it
        self._reached = not out.requires_grad  # whether all leaves of the graph are known to be inputs

    def state_vjp(self, v: Tensor) -> Tensor:
        """J^T v."""
        (bar,) = self._vjp((self._y,), v)
        return torch.zeros_like(v) if bar is None else bar

    def parameter_vjp(self, v: Tensor) -> Tensor:
        """P^T v, all parameters in one vector of doubles."""
        bars = self._vjp(self._parameters, v)
        pairs = zip(bars, self._parameters, strict=True)
        return _pack([torch.zeros_like(p) if bar is None else bar for bar, p in pairs], v)

    def state_jvp(self, v: Tensor) -> Tensor:
        """J v: the derivative of w -> J^T w along v, which does not depend on w."""
        if self._dual is None:
            w, (bar,) = self._transpose((self._y,))
            self._dual = w, bar
        w, bar = self._dual
        return _along(w, [bar], [v])

    def parameter_jvp(self, theta_dot: Tensor) -> Tensor:
        """P theta_dot, for all parameters in one vector."""
        parts = torch.split(theta_dot, [real(p).numel() for p in self._parameters])
        w, bars = self._transpose(self._parameters)
        return _along(w, bars, [unreal(part, p) for part, p in zip(parts, self._parameters, strict=True)])

    def _vjp(self, inputs: tuple[Tensor, ...], v: Tensor) -> Sequence[Tensor | None]:
        if not self._reached:
            Reached(self._parameters).require((self._out,), 0, self._y)
            self._reached = True
        if not inputs or not self._out.requires_grad:
            return [None] * len(inputs)
        return torch.autograd.grad(self._out, inputs, v, retain_graph=True, allow_unused=True)

    def _transpose(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Sequence[Tensor | None]]:
        with torch.enable_grad():
            w = torch.zeros_like(self._out, requires_grad=True)
            if not inputs or not self._out.requires_grad:
                return w, [None] * len(inputs)
            return w, torch.autograd.grad(self._out, inputs, w, create_graph=True, allow_unused=True)


def _along(w: Tensor, bars: Sequence[Tensor | None], tangents: Sequence[Tensor]) -> Tensor:
    """The derivative of w -> sum_i <bar_i(w), tangent_i>."""
    pairs = [(b, dot) for b, dot in zip(bars, tangents, strict=True) if b is not None and b.requires_grad]
    if not pairs:
        return torch.zeros_like(w, requires_grad=False)
    outputs, dots = zip(*pairs, strict=True)
    (out,) = torch.autograd.grad(outputs, w, dots, retain_graph=True, allow_unused=True)
    return torch.zeros_like(w, requires_grad=False) if out is None else out


def _pack(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    """All real numbers of the tensors in one vector of doubles, on the device of `like`."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float64, device=like.device)
    dense = (x if x.layout == torch.strided else x.to_dense() for x in tensors)
    return torch.cat([real(x.detach()).reshape(-1).to(like.device, torch.float64) for x in dense])
