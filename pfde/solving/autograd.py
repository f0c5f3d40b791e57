"""The bridge to torch.autograd: one Function whose forward is a TS solve and whose backward is the adjoint sweep.

    forward:  (inputs, theta) -> y at the output times        TS.solve -> forward sweep -> trajectory, snapshots
    backward: y_bar -> (input_bars, theta_bar)                adjoint sweep, with what the schedule computes again

The inputs are y0 and what else a gradient may be wanted of (`initial_value`). The run belongs to the graph node of one
solve: two pending solves share nothing. A backward pass spends it; a second one (retain_graph=True)
computes it anew, by the same steps, so that its gradient is bitwise the same.

NOTE 1. A model that keeps its own solution, `self.y = odeint(self, ...)`, closes a cycle: y, its node, the problem,
func, y. No garbage collector sees through a node in C++, so a node must hold func no longer than it may be needed:
`release_with_graph` lets go once torch has freed the graph. Before any backward pass the collector does see from a
tensor to the node that it came from, if nothing else holds that node: y leaves `Solve` in its final shape, not as a
view of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..system.autocast import autocast_now
from ..system.held import Held
from ..system.interrupts import as_raised
from ..system.layout import StateLayout
from ..system.peers import Peers
from ..system.releasing import release_with_graph
from .gradients import Backprop
from .initial_value import InitialValueProblem, examined

P = TypeVar("P", bound=InitialValueProblem)


class Solvable(Protocol):
    """A validated problem, as the Function sees it."""

    @property
    def func(self) -> Callable[..., Any]:
        """The user's callable."""

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """What func uses and what requires a gradient."""

    @property
    def peers(self) -> Peers:
        """The ranks that share the state."""

    @property
    def layout(self) -> StateLayout:
        """Of the state."""

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """Tensors beside inputs and parameters that must stay as they are until the backward pass."""

    def forward(self, *inputs: Any) -> tuple[Tensor, Any]:
        """y at the outputs, (T, d), and the run that the backward pass needs."""

    def backward(
        self, run: Any, y_bar: Tensor, needed: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The cotangents of the inputs, as far as needed, and of the parameters."""


class Solve(torch.autograd.Function):
    """y at the output times as a differentiable function of the inputs and the parameters.

    (T, d), or where the state is one real tensor (T, *its shape). `count` says how many of the tensors are inputs; one
    that is None has no gradient.
    """

    @staticmethod
    def forward(ctx: Any, problem: Solvable, count: int, *tensors: Tensor | None) -> Tensor:
        """Solve, and keep what the backward pass needs."""
        held = Held(problem.func, problem.parameters)
        y, ctx.run = problem.forward(*tensors[:count])
        ctx.problem, ctx.peers, ctx.count, ctx.held = problem, problem.peers, count, held
        ctx.likes = [None if x is None else (x.shape, x.dtype, x.device) for x in tensors[:count]]
        given = [x for x in tensors if x is not None]
        ctx.save_for_backward(*given, *problem.frozen)  # torch refuses if one is changed in place
        return problem.layout.unflatten(y).detach() if problem.layout.plain else y  # detached: no view of the flat one

    @staticmethod
    def backward(ctx: Any, y_bar: Tensor) -> tuple[Tensor | None, ...]:
        """The adjoint sweep."""
        ctx.peers.call(_may_run, ctx)
        release_with_graph(ctx, "run", "problem", "held")
        problem: Solvable = ctx.problem
        y_bar = y_bar.reshape(len(y_bar), -1)
        with as_raised(), autocast_now(y_bar.device).suspended(), ctx.held.restored():
            bars, theta_bar = problem.backward(ctx.run, y_bar, ctx.needs_input_grad[2 : 2 + ctx.count])
        if not problem.peers.alone:
            problem.peers.call(_require_finite, [*bars, *theta_bar])
        inputs = [
            None if bar is None or like is None else bar.to(dtype=like[1], device=like[2]).reshape(like[0])
            for bar, like in zip(bars, ctx.likes, strict=True)
        ]
        return None, None, *inputs, *theta_bar


def differentiated(
    problem: P, y0: Tensor, *inputs: Tensor | None, solvable: Callable[[P], Solvable] | None = None
) -> Tensor:
    """y at the outputs, (T, d) or (T, *shape), with whatever graph is called for. Collective.

    solvable : problem -> what has the two passes; None for the problem itself
    """
    if torch.is_grad_enabled():
        problem = examined(problem, y0)
    if not problem.needs_gradient(y0, *inputs):
        looked = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.no_grad():  # Newton's method needs graphs of its own
            y0 = y0.clone() if y0.is_inference() else y0
            others = [x.clone() if x is not None and x.is_inference() else x for x in inputs]
            if not looked:
                problem = examined(problem, y0)
            return problem.integrate(y0, *others)
    if isinstance(problem.gradient, Backprop):
        return problem.backprop(y0, *inputs)
    chosen = problem if solvable is None else solvable(problem)
    return solve_on_graph(chosen, y0, *inputs)


def solve_on_graph(problem: Solvable, *inputs: Tensor | None) -> Tensor:
    """`Solve` of this problem."""
    y: Tensor = Solve.apply(problem, len(inputs), *inputs, *problem.parameters)  # type: ignore[no-untyped-call]
    return y


def _require_finite(bars: Sequence[Tensor | None]) -> None:
    """Raise NonFiniteError where a gradient is NaN or inf, of which the other ranks would see nothing."""
    if not all(bar is None or bool(torch.isfinite(bar).all()) for bar in bars):
        raise NonFiniteError(
            "the gradient of a state shared by ranks is NaN or inf: check the loss, and func and its derivative at the "
            "solution"
        )


def _may_run(ctx: Any) -> None:
    """Raise RuntimeError where the backward pass may not run."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "double backward (create_graph=True) through this gradient is not implemented: use "
            "gradient=pfde.Backprop() with an explicit method"
        )
    _ = ctx.saved_tensors  # torch's own check that none was changed in place
