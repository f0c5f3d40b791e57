"""The times of the steps of an ordinary equation, and how they depend on the output times t_0, ..., t_T.

    fixed      [t_i, t_{i+1}] has m_i equal steps: with r = k / m_i
               t = (1 - r) t_i + r t_{i+1},  h = (t_{i+1} - t_i) / m_i
    adaptive   the steps are recorded as they are accepted and frozen: the grid moves with its ends as a rubber band
               does, t = t_0 + r (t_T - t_0),  h = q (t_T - t_0),   with r and q constant
    open       the same without a last time (an event ends the solve): t_0 moves the grid as a whole

A recorded time is the exact double the step was taken with, so that a replay repeats it to the bit.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence

from torch import Tensor

from .methods.base import Interval


class StepTimes:
    """The times of the steps; adaptive ones are appended.

    Parameters
    ----------
    anchors : the output times, strictly monotone
    pieces : m_i, the number of steps between two of them; None for adaptive steps
    open_end : whether the last time is not one of the solve's own

    Attributes
    ----------
    t0, t1 : the first and the last time
    direction : 1.0 or -1.0
    """

    def __init__(self, anchors: Sequence[float], pieces: Sequence[int] | None, *, open_end: bool = False) -> None:
        self.anchors, self.adaptive, self.open_end = list(anchors), pieces is None, open_end
        self.t0, self.t1 = self.anchors[0], self.anchors[-1]
        self.direction = 1.0 if self.t1 > self.t0 else -1.0
        self._recorded = [self.t0]
        self.ended = not self.adaptive and not open_end
        self._last: int | None = None
        self._pieces = list(pieces or ())
        self._starts = [0]
        for m in self._pieces:
            self._starts.append(self._starts[-1] + m)

    @property
    def known(self) -> int:
        """The number of steps whose times are known."""
        return len(self._recorded) - 1 if self.adaptive else self._starts[-1] if self._last is None else self._last

    @property
    def steps(self) -> int:
        """N; sys.maxsize as long as it is not known."""
        return self.known if self.ended else sys.maxsize if self.adaptive else self._starts[-1]

    def append(self, t: float) -> None:
        """The next step ends at t; it is the last one if that is the last time."""
        self._recorded.append(t)
        self.ended = t == self.t1

    def end(self, n: int) -> None:
        """No more steps: the solve ended early, with step n."""
        self.ended, self._last = True, n

    def time(self, n: int) -> float:
        """t after n steps."""
        if self.adaptive:
            return self._recorded[n]
        i = bisect_right(self._starts, n) - 1
        k = n - self._starts[i]
        if k == 0:
            return self.anchors[i]
        return self.anchors[i] + k * ((self.anchors[i + 1] - self.anchors[i]) / self._pieces[i])

    def interval(self, n: int) -> Interval:
        """Step n, n = 1..known."""
        t, t1 = self.time(n - 1), self.time(n)
        return Interval(n, t, t1 - t, t1)

    def _shares(self, n: int) -> tuple[int, int, float, float]:
        """Step n's two anchors i, j and r, q: t = (1 - r) t_i + r t_j, h = q (t_j - t_i)."""
        if not self.adaptive:
            i = bisect_right(self._starts, n - 1) - 1
            m = self._pieces[i]
            return i, i + 1, (n - 1 - self._starts[i]) / m, 1.0 / m
        span = self.t1 - self.t0
        t, t1 = self._recorded[n - 1], self._recorded[n]
        return 0, len(self.anchors) - 1, (t - self.t0) / span, (t1 - t) / span

    def pull(self, bars: list[float], n: int, t_bar: float, h_bar: float) -> None:
        """Add the cotangents of the anchors from those of step n's t and h, to `bars`."""
        if self.open_end:
            bars[0] += t_bar
            return
        i, j, r, q = self._shares(n)
        bars[i] += (1.0 - r) * t_bar - q * h_bar
        bars[j] += r * t_bar + q * h_bar

    def on_graph(self, n: int, anchors: Tensor) -> Interval:
        """Step n on the graph of the anchors, (T,) float64; its values are the recorded ones."""
        at = self.interval(n)
        if self.open_end:
            shift = anchors[0] - anchors[0].detach()
            return Interval._make((n, at.t + shift, at.h, at.t1 + shift))
        i, j, r, q = self._shares(n)
        span = anchors[j] - anchors[i]
        t, h = anchors[i] + r * span, q * span
        t, h = (x + (value - x.detach()) for x, value in ((t, at.t), (h, at.h)))
        t1 = t + h + (at.t1 - (t + h).detach())
        return Interval._make((n, t, h, t1))
