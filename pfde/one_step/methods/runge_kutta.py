"""Explicit Runge-Kutta methods and their discrete adjoint.

    Y_i = y_n + h sum_{j<i} a_ij K_j,   K_i = f(t_n + c_i h, Y_i),   y_{n+1} = y_n + h sum_i b_i K_i

Its transpose, in the form without divisions, which b_i = 0 does not disturb: for i = s, ..., 1

    K_bar_i = h (b_i lambda + sum_{j>i} a_ji u_j),   u_i = J_i^T K_bar_i,   theta_bar += P_i^T K_bar_i
    lambda_n = lambda + sum_i u_i,                   h_bar = sum_i <K_bar_i, K_i> / h + c_i t_bar_i

with t_bar_i that of f's own t. This is what Matsubara, Miyatake, Yaguchi (2021, arXiv:2102.09750) call the symplectic
adjoint (Sanz-Serna 2016, doi:10.1137/151002769, for b_i != 0): the exact gradient of the discrete scheme.

Where all graphs of a step are to be alive at a time in any case, the step as a whole is put on autograd's graph, and
its transpose is one product (`StepGraph`): the same sums, in one call instead of s.

The slope at the end of a step, f(t1, y_{n+1}), serves error estimates and dense outputs; it is the last stage of a
first-same-as-last tableau and one stage more of another. Cost: s evaluations forward, s linearisations backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...system.base import Linearisation, OneStepping, OneStepSystem, Stepping
from ..tableaux import Tableau
from .base import Interval, OneStep, Sources, Step, StepBars, StepGraph, TimeBars
from .sums_of_slopes import accumulate, add_lost, advance, combine, inner, nonzero, polynomial, weighted_sum, with_value


class RungeKutta(OneStep):
    """The explicit method of a tableau."""

    implicit = False

    def __init__(self, tableau: Tableau) -> None:
        self.tableau = tableau
        self.name, self.order, self.embedded_order = tableau.name, tableau.order, tableau.embedded_order
        self.dense_order, self.stability, self.source = tableau.dense_order, tableau.stability, tableau.source
        s = tableau.stages
        self._end = tableau.active  # the index of f(t1, y_{n+1}) among the slopes, behind those that y_{n+1} needs
        if self._end != s - tableau.first_same_as_last:
            raise ValueError(
                f"tableau {self.name!r} has a stage that b does not use and that is not y_{{n+1}}, for its error "
                "estimate alone, which is not implemented: leave b_hat and that stage out"
            )
        self.nodes = tableau.nodes if tableau.first_same_as_last else (*tableau.nodes, 1.0)
        self._a = [nonzero(row) for row in tableau.a]
        self._b = nonzero(tableau.weights)
        self.error_weights = nonzero(tableau.error or ())
        self._columns = [[(j, tableau.a[j][i]) for j in range(i + 1, self._end) if tableau.a[j][i]] for i in range(s)]
        self._dense = tableau.dense
        self.silent = tuple(i for i in range(self._end) if not tableau.weights[i])

    @property
    def evaluations(self) -> int:
        return self._end

    @property
    def kept_stages(self) -> int:
        return 0  # to evaluate f again with its graph takes as long, with the stages at hand or without

    def reusable_slope(self, step: Step) -> Tensor | None:
        return step.slopes[self._end] if len(step.slopes) > self._end else None

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
        if keep is not None:
            return self._step_graph(keep, at, y, carry=carry)
        step = Step(y, [], [], [])
        self._extend(step, system, at, y, self._end, first=first)
        end = advance(y, at.h, self._b, step.slopes, carry, out)
        return step._replace(y=end.y, mark=end.mark, carry=end.carry)

    def _step_graph(
        self, system: OneStepSystem, at: Interval, y: Tensor, *, carry: Tensor | None = None, y1: Tensor | None = None
    ) -> Step:
        """The step on autograd's graph; with y1, its end, also the slope there."""
        with torch.enable_grad():
            graph, leaves, at, begin = system.on_graph(at, y)
            step = Step(leaves[0], [], [], [])
            self._extend(step, graph, at, leaves[0], self._end)
            turn = at.n % self._end  # one stage of every step in turn: a walk over all graphs costs 4 % of the time
            system.require_reached(step.slopes[turn], begin, step.states[turn], *leaves)
            end = advance(leaves[0], at.h, self._b, step.slopes, carry)
            if y1 is not None:  # what is computed again does not know the carry, which y_{n+1} has a part of
                end = end._replace(y=with_value(end.y, y1.view_as(end.y)))
                self._extend(step._replace(y=end.y), graph, at, leaves[0], self._end + 1)
        slopes = [k.detach().reshape(-1) for k in step.slopes]
        kept = StepGraph(at, leaves, begin, end.y, step.slopes, end.increment, end.factor)
        return Step(end.y.detach().reshape(-1), [y], slopes, [], kept, end.mark, end.carry)

    def _extend(
        self,
        step: Step,
        system: Stepping,
        at: Interval,
        y: Tensor,
        count: int,
        *,
        first: Tensor | None = None,
    ) -> None:
        """Stages and slopes up to `count`, added to the step's lists; y is y_n."""
        for i in range(len(step.slopes), count):
            if i == self._end:
                state = step.y
            elif i == 0:
                state = y
            else:
                state = combine(y, at.h, self._a[i], step.slopes)
            step.states.append(state)
            if i == 0 and first is not None:
                step.slopes.append(first)
            else:
                step.slopes.append(system.evaluate(at.n, at.time(self.nodes[i]), state))

    def complete(
        self, system: OneStepping, at: Interval, step: Step, *, dense: bool, keep: OneStepSystem | None = None
    ) -> Step:
        count = self._end + 1 if dense or self.tableau.first_same_as_last else self.tableau.stages
        graph = step.graph
        if keep is not None and dense and graph is not None and len(graph.slopes) == self._end:
            with torch.enable_grad():
                end = keep.on_graph(at, step.y).system.evaluate(at.n, graph.at.t1, graph.y)
            graph.slopes.append(end)
            del step.slopes[self._end :]
            step.slopes.append(end.detach().reshape(-1))
        self._extend(step, system, at, step.states[0], count)
        return step

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
        if graphs:
            step = self._step_graph(system, at, y, y1=y1 if dense else None)
            states = [y1] * len(self.nodes)
            return Sources(system.parts, at, self.nodes, states, [], step.graph, mark=step.mark, remember=remember)
        step = Step(y1, [], [], [])
        self._extend(step, system, at, y, self._end - 1)  # the last slope is of no use to other stages
        step.states.append(combine(y, at.h, self._a[self._end - 1], step.slopes))
        return Sources(system.parts, at, self.nodes, [*step.states, y1], step.kept, remember=remember)

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
        h, graph, bars = at.h, sources.graph, TimeBars(at, self.nodes, theta_bar, wanted=times)
        u: list[Tensor | None] = [None] * (self._end + 1)
        start = lam
        terms: list[Tensor] = []

        def pull(i: int, v: Tensor) -> Tensor:
            f: Linearisation = sources.take(i)
            product = f.vjp(v, theta_bar)
            bars.add(i, v, f)
            return product

        if self._end in slope_bars and (graph is None or len(graph.slopes) <= self._end):
            terms.append(pull(self._end, slope_bars.pop(self._end)))
            lam = lam + terms[0]
        if graph is not None:
            if times:
                bars.h += sum(inner(v, graph.slopes[i].detach().reshape(-1)) for i, v in slope_bars.items()) / h
            if sources.remember:
                sources.values |= {i: graph.slopes[i].detach().reshape(-1) for i in slope_bars}
            outputs = [(graph.slopes[i], v) for i, v in slope_bars.items()]
            outputs.append((graph.increment, lam * graph.factor))  # of one weight alone, the increment is that slope
            y_bar, *clock = system.pull(outputs, graph.leaves, graph.begin, theta_bar)
            if times:
                bars.t, bars.h = bars.t + float(clock[0]), bars.h + float(clock[1])
            lam, carry = add_lost(start, [*terms, y_bar], carry)
            return StepBars(lam, bars.h, bars.t, carry)
        for i in range(self._end - 1, -1, -1):
            v = slope_bars.get(i)
            if b := self.tableau.weights[i]:
                v = accumulate(v, h * b, lam)
            for j, a in self._columns[i]:
                if (u_j := u[j]) is not None:
                    v = accumulate(v, h * a, u_j)
            if v is None:
                continue
            u[i] = u_i = pull(i, v)
            terms.append(u_i)
        lam, carry = add_lost(start, terms, carry)
        return StepBars(lam, bars.h, bars.t, carry)

    def marked(self, step: Step) -> Sequence[Tensor]:
        return () if step.mark is None else (step.mark,)

    def marked_again(self, at: Interval, sources: Sources) -> Sequence[Tensor]:
        if sources.mark is not None:
            return (sources.mark,)
        taken = sources.values
        return (weighted_sum(self._b, taken)[1],) if all(i in taken for i, _ in self._b) else ()

    def tangent(self, system: OneStepSystem, at: Interval, sources: Sources, y_dot: Tensor, theta_dot: Any) -> Tensor:
        assert sources.graph is None
        slopes: list[Tensor] = []
        for i in range(self._end):
            state_dot = combine(y_dot, at.h, self._a[i], slopes)
            slopes.append(sources.take(i).jvp(state_dot, theta_dot))
        return combine(y_dot, at.h, self._b, slopes)

    def dense_weights(self, theta: float, derivative: int = 0) -> list[tuple[int, float]]:
        return nonzero([polynomial(p, theta, derivative) for p in self._dense])
