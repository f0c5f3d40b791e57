"""Diagonally implicit and additive (implicit-explicit) Runge-Kutta methods, and their discrete adjoints.

DIRK, for M y' = f(t, y); the theta family is among them:

    M Y_i = M y_n + h sum_{j<i} a_ij K_j + w_i K_i,   w_i = h a_ii,   K_i = f(t_n + c_i h, Y_i)
    y_{n+1} = (1 - sum_i d_i) y_n + sum_i d_i Y_i

with d = b A^-1, or y_{n+1} = Y_s of a stiffly accurate tableau: no product with M^-1 occurs, so that M may be singular
(an index-1 DAE). A first stage with a_11 = 0 is y_n. Transposed, for i = s, ..., 1:

    K_bar_i = h sum_{j>i} a_ji u_j,   (M - w_i J_i)^T u_i = d_i lambda + J_i^T K_bar_i
    theta_bar += P_i^T (K_bar_i + w_i u_i)
    lambda_n = (1 - sum_i d_i) lambda + M^T sum_i u_i

Additive, for y' = f(t, y) + g(t, y), f stiff (A) and g not (A~), M = I:

    Y_i = y_n + h sum_{j<i} (a_ij K_j + a~_ij K~_j) + w_i K_i,   y_{n+1} = y_n + h sum_i (b_i K_i + b~_i K~_i)
    K_bar_i = h (b_i lambda + sum_{j>i} a_ji u_j),   K~_bar_i likewise with b~, a~
    (I - w_i J_i)^T u_i = J_i^T K_bar_i + J~_i^T K~_bar_i,   lambda_n = lambda + sum_i u_i

The stages are Newton's (`System.solve`), their transposes one linear solve each; the gradient is exact to both
tolerances.
Hairer, Wanner II, IV.6 (doi:10.1007/978-3-642-05221-7); Kennedy, Carpenter 2003 (doi:10.1016/S0168-9274(02)00138-1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ...system.base import Linearisation, OneStepping, OneStepSystem
from ..tableaux import AdditiveTableau, Tableau
from .base import Interval, OneStep, Sources, Step, StepBars, TimeBars
from .stage_guess import StageGuess
from .sums_of_slopes import accumulate, add_lost, advance, combine, nonzero, polynomial, value_of, weighted_sum


class _Implicit(OneStep):
    """What both families share: the stages of the implicit tableau, one after the other."""

    implicit = True

    def __init__(self, name: str, tableau: Tableau, slopes: int) -> None:
        self.name, self.tableau = name, tableau
        self.order, self.embedded_order = tableau.order, tableau.embedded_order
        self.dense_order, self.stability, self.source = tableau.dense_order, tableau.stability, tableau.source
        s = tableau.stages
        self._slopes = slopes  # of a step: s, for an additive method 2 s
        self.nodes = (*tableau.nodes, 1.0) if tableau.extra_slope else tableau.nodes
        self._a = [nonzero(row[:i]) for i, row in enumerate(tableau.a)]
        self._diagonal = [row[i] for i, row in enumerate(tableau.a)]
        self._columns = [[(j, tableau.a[j][i]) for j in range(i + 1, s) if tableau.a[j][i]] for i in range(s)]
        self._dense = tableau.dense

    @property
    def evaluations(self) -> int:
        return self.tableau.stages

    @property
    def kept_stages(self) -> int:
        return self.tableau.stages - (self._diagonal[0] == 0.0)

    def complete(
        self, system: OneStepping, at: Interval, step: Step, *, dense: bool, keep: OneStepSystem | None = None
    ) -> Step:
        if dense and self.tableau.extra_slope and len(step.slopes) == self.tableau.stages:
            f = None if keep is None else keep.linearise(at.n, at.t1, step.y)
            _add(step, step.y, system.evaluate(at.n, at.t1, step.y) if f is None else f.value, f)
        return step  # else a stage serves the step, the error estimate and the dense output alike

    def stages(
        self,
        system: OneStepSystem,
        at: Interval,
        y: Tensor,
        y1: Tensor,
        *,
        dense: bool,
        graphs: bool,
        rows: Tensor | None,
        remember: bool = False,
    ) -> Sources:
        kept: list[Linearisation] = []
        if rows is not None:
            states = [y, *rows.unbind(0)][-self.tableau.stages :]
        elif (between := self._between(y, y1)) is not None:
            states = between
        else:
            step = self._again(system, at, y, y1, keep=system if graphs else None)
            states, kept = step.states, step.kept
        return Sources(system.parts, at, self.nodes, [*states[: self.tableau.stages], y1], kept, remember=remember)

    def marked(self, step: Step) -> Sequence[Tensor]:
        return step.slopes[: self._slopes]

    def marked_again(self, at: Interval, sources: Sources) -> Sequence[Tensor]:
        found = [sources.values.get(i) for i in range(self._slopes)]
        return [k for k in found if k is not None] if None not in found else []

    def _between(self, y: Tensor, y1: Tensor) -> list[Tensor] | None:
        """The stages of a determined method; None of another."""
        return None

    def _again(self, system: OneStepSystem, at: Interval, y: Tensor, y1: Tensor, *, keep: OneStepSystem | None) -> Step:
        """The stages of another, computed again."""
        return self.step(system, at, y, keep=keep)

    def dense_weights(self, theta: float, derivative: int = 0) -> list[tuple[int, float]]:
        weights = nonzero([polynomial(p, theta, derivative) for p in self._dense])
        return [(i + part, w) for part in range(0, self._slopes, self.tableau.stages) for i, w in weights]


class DiagonallyImplicit(_Implicit):
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
                    _add(step, state, slope.value, None)
                else:
                    state, f = keep.solve(at.n, t, r, at.h * a, guess.next(r, at.h * a))
                    _add(step, state, f.value, f)
            elif keep is not None:
                f = keep.linearise(at.n, t, y)
                _add(step, y, f.value, f)
            else:
                _add(step, y, system.evaluate(at.n, t, y) if first is None else first, None)
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


class Additive(_Implicit):
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
            state = y if not states else states[-1]
            r = combine(y, at.h, self._both[i], slopes) if a else None
            start = None if r is None else guess.next(r, at.h * a)
            if keep is None:
                state, slopes[i], slopes[s + i] = self._stage(system, at, i, state, r, start)
            else:
                state, kept[i], kept[s + i] = self._kept_stage(keep, at, i, state, r, start)
                slopes[i], slopes[s + i] = kept[i].value, kept[s + i].value
            states.append(state)
            if i + 1 < s:
                guess.learn(state, slopes[i], at.h * a)
        if rows is not None:
            for row, stage in zip(rows, states[-len(rows) :], strict=True):
                row.copy_(stage)
        end = advance(y, at.h, self._b, slopes, carry, out)
        return Step(end.y, states, slopes, [kept[i] for i in range(2 * s)] if keep else [], carry=end.carry)

    def _stage(
        self, system: OneStepping, at: Interval, i: int, y: Tensor, r: Tensor | None, guess: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Y_i, from r and a guess where it is implicit, else y; K_i, K~_i."""
        stiff, nonstiff = system.parts
        t = at.time(self.nodes[i])
        if r is None or guess is None:
            slope = stiff.evaluate(at.n, t, y)
        else:
            y, f = stiff.solve(at.n, t, r, at.h * self._diagonal[i], guess)
            slope = f.value
        return y, slope, nonstiff.evaluate(at.n, t, y)

    def _kept_stage(
        self, system: OneStepSystem, at: Interval, i: int, y: Tensor, r: Tensor | None, guess: Tensor | None
    ) -> tuple[Tensor, Linearisation, Linearisation]:
        """The same with the linearisations of both parts."""
        stiff, nonstiff = system.parts
        t = at.time(self.nodes[i])
        if r is None or guess is None:
            f = stiff.linearise(at.n, t, y)
        else:
            y, f = stiff.solve(at.n, t, r, at.h * self._diagonal[i], guess)
        return y, f, nonstiff.linearise(at.n, t, y)

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


def _add(step: Step, state: Tensor, slope: Tensor, f: Linearisation | None) -> None:
    step.states.append(state)
    step.slopes.append(slope)
    if f is not None:
        step.kept.append(f)
