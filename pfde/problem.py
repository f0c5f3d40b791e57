"""One validated initial value problem: its forward pass, its backward pass, and what they cost.

What the torch door hands from floor to floor. `Problem` is frozen but for the counters of `Stats`; the values of y0,
alpha and the parameters belong to autograd and are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .choice import Choice, choose_history
from .driver import SweepTS, bare_system, drive
from .errors import PfdeError
from .gradients import Backprop, Discrete
from .history import Bounded, Exact
from .initial_value import InitialValueProblem
from .schedules import StoreAll
from .schemes import Scheme
from .sweeps.adjoint import AdjointSweep
from .sweeps.backprop import backprop
from .sweeps.checkpoints import CheckpointedSweep
from .sweeps.discretisation import Discretisation
from .sweeps.forward import ForwardSweep, take_again
from .sweeps.grid import Grid, Orders
from .sweeps.trajectory import Trajectory
from .system.base import System
from .system.random import Draws, generator_states, preserved
from .system.torch_function import TorchFunction
from .system.torch_system import GraphSystem, TorchSystem


class _Run(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    sweep: CheckpointedSweep
    system: TorchSystem


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem(InitialValueProblem):
    """A validated solve, but for the values of y0, alpha and the parameters, which autograd owns.

    outputs : the step numbers of the requested times, increasing, the first one 0
    history : None leaves the choice to `prepare`
    group : (d,) index of each component's order, or None when all share one
    """

    scheme: Scheme
    grid: Grid
    outputs: tuple[int, ...]
    history: Exact | Bounded | None
    gradient: Discrete | Backprop
    group: Tensor | None

    def orders(self, alpha: Tensor) -> Orders:
        """The orders as the weights take them."""
        return Orders(alpha.double().cpu().reshape(-1), self.group)

    def function(self, y0: Tensor) -> TorchFunction:
        """f, checked and counted."""
        return self.make_function(self.func, y0, self.grid, Draws(y0.device) if self.draws else None)

    def prepare(self, alpha: Tensor, y0: Tensor) -> Discretisation:
        """The scheme on its grid for this order, with the history for this state. Collective.

        Raises ValueError on every rank where the history does not reach its tolerance.
        """
        history, orders = self.history, self.orders(alpha.detach())
        if history is None:
            history, self.stats.history_reason = self._choose(orders, y0)
        try:
            discretisation = self.peers.call(self._discretise, history, orders, y0)
        except ValueError as error:
            if self.history is not None:
                raise
            self.stats.history_reason += f"; not the exponentials: {error}"
            discretisation = self.peers.call(self._discretise, Exact(), orders, y0)
        self.stats.history = repr(discretisation.history)
        self.stats.history_error = discretisation.operator.error
        return discretisation

    def _choose(self, orders: Orders, y0: Tensor) -> Choice:
        ranks = self.peers.sum(1)
        width = round(self.peers.sum(y0.numel()) / ranks)  # the same choice on every rank
        plan = self.gradient.plan if isinstance(self.gradient, Discrete) else StoreAll()
        schedule = None if isinstance(plan, StoreAll) else plan
        return choose_history(self.scheme, self.grid, len(orders.alpha), width, y0.dtype, schedule=schedule)

    def _discretise(self, history: Exact | Bounded, orders: Orders, y0: Tensor) -> Discretisation:
        discretisation = Discretisation(self.scheme, self.grid, orders, history, y0.numel(), y0.dtype, y0.device)
        _ = discretisation.operator  # the compression is tried now
        return discretisation

    def forward(self, alpha: Tensor, y0: Tensor, ends: Tensor | None) -> tuple[Tensor, _Run]:
        """The forward pass for autograd: `integrate`, and what the backward pass needs."""
        assert isinstance(self.gradient, Discrete)
        y, sweep, system = self.integrate(alpha, y0, self.gradient, ends=ends is not None)
        return y, _Run(sweep, system)

    def backward(
        self, run: _Run, y_bar: Tensor, needed: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The cotangents of (alpha, y0, ends), as far as `needed`, and of the parameters. Collective."""
        alpha_bar, y0_bar, ends_bar, theta_bar = self.reverse(*run, y_bar, alpha=needed[0], ends=needed[2])
        return [alpha_bar, y0_bar, ends_bar], theta_bar

    def integrate(
        self, alpha: Tensor, y0: Tensor, gradient: Discrete | None, *, ends: bool = False
    ) -> tuple[Tensor, CheckpointedSweep, TorchSystem]:
        """The forward pass in a TS; y at the outputs, (len(outputs), d). Collective.

        ends : whether the cotangents of the first and last time will be wanted
        """
        function = self.function(y0)
        function.differentiates_time = ends
        generators = generator_states(y0.device)
        y = y0.new_empty(len(self.outputs), y0.numel())
        row = {n: i for i, n in enumerate(self.outputs)}

        def on_step(n: int, y_n: Tensor) -> None:
            if n in row:
                y[row[n]].copy_(y_n)

        on_step(0, y0)
        discretisation = self.prepare(alpha, y0)
        run, system = _integrate(discretisation, y0, gradient, function, on_step, options_prefix=self.options_prefix)
        drew = not all(map(torch.equal, generators, generator_states(y0.device)))
        self.peers.agree(random_error(gradient) if drew and not self.draws else None)
        function.trusted = True
        self.stats.steps = self.grid.steps
        self.stats.nfe_forward += function.evaluations
        self.count_snapshots(run.snapshots)
        self.count_iterations(system)
        return y, run, system

    def backprop(self, alpha: Tensor, y0: Tensor, ends: Tensor | None) -> Tensor:
        """The same steps on autograd's graph; y at the outputs, (len(outputs), d). Collective."""
        function = self.function(y0)
        system = bare_system(function, implicit=self.scheme.implicit, options_prefix=self.options_prefix)
        discretisation = self.prepare(alpha, y0)
        order = alpha.double().cpu().reshape(-1)
        h = None
        if ends is not None and ends.requires_grad:
            ends = ends.double().cpu()
            h = (ends[1] - ends[0]) / self.grid.steps
            function.put_times_on_graph(ends[0] + h * torch.arange(self.grid.steps + 1, dtype=torch.float64))
        y = backprop(discretisation, order, cast(System, GraphSystem(system)), y0, self.outputs, h)
        self.stats.steps = self.grid.steps
        self.stats.nfe_forward += function.evaluations
        self.count_iterations(system)
        return torch.stack([y[n] for n in self.outputs])

    def reverse(
        self, run: CheckpointedSweep, system: TorchSystem, y_bar: Tensor, *, alpha: bool, ends: bool
    ) -> tuple[Tensor | None, Tensor, Tensor | None, list[Tensor | None]]:
        """(alpha_bar (G,), y0_bar (d,), ends_bar (2,), theta_bar) from the outputs' cotangents, (len(outputs), d).

        alpha, ends : whether the cotangents of the orders, and of the first and last time, are wanted
        """
        function, stats = system.function, self.stats
        function.evaluations = 0
        assert isinstance(self.gradient, Discrete)
        with preserved(y_bar.device) if self.draws else nullcontext():
            if run.trajectory.spent:
                run = take_again(run, system, self.gradient.plan, self.peers)
                stats.nfe_recompute += function.evaluations
                function.evaluations = 0
            theta_bar = system.parameter_cotangent()
            cotangents = {n: y_bar[i] for i, n in enumerate(self.outputs)}
            assert isinstance(run.trajectory, Trajectory)
            bars = run.reverse(AdjointSweep(run.trajectory, system, cotangents, theta_bar, alpha=alpha, h=ends))
        stats.nfe_recompute += run.recomputed
        stats.nfe_backward += function.evaluations - run.recomputed
        self.count_snapshots(run.snapshots)
        self.count_iterations(system)
        ends_bar = None
        if bars.h is not None:
            last = (bars.h + theta_bar.rate) / self.grid.steps
            ends_bar = torch.tensor([theta_bar.first - last, last], dtype=torch.float64)
        return bars.alpha, bars.y0, ends_bar, theta_bar.bars


