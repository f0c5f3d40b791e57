"""Where a solve takes place: the grid, and the orders of the components."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..system.base import Weight


class Grid(NamedTuple):
    """The uniform grid t_n = t0 + n h, n = 0..steps, ending at t1 exactly; or the times themselves.

    points : the N+1 times of a nonuniform grid, whose h is the mean step; None on a uniform one
    """

    t0: float
    h: float
    steps: int
    t1: float
    points: tuple[float, ...] | None = None

    def time(self, n: int) -> float:
        """t_n."""
        if self.points is not None:
            return self.points[n]
        return self.t1 if n == self.steps else self.t0 + n * self.h

    def times(self) -> Tensor:
        """All t_n, n = 0..steps, float64."""
        if self.points is not None:
            return torch.tensor(self.points, dtype=torch.float64)
        times = torch.arange(self.steps + 1, dtype=torch.float64).mul_(self.h).add_(self.t0)
        times[-1] = self.t1
        return times


class Orders(NamedTuple):
    """The orders alpha: (G,) distinct values, float64 on the CPU, and the component's index among them.

    group : (d,) int64 on the state's device, or None when all components share one order (G = 1)
    """

    alpha: Tensor
    group: Tensor | None

    def pick(self, values: Tensor) -> Weight:
        """One value for each order (G,) as a weight of the state: a number, or a tensor of shape (d,)."""
        return float(values[0]) if self.group is None else values[self.group]

    def collect(self, values: Tensor) -> Tensor:
        """Sum a value of each component (d,) into one for each order, (G,) float64 on the CPU: pick's transpose."""
        if self.group is None:
            return values.double().sum().reshape(1).cpu()
        sums = torch.zeros(len(self.alpha), dtype=torch.float64, device=values.device)
        return sums.index_add_(0, self.group, values.double()).cpu()
