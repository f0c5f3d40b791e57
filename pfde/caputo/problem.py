"""One validated Caputo initial value problem: its forward pass in a TS, its backward pass, and what they cost.

D^alpha y = f(t, y, theta),  y(t_0) = y_0. The inputs are (y0, alpha, ends), ends the first and last time where they
require a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..schedules import StoreAll
from ..solving.checkpoints import CheckpointedSweep
from ..solving.driver import Driver, SweepTS, bare_solver
from ..solving.gradients import Gradient
from ..solving.initial_value import Bars, InitialValueProblem
from ..solving.replay import Replay
from ..solving.run import Run
from ..system.parameter_bar import ParameterBar
from ..system.random import generator_states
from ..system.torch_function import TorchFunction
from ..system.torch_system import GraphSystem, TorchSystem
from .adjoint import AdjointSweep
from .backprop import backprop
from .choice import Choice, choose_history
from .discretisation import Discretisation
from .forward import ForwardSweep
from .grid import Grid, Orders
from .history import Exact, History
from .schemes import Scheme
from .tangent import tangent_sweep
from .trajectory import Trajectory


@dataclass(frozen=True, eq=False, kw_only=True)
class CaputoProblem(InitialValueProblem):
    """A validated solve, but for the values of y0, alpha and the parameters, which autograd owns.

    outputs : the step numbers of the requested times, increasing, the first one 0
    history : None leaves the choice to `prepare`
    group : (d,) index of each component's order, or None when all share one
    """

    scheme: Scheme
    grid: Grid
    outputs: tuple[int, ...]
    history: History | None
    group: Tensor | None

    @property
    def t0(self) -> float:
        return self.grid.t0

    @property
    def known_times(self) -> Grid:
        return self.grid

    def orders(self, alpha: Tensor) -> Orders:
        """The orders as the weights take them."""
        return Orders(alpha.double().cpu().reshape(-1), self.group)

    def prepare(self, y0: Tensor, alpha: Tensor) -> Discretisation:
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
        plan = self.gradient.plan
        schedule = None if isinstance(plan, StoreAll) else plan
        return choose_history(self.scheme, self.grid, len(orders.alpha), width, y0.dtype, schedule=schedule)

    def _discretise(self, history: History, orders: Orders, y0: Tensor) -> Discretisation:
        discretisation = Discretisation(self.scheme, self.grid, orders, history, y0.numel(), y0.dtype, y0.device)
        _ = discretisation.operator  # the compression is tried now
        return discretisation

    # -- the forward pass ----------------------------------------------------------------------------------------

    def integrate(self, y0: Tensor, alpha: Tensor, ends: Tensor | None) -> Tensor:
        return self._integrate(y0, alpha, ends, None)[0]

    def forward(self, y0: Tensor, alpha: Tensor, ends: Tensor | None) -> tuple[Tensor, Run[Trajectory]]:
        return self._integrate(y0, alpha, ends, self.gradient)

    def _integrate(
        self, y0: Tensor, alpha: Tensor, ends: Tensor | None, gradient: Gradient | None
    ) -> tuple[Tensor, Run[Trajectory]]:
        """y at the outputs, and what a forward pass for this gradient, or for none, leaves."""
        y0 = y0.detach()
        function = self.function(y0, draws=self.random_numbers(y0), differentiates_time=ends is not None)
        begin = generator_states(y0.device)
        y = y0.new_empty(len(self.outputs), y0.numel())
        row = {n: i for i, n in enumerate(self.outputs)}

        def on_step(n: int, y_n: Tensor) -> None:
            if n in row:
                y[row[n]].copy_(y_n)

        on_step(0, y0)
        discretisation = self.prepare(y0, alpha)
        run = self._drive(discretisation, y0, gradient, function, on_step)
        self.finish_forward(run, [function], begin, gradient=gradient)
        return y, run

    def _drive(
        self,
        discretisation: Discretisation,
        y0: Tensor,
        gradient: Gradient | None,
        function: TorchFunction,
        on_step: Callable[[int, Tensor], None],
    ) -> Run[Trajectory]:
        """All steps, in a TS; on_step sees (n, y_n) after every one. What a callback raises comes out as it was."""
        grid, scheme = self.grid, self.scheme
        keep, plan = (None, None) if gradient is None else (gradient.keep, gradient.plan)
        replay = None if plan is None else Replay(plan, alone=self.peers.alone)
        with Driver(self.peers, y0, self.prefix) as driver:
            system = TorchSystem(function, driver.snes if scheme.implicit else None, driver.vec)
            sweep = ForwardSweep(Trajectory(discretisation, y0, keep), system, replay)
            checkpointed = CheckpointedSweep(sweep, system, plan, self.peers, replay)
            title = f"{scheme.title}\n  history {discretisation.history}"
            context: SweepTS[Trajectory] = SweepTS(
                checkpointed, grid.time, title, on_step, shows_state=driver.is_observed
            )
            driver.run(context, grid.t0, grid.h)
        return Run(checkpointed, system)

    def backprop(self, y0: Tensor, alpha: Tensor, ends: Tensor | None) -> Tensor:
        h = times = None
        if ends is not None and ends.requires_grad:
            ends = ends.double().cpu()
            h = (ends[1] - ends[0]) / self.grid.steps
            times = ends[0] + h * torch.arange(self.grid.steps + 1, dtype=torch.float64)
        function = self.function(y0, draws=self.random_numbers(y0), times=times)
        system = self.bare_system(function)
        discretisation = self.prepare(y0, alpha)
        order = alpha.double().cpu().reshape(-1)
        y = backprop(discretisation, order, GraphSystem(system), y0, self.outputs, h)
        self.stats.steps = self.grid.steps
        self.stats.count("forward", function.evaluations)
        self.stats.count_iterations(system)
        return torch.stack([y[n] for n in self.outputs])

    def tangent(
        self, y0: Tensor, alpha: Tensor, y0_dot: Tensor, alpha_dot: Tensor, theta_dot: Sequence[Tensor]
    ) -> Tensor:
        """The tangents of y at the outputs, (T, d), along those of y0, alpha and the parameters. Collective."""
        trajectory = Trajectory(self.prepare(y0, alpha), y0, None)
        system, order_dot = self.bare_system(self.function(y0)), alpha_dot.cpu().reshape(-1)
        found = tangent_sweep(trajectory, system, y0_dot, order_dot, theta_dot, self.outputs)
        return torch.stack([found[n] for n in self.outputs])

    def bare_system(self, function: TorchFunction) -> TorchSystem:
        """f with a stage solver of its own, outside any TS. Collective."""
        snes, vec = bare_solver(function, self.prefix, implicit=self.scheme.implicit)
        return TorchSystem(function, snes, vec)

    # -- the backward pass ---------------------------------------------------------------------------------------

    def backward(self, run: Run[Trajectory], y_bar: Tensor, needed: Sequence[bool]) -> tuple[Bars, Bars]:
        _, alpha, ends = needed
        cotangents = {n: y_bar[i] for i, n in enumerate(self.outputs)}

        def adjoint(trajectory: Trajectory, theta_bar: ParameterBar) -> AdjointSweep:
            return AdjointSweep(
                trajectory, run.system, cotangents, theta_bar, alpha=alpha, h=ends, marks=run.sweep.marks
            )

        bars, theta_bar = self.reverse(run, adjoint)
        ends_bar = None
        if bars.h is not None:
            last = (bars.h + theta_bar.rate) / self.grid.steps
            ends_bar = torch.tensor([theta_bar.first - last, last], dtype=torch.float64)
        return [bars.y0, bars.alpha, ends_bar], self.peers.call(theta_bar.finish, self.parameters)
