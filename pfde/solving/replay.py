"""What a forward pass has seen, for what is computed again to be compared with: states and values of f.

Every state that is taken again is compared with the first one, by a fingerprint of its bits; every f that the backward
pass evaluates, by its mark (`marks`), which tells rounding from another function.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from ..errors import ReplayError
from ..schedules import Schedule, StoreAll
from .marks import REMEDY, Groups, Marks


class Replay:
    """The fingerprints and marks of one solve; shared by the passes that repeat its steps.

    schedule : of the forward pass; under StoreAll no step is taken again before a second backward pass
    alone : whether f may be evaluated on this rank without the others
    """

    def __init__(self, schedule: Schedule, *, alone: bool) -> None:
        self.fingerprints = Fingerprints(every=not isinstance(schedule, StoreAll))
        self.marks = Marks(alone=alone)

    def see(self, n: int, y: Tensor) -> None:
        """A step has been taken, to y_n."""
        self.fingerprints.see(n, y)

    def keep(self, n: int, groups: Groups) -> None:
        """It was made of these values of f."""
        self.marks.keep(n, groups)

    def end(self, n: int, y: Tensor) -> None:
        """That was the last one."""
        self.fingerprints.end(n, y)

    def state_error(self, steps: int) -> ReplayError | None:
        """The error of a state that was another, once."""
        mismatch = self.fingerprints.take_mismatch()
        if mismatch is None:
            return None
        return ReplayError(
            f"step {mismatch} of {steps}, computed again for the backward pass, is not what it was in "
            f"the forward pass: {REMEDY}"
        )

    def function_error(self, steps: int) -> ReplayError | None:
        """The error of an f that was another, once."""
        mismatch = self.marks.take_mismatch()
        return None if mismatch is None else self.another_function(mismatch, steps)

    def another_function(self, n: int, steps: int) -> ReplayError:
        """The error of an f that was another at step n."""
        return ReplayError(
            f"func, evaluated again for the backward pass at step {n} of {steps}, is not what it was in the "
            f"forward pass: {REMEDY}"
        )


class Fingerprints:
    """One number for each state seen in a forward pass: a weighted sum of its bits, as 32-bit integers.

    The weights tell components from each other: without them, an exchange or two changes of sign would be the same.

    every : all steps are kept, 8 bytes each; else the last one only
    """

    def __init__(self, *, every: bool) -> None:
        self.every = every
        self._values = array("q")
        self._mismatch: int | None = None
        self._weights: Tensor | None = None

    def take_mismatch(self) -> int | None:
        """The first step that was seen again with another state, told once."""
        mismatch, self._mismatch = self._mismatch, None
        return mismatch

    def see(self, n: int, y: Tensor) -> None:
        """Keep the fingerprint of y_n if it is the first, else compare; where all steps are kept."""
        if self.every:
            self._see(n - 1, n, y)

    def end(self, n: int, y: Tensor) -> None:
        """The same for the last step, where it alone is kept."""
        if not self.every:
            self._see(0, n, y)

    def _of(self, y: Tensor) -> int:
        bits = y.view(torch.int32)
        if self._weights is None:
            generator = torch.Generator().manual_seed(1)
            self._weights = torch.randint(1, 2**31, bits.shape, generator=generator).to(y.device)
        return int((bits * self._weights).sum())

    def _see(self, at: int, n: int, y: Tensor) -> None:
        value = self._of(y)
        if at == len(self._values):
            self._values.append(value)
        elif self._values[at] != value and self._mismatch is None:
            self._mismatch = n
