"""What all solves share: an initial value problem with a checked right-hand side, and what it has cost so far.

`Problem` (Caputo equations) and `OrdinaryProblem` build on it; both hand autograd a forward and a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .schedules.storage import SnapshotStore
from .system.autocast import NO_AUTOCAST, Autocast
from .system.layout import StateLayout
from .system.peers import Peers
from .system.random import Draws, see_whether_it_draws
from .system.reached import count_nodes
from .system.torch_function import Times, TorchFunction
from .system.torch_system import TorchSystem

P = TypeVar("P", bound="InitialValueProblem")


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
    schedule : the checkpoint schedule; "" for a solve without gradient, or one that keeps none of its own
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
    schedule: str = ""
    history: str = ""
    history_reason: str = ""
    history_error: float = 0.0


@dataclass(frozen=True)
class Solution:
    """The result of `solve`.

    Attributes
    ----------
    t : (T,) the output times, as given
    y : (T, *y0.shape), y0 first; a tuple of such for a tuple y0
    stats : what the solve cost; a backward pass through y adds to it
    status : "completed"; of adaptive steps with options={"on_limit": "return"} also "limit", where t and y end early
    """

    t: Tensor
    y: Any
    stats: Stats
    status: str


@dataclass(frozen=True, eq=False, kw_only=True)
class InitialValueProblem:
    """A right-hand side and where its state lives; the values of y0 and the parameters belong to autograd.

    layout : of the state
    func : the user's callable
    parameters : what func uses and what requires a gradient
    peers : the ranks that share the state
    options_prefix : of the solve's PETSc objects, as the user names them
    private_prefix : theirs in the forward pass, where it has options of its own; else None
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
    draws: bool = False
    autocast: Autocast = NO_AUTOCAST
    private_prefix: str | None = None

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

    def make_function(
        self, func: Callable[[Tensor, Any], Any], y0: Tensor, grid: Times | None, draws: Draws | None
    ) -> TorchFunction:
        """A callable of y0's layout as right-hand side, checked and counted."""
        return TorchFunction(
            func, self.layout, self.parameters, y0.dtype, y0.device, grid, self.peers, draws, self.autocast
        )

    def count_snapshots(self, snapshots: SnapshotStore | None) -> None:
        """Note the peaks of a store."""
        if snapshots is not None:
            self.stats.snapshots_peak = max(self.stats.snapshots_peak, snapshots.snapshots_peak)
            self.stats.snapshot_bytes_peak = max(self.stats.snapshot_bytes_peak, snapshots.bytes_peak)

    def count_iterations(self, system: TorchSystem) -> None:
        """Take over the iterations of a stage solver."""
        if system.stages is not None:
            newton, linear = system.stages.take_iterations()
            self.stats.newton_iterations += newton
            self.stats.linear_iterations += linear
            system.stages.rest()


def look(problem: P, function: TorchFunction, y0: Tensor, t0: float) -> P:
    """The problem, knowing whether func draws random numbers, from one evaluation of it at t0. Collective.

    function : the problem's own, of which no more is needed

    With gradients enabled, raises ValueError when its graph reaches a tensor that requires grad and is no parameter of
    the problem: that tensor's gradient would silently be None.
    """
    draws = problem.peers.call(draws_numbers, problem.stats, function, y0, t0)
    return replace(problem, draws=True) if draws else problem


def draws_numbers(stats: Stats, function: TorchFunction, y0: Tensor, t0: float) -> bool:
    """Whether func draws random numbers, from one evaluation at t0; raises what `look` does."""
    y = y0.detach()
    if torch.is_grad_enabled():
        y.requires_grad_()
    before, begin = function.evaluations, count_nodes()
    alone = function.peers.alone  # else every call is collective, and their number has to be the same everywhere
    value, drew = see_whether_it_draws(lambda: function.on_graph(0, t0, y), y0.device, again=alone)
    stats.nfe_forward += function.evaluations - before
    if torch.is_grad_enabled():
        function.reached.require((value,), begin, y)
    return drew
