"""The tangent linear sweep: the derivative of the forward sweep along (y0_dot, alpha_dot, theta_dot).

    r_dot_n = y0_dot + sum_{j<n} (kappa_{n-j} X_dot_j + alpha_dot kappa'_{n-j} X_j)
              + sigma_n F0_dot + sigma'_n alpha_dot F_0

It runs beside a forward sweep and serves verification: <v, J u> = <J^T v, u> holds to rounding exactly when the adjoint
sweep is the transpose of this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..system.base import System, scaled
from .forward import ForwardSweep
from .schemes.base import StepTangent
from .trajectory import Trajectory


def tangent_sweep(
    trajectory: Trajectory, system: System, y0_dot: Tensor, alpha_dot: Tensor, theta_dot: Any, outputs: Iterable[int]
) -> dict[int, Tensor]:
    """The tangents y_dot_n at the given steps.

    Parameters
    ----------
    trajectory : a new one, which the forward sweep beside this one fills
    y0_dot : (d,)
    alpha_dot : (G,) float64
    theta_dot : one tangent for each parameter of the system
    outputs : step numbers
    """
    discretisation = trajectory.discretisation
    orders, grid = discretisation.orders, discretisation.grid
    weights, weights_dot = discretisation.weights, discretisation.weights_dot
    direction = orders.pick(alpha_dot.to(dtype=discretisation.dtype, device=discretisation.device))
    forward = ForwardSweep(trajectory, system)
    rows = [torch.zeros_like(trajectory.x_rows), trajectory.x_rows] if trajectory.whole else []
    history = discretisation.operator.tangent(rows, alpha_dot)
    slope_dot = None
    if trajectory.slope is not None:
        slope_dot = system.linearise(0, grid.t0, trajectory.y0).jvp(y0_dot, theta_dot)

    def r_dot(n: int, channel: int, c_dot: Tensor) -> Tensor:
        r = weights.add_start(channel, n, y0_dot + c_dot, slope_dot)
        if trajectory.slope is None:
            return r
        return weights_dot.add_start(channel, n, r, scaled(direction, trajectory.slope))

    wanted, found = set(outputs), {0: y0_dot.clone()}
    for n in range(1, grid.steps + 1):
        at, stage = discretisation.at(n), forward.advance(n)
        r_dots = tuple(r_dot(n, channel, c_dot) for channel, c_dot in enumerate(history.read(n)))
        tangent = StepTangent(r_dots, weights_dot.local(n) * direction, y0_dot, theta_dot)
        y_dot, x_dot = discretisation.scheme.step_tangent(system, at, stage, tangent)
        if x_dot is not None:
            assert stage.x is not None
            history.push(n, (x_dot, stage.x))
        if n in wanted:
            found[n] = y_dot
    return {n: y_dot for n, y_dot in found.items() if n in wanted}
