"""Where Newton's method starts in the stages Y_i = r_i + w_i f(Y_i) of one step.

    Y_{i-1}, the stage before,   or   r_i + w_i K_{i-1}, its slope in the place of the new one

A stage earlier the errors of the two were |Y_{i-1} - Y_{i-2}| and |w (K_{i-1} - K_{i-2})|: the second is taken in the
components in which it was the smaller one by a factor, and not in a first stage, nor with a mass matrix. Where
f is not stiff along the solution it spares a Newton iteration a stage; where it is, w K would amplify. All is known
within the step, so that a step taken again starts as it did, and each rank may decide for its own part.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .sums_of_slopes import value_of

_BETTER = 0.125


class StageGuess:
    """The starting values of one step's stages, asked for with `next` and told the solutions with `learn`.

    y : y_n, the first stage's starting value
    predicts : whether r + w K approximates a stage: M = I
    """

    def __init__(self, y: Tensor, *, predicts: bool = True) -> None:
        self._state, self._predicts = y.detach(), predicts
        self._slope: Tensor | None = None
        self._trusted: Tensor | None = None

    def next(self, r: Tensor, w: float | Tensor) -> Tensor:
        """The starting value of the stage with these r and w."""
        if self._trusted is None or self._slope is None:
            return self._state
        return torch.where(self._trusted, torch.add(r.detach(), self._slope, alpha=value_of(w)), self._state)

    def learn(self, state: Tensor, slope: Tensor, w: float | Tensor) -> None:
        """The stage and its slope; w is 0 in an explicit one."""
        state, slope = state.detach(), slope.detach()
        if self._predicts and self._slope is not None and (size := value_of(w)):
            missed, moved = (slope - self._slope).abs_().mul_(abs(size)), (state - self._state).abs_().mul_(_BETTER)
            self._trusted = missed <= moved
        self._state, self._slope = state, slope
