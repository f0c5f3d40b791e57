"""Diagonally implicit Runge-Kutta methods for M y' = f(t, y), the theta family among them, and their discrete adjoint.

    M Y_i = M y_n + h sum_{j<i} a_ij K_j + w_i K_i,   w_i = h a_ii,   K_i = f(t_n + c_i h, Y_i)
    y_{n+1} = (1 - sum_i d_i) y_n + sum_i d_i Y_i

with d = b A^-1, or y_{n+1} = Y_s of a stiffly accurate tableau: no product with M^-1 occurs, so that M may be singular
(an index-1 DAE). A first stage with a_11 = 0 is y_n. Transposed, for i = s, ..., 1:

    K_bar_i = h sum_{j>i} a_ji u_j,   (M - w_i J_i)^T u_i = d_i lambda + J_i^T K_bar_i
    theta_bar += P_i^T (K_bar_i + w_i u_i)
    lambda_n = (1 - sum_i d_i) lambda + M^T sum_i u_i

The stages are Newton's (`System.solve`), their transposes one linear solve each; the gradient is exact to both
tolerances. Hairer, Wanner II, IV.6 (doi:10.1007/978-3-642-05221-7).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...system.base import OneStepping, OneStepSystem
from ..tableaux import Tableau
from .base import Interval, Sources, Step, StepBars, TimeBars
from .implicit import ImplicitMethod, add_stage
from .stage_guess import StageGuess
from .sums_of_slopes import accumulate, combine, nonzero, value_of, weighted_sum


class DiagonallyImplicit(ImplicitMethod):
    """The method of a lower triangular tableau with y_{n+1} a combination of y_n and the stages."""

    def __init__(self, tableau: Tableau) -> None:
        super().__init__(tableau.name, tableau, tableau.stages)
        combination = tableau.combination
        assert combination is not None
        self._d = [float(d) for d in combination]
        self._rest = 1.0 - sum(self._d)
        self.error_weights = nonzero(tableau.error or ())
        first = self._diagonal[0] == 0.0
        # one implicit stage, the last one: y_{n+1} gives it
        self.determined = tableau.stages == 1 + first
        self.keeps_stages = tableau.stiffly_accurate and self.determined
        self._explicit_first, self._b = first, nonzero(tableau.weights)

    def reusable_slope(self, step: Step) -> Tensor | None:
        return step.slopes[-1] if self._explicit_first and self.tableau.stiffly_accurate else None

    def _between(self, y: Tensor, y1: Tensor) -> list[Tensor] | None:
        if not self.determined:
            return None
        last = y1 if self._d[-1] == 1.0 else (y1 - self._rest * y) / self._d[-1]
        return [y, last] if self._explicit_first else [last]

    def _again(self, system: OneStepSystem, at: Interval, y: Tensor, y1: Tensor, *, keep: OneStepSystem | None) -> Step:
        """The stages but the last, which y_{n+1} is, and which the carry has a part in."""
        if not self.tableau.stiffly_accurate:
            return self.step(system, at, y, keep=keep)
        step = self._solve(system, at, y, self.tableau.stages - 1, keep=keep)
        step.states.append(y1)
        return step

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
        step = self._solve(system, at, y, self.tableau.stages, first=first, keep=keep, carry=carry)
        y1 = step.states[-1]
        if not self.tableau.stiffly_accurate:
            y1 = self._rest * y
            for d, stage in zip(self._d, step.states, strict=True):
                y1 = y1 + d * stage
        if rows is not None:
            for row, stage in zip(rows, step.states[-len(rows) :], strict=True):
                row.copy_(stage)
        y1 = y1 if out is None else out.copy_(y1)
        return step._replace(y=y1, carry=self._lost(system, at, y, y1, step.slopes, carry))

    def _lost(
        self, system: OneStepping, at: Interval, y: Tensor, y1: Tensor, slopes: list[Tensor], carry: Tensor | None
    ) -> Tensor | None:
        """M (y_n - y_{n+1}) + carry + h sum_i b_i K_i: what the solves and their rounding left out."""
        if carry is None:
            return None
        w, total = weighted_sum(self._b, [k.detach() for k in slopes])
        return system.mass(y.detach() - y1.detach()).add(carry).add_(total, alpha=value_of(at.h) * w)

    def _solve(
        self,
        system: OneStepping,
        at: Interval,
        y: Tensor,
        count: int,
        *,
        first: Tensor | None = None,
        keep: OneStepSystem | None = None,
        carry: Tensor | None = None,
    ) -> Step:
        """The first `count` stages; the last of all takes in the carry."""
        step, mass_y = Step(y, [], [], []), system.mass(y)
        guess = StageGuess(y, predicts=mass_y is y)
        for i, a in enumerate(self._diagonal[:count]):
            t = at.time(self.nodes[i])
            if a:
                r = combine(mass_y, at.h, self._a[i], step.slopes)
                if carry is not None and i == len(self._d) - 1:
                    r = r + carry / self._d[i]
                if keep is None:
                    state, slope = system.solve(at.n, t, r, at.h * a, guess.next(r, at.h * a))
                    add_stage(step, state, slope.value, None)
                else:
                    state, f = keep.solve(at.n, t, r, at.h * a, guess.next(r, at.h * a))
                    add_stage(step, state, f.value, f)
            elif keep is not None:
                f = keep.linearise(at.n, t, y)
                add_stage(step, y, f.value, f)
            else:
                add_stage(step, y, system.evaluate(at.n, t, y) if first is None else first, None)
            if i + 1 < count:
                guess.learn(step.states[-1], step.slopes[-1], at.h * a)
        return step

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
        h, bars = at.h, TimeBars(at, self.nodes, theta_bar, wanted=times)
        u: list[Tensor | None] = [None] * len(self._d)
        start = lam
        products: list[Tensor] = []  # J_i^T v_i, whose sum is lambda_n - lambda_{n+1}
        if (v := slope_bars.pop(len(self._d), None)) is not None:  # of the slope at the end, f(t1, y_{n+1})
            f = sources.take(len(self._d))
            products.append(f.vjp(v, theta_bar))
            lam = lam + products[0]
            bars.add(len(self._d), v, f)
        total, below = lam * self._rest, None  # what reaches y_n directly, and through M y_n
        for i in range(len(self._d) - 1, -1, -1):
            v = slope_bars.get(i)
            for j, a in self._columns[i]:
                if (u_j := u[j]) is not None:
                    v = accumulate(v, h * a, u_j)
            d = self._d[i]
            if v is None and not d:
                continue
            f = sources.take(i)
            if a := self._diagonal[i]:
                b = lam * d if d else None
                if v is not None:
                    product = f.vjp(v, retain=True)
                    b = product if b is None else b.add_(product)
                assert b is not None
                if carry is not None and i == len(self._d) - 1:
                    b.add_(carry)
                u[i] = u_i = system.solve_transpose(at.n, at.time(self.nodes[i]), f, h * a, b)
                below = u_i.clone() if below is None else below.add_(u_i)
                v = accumulate(v, h * a, u_i)
                products.append(f.vjp(v, theta_bar))
            else:
                assert v is not None
                products.append(f.vjp(v, theta_bar))
                total.add_(products[-1])
            bars.add(i, v, f)
        if below is not None:
            total.add_(system.mass_transpose(below))
        if carry is not None:
            carry = (start - total).add_(carry)
            for product in products:
                carry.add_(product)
        return StepBars(total, bars.h, bars.t, carry)

    def tangent(self, system: OneStepSystem, at: Interval, sources: Sources, y_dot: Tensor, theta_dot: Any) -> Tensor:
        slopes: list[Tensor] = []
        mass_dot, total = system.mass(y_dot), self._rest * y_dot
        zero = y_dot.new_zeros(y_dot.shape)
        for i, a in enumerate(self._diagonal):
            f = sources.take(i)
            if a:
                b = combine(mass_dot, at.h, [*self._a[i], (i, a)], [*slopes, f.jvp(zero, theta_dot)])
                state_dot = system.solve_tangent(at.n, at.time(self.nodes[i]), f, at.h * a, b)
            else:
                state_dot = y_dot
            slopes.append(f.jvp(state_dot, theta_dot))
            total = total + self._d[i] * state_dot
        return total
