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
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .peers import Peers
from .random import Draws

_TABLE = 2**16  # steps up to which the times are kept as a table
_IN_PLACE = "write y = y + ... instead of y += ... in func"


@dataclass(frozen=True)
class StateLayout:
    """How a flat state of shape (d,) maps to what the user calls y: one tensor, or a tuple of them.

    A complex entry is two real ones, its real and its imaginary part, next to each other.

    shapes : of the parts
    is_tuple : whether the user's y is a tuple
    is_complex : for each part, whether it is complex; () when none is
    """

    shapes: tuple[torch.Size, ...]
    is_tuple: bool
    is_complex: tuple[bool, ...] = ()

    @property
    def size(self) -> int:
        """d, the real entries of a state."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        if not self.is_complex:
            return [shape.numel() for shape in self.shapes]
        return [shape.numel() << z for shape, z in zip(self.shapes, self.is_complex, strict=True)]

    def unflatten(self, y: Tensor) -> Any:
        """Views of the last dimension of y, (..., d), in the user's shapes."""
        if not self.is_tuple:
            return self._part(0, y) if self.is_complex else y.view((*y.shape[:-1], *self.shapes[0]))
        return tuple(self._part(i, part) for i, part in enumerate(torch.split(y, self._sizes, dim=-1)))

    def _part(self, i: int, y: Tensor) -> Tensor:
        if self.is_complex and self.is_complex[i]:
            return torch.view_as_complex(y.reshape((*y.shape[:-1], *self.shapes[i], 2)))
        return y.reshape((*y.shape[:-1], *self.shapes[i]))

    def flatten(self, value: Any, dtype: torch.dtype, source: str) -> Tensor:
        """The flat tensor of a value of this layout. Raises TypeError or ValueError when it is of another."""
        if not self.is_tuple:
            if not isinstance(value, Tensor):
                raise TypeError(f"{source} must return a tensor like y: got {type(value).__name__}")
            return self._flat(0, value, dtype, source)
        if not isinstance(value, tuple | list) or len(value) != len(self.shapes):
            raise TypeError(f"{source} must return a tuple of {len(self.shapes)} tensors like y: got {describe(value)}")
        return torch.cat([self._flat(i, part, dtype, source) for i, part in enumerate(value)])

    def _flat(self, i: int, value: Any, dtype: torch.dtype, source: str) -> Tensor:
        shape, is_complex = self.shapes[i], bool(self.is_complex) and self.is_complex[i]
        if not isinstance(value, Tensor):
            raise TypeError(f"{source} must return tensors like y: got {type(value).__name__} in its tuple")
        if is_complex:
            dtype = dtype.to_complex()
        if value.shape != shape:
            raise ValueError(f"{source} must return the shape of y, {tuple(shape)}: got {tuple(value.shape)}")
        if value.dtype != dtype:
            raise TypeError(f"{source} must return the dtype of y, {dtype}: got {value.dtype}; convert its result")
        return torch.view_as_real(value.resolve_conj()).reshape(-1) if is_complex else value.reshape(-1)


