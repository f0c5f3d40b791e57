"""A torch callable as right-hand side: f on flat states, with its vector-Jacobian and Jacobian-vector products.

    value = f(t, y),    vjp: v -> (J^T v, P^T v),    jvp: y_dot -> J y_dot + P theta_dot

J = df/dy and P = df/dtheta. The vjp is one reverse pass over the graph of f. The jvp is the derivative of the
linear map v -> J^T v along v (two reverse passes over one graph, where a forward-mode pass would run f anew).

The callable sees the state in its own shape (or a tuple of tensors) and a 0-d time of the state's dtype. What it
returns is checked: shape, dtype, finite values, and that it left y as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .autocast import NO_AUTOCAST, Autocast
from .layout import StateLayout
from .parameter_bar import ParameterBar
from .peers import Peers
from .random import Draws
from .reached import Border, Reached, count_nodes

_NOTHING = nullcontext()
_TABLE = 2**16  # steps up to which the times are kept as a table
_IN_PLACE = "write y = y + ... instead of y += ... in func"


class Times(Protocol):
    """The grid as a function sees it."""

    @property
    def steps(self) -> int:
        """N."""

    def time(self, n: int) -> float:
        """t_n."""

    def times(self) -> Tensor:
        """All of them, (N+1,) float64."""


class TorchFunction:
    """`func(t, y)` on flat states, counted and checked; without any solver.

    Parameters
    ----------
    func : the user's callable
    layout : of the state
    parameters : tensors that require a gradient and that func uses
    dtype, device : of the state
    grid : the times t_0, ..., t_N at which f is evaluated; None where it may be at any t
    draws : the random states of the steps, where func draws random numbers
    peers : the ranks that share the state; every call is collective over them
    autocast : torch.autocast as func is to see it
    differentiates_time : whether products are to give the cotangent of f's t, too
    trusted : whether f need not be checked for NaN and inf at each state, as somebody else does
    times : of the grid, (N+1,), on a graph of their own, for `on_graph` to pass to func
    """

    def __init__(
        self,
        func: Callable[[Tensor, Any], Any],
        layout: StateLayout,
        parameters: Sequence[Tensor],
        dtype: torch.dtype,
        device: torch.device,
        grid: Times | None,
        peers: Peers,
        draws: Draws | None = None,
        autocast: Autocast = NO_AUTOCAST,
        *,
        differentiates_time: bool = False,
        trusted: bool = False,
        times: Tensor | None = None,
    ) -> None:
        self.func, self.layout, self.parameters = func, layout, tuple(parameters)
        self.dtype, self.device, self.peers = dtype, device, peers
        self._grid = grid
        self._times: Tensor | None = None  # a table, where it is small or saves transfers to the device
        if times is not None:
            self._times = times.to(dtype=dtype, device=device)
        elif grid is not None and (grid.steps <= _TABLE or device.type != "cpu"):
            self._times = grid.times().to(dtype=dtype, device=device)
        self.evaluations = 0
        self._trusted = trusted
        self.draws, self.autocast = draws, autocast
        self.casts = autocast.enabled or layout.narrow is not None  # whether func's result is converted to y's dtype
        self.differentiates_time = differentiates_time
        self.reached = Reached(self.parameters)
        self._last = torch.empty(0), 0

    @property
    def precision(self) -> torch.dtype:
        """In which f is computed, as far as is known from outside: narrower than y's under autocast."""
        autocast = self.autocast.dtype if self.autocast.enabled else None
        return self.layout.narrow or autocast or self.dtype

    def evaluate(self, n: int, t: float, y: Tensor) -> Tensor:
        """f(t, y) without a graph: the sweeps run with gradients disabled."""
        assert not torch.is_grad_enabled()
        if self.layout.plain:
            return self.peers.call(self._fresh, n, t, y.view(self.layout.shapes[0])).detach().reshape(-1)
        return self.peers.call(self._checked, n, t, y).detach()

    def _fresh(self, n: int, t: float, y: Tensor) -> Tensor:
        """f on a state in the user's shape, for a plain layout, in memory that no later call of func writes to."""
        value = self._checked_value(n, t, y)
        last, version = self._last
        if last._version != version and self._grid is None:  # the stages of a step are all in use
            raise RuntimeError(
                f"func at t={t:.6g} wrote to what it had returned before: return a new tensor each time, without out="
            )
        self._last = value, value._version
        return value

    def linearise(self, n: int, t: float, y: Tensor) -> TorchLinearisation:
        """f(t, y) with its graph. y must not be overwritten while the linearisation is in use."""
        with torch.enable_grad():
            plain = self.layout.plain  # then the graph begins and ends with y's own shape, two nodes less
            y = (y.view(self.layout.shapes[0]) if plain else y).detach().requires_grad_()
            time = self._time(n, t).clone().requires_grad_() if self.differentiates_time else None
            value, begin = self._checked_value if plain else self._checked, count_nodes()
            return TorchLinearisation(self, y, self.peers.call(value, n, t, y, time), begin, n, time)

    def on_graph(self, n: int, t: float | Tensor, y: Tensor) -> Tensor:
        """f(t, y) on the caller's graph, for differentiation by autograd; t may be on a graph of its own.

        y is flat, or of a plain layout's shape, and so is the result.
        """
        shaped = self.layout.plain and y.shape == self.layout.shapes[0]
        return self.peers.call(self._checked_value if shaped else self._checked, n, t, y)

    def pull(
        self, outputs: Sequence[tuple[Tensor, Tensor]], leaves: tuple[Tensor, ...], begin: int, theta_bar: ParameterBar
    ) -> list[Tensor]:
        """The cotangents of leaves of a graph from (output, its cotangent), flat; the parameters' go to theta_bar.

        begin : `count_nodes()` before the graph was made
        """
        used = [(x, bar.view(x.shape)) for x, bar in outputs if x.requires_grad]
        border = Border()
        if self.reached.has_outside:  # else the walks over parts of steps have found none
            border = self.reached.require([x for x, _ in used], begin, *leaves)
        found = self.products(used, leaves, border, theta_bar)
        return [(torch.zeros_like(x) if bar is None else bar).reshape(-1) for bar, x in zip(found, leaves, strict=True)]

    def products(
        self,
        outputs: Sequence[tuple[Tensor, Tensor]],
        leaves: tuple[Tensor, ...],
        border: Border,
        theta_bar: ParameterBar,
        *,
        retain: bool = False,
    ) -> Sequence[Tensor | None]:
        """The cotangents of leaves; those of the parameters and at the border are added to theta_bar."""
        parameters, edges = self.parameters, border.edges
        asked = parameters
        if border.direct is not None:
            asked = tuple(p for i, p in enumerate(parameters) if i in border.direct)
        if not outputs:
            return [None] * len(leaves)
        outs, bars = zip(*outputs, strict=True)
        inputs: Any = (*leaves, *asked, *edges)
        found = torch.autograd.grad(outs, inputs, bars, retain_graph=retain or border.retain, allow_unused=True)
        k = len(leaves)
        if border.direct is None:
            theta_bar.add(found[k:])
        else:
            theta_bar.add_outside(edges, found[k + len(asked) :])
            direct = iter(found[k : k + len(asked)])
            theta_bar.add([next(direct) if i in border.direct else None for i in range(len(parameters))])
        bars_of_leaves: Sequence[Tensor | None] = found[:k]
        return bars_of_leaves

    def complete_forward(self) -> None:
        """A forward pass has seen f finite at all its states: what comes are replays, which draw apart."""
        self._trusted = True
        if self.draws is not None:
            self.draws.keep_apart()

    def _time(self, n: int, t: float | Tensor) -> Tensor:
        if self._times is not None:
            return self._times[n]
        if isinstance(t, Tensor):  # on a graph
            return t.to(dtype=self.dtype, device=self.device)
        return torch.full((), t, dtype=self.dtype, device=self.device)

    def _checked(self, n: int, t: float | Tensor, y: Tensor, time: Tensor | None = None) -> Tensor:
        """f on a flat state, flat."""
        value = self._call(n, t, self.layout.unflatten(y), time, y)
        return self._finite(n, t, y, self.layout.flatten(value, self.dtype, "func", cast=self.casts))

    def _checked_value(self, n: int, t: float | Tensor, y: Tensor, time: Tensor | None = None) -> Tensor:
        """f on a state in the user's shape, for a plain layout."""
        value = self._call(n, t, y, time, y)
        return self._finite(n, t, y, self.layout.accept(0, value, self.dtype, "func", cast=self.casts))

    def _finite(self, n: int, t: float | Tensor, y: Tensor, value: Tensor) -> Tensor:
        """The value, in memory other than y's, which the sweeps write to."""
        if value.device != self.device:
            raise ValueError(f"func must return a tensor on y's device, {self.device}: got {value.device}")
        if 0 <= value.data_ptr() - y.data_ptr() < y.numel() * y.element_size():
            value = value.clone()
        if self._trusted or all_finite(value.detach()):
            return value
        of = "" if self._grid is None else f" of {self._grid.steps}"
        raise non_finite(f"at t={float(t):.6g}, step {n}{of}")

    def _call(self, n: int, t: float | Tensor, state: Any, time: Tensor | None, y: Tensor) -> Any:
        """func at a state, of which y holds the memory."""
        self.evaluations += 1
        version = y._version
        try:
            time = self._time(n, t) if time is None else time
            time = time if self.layout.narrow is None else time.to(self.layout.narrow)
            with _NOTHING if self.draws is None else self.draws.evaluation(n), self.autocast.active():
                value = self.func(time, state)
            if y._version != version:
                raise RuntimeError(f"func changed y in place at t={float(t):.6g}: {_IN_PLACE}")
            return value
        except RuntimeError as error:
            if "in-place operation" in str(error):  # torch's own refusal, where y is on a graph
                error.add_note(f"If func changes y in place: {_IN_PLACE}")
            raise


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or inf; one reduction, as a finite sum has finite terms, unless that merely overflows."""
    flat = x.reshape(-1)
    return math.isfinite(torch.dot(flat, flat).item()) or bool(torch.isfinite(x).all())


def non_finite(where: str) -> NonFiniteError:
    """The error for a value of func."""
    return NonFiniteError(
        f"func returned NaN or inf {where}: reduce step_size, use an implicit method for stiff problems, or check func "
        "and its parameters"
    )


class TorchLinearisation:
    """f at one state, with the graph of its evaluation; y and out have one shape, the user's or (d,)."""

    __slots__ = ("_begin", "_function", "_n", "_out", "_time", "_y", "value")

    def __init__(
        self, function: TorchFunction, y: Tensor, out: Tensor, begin: int, n: int = 0, time: Tensor | None = None
    ) -> None:
        self._function, self._y, self._out, self._begin = function, y, out, begin
        self._n, self._time = n, time
        self.value = out.detach().reshape(-1)

    def vjp(self, v: Tensor, theta_bar: ParameterBar | None = None, *, retain: bool = False) -> Tensor:
        """J^T v, and P^T v added to theta_bar."""
        return self._function.peers.call(self._vjp, v, theta_bar, retain)

    def _vjp(self, v: Tensor, theta_bar: ParameterBar | None, retain: bool) -> Tensor:
        if not self._out.requires_grad:  # f uses neither y nor a parameter
            if theta_bar is not None and self._time is not None:
                theta_bar.add_time(self._n, None)
            return torch.zeros_like(v)
        function, out = self._function, self._out
        v = v.view(out.shape)
        bars: Sequence[Tensor | None]
        if theta_bar is None:
            bars = torch.autograd.grad(out, (self._y,), v, retain_graph=retain, allow_unused=True)
        else:
            leaves = (self._y,) if self._time is None else (self._y, self._time)
            border = function.reached.require((out,), self._begin, *leaves)
            bars = function.products([(out, v)], leaves, border, theta_bar, retain=retain)
            if self._time is not None:
                theta_bar.add_time(self._n, bars[1])
        return torch.zeros_like(v).reshape(-1) if bars[0] is None else bars[0].reshape(-1)

    def jvp(self, v: Tensor, theta_dot: Sequence[Tensor] | None = None) -> Tensor:
        """J v, and P theta_dot when given (one tangent for each parameter)."""
        return self._function.peers.call(self._jvp, v, theta_dot)

    def _jvp(self, v: Tensor, theta_dot: Sequence[Tensor] | None) -> Tensor:
        inputs, tangents = [self._y], [v.view(self._y.shape)]
        if theta_dot is not None:
            inputs += self._function.parameters
            tangents += theta_dot
        if not self._out.requires_grad:
            return torch.zeros_like(v)
        with torch.enable_grad():
            dummy = torch.zeros_like(self._out, requires_grad=True)
            bars = torch.autograd.grad(self._out, inputs, dummy, create_graph=True, allow_unused=True)
            linear = [
                (bar, dot) for bar, dot in zip(bars, tangents, strict=True) if bar is not None and bar.requires_grad
            ]
            if not linear:
                return torch.zeros_like(v)
            outputs, dots = zip(*linear, strict=True)
            (out,) = torch.autograd.grad(outputs, dummy, dots, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if out is None else out.detach().reshape(-1)
