"""Checkpoint schedules: which steps to take, keep, restore and reverse, as a stream of plain actions.

The actions are those of the library checkpoint_schedules (Maddison, Dolci, Ham, doi:10.21105/joss.06148): Forward,
Reverse, Copy, Move, EndForward, EndReverse. A schedule knows no numerics; the driver of a sweep executes it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from checkpoint_schedules import CheckpointAction


class Schedule(ABC):
    """A frozen description; every solve draws its own stream of actions from it."""

    @abstractmethod
    def backward(self, steps: int) -> Iterator[CheckpointAction]:
        """The actions after EndForward that reverse all steps, up to EndReverse."""
