"""The adjoint sweep: the transpose of the forward sweep, step by step on reversed time.

    X_bar_n = sum_{k>n} sum_c kappa^c_{k-n} r_bar^c_k              (the same history, fed with r_bar, backwards)
    r_bar_n = (transpose of step n)(y_bar_n, X_bar_n)              (theta_bar collects its part there)

and, summed on the way,

    y0_bar    = y_bar_0 + sum_n sum_c r_bar^c_n - (derivative form: sum_n X_bar_n) + J_0^T F0_bar
    F0_bar    = sum_n sum_c sigma^c_n r_bar^c_n
    alpha_bar = sum_n <Z_n, X_n> + w' sum_n <w_bar_n, 1> + sum_n sum_c sigma'^c_n <r_bar^c_n, F_0>

    h_bar     = 1/h sum_n sum_i alpha_i (integral form: sum_c r_bar^c_n (y^c_n - y_0), y^c the corrector, the predictor)
                                        (derivative form: r_bar_n sigma_n F_0 + w w_bar_n)

since every weight but the derivative form's kernel is h^alpha times a number; f's own t comes through theta_bar. Here
Z_n = sum_{k>n} kappa'_{k-n} r_bar_k is the transposed history with the derivative kernel kappa' in place of
kappa: the derivative in alpha costs a second history and no buffer (a correlation of r_bar with X would need both
buffers whole). It is reverse-accurate: the gradient of the discrete scheme, to rounding.

With the exact history r_bar_n overwrites row n of the trajectory's buffers, which is dead once step n is reversed; a
spent trajectory has to be computed anew for a second backward pass. A bounded history keeps modes of r_bar instead: the
adjoint of the compressed scheme needs y_n, and never the forward modes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import PfdeError
from ..solving.marks import Marks, shaken
from ..system.base import System, add_scaled
from ..system.profile import event
from ..system.sums import LongSum
from .discretisation import Discretisation
from .history.online_product import ExactConvolution
from .schemes.base import Stage, StepAdjoint, StepData, linearised
from .trajectory import Trajectory


class Cotangents(NamedTuple):
    """The gradient with respect to y_0, (d,), to the orders, (G,) float64, and to h through the weights; or None."""

    y0: Tensor
    alpha: Tensor | None
    h: float | None


class AdjointSweep:
    """A backward pass in progress over one trajectory, which it overwrites.

    Parameters
    ----------
    trajectory : of a completed forward sweep
    system : the one that made it
    y_bar : the cotangents of the outputs, by step (0 is y_0); steps that are no output are absent
    theta_bar : receives the parameters' cotangents
    alpha, h : whether these cotangents are wanted
    marks : what f is compared with; None for nothing
    """

    def __init__(
        self,
        trajectory: Trajectory,
        system: System,
        y_bar: Mapping[int, Tensor],
        theta_bar: Any,
        *,
        alpha: bool,
        h: bool = False,
        marks: Marks | None = None,
    ) -> None:
        assert not trajectory.spent
        self._trajectory, self._system, self._y_bar, self._theta_bar = trajectory, system, y_bar, theta_bar
        self._discretisation: Discretisation = trajectory.discretisation
        self._scheme = self._discretisation.scheme
        self._history = self._discretisation.operator.adjoint(trajectory.cotangent_rows(), alpha=alpha)
        self._predictors: _Predictors | None = None
        y0 = trajectory.y0
        self._y0_bar = LongSum(y0)
        self._slope_bar = None if trajectory.slope is None else LongSum(y0)
        self._alpha_bar = LongSum(y0) if alpha else None
        self._h_bar = LongSum(y0) if h else None
        # sum_n sigma'_n r_bar_n, to be multiplied by F_0
        self._slope_dot_bar = LongSum(y0) if alpha and trajectory.slope is not None else None
        self._events = event("FDEAdjoint"), event("FDEHistory")
        self._marks = marks

    def reverse(self, n1: int, n0: int) -> None:
        """Reverse the steps n1, n1-1, ..., n0+1."""
        sweep_event, history_event = self._events
        for n in range(n1, n0, -1):
            with sweep_event:
                with history_event:
                    x_bars = self._history.read(n)
                self._step(n, x_bars)

    def _step(self, n: int, x_bars: tuple[Tensor, ...]) -> None:
        at = self._discretisation.at(n)
        x_bar = None if at.last else x_bars[0]
        stage = self._trajectory.stage(n, self._predictor(n))
        exact = [self._trajectory.exact]
        if stage.predictor is not None:
            exact.insert(0, self._trajectory.has_predictor(n))
        try:
            step = self._scheme.step_adjoint(
                self._system, at, stage, self._trajectory.y0, self._y_bar.get(n), x_bar, self._theta_bar
            )
        except PfdeError:
            if self._marks is not None:
                self._marks.explain(n, lambda shake: self._again(at, stage, shake), exact=exact)
            raise
        if self._marks is not None:
            groups = [(x,) for x in step.slopes]
            self._marks.compare(n, groups, lambda shake: self._again(at, stage, shake), exact=exact)
        if self._alpha_bar is not None:
            self._add_alpha(n, step, None if at.last else x_bars[1])
        if self._h_bar is not None:
            self._add_h(at, stage, step)
        y0_bar = self._y0_bar.term()
        if x_bar is not None and self._scheme.form == "derivative":
            y0_bar.sub_(x_bar)
        slope_bar = None if self._slope_bar is None else self._slope_bar.term()
        for c, r_bar in enumerate(step.r_bar):
            y0_bar.add_(r_bar)
            if slope_bar is not None:
                self._discretisation.weights.add_start(c, n, slope_bar, r_bar)
        self._history.push(n, step.r_bar)

    def _again(self, at: StepData, stage: Stage, shake: Tensor | None) -> list[tuple[Tensor]]:
        """The step's values of f once more, as the forward pass had them, or at states moved by rounding."""
        system, scheme = self._system, self._scheme
        states = [] if stage.predictor is None else [stage.predictor]
        if scheme.implicit or not at.last:
            states.append(stage.y)
        states = [shaken(y, shake, self._trajectory.y0) for y in states]  # they are sums of y_0 and the rest
        if scheme.implicit:
            return [(system.linearise(at.n, at.t, y).value,) for y in states]
        return [(system.evaluate(at.n, at.t, y),) for y in states]

    def _compare_start(self, slope: Tensor) -> None:
        """Compare F_0, which is kept itself."""
        assert self._marks is not None
        t0, y0 = self._discretisation.grid.t0, self._trajectory.y0
        self._marks.compare(
            0, [(slope,)], lambda shake: [(self._system.evaluate(0, t0, shaken(y0, shake, y0)),)], exact=(True,)
        )

    def _predictor(self, n: int) -> Tensor | None:
        """p_n of `pece`, where it has to be built again."""
        if self._scheme.channels == 1 or self._trajectory.has_predictor(n):
            return None
        if self._predictors is None:
            self._predictors = _Predictors(self._trajectory)
        return self._predictors.get(n)

    def _add_alpha(self, n: int, step: StepAdjoint, z: Tensor | None) -> None:
        assert self._alpha_bar is not None
        weights_dot, alpha_bar = self._discretisation.weights_dot, self._alpha_bar.term()
        if z is not None:
            assert step.x is not None
            alpha_bar.addcmul_(z, step.x)
        if step.w_bar is not None:
            add_scaled(alpha_bar, weights_dot.local(n), step.w_bar)
        if self._slope_dot_bar is not None:
            slope_dot_bar = self._slope_dot_bar.term()
            for c, r_bar in enumerate(step.r_bar):
                weights_dot.add_start(c, n, slope_dot_bar, r_bar)

    def _add_h(self, at: StepData, stage: Stage, step: StepAdjoint) -> None:
        assert self._h_bar is not None
        h_bar = self._h_bar.term()
        if self._scheme.form == "derivative":
            assert step.w_bar is not None
            add_scaled(h_bar, at.w, step.w_bar)
            return
        for r_bar, y in zip(step.r_bar, (stage.y, stage.predictor), strict=False):
            assert y is not None
            h_bar.addcmul_(r_bar, y - self._trajectory.y0)

    def _finish_h(self) -> float | None:
        if self._h_bar is None:
            return None
        h_bar = self._h_bar.total()
        if self._slope_bar is not None and self._scheme.form == "derivative":
            assert self._trajectory.slope is not None
            h_bar = torch.addcmul(h_bar, self._slope_bar.total(), self._trajectory.slope.to(h_bar))
        orders = self._discretisation.orders
        return float(orders.alpha @ orders.collect(h_bar)) / self._discretisation.grid.h

    def finish(self) -> Cotangents:
        """The gradient, once all steps are reversed."""
        trajectory, y0_bar = self._trajectory, self._y0_bar.term()
        if 0 in self._y_bar:
            y0_bar.add_(self._y_bar[0])
        if self._slope_bar is not None:
            f = linearised(self._system, self._discretisation.at(0), trajectory.initial_stage())
            y0_bar.add_(f.vjp(self._slope_bar.total().to(y0_bar.dtype), self._theta_bar))
            if self._marks is not None:
                self._compare_start(f.value)
        y0_bar = self._y0_bar.total().to(y0_bar.dtype)
        if self._alpha_bar is None:
            return Cotangents(y0_bar, None, self._finish_h())
        alpha_bar = self._alpha_bar.total()
        if self._slope_dot_bar is not None:
            assert trajectory.slope is not None
            alpha_bar = torch.addcmul(alpha_bar, self._slope_dot_bar.total(), trajectory.slope.to(alpha_bar))
        return Cotangents(y0_bar, self._discretisation.orders.collect(alpha_bar), self._finish_h())


class _Predictors:
    """The predictors p_n of `pece` for n = N..1, rebuilt block by block from the rows of X before them.

    A block is rebuilt when its last step is reversed: the rows it draws from are earlier ones, not yet overwritten.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self._trajectory = trajectory
        discretisation = trajectory.discretisation
        history = discretisation.operator.forward([trajectory.x_rows], slice(1, 2))
        assert isinstance(history, ExactConvolution)
        self._history = history
        self._first = discretisation.grid.steps + 1

    def get(self, n: int) -> Tensor:
        """p_n."""
        if n < self._first:
            self._first = n - (n - 1) % self._history.block
            (self._values,) = self._history.rows(self._first, n + 1)
        trajectory = self._trajectory
        p = trajectory.y0 + self._values[n - self._first]
        return trajectory.discretisation.weights.add_start(1, n, p, trajectory.slope)
