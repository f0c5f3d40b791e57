"""Keep the data of every step: no recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from checkpoint_schedules import CheckpointAction, SingleMemoryStorageSchedule

from .base import Schedule


@dataclass(frozen=True)
class StoreAll(Schedule):
    """One forward pass that keeps what `Discrete(store=...)` says of every step, one backward pass."""

    def backward(self, steps: int) -> Iterator[CheckpointAction]:
        """Reverse(steps, 0), EndReverse."""
        schedule = SingleMemoryStorageSchedule()
        actions = iter(schedule)
        next(actions)  # Forward over all steps; the sweep has taken them
        schedule.finalize(steps)
        next(actions)  # EndForward
        return actions
