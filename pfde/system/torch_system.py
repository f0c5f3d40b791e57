"""The System of a torch callable: its evaluation, and its stages through SNES and KSP."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Linearisation, OnGraph, RandomNumbers, Weight
from .interrupts import as_raised
from .mass import Mass
from .operators import MatrixFree
from .options_help import Entry, show_help
from .parameter_bar import ParameterBar
from .prefixes import shown
from .random import NO_DRAWS
from .reached import count_nodes
from .releasing import release_with_graph
from .stage_solver import Staged, StageSolver
from .start import PETSc
from .torch_function import TorchFunction, all_finite, non_finite

_SMALL = 16  # entries up to which a Jacobian is assembled as one dense block: d products against GMRES's many


def _help(choice: str) -> Entry:
    text = "Newton matrix (one of) auto dense blocks matrix_free"
    return Entry("fde_jacobian", choice, "auto", text, "docs/methods.md")


def block_count(function: TorchFunction, choice: str) -> int:
    """The dense diagonal blocks that option fde_jacobian asks for; 0 for products only.

    'auto' assembles up to 16 entries on one rank; 'dense' is one block; 'blocks' one for each entry of the first
    dimension of y (independent systems in a batch); 'matrix_free' none.
    """
    layout, alone = function.layout, function.peers.alone
    if choice == "auto":
        return int(alone and layout.size <= _SMALL)
    if choice == "matrix_free":
        return 0
    if choice not in ("dense", "blocks"):
        raise ValueError(f"option fde_jacobian must be auto, dense, blocks or matrix_free: got {choice!r}")
    if not alone:
        raise ValueError(f"option fde_jacobian={choice} needs the whole state on one rank: use matrix_free with comm")
    if choice == "dense":
        return 1
    if layout.is_tuple or not layout.shapes[0]:
        raise ValueError("option fde_jacobian=blocks needs y to be one tensor with a batch dimension first; use dense")
    return layout.shapes[0][0]


class TorchSystem(Staged):
    """A torch function with the solver of its implicit stages, for one integration.

    Parameters
    ----------
    function : f
    snes : the SNES of the integration's TS for an implicit method, else None
    vec : a Vec of the state
    mass : M of M y' = f(t, y), for implicit methods
    nonstiff : the second part of a split right-hand side, of which `function` is the stiff one
    """

    def __init__(
        self,
        function: TorchFunction,
        snes: PETSc.SNES | None,
        vec: PETSc.Vec,
        mass: Mass | None = None,
        nonstiff: TorchFunction | None = None,
    ) -> None:
        self.function, self._mass = function, mass
        self._nonstiff = None if nonstiff is None else TorchSystem(nonstiff, None, vec)
        self.evaluate = function.evaluate
        self.linearise = function.linearise
        if snes is not None:
            prefix = snes.getOptionsPrefix() or ""
            choice = PETSc.Options().getString(f"{prefix}fde_jacobian", "auto")
            show_help("Newton matrix of a torch function (pfde) options", shown(prefix), [_help(choice)], vec.comm)
            blocks = block_count(function, choice)
            operator = MatrixFree(vec, function.dtype, blocks, mass)
            self.stages = StageSolver(
                snes,
                function.linearise,
                operator,
                vec,
                function.dtype,
                function.peers,
                mass,
                precision=function.precision,
            )

    def on_graph(self, at: Any, y: Tensor) -> OnGraph:
        """f on autograd's graph, the leaves y (and t, h where its time is differentiated), the step on them."""
        function, graph, begin = self.function, GraphSystem(self), count_nodes()
        shape = function.layout.shapes[0] if function.layout.plain else y.shape
        leaf = y.view(shape).detach().requires_grad_()
        if not function.differentiates_time:
            return OnGraph(graph, (leaf,), at, begin)
        t, h = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (at.t, at.h))
        t1 = t + h + (at.t1 - (at.t + at.h))
        return OnGraph(graph, (leaf, t, h), at._replace(t=t, h=h, t1=t1), begin)

    def require_finite(self, n: int, t: float, t1: float, *values: Tensor) -> None:
        """Raise NonFiniteError, on every rank, where one of step n's values is NaN or inf."""
        where = f"between t={t:.6g} and t={t1:.6g}, step {n}"
        self.function.peers.agree(None if all(map(all_finite, values)) else non_finite(where))

    def require_reached(self, out: Tensor, begin: int, *inputs: Tensor) -> None:
        """Raise ValueError where the graph from inputs to out has a leaf that no gradient will reach. Collective."""
        self.function.peers.call(self.function.reached.require, (out,), begin, *inputs)

    def pull(
        self, outputs: Sequence[tuple[Tensor, Tensor]], leaves: tuple[Tensor, ...], begin: int, theta_bar: ParameterBar
    ) -> list[Tensor]:
        """The cotangents of such leaves from (output, its cotangent), flat; the parameters' are added to theta_bar."""
        return self.function.peers.call(self.function.pull, outputs, leaves, begin, theta_bar)

    @property
    def parts(self) -> tuple[TorchSystem, ...]:
        """The system itself; of a split right-hand side its stiff and its nonstiff part."""
        return (self,) if self._nonstiff is None else (self, self._nonstiff)

    def mass(self, y: Tensor) -> Tensor:
        """M y; y itself where there is no mass matrix."""
        return y if self._mass is None else self._mass.apply(y)

    def mass_transpose(self, y: Tensor) -> Tensor:
        """M^T y; y itself where there is no mass matrix."""
        return y if self._mass is None else self._mass.apply_transpose(y)

    @property
    def evaluations(self) -> int:
        """Evaluations of f so far; of both parts of a split one."""
        return self.function.evaluations + (0 if self._nonstiff is None else self._nonstiff.evaluations)

    @property
    def draws(self) -> RandomNumbers:
        """The random numbers of f; of a split one its parts draw from one stream."""
        return NO_DRAWS if self.function.draws is None else self.function.draws

    def parameter_cotangent(self) -> ParameterBar:
        """A fresh zero cotangent for the function's parameters."""
        return ParameterBar(len(self.function.parameters))


