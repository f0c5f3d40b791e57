"""The tangent linear sweep of a one-step method: the derivative of the forward sweep along (y0_dot, theta_dot).

It takes the steps and their tangents side by side, on known times, and serves verification: <v, J u> = <J^T v, u> holds
to rounding exactly when the adjoint sweep is the transpose of this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from ..system.base import OneStepSystem
from .methods.base import OneStep
from .times import StepTimes


def tangent_sweep(
    scheme: OneStep,
    times: StepTimes,
    system: OneStepSystem,
    y0: Tensor,
    y0_dot: Tensor,
    theta_dot: Any,
    outputs: Iterable[int],
) -> dict[int, Tensor]:
    """The tangents y_dot_n at the given steps.

    Parameters
    ----------
    y0, y0_dot : (d,)
    theta_dot : one tangent for each parameter of the system
    outputs : step numbers
    """
    wanted, found = set(outputs), {0: y0_dot.clone()}
    y, y_dot = y0, y0_dot
    for n in range(1, times.steps + 1):
        at = times.interval(n)
        step = scheme.step(system, at, y)
        sources = scheme.stages(system, at, y, step.y, dense=False, graphs=False, rows=None)
        y, y_dot = step.y, scheme.tangent(system, at, sources, y_dot, theta_dot)
        found[n] = y_dot
    return {n: y_dot for n, y_dot in found.items() if n in wanted}
