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
    def plain(self) -> bool:
        """Whether y is one real tensor."""
        return not self.is_tuple and not self.is_complex

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
            return self._flat(0, value, dtype, source)
        if not isinstance(value, tuple | list) or len(value) != len(self.shapes):
            raise TypeError(f"{source} must return a tuple of {len(self.shapes)} tensors like y: got {describe(value)}")
        return torch.cat([self._flat(i, part, dtype, source) for i, part in enumerate(value)])

    def _flat(self, i: int, value: Any, dtype: torch.dtype, source: str) -> Tensor:
        self.check(i, value, dtype, source)
        return torch.view_as_real(value.resolve_conj()).reshape(-1) if value.is_complex() else value.reshape(-1)

    def check(self, i: int, value: Any, dtype: torch.dtype, source: str) -> None:
        """Raise TypeError or ValueError unless a value is as part i."""
        shape, is_complex = self.shapes[i], bool(self.is_complex) and self.is_complex[i]
        if not isinstance(value, Tensor):
            if self.is_tuple:
                raise TypeError(f"{source} must return tensors like y: got {type(value).__name__} in its tuple")
            raise TypeError(f"{source} must return a tensor like y: got {describe(value)}")
        if is_complex:
            dtype = dtype.to_complex()
        if value.shape != shape:
            raise ValueError(f"{source} must return the shape of y, {tuple(shape)}: got {tuple(value.shape)}")
        if value.dtype != dtype:
            raise TypeError(f"{source} must return the dtype of y, {dtype}: got {value.dtype}; convert its result")


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
        for i, (total, bar) in enumerate(zip(self.bars, bars, strict=True)):
            if bar is None:
                continue
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
        self.reached = Reached(self.parameters)
        self._last = torch.empty(0), 0

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
            value = self._checked_value if plain else self._checked
            return TorchLinearisation(self, y, self.peers.call(value, n, t, y, time), n, time)

    def on_graph(self, n: int, t: float | Tensor, y: Tensor) -> Tensor:
        """f(t, y) on the caller's graph, for differentiation by autograd; t may be on a graph of its own.

        y is flat, or of a plain layout's shape, and so is the result.
        """
        shaped = self.layout.plain and y.shape == self.layout.shapes[0]
        return self.peers.call(self._checked_value if shaped else self._checked, n, t, y)

    def pull(self, outputs: dict[Tensor, Tensor], leaves: tuple[Tensor, ...], theta_bar: ParameterBar) -> list[Tensor]:
        """The cotangents of leaves of a graph from those of its outputs, flat; the parameters' go to theta_bar."""
        used = {x: bar.view(x.shape) for x, bar in outputs.items() if x.requires_grad}
        inputs = (*leaves, *self.parameters)
        found = torch.autograd.grad(tuple(used), inputs, tuple(used.values()), allow_unused=True)
        theta_bar.add(found[len(leaves) :])
        bars = zip(found[: len(leaves)], leaves, strict=True)
        return [(torch.zeros_like(x) if bar is None else bar).reshape(-1) for bar, x in bars]

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
        """f on a flat state, flat."""
        value = self._call(n, t, self.layout.unflatten(y), time, y)
        return self._finite(n, t, self.layout.flatten(value, self.dtype, "func"))

    def _checked_value(self, n: int, t: float | Tensor, y: Tensor, time: Tensor | None = None) -> Tensor:
        """f on a state in the user's shape, for a plain layout."""
        value = self._call(n, t, y, time, y)
        self.layout.check(0, value, self.dtype, "func")
        return self._finite(n, t, value)

    def _finite(self, n: int, t: float | Tensor, value: Tensor) -> Tensor:
        if value.device != self.device:
            raise ValueError(f"func must return a tensor on y's device, {self.device}: got {value.device}")
        if self.trusted or all_finite(value.detach()):
            return value
        of = "" if self._grid is None else f" of {self._grid.steps}"
        raise non_finite(f"at t={float(t):.6g}, step {n}{of}")

    def _call(self, n: int, t: float | Tensor, state: Any, time: Tensor | None, y: Tensor) -> Any:
        """func at a state, of which y holds the memory."""
        self.evaluations += 1
        version = y._version
        if self.draws is not None:
            self.draws.enter(n)
        try:
            value = self.func(self._time(n, t) if time is None else time, state)
            if y._version != version:
                raise RuntimeError(f"func changed y in place at t={float(t):.6g}: {_IN_PLACE}")
            return value
        except RuntimeError as error:
            if "in-place operation" in str(error):  # torch's own refusal, where y is on a graph
                error.add_note(f"If func changes y in place: {_IN_PLACE}")
            raise


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or inf; one reduction, as a finite sum has finite terms, unless that merely overflows."""
    return math.isfinite(x.sum().item()) or bool(torch.isfinite(x).all())


def non_finite(where: str) -> NonFiniteError:
    """The error for a value of func."""
    return NonFiniteError(
        f"func returned NaN or inf {where}: reduce step_size, use an implicit method for stiff problems, or check func "
        "and its parameters"
    )


class TorchLinearisation:
    """f at one state, with the graph of its evaluation; y and out have one shape, the user's or (d,)."""

    __slots__ = ("_function", "_n", "_out", "_time", "_y", "value")

    def __init__(self, function: TorchFunction, y: Tensor, out: Tensor, n: int = 0, time: Tensor | None = None) -> None:
        self._function, self._y, self._out, self._n, self._time = function, y, out, n, time
        self.value = out.detach().reshape(-1)

    def vjp(self, v: Tensor, theta_bar: ParameterBar | None = None, *, retain: bool = False) -> Tensor:
        """J^T v, and P^T v added to theta_bar."""
        return self._function.peers.call(self._vjp, v, theta_bar, retain)

    def _vjp(self, v: Tensor, theta_bar: ParameterBar | None, retain: bool) -> Tensor:
        if not self._out.requires_grad:  # f uses neither y nor a parameter
            if theta_bar is not None and self._time is not None:
                theta_bar.add_time(self._n, None)
            return torch.zeros_like(v)
        inputs: tuple[Tensor, ...] = (self._y,)
        if theta_bar is not None:
            inputs += self._function.parameters if self._time is None else (*self._function.parameters, self._time)
            self._function.reached.require(self._out, self._y, self._time)
        out = self._out
        y_bar, *bars = torch.autograd.grad(out, inputs, v.view(out.shape), retain_graph=retain, allow_unused=True)
        if theta_bar is not None:
            if self._time is not None:
                theta_bar.add_time(self._n, bars.pop())
            theta_bar.add(bars)
        return torch.zeros_like(v) if y_bar is None else y_bar.reshape(-1)

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


