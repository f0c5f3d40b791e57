"""Additive (implicit-explicit) Runge-Kutta methods, for y' = f(t, y) + g(t, y), and their discrete adjoint.

f is stiff (A) and g not (A~), M = I:

    Y_i = y_n + h sum_{j<i} (a_ij K_j + a~_ij K~_j) + w_i K_i,   y_{n+1} = y_n + h sum_i (b_i K_i + b~_i K~_i)
    K_bar_i = h (b_i lambda + sum_{j>i} a_ji u_j),   K~_bar_i likewise with b~, a~
    (I - w_i J_i)^T u_i = J_i^T K_bar_i + J~_i^T K~_bar_i,   lambda_n = lambda + sum_i u_i

The stages are Newton's (`System.solve`), their transposes one linear solve each; the gradient is exact to both
tolerances. Kennedy, Carpenter 2003 (doi:10.1016/S0168-9274(02)00138-1).
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from ...system.base import Linearisation, OneStepping, OneStepSystem
from ..tableaux import AdditiveTableau
from .base import Interval, Sources, Step, StepBars, TimeBars
from .implicit import ImplicitMethod
from .stage_guess import StageGuess
from .sums_of_slopes import accumulate, add_lost, advance, combine, nonzero


class Additive(ImplicitMethod):
    """The implicit-explicit method of an additive tableau; f comes in two parts, `system.parts`."""

    split = True
    keeps_stages = False

    def __init__(self, tableau: AdditiveTableau) -> None:
        super().__init__(tableau.name, tableau.implicit, 2 * tableau.implicit.stages)
        s, explicit = tableau.implicit.stages, tableau.explicit
        self.order = tableau.order
        self._both = [[*row, *((s + j, w) for j, w in nonzero(explicit.a[i]))] for i, row in enumerate(self._a)]
        weights = [*tableau.implicit.weights, *explicit.weights]
        self._b, self._weights = nonzero(weights), weights
        self._columns += [[(j, explicit.a[j][i]) for j in range(i + 1, s) if explicit.a[j][i]] for i in range(s)]
        if tableau.implicit.error is not None and explicit.error is not None:
            self.error_weights = nonzero([*tableau.implicit.error, *explicit.error])

    def reusable_slope(self, step: Step) -> Tensor | None:
        return None  # y_{n+1} is no stage

    def step(
        self,
        system: OneStepping,
        at: Interval,
        y: Tensor,
        *,
        first: Tensor | None = None,
        keep: OneStepSystem | None = None,
        rows: Tensor | None = None,
        out: Tensor | None = None,
        carry: Tensor | None = None,
    ) -> Step:
        s = self.tableau.stages
        states: list[Tensor] = []
        slopes = [y] * (2 * s)  # each in its place as soon as it is known
        kept: dict[int, Linearisation] = {}
        guess = StageGuess(y)
        for i, a in enumerate(self._diagonal):
            t, state = at.time(self.nodes[i]), states[-1] if states else y
            implicit = None
            if a:
                r = combine(y, at.h, self._both[i], slopes)
                implicit = _Implicit(r, at.h * a, guess.next(r, at.h * a))
            if keep is None:
                state, slopes[i], slopes[s + i] = _stage(system, at.n, t, state, implicit)
            else:
                state, kept[i], kept[s + i] = _kept_stage(keep, at.n, t, state, implicit)
                slopes[i], slopes[s + i] = kept[i].value, kept[s + i].value
            states.append(state)
            if i + 1 < s:
                guess.learn(state, slopes[i], at.h * a)
        if rows is not None:
            for row, stage in zip(rows, states[-len(rows) :], strict=True):
                row.copy_(stage)
        end = advance(y, at.h, self._b, slopes, carry, out)
        return Step(end.y, states, slopes, [kept[i] for i in range(2 * s)] if keep else [], carry=end.carry)

    def adjoint(
        self,
        system: OneStepSystem,
        at: Interval,
        sources: Sources,
        lam: Tensor,
        slope_bars: dict[int, Tensor],
        theta_bar: Any,
        *,
        times: bool,
        carry: Tensor | None = None,
    ) -> StepBars:
        s, h, bars = self.tableau.stages, at.h, TimeBars(at, self.nodes, theta_bar, wanted=times)
        stiff, _ = system.parts
        u: list[Tensor | None] = [None] * s
        terms: list[Tensor] = []

        def gather(i: int) -> Tensor | None:
            v = slope_bars.get(i)
            if b := self._weights[i]:
                v = accumulate(v, h * b, lam)
            for j, a in self._columns[i]:
                if (u_j := u[j]) is not None:
                    v = accumulate(v, h * a, u_j)
            return v

        for i in range(s - 1, -1, -1):
            v, w, b, a = gather(i), gather(s + i), None, self._diagonal[i]
            if w is not None:
                g = sources.take(s + i)
                b = g.vjp(w, theta_bar)
                bars.add(i, w, g)
            if v is None and (b is None or not a):
                u[i] = b
            else:
                f = sources.take(i)
                if v is not None:
                    product = f.vjp(v, None if a else theta_bar, retain=bool(a))
                    b = product if b is None else b + product
                assert b is not None
                if a:
                    b = stiff.solve_transpose(at.n, at.time(self.nodes[i]), f, h * a, b)
                    v = accumulate(v, h * a, b)
                    f.vjp(v, theta_bar)
                assert v is not None
                bars.add(i, v, f)
                u[i] = b
            if (u_i := u[i]) is not None:
                terms.append(u_i)
        total, carry = add_lost(lam, terms, carry)
        return StepBars(total, bars.h, bars.t, carry)

    def tangent(self, system: OneStepSystem, at: Interval, sources: Sources, y_dot: Tensor, theta_dot: Any) -> Tensor:
        s = self.tableau.stages
        stiff, _ = system.parts
        zero = y_dot.new_zeros(y_dot.shape)
        slopes = [zero] * (2 * s)
        for i, a in enumerate(self._diagonal):
            f = sources.take(i)
            state_dot = combine(y_dot, at.h, self._both[i], slopes)
            if a:
                b = combine(state_dot, at.h, [(0, a)], [f.jvp(zero, theta_dot)])
                state_dot = stiff.solve_tangent(at.n, at.time(self.nodes[i]), f, at.h * a, b)
            slopes[i] = f.jvp(state_dot, theta_dot)
            slopes[s + i] = sources.take(s + i).jvp(state_dot, theta_dot)
        return combine(y_dot, at.h, self._b, slopes)


class _Implicit(NamedTuple):
    """A stage to be solved for: Y = r + w f(t, Y), from a guess."""

    r: Tensor
    w: float
    guess: Tensor


def _stage(
    system: OneStepping, n: int, t: float, y: Tensor, implicit: _Implicit | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Y_i, y itself where it is explicit; K_i, K~_i."""
    stiff, nonstiff = system.parts
    if implicit is None:
        slope = stiff.evaluate(n, t, y)
    else:
        y, f = stiff.solve(n, t, *implicit)
        slope = f.value
    return y, slope, nonstiff.evaluate(n, t, y)


def _kept_stage(
    system: OneStepSystem, n: int, t: float, y: Tensor, implicit: _Implicit | None
) -> tuple[Tensor, Linearisation, Linearisation]:
    """The same with the linearisations of both parts."""
    stiff, nonstiff = system.parts
    if implicit is None:
        f = stiff.linearise(n, t, y)
    else:
        y, f = stiff.solve(n, t, *implicit)
    return y, f, nonstiff.linearise(n, t, y)
