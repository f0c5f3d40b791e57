"""The control of adaptive steps, as PETSc's TSAdapt of type basic does it.

    e = sqrt(mean_i (err_i / (atol_i + rtol_i max(|y_n,i|, |y_{n+1},i|)))^2)
    h_new = h clip(safety e^(-1/q), shrink, grow)

with q = min(order, embedded order) + 1 the order of the estimate err. A step is accepted where e <= 1; where e is not a
number (f is NaN or inf) it is rejected and shrunk as far as the clip allows. The mean is over all ranks' entries. The
first step follows Hairer, Norsett, Wanner I, II.4: h with |y''| h^2 and |y'| h a hundredth of the tolerances' scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import StepLimitError
from ..system.peers import Peers
from .methods.base import OneStep

Tolerance = float | Tensor


class Limits(NamedTuple):
    """What adaptive steps may do, all lengths positive.

    first_step : h of the first one; None for the rule of Hairer, Norsett and Wanner
    min_step, max_step : of |h|; the last step, which is cut, may be shorter
    max_num_steps : of the steps tried
    safety, shrink, grow : of the control
    """

    first_step: float | None = None
    min_step: float = 0.0
    max_step: float = math.inf
    max_num_steps: int = 10**6
    safety: float = 0.9
    shrink: float = 0.1
    grow: float = 10.0


@dataclass(frozen=True)
class Accuracy:
    """What adaptive steps aim at: rtol and atol, numbers or (d,) tensors, and the limits of the steps."""

    rtol: Tolerance
    atol: Tolerance
    limits: Limits


class Controller:
    """The step sizes of one solve.

    Parameters
    ----------
    scheme : with an embedded pair
    rtol, atol : numbers, or tensors (d,)
    limits : of the steps
    peers : the ranks that share the state

    Attributes
    ----------
    rejected : steps
    """

    def __init__(self, scheme: OneStep, rtol: Tolerance, atol: Tolerance, limits: Limits, peers: Peers) -> None:
        assert scheme.embedded_order is not None
        self._exponent = -1.0 / (min(scheme.order, scheme.embedded_order) + 1)
        self._rtol, self._atol, self.limits, self._peers = rtol, atol, limits, peers
        self._size: float | None = None
        self.tried = self.rejected = 0

    def norm(self, x: Tensor, *scales: Tensor) -> float:
        """The weighted root mean square of x. Collective."""
        if self._size is None:
            self._size = self._peers.sum(x.numel())
        scale = scales[0].abs()
        for other in scales[1:]:
            scale = torch.maximum(scale, other.abs())
        ratio = x / (scale * self._rtol).add_(self._atol)
        return math.sqrt(self._peers.sum(float(torch.dot(ratio, ratio))) / self._size)

    def first(self, f0: Tensor, y0: Tensor, span: float) -> float:
        """|h| of the first step before a look further on: 0.01 |y| / |y'|."""
        d0, d1 = self.norm(y0, y0), self.norm(f0, y0)
        h = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
        return min(h if math.isfinite(h) and h > 0 else 1e-6, span, self.limits.max_step)

    def second(self, h: float, f0: Tensor, f1: Tensor, y0: Tensor, span: float) -> float:
        """|h| of the first step, with f1 = f after an Euler step of length h."""
        d1, d2 = self.norm(f0, y0), self.norm(f1 - f0, y0) / h
        if not math.isfinite(d2):
            return h
        larger = max(d1, d2)
        wanted = max(1e-6, h * 1e-3) if larger <= 1e-15 else (0.01 / larger) ** -self._exponent
        return min(max(min(100 * h, wanted), self.limits.min_step), span, self.limits.max_step)

    def factor(self, error: float, *, accepted: bool) -> float:
        """By what to multiply h after a step with this error."""
        limits = self.limits
        if not math.isfinite(error):
            return limits.shrink
        safety = limits.safety if accepted else 0.5 * limits.safety
        wanted = limits.grow if error == 0.0 else safety * error**self._exponent
        return min(limits.grow if accepted else 1.0, max(limits.shrink, wanted))

    def check(self, t: float, h: float, rest: float, *, nan: bool) -> StepLimitError | None:
        """The error of going on from t with a step h, if it is one; `rest` is left, and may be taken as one step."""
        spacing = max(16 * 2.0**-53 * abs(t), 1e-300)
        floor = max(self.limits.min_step, spacing)
        if abs(h) < min(floor, rest):
            what = "min_step" if floor > spacing else "the resolution of float64 there"
            why = "func returned NaN or inf there" if nan else "the error estimate asks for less"
            return StepLimitError(
                f"the step size fell to {abs(h):.3g} at t={t:.6g}, below {floor:.3g}, {what}: {why}; use an implicit "
                "method ('esdirk4') if the problem is stiff, loosen rtol and atol, or check func"
            )
        if self.tried >= self.limits.max_num_steps:
            return StepLimitError(
                f"{self.tried} steps were tried and t={t:.6g} reached: raise options={{'max_num_steps': ...}}, use an "
                "implicit method ('esdirk4') if the problem is stiff, or loosen rtol and atol"
            )
        return None