class GraphSystem:
    """The same steps on autograd's graph: what `Backprop` differentiates.

    An implicit stage is solved off the graph; its derivative enters by the implicit function theorem, as a node
    that solves the transposed stage for the cotangent that autograd brings.
    """

    def __init__(self, system: TorchSystem) -> None:
        self._system = system

    @property
    def parts(self) -> tuple[GraphSystem, ...]:
        """The system itself; of a split right-hand side its stiff and its nonstiff part."""
        inner = self._system.parts
        if len(inner) == 1:
            return (self,)
        return tuple(self if part is self._system else GraphSystem(part) for part in inner)

    def mass(self, y: Tensor) -> Tensor:
        """M y on the graph."""
        return self._system.mass(y)

    def evaluate(self, n: int, t: float | Tensor, y: Tensor) -> Tensor:
        """f(t, y) on the graph."""
        return self._system.function.on_graph(n, t, y)

    def solve(self, n: int, t: float | Tensor, r: Tensor, w: Weight, guess: Tensor) -> tuple[Tensor, _Slope]:
        """y, M y = r + w f(t, y), on the graph, and f there when asked for."""
        with torch.no_grad():
            detached_w = w.detach() if isinstance(w, Tensor) else w
            at_time = float(t) if isinstance(t, Tensor) else t
            y, at = self._system.solve(n, at_time, r.detach(), detached_w, guess.detach())
        right = r + self._system.function.on_graph(n, t, y) * w
        # The value of y is the solver's: that of r + w f has no digits left where w J is large. Its cotangent, once
        # through the node, is that of the right-hand side.
        y = y + (right - right.detach())
        if y.requires_grad:
            y = _Stage.apply(lambda y_bar: self._stage_cotangent(n, at_time, at, detached_w, y_bar), y)  # type: ignore[no-untyped-call]
        return y, _Slope(self, n, t, y)

    def _stage_cotangent(self, n: int, t: float, at: Linearisation, w: Weight, y_bar: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "double backward (create_graph=True) through an implicit method is not implemented: use an explicit "
                "method with gradient=pfde.Backprop()"
            )
        with as_raised():
            return self._system.solve_transpose(n, t, at, w, y_bar)


class _Stage(torch.autograd.Function):
    """y itself, whose cotangent goes through the transposed stage; a node, since a hook on y would outlive the graph.

    NOTE. What the graph holds leads to func, and func may keep the solution (NOTE 1 of `autograd`).
    """

    @staticmethod
    def forward(ctx: Any, transposed: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
        """y."""
        ctx.transposed = transposed
        ctx.save_for_backward(y.new_empty(0))  # tells whether the graph has been freed
        return y.detach()

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[None, Tensor]:
        """The transposed stage's solution for y_bar."""
        _ = ctx.saved_tensors  # torch's own error for a graph that has been freed
        release_with_graph(ctx, "transposed")
        return None, ctx.transposed(y_bar)


class _Slope:
    """f at a stage, evaluated on the graph when asked for."""

    def __init__(self, system: GraphSystem, n: int, t: float | Tensor, y: Tensor) -> None:
        self._arguments = (system, n, t, y)

    @property
    def value(self) -> Tensor:
        """f(t, y)."""
        system, n, t, y = self._arguments
        return system.evaluate(n, t, y)