class Reached:
    """What a gradient reaches: the parameters; a leaf that it does not reach would silently get none.

    Asked for every product with the parameters (for one stage in turn where a step is one product), because func may
    take another branch at another time: a walk over the graph, 10 to 20 us for a small network.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._ids = frozenset(map(id, parameters))
        self._nodes = frozenset(p.grad_fn for p in parameters if p.grad_fn is not None)

    def require(self, out: Tensor, *inputs: Tensor | None) -> None:
        """Raise ValueError when the graph of `out` ends in a leaf that is no parameter, nor one of the inputs."""
        leaves = self.unreached(out, *inputs)
        if leaves:
            raise ValueError(
                f"func uses a tensor of shape {tuple(leaves[0].shape)} that requires grad but is none of its "
                "parameters, so it would get no gradient: pass params=(...), make func an nn.Module with it, or "
                "detach it"
            )

    def unreached(self, out: Tensor, *inputs: Tensor | None) -> list[Tensor]:
        """These leaves; the walk stops at the nodes of inputs and parameters that are no leaves."""
        seen, leaves = set(self._nodes), []
        seen.update(x.grad_fn for x in inputs if x is not None and x.grad_fn is not None)
        nodes = [] if out.grad_fn is None or out.grad_fn in seen else [out.grad_fn]
        for node in nodes:
            parents = node.next_functions
            for parent, _ in parents:
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    nodes.append(parent)
            if not parents:
                leaf = getattr(node, "variable", None)  # None for a custom Function without differentiable inputs
                if leaf is not None and id(leaf) not in self._ids and all(leaf is not x for x in inputs):
                    leaves.append(leaf)
        return leaves
