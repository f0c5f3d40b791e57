"""One validated initial value problem: its forward pass, its backward pass, and what they cost.

What the torch door hands from floor to floor. `Problem` is frozen but for the counters of `Stats`; the values of y0,
alpha and the parameters belong to autograd and are passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from . import ts
from .errors import PfdeError
from .gradients import Backprop, Discrete, Store
from .history import Exact
from .schedules import StoreAll
from .schemes import Scheme
from .sweeps.adjoint import adjoint
from .sweeps.backprop import backprop
from .sweeps.discretisation import Discretisation, Grid, Orders
from .sweeps.trajectory import Trajectory
from .system.base import System
from .system.peers import Peers
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
    """

    scheme: Scheme
    grid: Grid
    outputs: tuple[int, ...]
    history: Exact
    gradient: Discrete | Backprop
    group: Tensor | None
    layout: StateLayout
    func: Callable[[Tensor, Any], Any]
    parameters: tuple[Tensor, ...]
    peers: Peers
    options_prefix: str
    stats: Stats

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
        times = self.grid.times()
        return TorchFunction(self.func, self.layout, self.parameters, y0.dtype, y0.device, times, self.peers)

    def integrate(self, alpha: Tensor, y0: Tensor, store: Store | None) -> tuple[Tensor, Trajectory, TorchSystem]:
        """The forward pass in a TS; y at the outputs, (len(outputs), d). Collective."""
        function = self.function(y0)
        generators = _generator_states(y0)
        y = y0.new_empty(len(self.outputs), y0.numel())
        row = {n: i for i, n in enumerate(self.outputs)}

        def on_step(n: int, y_n: Tensor) -> None:
            if n in row:
                y[row[n]].copy_(y_n)

        on_step(0, y0)
        trajectory, system = ts.integrate(
            Discretisation(self.scheme, self.grid, self.orders(alpha.detach()), self.history, y0.dtype, y0.device),
            y0,
            store,
            function,
            on_step,
            options_prefix=self.options_prefix,
        )
        if not all(map(torch.equal, generators, _generator_states(y0))):
            function.generators = generators
        self.peers.agree(_random_error(store) if function.generators else None)
        function.trusted = True
        self.stats.steps = self.grid.steps
        self.stats.nfe_forward += function.evaluations
        self._count_iterations(system)
        return y, trajectory, system

    def backprop(self, alpha: Tensor, y0: Tensor) -> Tensor:
        """The same steps on autograd's graph; y at the outputs, (len(outputs), d). Collective."""
        function = self.function(y0)
        system = ts.bare_system(self.scheme, function, options_prefix=self.options_prefix)
        y = backprop(self.scheme, self.grid, self.orders(alpha), cast(System, GraphSystem(system)), y0, self.outputs)
        self.stats.steps = self.grid.steps
        self.stats.nfe_forward += function.evaluations
        self._count_iterations(system)
        return torch.stack([y[n] for n in self.outputs])

    def reverse(
        self, trajectory: Trajectory, system: TorchSystem, y_bar: Tensor, *, alpha: bool
    ) -> tuple[Tensor | None, Tensor, list[Tensor | None]]:
        """(alpha_bar (G,), y0_bar (d,), theta_bar) from the cotangents of the outputs, (len(outputs), d)."""
        function, stats = system.function, self.stats
        function.evaluations = 0
        if trajectory.spent:
            with _replay(function.generators, y_bar):
                trajectory = ts.again(trajectory, system)
            stats.nfe_recompute += function.evaluations
            function.evaluations = 0
        theta_bar = system.parameter_cotangent()
        assert isinstance(self.gradient, Discrete)
        actions = (self.gradient.schedule or StoreAll()).backward(self.grid.steps)
        cotangents = {n: y_bar[i] for i, n in enumerate(self.outputs)}
        bars = adjoint(trajectory, system, cotangents, theta_bar, actions, alpha=alpha)
        stats.nfe_backward += function.evaluations
        self._count_iterations(system)
        return bars.alpha, bars.y0, theta_bar.bars

    def _count_iterations(self, system: TorchSystem) -> None:
        if system.stages is not None:
            newton, linear = system.stages.take_iterations()
            self.stats.newton_iterations += newton
            self.stats.linear_iterations += linear


def _generator_states(y0: Tensor) -> list[Tensor]:
    states = [torch.get_rng_state()]
    if y0.is_cuda:
        states.append(torch.cuda.get_rng_state(y0.device))
    return states


def _random_error(store: Store | None) -> PfdeError | None:
    if store not in ("state", "stages"):
        return None
    return PfdeError(
        "func drew random numbers (dropout?): the backward pass would evaluate it again with others; use "
        "gradient=pfde.Discrete(store='graph') or pfde.Backprop(), or draw the numbers outside func"
    )


@contextmanager
def _replay(generators: list[Tensor] | None, like: Tensor) -> Iterator[None]:
    """Let func draw the random numbers of the forward pass once more, where it drew any."""
    if generators is None:
        yield
        return
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        torch.set_rng_state(generators[0])
        if like.is_cuda:
            torch.cuda.set_rng_state(generators[1], like.device)
        yield
