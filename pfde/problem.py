"""One validated initial value problem: its forward pass, its backward pass, and what they cost.

What the torch door hands from floor to floor. `Problem` is frozen but for the counters of `Stats`; the values of y0,
alpha and the parameters belong to autograd and are passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import ts
from .choice import Choice, choose_history
from .errors import PfdeError
from .gradients import Backprop, Discrete
from .history import Bounded, Exact
from .schedules import StoreAll
from .schemes import Scheme
from .sweeps.backprop import backprop
from .sweeps.checkpoints import CheckpointedSweep
from .sweeps.discretisation import Discretisation
from .sweeps.grid import Grid, Orders
from .system.base import System
from .system.peers import Peers
from .system.random import Draws, generator_states, preserved
from .system.torch_function import StateLayout, TorchFunction
from .system.torch_system import GraphSystem, TorchSystem


@dataclass
class Stats:
    """What a solve has cost so far; the backward pass adds to it.

    Attributes
    ----------
    method : the scheme's name
    steps, rejected : steps taken and rejected
    nfe_forward, nfe_recompute, nfe_backward : evaluations of f, by phase (a linearisation counts as one)
    newton_iterations, linear_iterations : of SNES and KSP, all phases
    snapshots_peak, snapshot_bytes_peak : checkpoints held at once, in memory and on disk together (an index into the
        exact history counts, and costs nothing)
    history, history_reason : the history used, and why where it was chosen (history=None)
    history_error : the largest relative error of its kernel over all lags; 0 for the exact one
    """

    method: str
    steps: int = 0
    rejected: int = 0
    nfe_forward: int = 0
    nfe_recompute: int = 0
    nfe_backward: int = 0
    newton_iterations: int = 0
    linear_iterations: int = 0
    snapshots_peak: int = 0
    snapshot_bytes_peak: int = 0
    history: str = ""
    history_reason: str = ""
    history_error: float = 0.0


@dataclass(frozen=True, eq=False)
class Problem:
    """A validated solve, but for the values of y0, alpha and the parameters, which autograd owns.

    outputs : the step numbers of the requested times, increasing, the first one 0
    group : (d,) index of each component's order, or None when all share one
    parameters : what func uses and what requires a gradient
    history : None leaves the choice to `prepare`
    draws : whether func draws random numbers
    """

    scheme: Scheme
    grid: Grid
    outputs: tuple[int, ...]
    history: Exact | Bounded | None
    gradient: Discrete | Backprop
    group: Tensor | None
    layout: StateLayout
    func: Callable[[Tensor, Any], Any]
    parameters: tuple[Tensor, ...]
    peers: Peers
    options_prefix: str
    stats: Stats
    draws: bool = False

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

    def orders(self, alpha: Tensor) -> Orders:
        """The orders as the weights take them."""
        return Orders(alpha.double().cpu().reshape(-1), self.group)

    def function(self, y0: Tensor) -> TorchFunction:
        """f, checked and counted."""
        draws = Draws(y0.device) if self.draws else None
        return TorchFunction(self.func, self.layout, self.parameters, y0.dtype, y0.device, self.grid, self.peers, draws)

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
        bounded = isinstance(self.gradient, Discrete) and not isinstance(self.gradient.plan, StoreAll)
        return choose_history(self.scheme, self.grid, len(orders.alpha), width, y0.dtype, bounded=bounded)

    def _discretise(self, history: Exact | Bounded, orders: Orders, y0: Tensor) -> Discretisation:
        discretisation = Discretisation(self.scheme, self.grid, orders, history, y0.numel(), y0.dtype, y0.device)
        _ = discretisation.operator  # the compression is tried now
        return discretisation

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
        run, system = ts.integrate(discretisation, y0, gradient, function, on_step, options_prefix=self.options_prefix)
        drew = not all(map(torch.equal, generators, generator_states(y0.device)))
        self.peers.agree(_random_error(gradient) if drew and not self.draws else None)
        function.trusted = True
        self.stats.steps = self.grid.steps
        self.stats.nfe_forward += function.evaluations
        self._count_snapshots(run)
        self._count_iterations(system)
        return y, run, system

    def backprop(self, alpha: Tensor, y0: Tensor, ends: Tensor | None) -> Tensor:
        """The same steps on autograd's graph; y at the outputs, (len(outputs), d). Collective."""
        function = self.function(y0)
        system = ts.bare_system(self.scheme, function, options_prefix=self.options_prefix)
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
        self._count_iterations(system)
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
                run = ts.again(run, system, self.gradient.plan, self.peers)
                stats.nfe_recompute += function.evaluations
                function.evaluations = 0
            theta_bar = system.parameter_cotangent()
            cotangents = {n: y_bar[i] for i, n in enumerate(self.outputs)}
            bars = run.reverse(cotangents, theta_bar, alpha=alpha, h=ends)
        stats.nfe_recompute += run.recomputed
        stats.nfe_backward += function.evaluations - run.recomputed
        self._count_snapshots(run)
        self._count_iterations(system)
        ends_bar = None
        if bars.h is not None:
            last = (bars.h + theta_bar.rate) / self.grid.steps
            ends_bar = torch.tensor([theta_bar.first - last, last], dtype=torch.float64)
        return bars.alpha, bars.y0, ends_bar, theta_bar.bars

    def _count_snapshots(self, run: CheckpointedSweep) -> None:
        if run.snapshots is not None:
            self.stats.snapshots_peak = max(self.stats.snapshots_peak, run.snapshots.snapshots_peak)
            self.stats.snapshot_bytes_peak = max(self.stats.snapshot_bytes_peak, run.snapshots.bytes_peak)

    def _count_iterations(self, system: TorchSystem) -> None:
        if system.stages is not None:
            newton, linear = system.stages.take_iterations()
            self.stats.newton_iterations += newton
            self.stats.linear_iterations += linear


def _random_error(gradient: Discrete | None) -> PfdeError | None:
    if gradient is None or (gradient.store == "graph" and isinstance(gradient.plan, StoreAll)):
        return None
    return PfdeError(
        "func drew random numbers at some step, but none when it was first evaluated, at t[0]: the backward pass would "
        "evaluate it again with others; draw at every step, use gradient=pfde.Discrete(store='graph') or "
        "pfde.Backprop(), or draw the numbers outside func"
    )
