"""The adjoint sweep of a one-step method: the transposed steps on reversed time.

    lambda_N = 0;   lambda_{n-1} = (transpose of step n)(lambda_n + y_bar at t_n, y_bar inside the step)

theta_bar, and the cotangents of the step's times, are collected on the way; time is linear in the steps and the
outputs. It is reverse-accurate: the gradient of the discrete solution on its recorded steps, to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import PfdeError
from ..solving.marks import Marks, shaken
from ..system.base import OneStepSystem
from ..system.profile import event
from .methods.base import Interval, Sources
from .methods.sums_of_slopes import accumulate, add_lost, inner, no_carry
from .outputs import Output, Outputs
from .trajectory import Trajectory


class Cotangents(NamedTuple):
    """The gradient with respect to y_0, (d,), and to the output times, T numbers."""

    y0: Tensor
    t: list[float]


class AdjointSweep:
    """A backward pass in progress over one trajectory.

    Parameters
    ----------
    trajectory : of a completed forward sweep
    system : the one that made it
    outputs : where the outputs lie
    y_bar : (T, d), their cotangents
    theta_bar : receives the parameters' cotangents
    times : whether those of the output times are wanted
    marks : what f is compared with; None for nothing

    """

    def __init__(
        self,
        trajectory: Trajectory,
        system: OneStepSystem,
        outputs: Outputs,
        y_bar: Tensor,
        theta_bar: Any,
        *,
        times: bool,
        marks: Marks | None = None,
    ) -> None:
        assert not trajectory.spent
        self._trajectory, self._system, self._outputs, self._y_bar = trajectory, system, outputs, y_bar
        self._theta_bar, self._wants_times = theta_bar, times
        self._lam: Tensor | None = None
        self._carry: Tensor | None = None  # what lambda_n lacks of its sum
        self._t_bar = [0.0] * len(trajectory.times.anchors)
        self._event = event("FDEAdjoint")
        self._marks = marks

    def reverse(self, n1: int, n0: int) -> None:
        """Reverse the steps n1, n1-1, ..., n0+1."""
        for n in range(n1, n0, -1):
            with self._event:
                self._step(self._trajectory.times.interval(n))

    def _step(self, at: Interval) -> None:
        scheme, trajectory = self._trajectory.scheme, self._trajectory
        inside = []
        for output in self._outputs.by_step.get(at.n, ()):
            if output.theta is None:
                self._add(self._y_bar[output.i])
            else:
                inside.append(output)
        if self._lam is None and not inside:
            return
        slope_bars: dict[int, Tensor] = {}
        for index, theta in inside:
            assert theta is not None
            for i in {i for i, _ in scheme.dense_weights(theta, 1)} - slope_bars.keys():
                slope_bars[i] = self._y_bar.new_zeros(self._y_bar.shape[1])
            for i, b in scheme.dense_weights(theta):
                slope_bars[i] = accumulate(slope_bars.get(i), at.h * b, self._y_bar[index])
        lam = self._y_bar.new_zeros(self._y_bar.shape[1]) if self._lam is None else self._lam
        remember = self._marks is not None or (self._wants_times and bool(inside))
        sources = trajectory.sources(self._system, at, dense=bool(inside), remember=remember)
        exact = (scheme.keeps_stages,)
        try:
            bars = scheme.adjoint(
                self._system,
                at,
                sources,
                lam,
                slope_bars,
                self._theta_bar,
                times=self._wants_times,
                carry=no_carry(lam) if self._lam is None else self._carry,
            )
        except PfdeError:
            if self._marks is not None:
                self._marks.explain(at.n, lambda shake: [self._again(at, shake)], exact=exact)
            raise
        if self._marks is not None:
            values = scheme.marked_again(at, sources)
            groups = [values] if values else []
            self._marks.compare(at.n, groups, lambda shake: [self._again(at, shake, sources, len(values))], exact=exact)
        self._lam, self._carry = bars.y, bars.carry
        for index, _ in inside:
            self._add(self._y_bar[index])
        if self._wants_times:
            t_bar, h_bar = self._place(at, sources, inside)
            trajectory.times.pull(self._t_bar, at.n, bars.t + t_bar, bars.h + h_bar)

    def _again(
        self, at: Interval, shake: Tensor | None, sources: Sources | None = None, count: int = 0
    ) -> Sequence[Tensor]:
        """What the step is recognised by, `count` values, once more: as the forward pass had it, or moved by rounding.

        The stages of an implicit step are as far off as it was solved; a step from elsewhere would damp that.
        """
        scheme, y = self._trajectory.scheme, self._trajectory.start(at.n)
        if shake is not None and sources is not None and scheme.implicit:
            return sources.slopes_at(lambda y: shaken(y, shake, y), count)
        return scheme.marked(scheme.step(self._system, at, shaken(y, shake, y)))

    def _place(self, at: Interval, sources: Sources, inside: list[Output]) -> tuple[float, float]:
        """The cotangents of t and h from where the outputs lie in the step; those of the outputs' times are added."""
        t_bar, h_bar = 0.0, 0.0
        for index, theta in inside:
            assert theta is not None
            rate = sum(  # theta_bar / h
                b * inner(self._y_bar[index], sources.values[i])
                for i, b in self._trajectory.scheme.dense_weights(theta, 1)
            )
            self._t_bar[index] += rate
            t_bar -= rate
            h_bar -= theta * rate
        return t_bar, h_bar

    def _add(self, y_bar: Tensor) -> None:
        if self._lam is None:
            self._lam, self._carry = y_bar.clone(), no_carry(y_bar)
        else:
            self._lam, self._carry = add_lost(self._lam, [y_bar], self._carry)

    def finish(self) -> Cotangents:
        """The gradient, once all steps are reversed."""
        for output in self._outputs.by_step.get(0, ()):
            self._add(self._y_bar[output.i])
        y0_bar = self._y_bar.new_zeros(self._y_bar.shape[1]) if self._lam is None else self._lam
        return Cotangents(y0_bar, self._t_bar)
