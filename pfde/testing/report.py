"""What the checks measured, what they allow, and the table that says so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

SLOPE_TOLERANCE = 0.02


@dataclass(frozen=True)
class GradientErrors:
    """Relative errors of a gradient, |grad - grad_ref| / |grad_ref| in the 2-norm, by group of inputs.

    Attributes
    ----------
    y0 : of the initial state
    theta : of all parameters together; None for a model without
    alpha : of the order or orders; None for an ordinary equation
    """

    y0: float
    theta: float | None
    alpha: float | None

    @property
    def worst(self) -> float:
        """The largest of them; NaN if one is."""
        errors = [x for x in (self.y0, self.theta, self.alpha) if x is not None]
        return math.nan if any(map(math.isnan, errors)) else max(errors)


@dataclass(frozen=True)
class TaylorSlopes:
    """Observed rates of the two Taylor remainders, one for each halving of the step length.

    Attributes
    ----------
    zeroth : of |J(p + e u) - J(p)|, which should be 1
    first : of |J(p + e u) - J(p) - e <grad, u>|, which should be 2
    zeroth_allowed, first_allowed : how far each may be off; infinity where a remainder is the rounding of J, which has
        no rate
    """

    zeroth: tuple[float, ...]
    first: tuple[float, ...]
    zeroth_allowed: tuple[float, ...] = ()
    first_allowed: tuple[float, ...] = ()

    @property
    def worst(self) -> float:
        """The largest distance of a rate from what it should be; NaN if one is."""
        distances = [abs(s - 1) for s in self.zeroth] + [abs(s - 2) for s in self.first]
        return math.nan if any(map(math.isnan, distances)) else max(distances)


@dataclass(frozen=True)
class Report:
    """What `verify` measured, and what it allows; `print(report)` shows a table.

    Attributes
    ----------
    method, steps, dtype : of the solve
    gradient : relative errors against autograd through the same steps; allowed: `tolerance`
    dot_product : relative error of the dot product test; allowed: `dot_tolerance`
    slopes : of the Taylor remainders; allowed: 1 and 2, each within `slope_tolerance` or, where the rounding of J is
        seen, what the slopes say themselves
    """

    method: str
    steps: int
    dtype: torch.dtype
    gradient: GradientErrors
    dot_product: float
    slopes: TaylorSlopes
    tolerance: float
    dot_tolerance: float
    slope_tolerance: float = SLOPE_TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(passed for *_, passed in self.checks())

    def checks(self) -> list[tuple[str, str, str, bool]]:
        """(name, measured, allowed, passed) of each check."""

        def small(name: str, error: float, allowed: float) -> tuple[str, str, str, bool]:
            return name, f"{error:.1e}", f"{allowed:.1e}", error <= allowed  # NaN compares false

        def rates(
            name: str, observed: tuple[float, ...], expected: int, found: tuple[float, ...]
        ) -> tuple[str, str, str, bool]:
            allowed = [max(self.slope_tolerance, x) for x in found] or [self.slope_tolerance] * len(observed)
            pairs = [(s, a) for s, a in zip(observed, allowed, strict=True) if a < math.inf]
            if not pairs:  # J is as its linear model says, to rounding
                return name, "rounding", f"{expected} +- {self.slope_tolerance:g}", True
            worst, most = max(pairs, key=lambda p: math.inf if math.isnan(p[0]) else abs(p[0] - expected) / p[1])
            return name, f"{worst:.4f}", f"{expected} +- {most:.2g}", abs(worst - expected) <= most

        groups = (("y0", self.gradient.y0), ("theta", self.gradient.theta), ("alpha", self.gradient.alpha))
        return [
            *(small(f"against autograd, {name}", x, self.tolerance) for name, x in groups if x is not None),
            small("tangent-adjoint dot product", self.dot_product, self.dot_tolerance),
            rates("Taylor slope, zeroth order", self.slopes.zeroth, 1, self.slopes.zeroth_allowed),
            rates("Taylor slope, first order", self.slopes.first, 2, self.slopes.first_allowed),
        ]

    def __str__(self) -> str:
        lines = [f"method {self.method}, {self.steps} steps, {self.dtype}"]
        for name, measured, allowed, passed in self.checks():
            lines.append(f"  {name:<28} {measured:>9}   allowed {allowed:<9}  {'pass' if passed else 'FAIL'}")
        return "\n".join(lines)