def describe(value: Any) -> str:
    """What a value is, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__} of {len(value)}"
    return type(value).__name__


class Times(Protocol):
    """The grid as a function sees it."""

    @property
    def steps(self) -> int:
        """N."""

    def time(self, n: int) -> float:
        """t_n."""

    def times(self) -> Tensor:
        """All of them, (N+1,) float64."""


class ParameterBar:
    """The cotangents of a sequence of parameters, summed in place; None where nothing arrived."""

    def __init__(self, count: int) -> None:
        self.bars: list[Tensor | None] = [None] * count
        self.first = self.rate = 0.0  # the cotangents of t_0 and h, in t_n = t_0 + n h, through f's argument t
        self.time = 0.0  # that of f's argument t in the last product

    def add_time(self, n: int, bar: Tensor | None) -> None:
        """Add the cotangent of t_n."""
        self.time = 0.0 if bar is None else float(bar)
        self.first += self.time
        self.rate += n * self.time

    def add(self, bars: Sequence[Tensor | None]) -> None:
        """Add one cotangent for each parameter; None adds nothing."""
        sums, terms = [], []
        for i, bar in enumerate(bars):
            if bar is None:
                continue
            total = self.bars[i]
            if total is None:
                self.bars[i] = bar.clone()  # autograd may have handed out a view of the incoming cotangent
            else:
                sums.append(total)
                terms.append(bar)
        if sums:
            torch._foreach_add_(sums, terms)


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
    ) -> None:
        self.func, self.layout, self.parameters = func, layout, tuple(parameters)
        self.dtype, self.device, self.peers = dtype, device, peers
        self._grid = grid
        self._times: Tensor | None = None  # a table, where it is small or saves transfers to the device
        if grid is not None and (grid.steps <= _TABLE or device.type != "cpu"):
            self._times = grid.times().to(dtype=dtype, device=device)
        self.evaluations = 0
        self.trusted = False  # whether all states have been seen by a completed forward pass, f finite at each
        self.draws = draws
        self.differentiates_time = False

    def evaluate(self, n: int, t: float, y: Tensor) -> Tensor:
        """f(t, y) without a graph: the sweeps run with gradients disabled."""
        assert not torch.is_grad_enabled()
        return self.peers.call(self._checked, n, t, y).detach()

    def linearise(self, n: int, t: float, y: Tensor) -> TorchLinearisation:
        """f(t, y) with its graph. y must not be overwritten while the linearisation is in use."""
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            if not self.differentiates_time:
                return TorchLinearisation(self, y, self.peers.call(self._checked, n, t, y))
            time = self._time(n, t).clone().requires_grad_()
            return TorchLinearisation(self, y, self.peers.call(self._checked, n, t, y, time), n, time)

    def on_graph(self, n: int, t: float | Tensor, y: Tensor) -> Tensor:
        """f(t, y) on the caller's graph, for differentiation by autograd; t may be on a graph of its own."""
        return self.peers.call(self._checked, n, t, y)

    def put_times_on_graph(self, times: Tensor) -> None:
        """Let `on_graph` pass these times, (N+1,) on a graph of their own."""
        self._times = times.to(dtype=self.dtype, device=self.device)

    def _time(self, n: int, t: float | Tensor) -> Tensor:
        if self._times is not None:
            return self._times[n]
        if isinstance(t, Tensor):  # on a graph
            return t.to(dtype=self.dtype, device=self.device)
        return torch.full((), t, dtype=self.dtype, device=self.device)

    def _checked(self, n: int, t: float | Tensor, y: Tensor, time: Tensor | None = None) -> Tensor:
        self.evaluations += 1
        version = y._version
        value = self.layout.flatten(self._call(n, t, y, time), self.dtype, "func")
        if value.device != self.device:
            raise ValueError(f"func must return a tensor on y's device, {self.device}: got {value.device}")
        if y._version != version:
            raise RuntimeError(f"func changed y in place at t={float(t):.6g}: {_IN_PLACE}")
        # One reduction and one transfer; a finite sum has finite terms, an infinite one may merely have overflowed.
        if self.trusted or math.isfinite(value.detach().sum().item()):
            return value
        if not bool(torch.isfinite(value).all()):
            of = "" if self._grid is None else f" of {self._grid.steps}"
            raise NonFiniteError(
                f"func returned NaN or inf at t={float(t):.6g}, step {n}{of}: reduce step_size, use an implicit "
                "method for stiff problems, or check func and its parameters"
            )
        return value

    def _call(self, n: int, t: float | Tensor, y: Tensor, time: Tensor | None) -> Any:
        if self.draws is not None:
            self.draws.enter(n)
        try:
            return self.func(self._time(n, t) if time is None else time, self.layout.unflatten(y))
        except RuntimeError as error:
            if "in-place" in str(error):  # torch's own refusal, where y is on a graph
                error.add_note(f"If func changes y in place: {_IN_PLACE}")
            raise


