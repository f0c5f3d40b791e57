"""What a forward pass leaves: the sweep with its trajectory, and the system that took its steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from ..system.torch_system import TorchSystem
from .checkpoints import CheckpointedSweep
from .sweep import Record

R = TypeVar("R", bound=Record)


@dataclass(frozen=True, eq=False)
class Run(Generic[R]):
    """A forward pass, for the backward pass that belongs to it."""

    sweep: CheckpointedSweep[R]
    system: TorchSystem
