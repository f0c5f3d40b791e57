"""What a solve costs, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from torch import Tensor

from ..schedules import SnapshotStore
from ..system.torch_system import TorchSystem

State = TypeVar("State")
Phase = Literal["forward", "recompute", "backward"]


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

    def count(self, phase: Phase, evaluations: int = 1) -> None:
        """Add evaluations of f."""
        name = f"nfe_{phase}"
        setattr(self, name, getattr(self, name) + evaluations)

    def count_snapshots(self, snapshots: SnapshotStore | None) -> None:
        """Note the peaks of a store."""
        if snapshots is not None:
            self.snapshots_peak = max(self.snapshots_peak, snapshots.snapshots_peak)
            self.snapshot_bytes_peak = max(self.snapshot_bytes_peak, snapshots.bytes_peak)

    def count_iterations(self, system: TorchSystem) -> None:
        """Take over the iterations of a stage solver, which rests then."""
        if system.stages is not None:
            newton, linear = system.stages.take_iterations()
            self.newton_iterations += newton
            self.linear_iterations += linear
            system.stages.rest()


@dataclass(frozen=True)
class Solution(Generic[State]):
    """The result of `solve`.

    Attributes
    ----------
    t : (T,) the output times, as given
    y : (T, *y0.shape), y0 first; a tuple of such for a tuple y0
    stats : what the solve cost; a backward pass through y adds to it
    status : "completed"; of adaptive steps with options={"on_limit": "return"} also "limit", where t and y end early
    """

    t: Tensor
    y: State
    stats: Stats
    status: str
