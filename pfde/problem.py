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
    snapshots_peak, snapshot_bytes_peak : checkpoints held at once (an index into the exact history costs nothing)
    history_error : bound on the relative error of the history's kernel; 0 for the exact one
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
    history_error: float = 0.0


@dataclass(frozen=True, eq=False)
class Problem:
    """A validated solve, but for the values of y0, alpha and the parameters, which autograd owns.

    outputs : the step numbers of the requested times, increasing, the first one 0
    group : (d,) index of each component's order, or None when all share one
    parameters : what func uses and what requires a gradient
    draws : whether func draws random numbers
    """

    scheme: Scheme
    grid: Grid
    outputs: tuple[int, ...]
    history: Exact | Bounded
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

    def needs_gradient(self, alpha: Tensor, y0: Tensor) -> bool:
        """Whether autograd is to follow the solve."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in (alpha, y0, *self.parameters))

    def orders(self, alpha: Tensor) -> Orders:
        """The orders as the weights take them."""
        return Orders(alpha.double().cpu().reshape(-1), self.group)

    def function(self, y0: Tensor) -> TorchFunction:
        """f, checked and counted."""
        draws = Draws(y0.device) if self.draws else None
        times = self.grid.times()
        return TorchFunction(self.func, self.layout, self.parameters, y0.dtype, y0.device, times, self.peers, draws)

    def discretisation(self, alpha: Tensor, y0: Tensor) -> Discretisation:
        """The scheme on its grid for this order, with the history for this state."""
        where = self.scheme, self.grid, self.orders(alpha.detach()), self.history
        return Discretisation(*where, y0.numel(), y0.dtype, y0.device)

    def integrate(
        self, alpha: Tensor, y0: Tensor, gradient: Discrete | None
    ) -> tuple[Tensor, CheckpointedSweep, TorchSystem]:
        """The forward pass in a TS; y at the outputs, (len(outputs), d). Collective."""
        function = self.function(y0)
        generators = generator_states(y0.device)
        y = y0.new_empty(len(self.outputs), y0.numel())
        row = {n: i for i, n in enumerate(self.outputs)}

        def on_step(n: int, y_n: Tensor) -> None:
            if n in row:
                y[row[n]].copy_(y_n)

        on_step(0, y0)
        discretisation = self.peers.call(self._prepared, alpha, y0)
        run, system = ts.integrate(discretisation, y0, gradient, function, on_step, options_prefix=self.options_prefix)
        drew = not all(map(torch.equal, generators, generator_states(y0.device)))
        self.peers.agree(_random_error(gradient) if drew and not self.draws else None)
        function.trusted = True
        self.stats.steps = self.grid.steps
        self.stats.nfe_forward += function.evaluations
        self.stats.history_error = discretisation.operator.error
        self._count_snapshots(run)
        self._count_iterations(system)
        return y, run, system

    def _prepared(self, alpha: Tensor, y0: Tensor) -> Discretisation:
        """The discretisation with its history, which may be found to be impossible."""
        discretisation = self.discretisation(alpha, y0)
        _ = discretisation.operator
        return discretisation

    def backprop(self, alpha: Tensor, y0: Tensor) -> Tensor:
        """The same steps on autograd's graph; y at the outputs, (len(outputs), d). Collective."""
        function = self.function(y0)
        system = ts.bare_system(self.scheme, function, options_prefix=self.options_prefix)
        discretisation = self.peers.call(self._prepared, alpha, y0)
        order = alpha.double().cpu().reshape(-1)
        y = backprop(discretisation, order, cast(System, GraphSystem(system)), y0, self.outputs)
        self.stats.steps = self.grid.steps
        self.stats.nfe_forward += function.evaluations
        self.stats.history_error = discretisation.operator.error
        self._count_iterations(system)
        return torch.stack([y[n] for n in self.outputs])

    def reverse(
        self, run: CheckpointedSweep, system: TorchSystem, y_bar: Tensor, *, alpha: bool
    ) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
        """(alpha_bar (G,), y0_bar (d,), theta_bar) from the cotangents of the outputs, (len(outputs), d)."""
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
            bars = run.reverse(cotangents, theta_bar, alpha=alpha)
        stats.nfe_recompute += run.recomputed
        stats.nfe_backward += function.evaluations - run.recomputed
        self._count_snapshots(run)
        self._count_iterations(system)
        return bars.alpha, bars.y0, theta_bar.bars

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
