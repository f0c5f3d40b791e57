"""Product integration: I^alpha f by integrating an interpolant of f exactly against (t - s)^(alpha-1) / Gamma(alpha).

    rectangle  b_k = ((k+1)^alpha - k^alpha) / Gamma(alpha+1)                  piecewise constant f
    trapezoid  a_k = ((k+1)^(alpha+1) - 2 k^(alpha+1) + (k-1)^(alpha+1)) / Gamma(alpha+2),  a_0 = 1 / Gamma(alpha+2)
               column of F_0:  ((n-1)^(alpha+1) - (n-1-alpha) n^alpha) / Gamma(alpha+2)     piecewise linear f

all times h^alpha. `euler` takes f at the left end of each interval, `beuler` at the right end; `pece` predicts with
the first and corrects once with the trapezoid (Adams-Bashforth-Moulton; Diethelm, Ford, Freed 2002,
doi:10.1023/A:1016592219341, and 2004, doi:10.1023/B:NUMA.0000027736.85078.be). At alpha = 1 they are Euler's
methods, the trapezoidal rule and, for `pece`, a method of order 2 whose first step is Heun's (its sums start at t_0, so
that later steps are not). Everything constant in f is integrated exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...system.base import Linearisation, Stepping, System
from ..special import first_difference, reciprocal_gamma, second_difference, starting_difference
from .base import (
    METHODS,
    ExplicitScheme,
    ImplicitScheme,
    Scheme,
    Stage,
    StepAdjoint,
    StepData,
    StepTangent,
    Weights,
    linearised,
    plus,
    total,
    with_slope,
)


def rectangle(count: int, alpha: Tensor) -> Tensor:
    """b_k, k = 0..count-1, shape (count, G)."""
    return first_difference(count, alpha) * reciprocal_gamma(alpha + 1)


def trapezoid(count: int, alpha: Tensor) -> Tensor:
    """a_k, k = 0..count-1, shape (count, G)."""
    return second_difference(count, alpha + 1) * reciprocal_gamma(alpha + 2)


def trapezoid_start(count: int, alpha: Tensor) -> Tensor:
    """The weight of F_0 in row n, n = 0..count-1 (0 at n = 0), shape (count, G)."""
    return starting_difference(count, alpha) * reciprocal_gamma(alpha + 2)


def explicit_rectangle(steps: int, alpha: Tensor) -> Tensor:
    """Row n draws b_{n-1-j} from column j: the rectangle weights one lag later, (N+1, G)."""
    return torch.cat([alpha.new_zeros(1, len(alpha)), rectangle(steps, alpha)])


@METHODS.register("euler")
class Euler(ExplicitScheme):
    """y_n = y_0 + h^alpha sum_{j<n} b_{n-1-j} F_j."""

    name = "euler"
    uses_initial_slope = True
    rules = ("left",)
    order = "1"
    stability = "explicit: |lambda| h^alpha below about 1 to 2"
    cost = "1 f"

    def weights(self, alpha: Tensor, h: float | Tensor, steps: int) -> Weights:
        """kappa_k = sigma_k = h^alpha b_{k-1}; nothing local."""
        b = explicit_rectangle(steps, alpha) * h**alpha
        return Weights(b.unsqueeze(0), b.unsqueeze(0), torch.zeros_like(alpha))


@METHODS.register("beuler", rank=1)
class BackwardEuler(ImplicitScheme):
    """y_n = y_0 + h^alpha sum_{1<=j<=n} b_{n-j} F_j."""

    name = "beuler"
    form = "integral"
    uses_initial_slope = False
    rules = ("right",)
    order = "1"
    stability = "A-stable"
    cost = "1 nonlinear solve"

    def weights(self, alpha: Tensor, h: float | Tensor, steps: int) -> Weights:
        """kappa_k = h^alpha b_k, w = h^alpha b_0."""
        b = rectangle(steps + 1, alpha) * h**alpha
        return Weights(b.unsqueeze(0), None, b[0])


@METHODS.register("trapezoid", rank=1)
class Trapezoid(ImplicitScheme):
    """y_n = y_0 + h^alpha (start_n F_0 + sum_{1<=j<=n} a_{n-j} F_j)."""

    name = "trapezoid"
    form = "integral"
    uses_initial_slope = True
    rules = ("linear",)
    order = "2 (smooth y); 1+alpha at fixed t for y ~ t^alpha"
    stability = "A-stable"
    cost = "1 nonlinear solve"

    def weights(self, alpha: Tensor, h: float | Tensor, steps: int) -> Weights:
        """kappa_k = h^alpha a_k, sigma_n = h^alpha start_n, w = h^alpha a_0."""
        a = trapezoid(steps + 1, alpha) * h**alpha
        start = trapezoid_start(steps + 1, alpha) * h**alpha
        return Weights(a.unsqueeze(0), start.unsqueeze(0), a[0])


@METHODS.register("pece")
class PredictorCorrector(Scheme):
    """p_n = y_0 + h^alpha sum_{j<n} b_{n-1-j} F_j, then y_n by the trapezoid with f(t_n, p_n) in place of F_n."""

    name = "pece"
    form = "integral"
    implicit = False
    channels = 2  # corrector, predictor
    uses_initial_slope = True
    rules = ("linear", "left")
    order = "min(2, 1+alpha)"
    stability = "explicit: |lambda| h^alpha < Gamma(alpha+2)"
    cost = "2 f"

    def weights(self, alpha: Tensor, h: float | Tensor, steps: int) -> Weights:
        """The trapezoid's weights, and those of `euler` for the predictor."""
        corrector = Trapezoid().weights(alpha, h, steps)
        b = explicit_rectangle(steps, alpha) * h**alpha
        assert corrector.start is not None
        return Weights(torch.stack([corrector.kernel[0], b]), torch.stack([corrector.start[0], b]), corrector.local)

    def step(self, system: Stepping, at: StepData, r: tuple[Tensor, ...], y0: Tensor, guess: Tensor) -> Stage:
        """Predict, evaluate, correct, evaluate."""
        corrector, p = r
        predicted = with_slope(system, at, Stage(p))
        assert predicted.x is not None
        y = corrector + predicted.x * at.w
        stage = Stage(y, predictor=p, kept=(predicted.kept[1], None), slopes=predicted.slopes)
        return stage if at.last else with_slope(system, at, stage)

    def step_tangent(
        self, system: System, at: StepData, stage: Stage, tangent: StepTangent
    ) -> tuple[Tensor, Tensor | None]:
        """y_dot = r^C_dot + w (J p_dot + P theta_dot) + w_dot f(t, p)."""
        corrector_dot, p_dot = tangent.r
        f = self._at_predictor(system, at, stage)
        y_dot = corrector_dot + f.jvp(p_dot, tangent.theta) * at.w + f.value * tangent.w
        return y_dot, None if at.last else linearised(system, at, stage).jvp(y_dot, tangent.theta)

    def step_adjoint(
        self,
        system: System,
        at: StepData,
        stage: Stage,
        y0: Tensor,
        y_bar: Tensor | None,
        x_bar: Tensor | None,
        theta_bar: Any,
    ) -> StepAdjoint:
        """r_bar^C = y_bar + J(y)^T x_bar, r_bar^P = J(p)^T (w r_bar^C)."""
        x = None
        if x_bar is None:
            corrector_bar = total(y_bar, stage.y)
        else:
            f = linearised(system, at, stage)
            corrector_bar, x = plus(f.vjp(x_bar, theta_bar), y_bar), f.value
        f = self._at_predictor(system, at, stage)
        p_bar = f.vjp(corrector_bar * at.w, theta_bar)
        slopes = (f.value,) if x is None else (f.value, x)
        return StepAdjoint((corrector_bar, p_bar), x, f.value * corrector_bar, slopes)

    @staticmethod
    def _at_predictor(system: System, at: StepData, stage: Stage) -> Linearisation:
        if stage.kept[0] is not None:
            return stage.kept[0]
        assert stage.predictor is not None
        return system.linearise(at.n, at.t, stage.predictor)
