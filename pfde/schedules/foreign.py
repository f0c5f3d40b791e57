"""Schedules of the library checkpoint_schedules (doi:10.21105/joss.06148), given by the user, as ours.

Such an object is a stream itself: it is used up by one solve. Adopting it keeps it as a template, and every solve gets
a copy of its own.
"""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass

from checkpoint_schedules import CheckpointSchedule, NoneCheckpointSchedule

from .base import Schedule, Sizes, Stream, check_directory


@dataclass(frozen=True)
class Foreign(Schedule):
    """A schedule of checkpoint_schedules that has not been started; two are equal when they hold the same object."""

    schedule: CheckpointSchedule
    directory: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        name = type(self.schedule).__name__
        if isinstance(self.schedule, NoneCheckpointSchedule):
            raise ValueError(f"schedule must keep what a gradient needs: got {name}; use StoreAll() or Revolve(...)")
        check_directory(self.directory)
        self._check_unused()

    def _check_unused(self) -> None:
        if hasattr(self.schedule, "iter"):  # a running generator cannot be copied
            name = type(self.schedule).__name__
            raise ValueError(
                f"schedule must not have been started: got a {name} of which actions were drawn; make a new one"
            )

    def stream(self, sizes: Sizes) -> Stream:
        """A copy of the schedule; ValueError if it was made for another number of steps or has been started since."""
        self._check_unused()
        steps = self.schedule.max_n
        if steps is not None and steps != sizes.steps:
            name = type(self.schedule).__name__
            raise ValueError(
                f"schedule must be made for the steps of the solve, {sizes.steps}: got a {name} for {steps}; "
                f"make it with max_n={sizes.steps}"
            )
        stream: Stream = copy.deepcopy(self.schedule)
        return stream


def adopt(schedule: object) -> Schedule:
    """The schedule itself if it is one of pfde's, a Foreign around one of checkpoint_schedules, else TypeError."""
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, CheckpointSchedule):
        return Foreign(schedule)
    raise TypeError(
        "schedule must be StoreAll(), Revolve(...), Online(...) or a schedule of checkpoint_schedules: "
        f"got {schedule!r}; make one of these"
    )
