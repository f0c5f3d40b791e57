"""What every problem is: an initial value problem with a checked right-hand side, its two passes, what they cost.

A wing's problem is frozen but for the counters of `Stats`; the values of y0, other inputs and parameters belong to
autograd and are passed in. The inputs are y0 and what else a gradient may be wanted of: (y0, alpha, ends of t) of a
Caputo equation, (y0, t) of an ordinary one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import PfdeError
from ..system.autocast import NO_AUTOCAST, Autocast
from ..system.layout import StateLayout
from ..system.parameter_bar import ParameterBar
from ..system.peers import Peers
from ..system.random import Draws, has_drawn, see_whether_it_draws
from ..system.reached import count_nodes
from ..system.torch_function import Times, TorchFunction
from .gradients import Gradient
from .run import Run
from .stats import Stats
from .sweep import Adjoint, Record

P = TypeVar("P", bound="InitialValueProblem")
R = TypeVar("R", bound=Record)
T = TypeVar("T")
Bars = list[Tensor | None]


@dataclass(frozen=True, eq=False, kw_only=True)
class InitialValueProblem(ABC):
    """A right-hand side and where its state lives.

    layout : of the state
    func : the user's callable
    parameters : what func uses and what requires a gradient
    peers : the ranks that share the state
    options_prefix : of the solve's PETSc objects, as the user names them
    private_prefix : theirs in the forward pass, where it has options of its own; else None
    gradient : how it is differentiated
    stats : the one thing that changes
    draws : whether func draws random numbers
    autocast : torch.autocast as func is to see it
    """

    layout: StateLayout
    func: Callable[[Tensor, Any], Any]
    parameters: tuple[Tensor, ...]
    peers: Peers
    options_prefix: str
    stats: Stats
    gradient: Gradient
    draws: bool = False
    autocast: Autocast = NO_AUTOCAST
    private_prefix: str | None = None

    # -- what a wing gives ---------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def t0(self) -> float:
        """Where it starts."""

    @abstractmethod
    def integrate(self, y0: Tensor, *inputs: Any) -> Tensor:
        """y at the outputs, (T, d), without a gradient. Collective."""

    @abstractmethod
    def forward(self, y0: Tensor, *inputs: Any) -> tuple[Tensor, Any]:
        """y at the outputs, (T, d), and the run that the backward pass needs. Collective."""

    @abstractmethod
    def backward(self, run: Any, y_bar: Tensor, needed: Sequence[bool]) -> tuple[Bars, Bars]:
        """The cotangents of the inputs, as far as needed, and of the parameters. Collective."""

    @abstractmethod
    def backprop(self, y0: Tensor, *inputs: Any) -> Tensor:
        """The same steps on autograd's graph; y at the outputs, (T, d). Collective."""

    # -- what all have -------------------------------------------------------------------------------------------

    @property
    def prefix(self) -> str:
        """The options prefix of the forward pass's PETSc objects."""
        return self.options_prefix if self.private_prefix is None else self.private_prefix

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """A module's parameters that require no gradient: the backward pass evaluates func with them again."""
        if not isinstance(self.func, nn.Module):
            return ()
        return tuple(p for p in self.func.parameters() if not p.requires_grad)

    def needs_gradient(self, *inputs: Tensor | None) -> bool:
        """Whether autograd is to follow the solve."""
        given = [x for x in (*inputs, *self.parameters) if x is not None]
        return torch.is_grad_enabled() and any(x.requires_grad for x in given)

    def function(
        self,
        y0: Tensor,
        func: Callable[[Tensor, Any], Any] | None = None,
        *,
        draws: Draws | None = None,
        differentiates_time: bool = False,
        trusted: bool = False,
        times: Tensor | None = None,
    ) -> TorchFunction:
        """func, or another callable of y0's layout, on flat states like y0, checked and counted (`TorchFunction`)."""
        return TorchFunction(
            self.func if func is None else func,
            self.layout,
            self.parameters,
            y0.dtype,
            y0.device,
            self.known_times,
            self.peers,
            draws,
            self.autocast,
            differentiates_time=differentiates_time,
            trusted=trusted,
            times=times,
        )

    @property
    def known_times(self) -> Times | None:
        """The times of the steps, where they are all that f is evaluated at."""
        return None

    def random_numbers(self, y0: Tensor) -> Draws | None:
        """Those of a forward pass, where func draws any."""
        return Draws(y0.device) if self.draws else None

    def finish_forward(
        self, run: Run[R], functions: Sequence[TorchFunction], begin: list[Tensor], *, gradient: Gradient | None
    ) -> None:
        """Count what a forward pass has cost, and see that it can be repeated. Collective.

        begin : `generator_states` before it
        gradient : that is to follow, or None
        """
        drew = has_drawn(begin, functions[0].device)
        unseen = drew and not self.draws and gradient is not None and gradient.redraws
        self.peers.agree(_random_error() if unseen else None)
        for f in functions:
            f.complete_forward()
        stats = self.stats
        stats.steps = run.sweep.n
        if run.sweep.schedule is not None:
            stats.schedule = repr(run.sweep.schedule)
        stats.count("forward", run.system.evaluations)
        stats.count_snapshots(run.sweep.snapshots)
        stats.count_iterations(run.system)

    def reverse(self, run: Run[R], adjoint: Callable[[R, ParameterBar], Adjoint[T]]) -> tuple[T, ParameterBar]:
        """What the adjoint sweep over a run gives, and the parameters' cotangents, counted. Collective.

        adjoint : (the trajectory, theta_bar) -> a new adjoint sweep
        """
        system, stats, sweep = run.system, self.stats, run.sweep
        before = system.evaluations
        if sweep.trajectory.spent:
            sweep = sweep.again()
            stats.count("recompute", system.evaluations - before)
            before = system.evaluations
        theta_bar = system.parameter_cotangent()
        bars = sweep.reverse(adjoint(sweep.trajectory, theta_bar))
        stats.count("recompute", sweep.recomputed)
        stats.count("backward", system.evaluations - before - sweep.recomputed)
        stats.count_snapshots(sweep.snapshots)
        stats.count_iterations(system)
        return bars, theta_bar


def examined(problem: P, y0: Tensor) -> P:
    """The problem, knowing whether func draws random numbers, from one evaluation of it at t0. Collective.

    With gradients enabled, raises ValueError when its graph reaches a tensor that requires grad and is no parameter of
    the problem: that tensor's gradient would silently be None.
    """
    draws = problem.peers.call(draws_numbers, problem.stats, problem.function(y0), y0, problem.t0)
    return replace(problem, draws=True) if draws else problem


def draws_numbers(stats: Stats, function: TorchFunction, y0: Tensor, t0: float) -> bool:
    """Whether func draws random numbers, from one evaluation at t0; raises what `examined` does."""
    y = y0.detach()
    if torch.is_grad_enabled():
        y.requires_grad_()
    before, begin = function.evaluations, count_nodes()
    alone = function.peers.alone  # else every call is collective, and their number has to be the same everywhere
    value, drew = see_whether_it_draws(lambda: function.on_graph(0, t0, y), y0.device, again=alone)
    stats.count("forward", function.evaluations - before)
    if torch.is_grad_enabled():
        function.reached.require((value,), begin, y)
    return drew


def _random_error() -> PfdeError:
    """Where func drew random numbers at some step, but none when it was first evaluated."""
    return PfdeError(
        "func drew random numbers at some step, but none when it was first evaluated, at t[0]: the backward pass would "
        "evaluate it again with others; draw at every step, use gradient=pfde.Discrete(store='graph') or "
        "pfde.Backprop(), or draw the numbers outside func"
    )
