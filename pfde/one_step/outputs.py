"""Where the outputs of a one-step solve lie: at the end of a step, or inside one, on its dense output.

    y(t_out) = y_{n-1} + h sum_i b_i(theta) K_i,   theta = (t_out - t) / h,   0 < theta < 1

Outputs do not change the steps. Transposed, y_bar goes to y_{n-1}, h b_i(theta) y_bar to K_i, and, with

    theta_bar = h sum_i b_i'(theta) <y_bar, K_i>,

theta_bar / h to t_out, -theta_bar / h to t, and -theta theta_bar / h to h (beside its share through h b_i K_i).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .methods.base import Interval, OneStep, Step
from .methods.sums_of_slopes import combine


class Output(NamedTuple):
    """Output i of the times, and its theta, None for the end of the step (or y_0, in step 0)."""

    i: int
    theta: float | None


class Outputs:
    """The outputs of one solve, filled step by step.

    Parameters
    ----------
    times : of the outputs, the first one t_0
    y0 : (d,)
    steps : at the end of which step each one lies; None where that is found on the way (adaptive steps)
    open_end : whether the end of the solve does not move with the last output
    filled : whether y is elsewhere, and only `by_step` wanted of known steps

    Attributes
    ----------
    by_step : step number -> its outputs, for the adjoint
    reached : how many are filled
    """

    def __init__(
        self,
        times: Sequence[float],
        y0: Tensor,
        steps: Sequence[int] | None,
        *,
        open_end: bool = False,
        filled: bool = False,
    ) -> None:
        self._times, self._located, self._open_end = list(times), steps is not None, open_end
        self._y = y0.new_empty(0 if filled else len(times), y0.numel())
        self.by_step: dict[int, list[Output]] = {}
        for i, n in enumerate([0] if steps is None else steps):
            self.by_step[n] = [Output(i, None)]
        self.reached = len(times) if filled else 1
        if not filled:
            self._y[0].copy_(y0)

    def give_away(self) -> Tensor:
        """y as far as it is filled, given away: it is to carry the graph, which holds the run of these outputs."""
        y, self._y = self._y, self._y.new_empty(0)
        return y if self.reached == len(y) else y[: self.reached].clone()

    def place(self, t: float) -> None:
        """The last output is at t: an event's."""
        self._times[-1] = t

    def time(self, i: int) -> float:
        """Of output i."""
        return self._times[i]

    @property
    def complete(self) -> bool:
        """Whether all are filled."""
        return self.reached == len(self._times)

    def within(self, at: Interval) -> bool:
        """Whether a step of known end has outputs on its dense output."""
        if self._located:
            return False
        if self.complete:  # the step is taken again
            return any(output.theta is not None for output in self.by_step.get(at.n, ()))
        ahead = (self._times[self.reached] - at.t1) * (1.0 if at.h > 0 else -1.0)
        return ahead < 0 or (ahead == 0 and not self._ends_solve(self.reached))

    def _ends_solve(self, i: int) -> bool:
        """Whether output i is the last step's end, and moves with it; another lies at a step's end by chance."""
        return i == len(self._times) - 1 and not self._open_end

    def collect(self, scheme: OneStep, at: Interval, y: Tensor, step: Step) -> None:
        """Fill the outputs up to the end of a step from y; a step with outputs `within` has all slopes."""
        if self.complete:
            return
        if self._located:
            for output in self.by_step.get(at.n, ()):
                self._y[output.i].copy_(step.y)
                self.reached += 1
            return
        direction = 1.0 if at.h > 0 else -1.0
        while self.reached < len(self._times) and (self._times[self.reached] - at.t1) * direction <= 0:
            i = self.reached
            t = self._times[i]
            theta = None if self._ends_solve(i) else (t - at.t) / at.h
            if theta is None:
                self._y[i].copy_(step.y)
            else:
                combine(y, at.h, scheme.dense_weights(theta), step.slopes, out=self._y[i])
            self.by_step.setdefault(at.n, []).append(Output(i, theta))
            self.reached += 1


def on_graph(
    outputs: Outputs, scheme: OneStep, at: Interval, y: Tensor, step: Step, t: Tensor | None
) -> dict[int, Tensor]:
    """The outputs of a step on autograd's graph, by index; t, (T,), is the output times' graph where they have one."""
    found = {}
    for index, theta in outputs.by_step.get(at.n, ()):
        if theta is None:
            found[index] = step.y
            continue
        exact = ((outputs.time(index) if t is None else t[index]) - at.t) / at.h
        value = combine(y, at.h, scheme.dense_weights(theta), step.slopes)
        if isinstance(exact, Tensor) and exact.requires_grad:
            rate = combine(torch.zeros_like(y), at.h, scheme.dense_weights(theta, 1), step.slopes).detach()
            value = value + rate * (exact - exact.detach()).to(rate)
        found[index] = value
    return found
