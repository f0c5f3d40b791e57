"""A one-step method: y_{n+1} from y_n alone, for ordinary equations M y' = f(t, y).

alpha = 1, and the history is empty.

Stages Y_1..Y_s with slopes K_i = f(t_n + c_i h, Y_i) of a Runge-Kutta tableau (A, b, c). In a step from t to t1,

    y(t + theta h) = y_n + h sum_i b_i(theta) K_i,   0 <= theta <= 1                          (dense output)
    h sum_i e_i K_i                                                                            (error estimate)

beside y_{n+1}; both may need the slope at the end, f(t1, y_{n+1}), as one stage more. A transposed step takes lambda,
the cotangent of y_{n+1}, and K_bar_i, what the dense outputs in the step draw from the slopes, and gives

    lambda_n, the cotangent of y_n;    theta_bar;    h_bar, t_bar, those of h and t (where wanted)

Sums. A step's increments are summed before they meet y_n. In float32 what y_{n+1} lacks of its sum is carried to the
next step (Kahan 1965, doi:10.1145/363707.363723), so that rounding does not grow with the number of steps:

    M y_{n+1} + c_{n+1} = M y_n + c_n + h sum_i b_i K_i,    lambda_n + c_n = lambda_{n+1} + c_{n+1} + sum_i J_i^T v_i

with v_i what goes into theta_bar's product. In float64 N eps is nothing, and there is no c. The stages depend on y_n
alone, but for a last one that is y_{n+1} itself, and so can be computed again from the states that are kept.

The step size itself is data: with adaptive steps it is frozen, as the sweep has recorded it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from ...system.base import Linearisation, OneStepping, OneStepSystem, System
from .sums_of_slopes import accumulate, inner


class Interval(NamedTuple):
    """Where step n takes place: from t to t1 = t + h, h negative for decreasing times.

    Where the times are on autograd's graph (`StepTimes.on_graph`), t, h and t1 are 0-d tensors in place of numbers.
    """

    n: int
    t: float
    h: float
    t1: float

    def time(self, c: float) -> float:
        """t + c h; the ends exactly, so that the last stage of one step and the first of the next see one time."""
        if c == 0.0:
            return self.t
        return self.t1 if c == 1.0 else self.t + c * self.h


class Step(NamedTuple):
    """What a step leaves.

    y : y_{n+1}
    states : Y_i, as many as were needed
    slopes : K_i; of a split method the implicit ones, then the explicit ones
    kept : their linearisations, where they were to be kept
    graph : of an explicit method, in place of the linearisations, the whole step on autograd's graph
    mark : of an explicit method, the sum of its slopes, by which the backward pass recognises the step
    carry : what y_{n+1} lacks of its sum, in float32
    """

    y: Tensor
    states: list[Tensor]
    slopes: list[Tensor]
    kept: list[Linearisation]
    graph: StepGraph | None = None
    mark: Tensor | None = None
    carry: Tensor | None = None


class StepGraph(NamedTuple):
    """An explicit step on autograd's graph: one product with all its Jacobians, where s linearisations take s.

    at : the step, its times on the leaves where there are such
    leaves : y_n, and t and h where their cotangents are wanted
    begin : how many nodes of autograd there were before the step
    y : y_{n+1}
    slopes : K_i
    increment, factor : y_{n+1} = y_n + factor increment; lambda goes around it, where its rounding can be carried
    """

    at: Interval
    leaves: tuple[Tensor, ...]
    begin: int
    y: Tensor
    slopes: list[Tensor]
    increment: Tensor
    factor: float


class StepBars(NamedTuple):
    """What the transpose of a step gives: the cotangents of y_n, of h (with the stage times' share) and of t.

    carry : what that of y_n lacks of its sum, in float32
    """

    y: Tensor
    h: float
    t: float
    carry: Tensor | None = None


class TimeBars:
    """The cotangents of a step's h and t, summed over the products of its transpose.

        h_bar = sum_i <K_bar_i, K_i> / h + c_i t_bar_i,   t_bar = sum_i t_bar_i

    with t_bar_i that of f's own t in the product, which the system leaves in theta_bar.
    """

    def __init__(self, at: Interval, nodes: Sequence[float], theta_bar: Any, *, wanted: bool) -> None:
        self._at, self._nodes, self._theta_bar, self._wanted = at, nodes, theta_bar, wanted
        self.h = self.t = 0.0

    def add(self, i: int, v: Tensor, f: Linearisation) -> None:
        """The share of stage i, whose product with K_bar_i = v has just been taken."""
        if self._wanted:
            self.h += inner(v, f.value) / self._at.h + self._nodes[i] * self._theta_bar.time
            self.t += self._theta_bar.time


class Sources:
    """The linearisations of a step's stages for its transpose, made when asked for, or kept.

    Parameters
    ----------
    systems : f; for a split method (stiff, nonstiff)
    at, nodes : the step, and the nodes c of its slopes
    states : Y_i
    kept : linearisations that are there already, by index
    graph : the step on autograd's graph, in place of these
    mark : of a step that was taken again on autograd's graph
    remember : whether the slopes that are taken are to be kept, in `values`
    """

    def __init__(
        self,
        systems: Sequence[System],
        at: Interval,
        nodes: Sequence[float],
        states: Sequence[Tensor],
        kept: Sequence[Linearisation],
        graph: StepGraph | None = None,
        *,
        mark: Tensor | None = None,
        remember: bool = False,
    ) -> None:
        self.graph, self.mark, self.remember = graph, mark, remember
        self._systems, self._at, self._nodes, self._states = systems, at, nodes, states
        self._kept: dict[int, Linearisation] = dict(enumerate(kept))
        self.values: dict[int, Tensor] = {}

    def take(self, i: int) -> Linearisation:
        """The linearisation of slope i, given away: its graph lives as long as the caller uses it."""
        f = self._kept.pop(i, None)
        if f is None:
            part, stage = divmod(i, len(self._nodes))
            at = self._at
            f = self._systems[part].linearise(at.n, at.time(self._nodes[stage]), self._states[stage])
        if self.remember:
            self.values[i] = f.value
        return f

    def slopes_at(self, move: Callable[[Tensor], Tensor], count: int) -> list[Tensor]:
        """The first slopes anew, at the stages that `move` makes of these."""
        at, found = self._at, []
        for i in range(count):
            part, stage = divmod(i, len(self._nodes))
            state = move(self._states[stage])
            found.append(self._systems[part].linearise(at.n, at.time(self._nodes[stage]), state).value)
        return found


class OneStep(ABC):
    """A method. Stateless; one instance serves all solves.

    Attributes
    ----------
    name, order, stability, cost, source : for the documentation's tables
    implicit : whether a step solves equations
    split : whether f is given in two parts, a stiff and a nonstiff one
    embedded_order : of the comparison formula; None without one, and then steps are fixed
    dense_order : of the dense output
    nodes : c
    determined : whether y_n and y_{n+1} determine the stages, so that the transpose need not compute them again
    keeps_stages : whether the transpose has the stages of the forward pass to the bit, without solving for them again
    error_weights : e_i, pairs of slope index and weight, those that are not zero
    silent : the slopes that y_{n+1} has no part of, so that it may be finite where they are not
    """

    implicit: ClassVar[bool]
    split: ClassVar[bool] = False
    determined: bool = False
    keeps_stages: bool = True
    silent: tuple[int, ...] = ()
    error_weights: Sequence[tuple[int, float]] = ()
    name: str
    order: int
    embedded_order: int | None
    dense_order: int
    stability: str
    source: str
    nodes: tuple[float, ...]

    @property
    def adaptive(self) -> bool:
        """Whether there is an error estimate."""
        return self.embedded_order is not None

    @property
    @abstractmethod
    def evaluations(self) -> int:
        """f's evaluations in a step of an explicit method; the stages of an implicit one."""

    @property
    @abstractmethod
    def kept_stages(self) -> int:
        """How many stages store="stages" keeps: of an implicit method those that are not y_n, else none."""

    @abstractmethod
    def reusable_slope(self, step: Step) -> Tensor | None:
        """f(t1, y_{n+1}), where the step has it and it is the first slope of the next one."""

    @abstractmethod
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
        """One step from y.

        carry : what y lacks of its sum; None in float64
        first : K_1, where it is known
        keep : linearises f, where that is to be kept, instead of evaluating it
        rows, out : memory for the kept stages, (kept_stages, d), and for y_{n+1}; what is returned is then a view of it
        """

    @abstractmethod
    def complete(
        self, system: OneStepping, at: Interval, step: Step, *, dense: bool, keep: OneStepSystem | None = None
    ) -> Step:
        """The step with all slopes that the error estimate, or the dense output, needs."""

    def error(self, at: Interval, step: Step) -> Tensor:
        """h sum_i e_i K_i of a completed step."""
        total: Tensor | None = None
        for i, e in self.error_weights:
            total = accumulate(total, at.h * e, step.slopes[i])
        assert total is not None
        return total

    @abstractmethod
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
        """The linearisations for the transpose of a step from y to y1 that nothing was kept of, but perhaps rows.

        graphs : linearise while the stages are computed again, all graphs alive at a time, and no evaluation twice
        remember : see `Sources`
        """

    @abstractmethod
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
        """The transpose of a step.

        lam, carry : the cotangent of y_{n+1}, and what it lacks of its sum
        slope_bars : K_bar_i from dense outputs, h b_i(theta) y_bar summed; may be changed in place
        times : whether the cotangents of h and t are wanted; needs a system whose products give that of f's t
        """

    @abstractmethod
    def marked(self, step: Step) -> Sequence[Tensor]:
        """What a step is recognised by when it is taken again: values of f, or a sum of them."""

    @abstractmethod
    def marked_again(self, at: Interval, sources: Sources) -> Sequence[Tensor]:
        """The same from what its transpose has taken; empty where that is not all."""

    @abstractmethod
    def tangent(self, system: OneStepSystem, at: Interval, sources: Sources, y_dot: Tensor, theta_dot: Any) -> Tensor:
        """The tangent of y_{n+1} along those of y_n and of the parameters."""

    @abstractmethod
    def dense_weights(self, theta: float, derivative: int = 0) -> list[tuple[int, float]]:
        """b_i(theta), or its derivative: pairs of slope index and weight, those that are not zero."""