def random_error(gradient: Discrete | None) -> PfdeError | None:
    """What to raise where func drew random numbers at some step, but none when it was first evaluated."""
    if gradient is None or (gradient.store == "graph" and isinstance(gradient.plan, StoreAll)):
        return None
    return PfdeError(
        "func drew random numbers at some step, but none when it was first evaluated, at t[0]: the backward pass would "
        "evaluate it again with others; draw at every step, use gradient=pfde.Discrete(store='graph') or "
        "pfde.Backprop(), or draw the numbers outside func"
    )


def _integrate(
    discretisation: Discretisation,
    y0: Tensor,
    gradient: Discrete | None,
    function: TorchFunction,
    on_step: Callable[[int, Tensor], None],
    *,
    options_prefix: str = "",
) -> tuple[CheckpointedSweep, TorchSystem]:
    """The forward pass in a TS of its own.

    Parameters
    ----------
    discretisation : the scheme on its grid
    y0 : (d,) the initial state
    gradient : what is kept for the backward pass; None without gradient
    function : f; its peers are the ranks that share the state
    on_step : sees (n, y_n) after every step
    options_prefix : of the TS and its solvers

    Collective. What a callback raises comes out as it was raised.
    """
    grid, scheme = discretisation.grid, discretisation.scheme

    def start(snes: Any, vec: Any) -> tuple[SweepTS, TorchSystem]:
        system = TorchSystem(function, snes if scheme.implicit else None, vec)
        trajectory = Trajectory(discretisation, y0, None if gradient is None else gradient.store)
        sweep, plan = ForwardSweep(trajectory, system), None if gradient is None else gradient.plan
        run = CheckpointedSweep(sweep, trajectory, system, plan, function.peers)
        description = f"{scheme.title}\n  history {discretisation.history}"
        return SweepTS(run, grid.time, description, on_step), system

    return drive(start, function, y0, grid.t0, grid.h, options_prefix=options_prefix)
