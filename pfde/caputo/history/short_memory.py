"""The short-memory principle: forget what is older than a fixed length (Podlubny 1999, section 7.3, ISBN 0125588402).

    kappa_k = 0 for k h > length

The simplest bounded history, kept for comparison: its memory and cost grow with length / h, and its error does not fall
with the step size. For |y - y_0| <= M the derivative form errs in D^alpha y by at most
M length^-alpha / Gamma(1-alpha); in the integral form what is dropped from y, at most
(T^alpha - length^alpha) / Gamma(alpha+1) max |f|, grows with T.
`stats.history_error` is 1, the relative error of the lags that are dropped. Its adjoint is exact.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Bounded


@dataclass(frozen=True)
class ShortMemory(Bounded):
    """Only the last `length` units of time act; O(length / h) memory and work a step. For comparison, not for accuracy.

    Parameters
    ----------
    length : of the memory, in the units of t, positive; the window is the nearest whole number of steps, at least 1
    """

    length: float

    def __post_init__(self) -> None:
        if isinstance(self.length, bool) or not isinstance(self.length, int | float):
            raise TypeError(f"length must be a number, in the units of t: got {self.length!r}")
        if not 0 < self.length < math.inf:
            raise ValueError(f"length must be positive and finite, in the units of t: got {self.length:g}")

    def compress(self, steps: int, h: float, window: int, exponents: tuple[float, float]) -> Window:
        """The window of lags."""
        return Window(steps, max(1, round(self.length / h)))


class Window:
    """The map from kernels on a uniform grid to their first lags."""

    def __init__(self, steps: int, length: int) -> None:
        self._complete = length >= steps
        self.window = min(length, steps) + 1
        self.steps, self.nodes = steps, torch.empty(0, dtype=torch.float64)

    def weights(self, kernel: Tensor) -> Tensor:
        """No exponentials: (C, 0, G)."""
        return kernel.new_zeros(len(kernel), 0, kernel.shape[2])

    def lags(self, kernel: Tensor, weights: Tensor, count: int) -> Tensor:
        """The kernel at the lags 0..count-1, (C, count, G), zero beyond the window."""
        kept = kernel[:, : min(self.window, count)]
        return torch.nn.functional.pad(kept, (0, 0, 0, count - kept.shape[1]))

    def dense(self, kernel: Tensor) -> Tensor:
        """The same at all lags, on the graph."""
        return self.lags(kernel, kernel, kernel.shape[1])

    def start(self, sigma: Tensor) -> Tensor:
        """The start column: F_0 is forgotten as every other row."""
        return self.dense(sigma)

    def error(self, kernel: Tensor, weights: Tensor) -> float:
        """1, the relative error of a lag that is dropped, or 0 when none is."""
        return 0.0 if self._complete else 1.0
