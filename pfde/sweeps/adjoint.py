"""The adjoint sweep: the transpose of the forward sweep, step by step on reversed time.

    X_bar_n = sum_{k>n} sum_c kappa^c_{k-n} r_bar^c_k              (the same history, fed with r_bar, backwards)
    r_bar_n = (transpose of step n)(y_bar_n, X_bar_n)              (theta_bar collects its part there)

and at the end, over all rows at once,

    y0_bar    = y_bar_0 + sum_n sum_c r_bar^c_n - (derivative form: sum_n X_bar_n) + J_0^T F0_bar
    F0_bar    = sum_n sum_c sigma^c_n r_bar^c_n
    alpha_bar = sum_n <Z_n, X_n> + w' sum_n <w_bar_n, 1> + sum_n sum_c sigma'^c_n <r_bar^c_n, F_0>

where Z_n = sum_{k>n} kappa'_{k-n} r_bar_k is the transposed history with the derivative kernel kappa' in place of
kappa: the derivative in alpha costs a second history and no buffer (a correlation of r_bar with X would need both
buffers whole). It is reverse-accurate: the gradient of the discrete scheme, to rounding.

r_bar_n overwrites row n of the trajectory's buffers, which is dead once step n is reversed; a spent trajectory has to
be computed anew for a second backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from checkpoint_schedules import CheckpointAction, EndReverse, Reverse
from torch import Tensor

from ..schemes.base import StepAdjoint, linearised
from ..system.base import System, add_scaled
from ..system.profile import event
from .discretisation import Discretisation
from .trajectory import Trajectory


class Cotangents(NamedTuple):
    """The gradient with respect to y_0, (d,), and to the orders, (G,) float64, or None if not asked for."""

    y0: Tensor
    alpha: Tensor | None


class AdjointSweep:
    """A backward pass in progress over one trajectory, which it overwrites.

    Parameters
    ----------
    trajectory : of a completed forward sweep
    system : the one that made it
    y_bar : the cotangents of the outputs, by step (0 is y_0); steps that are no output are absent
    theta_bar : receives the parameters' cotangents
    alpha : whether the orders' cotangents are wanted
    """

    def __init__(
        self,
        trajectory: Trajectory,
        system: System,
        y_bar: Mapping[int, Tensor],
        theta_bar: Any,
        *,
        alpha: bool,
    ) -> None:
        assert not trajectory.spent
        self._trajectory, self._system, self._y_bar, self._theta_bar = trajectory, system, y_bar, theta_bar
        self._discretisation: Discretisation = trajectory.discretisation
        self._scheme = self._discretisation.scheme
        self._rows = trajectory.cotangent_rows()
        self._history = self._discretisation.adjoint_history(self._rows, alpha=alpha)
        self._predictors = _Predictors(trajectory) if self._scheme.channels == 2 else None
        self._y0_bar = trajectory.y0.new_zeros(trajectory.y0.shape)
        self._alpha_bar = self._y0_bar.clone() if alpha else None
        self._events = event("FDEAdjoint"), event("FDEHistory")

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
        predictor = None if self._predictors is None else self._predictors.get(n)
        stage = self._trajectory.stage(n, predictor)
        step = self._scheme.step_adjoint(
            self._system, at, stage, self._trajectory.y0, self._y_bar.get(n), x_bar, self._theta_bar
        )
        if self._alpha_bar is not None:
            self._add_alpha(step, None if at.last else x_bars[1])
        if x_bar is not None and self._scheme.form == "derivative":
            self._y0_bar.sub_(x_bar)
        for rows, r_bar in zip(self._rows, step.r_bar, strict=True):
            rows[n - 1].copy_(r_bar)

    def _add_alpha(self, step: StepAdjoint, z: Tensor | None) -> None:
        assert self._alpha_bar is not None
        if z is not None:
            assert step.x is not None
            self._alpha_bar.addcmul_(z, step.x)
        if step.w_bar is not None:
            add_scaled(self._alpha_bar, self._discretisation.weights_dot.local, step.w_bar)

    def finish(self) -> Cotangents:
        """The gradient, once all steps are reversed."""
        trajectory, discretisation = self._trajectory, self._discretisation
        y0_bar = self._y0_bar
        for rows in self._rows:
            y0_bar.add_(rows.sum(0))
        if 0 in self._y_bar:
            y0_bar.add_(self._y_bar[0])
        if trajectory.slope is not None:
            parts = [discretisation.weights.start_transpose(c, rows) for c, rows in enumerate(self._rows)]
            slope_bar = torch.stack(parts).sum(0)
            f = linearised(self._system, discretisation.at(0), trajectory.initial_stage())
            y0_bar.add_(f.vjp(slope_bar, self._theta_bar))
        alpha_bar = None
        if self._alpha_bar is not None:
            if trajectory.slope is not None:
                for c, rows in enumerate(self._rows):
                    self._alpha_bar.addcmul_(discretisation.weights_dot.start_transpose(c, rows), trajectory.slope)
            alpha_bar = discretisation.orders.collect(self._alpha_bar)
        return Cotangents(y0_bar, alpha_bar)


def adjoint(
    trajectory: Trajectory,
    system: System,
    y_bar: Mapping[int, Tensor],
    theta_bar: Any,
    actions: Iterable[CheckpointAction],
    *,
    alpha: bool,
) -> Cotangents:
    """The whole backward pass: execute the actions of a schedule from EndForward on. Releases the trajectory."""
    sweep = AdjointSweep(trajectory, system, y_bar, theta_bar, alpha=alpha)
    try:
        for action in actions:
            if isinstance(action, EndReverse):
                break
            if not isinstance(action, Reverse):
                raise TypeError(f"the exact history keeps every step: a schedule may only reverse, not {action}")
            sweep.reverse(action.n1, action.n0)
        return sweep.finish()
    finally:
        trajectory.release()  # its rows are overwritten, after an error half of them


class _Predictors:
    """The predictors p_n of `pece` for n = N..1: stored, or rebuilt block by block from the rows of X before them.

    A block is rebuilt when its last step is reversed: the rows it draws from are earlier ones, not yet overwritten.
    """

    def __init__(self, trajectory: Trajectory) -> None:
        self._trajectory = trajectory
        self._rebuilds = trajectory.predictor_rows is None and trajectory.store != "graph"
        if self._rebuilds:
            discretisation = trajectory.discretisation
            self._history = discretisation.forward_history(trajectory.x_rows, slice(1, 2))
            self._first = discretisation.grid.steps + 1

    def get(self, n: int) -> Tensor | None:
        """p_n, or None where the trajectory has it."""
        if not self._rebuilds:
            return None
        if n < self._first:
            self._first = n - (n - 1) % self._history.block
            (self._values,) = self._history.rows(self._first, n + 1)
        trajectory = self._trajectory
        p = trajectory.y0 + self._values[n - self._first]
        return trajectory.discretisation.weights.add_start(1, n, p, trajectory.slope)