class TorchLinearisation:
    """f at one state, with the graph of its evaluation."""

    __slots__ = ("_function", "_n", "_out", "_time", "_y", "value")

    def __init__(self, function: TorchFunction, y: Tensor, out: Tensor, n: int = 0, time: Tensor | None = None) -> None:
        self._function, self._y, self._out, self._n, self._time = function, y, out, n, time
        self.value = out.detach()

    def vjp(self, v: Tensor, theta_bar: ParameterBar | None = None, *, retain: bool = False) -> Tensor:
        """J^T v, and P^T v added to theta_bar."""
        return self._function.peers.call(self._vjp, v, theta_bar, retain)

    def _vjp(self, v: Tensor, theta_bar: ParameterBar | None, retain: bool) -> Tensor:
        if not self._out.requires_grad:  # f uses neither y nor a parameter
            return torch.zeros_like(v)
        inputs: tuple[Tensor, ...] = (self._y,)
        if theta_bar is not None:
            inputs += self._function.parameters if self._time is None else (*self._function.parameters, self._time)
            require_reached(self._out, inputs)
        y_bar, *bars = torch.autograd.grad(self._out, inputs, v, retain_graph=retain, allow_unused=True)
        if theta_bar is not None:
            if self._time is not None:
                theta_bar.add_time(self._n, bars.pop())
            theta_bar.add(bars)
        return torch.zeros_like(v) if y_bar is None else y_bar

    def jvp(self, v: Tensor, theta_dot: Sequence[Tensor] | None = None) -> Tensor:
        """J v, and P theta_dot when given (one tangent for each parameter)."""
        return self._function.peers.call(self._jvp, v, theta_dot)

    def _jvp(self, v: Tensor, theta_dot: Sequence[Tensor] | None) -> Tensor:
        inputs, tangents = [self._y], [v]
        if theta_dot is not None:
            inputs += self._function.parameters
            tangents += theta_dot
        if not self._out.requires_grad:
            return torch.zeros_like(v)
        with torch.enable_grad():
            dummy = torch.zeros_like(v, requires_grad=True)
            bars = torch.autograd.grad(self._out, inputs, dummy, create_graph=True, allow_unused=True)
            linear = [
                (bar, dot) for bar, dot in zip(bars, tangents, strict=True) if bar is not None and bar.requires_grad
            ]
            if not linear:
                return torch.zeros_like(v)
            outputs, dots = zip(*linear, strict=True)
            (out,) = torch.autograd.grad(outputs, dummy, dots, retain_graph=True, allow_unused=True)
        return torch.zeros_like(v) if out is None else out.detach()


def require_reached(out: Tensor, reached: Sequence[Tensor]) -> None:
    """Raise ValueError when the graph of `out` ends in a leaf not in `reached`: its gradient would silently be None.

    Done for every product with the parameters, because func may take another branch at another time: 10 us for a small
    network, a few percent of the product.
    """
    leaves = unreached_leaves(out, reached)
    if leaves:
        raise ValueError(
            f"func uses a tensor of shape {tuple(leaves[0].shape)} that requires grad but is none of its "
            "parameters, so it would get no gradient: pass params=(...), make func an nn.Module with it, or detach it"
        )


def unreached_leaves(out: Tensor, reached: Sequence[Tensor]) -> list[Tensor]:
    """The leaf tensors on the graph of `out` that are not in `reached` (leaves or inner tensors).

    A walk over the graph that stops at the nodes of `reached`; what it still finds would get no gradient.
    """
    seen = {t.grad_fn for t in reached}
    known = {id(t) for t in reached}
    stack, leaves = [out.grad_fn], []
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if parents := node.next_functions:
            stack += [parent for parent, _ in parents]
        else:
            leaf = getattr(node, "variable", None)  # None for a custom Function without differentiable inputs
            if leaf is not None and id(leaf) not in known:
                leaves.append(leaf)
    return leaves
