"""The gradient battery: three checks of a discrete adjoint that anyone can run on a model of their own.

For the discrete solution y(p) of a model with inputs p = (y_0, theta, alpha), a functional J and a direction u:

    against autograd    |grad - grad_ref| / |grad_ref|, by group of p            0 to rounding
    dot product         <v, y'(p) u> - <y'(p)^T v, u>                            0 to rounding, times sqrt(N)
    Taylor              |J(p + e u) - J(p)| ~ e,    |J(p + e u) - J(p) - e <grad, u>| ~ e^2

grad_ref is autograd's, through the same steps (`pfde.Backprop`); y' u is the tangent linear sweep, a derivation of its
own (Griewank, Walther 2008, doi:10.1137/1.9780898717761); the Taylor test sees values of J alone, so that it also
holds the other two to account. `verify` runs all three.

The functional is J(y) = <v, y + y^2 / 2> over all outputs, v random from `seed`, unless `loss` gives another.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..api.types import Func, Loss, Method
from ..caputo.history import History
from ..solving.gradients import Backprop, Discrete, Gradient
from ..solving.request import Request
from .case import Case, random_like, rows_of
from .report import SLOPE_TOLERANCE, GradientErrors, Report, TaylorSlopes

__all__ = ["GradientErrors", "Report", "TaylorSlopes", "dot_product_error", "gradient_error", "taylor_slopes", "verify"]


def gradient_error(
    func: Func,
    y0: Any,
    t: Tensor,
    alpha: float | Tensor,
    *,
    method: Method = "trapezoid",
    step_size: float | None = None,
    gradient: Discrete | None = None,
    history: History | None = None,
    params: Sequence[Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> GradientErrors:
    """Compare the gradient of the discrete adjoint with autograd through the same steps.

    Parameters
    ----------
    func, y0, t, alpha, method, step_size, gradient, history, params, options : as in `pfde.solve`; the derivative is
        taken in y0, in alpha and in the parameters that require a gradient, whatever requires_grad y0 and alpha have.
        A method of `pfde.odeint` takes alpha=1, which is no input then, and fixed steps
    loss : y -> 0-d tensor, y as `fdeint` returns it; default the random functional of this module
    seed : of the random functional

    Returns
    -------
    GradientErrors : float64, and a model without cancellation of its own: 1e-12 or less (typically 1e-15)

    Raises what `solve` raises, and ValueError when `loss` returns no 0-d tensor. Nothing is left in any `.grad`, and
    torch's random generator is left as it was.
    """
    asked = Request(
        func=func,
        y0=y0,
        t=t,
        alpha=alpha,
        method=method,
        step_size=step_size,
        history=history,
        params=params,
        options=options,
    )
    return _gradient_error(Case(asked, loss, seed), gradient or Discrete())


def _gradient_error(case: Case, gradient: Gradient) -> GradientErrors:
    measured, reference = case.gradient(gradient), case.gradient(Backprop())
    errors = [_relative_error(a, b) for a, b in zip(measured, reference, strict=True)]
    return GradientErrors(errors[0], errors[1] if case.parameters else None, None if case.alpha is None else errors[2])


def dot_product_error(
    func: Func,
    y0: Any,
    t: Tensor,
    alpha: float | Tensor,
    *,
    method: Method = "trapezoid",
    step_size: float | None = None,
    gradient: Discrete | None = None,
    history: History | None = None,
    params: Sequence[Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> float:
    """Compare <v, y' u> with <y'^T v, u> for random u in (y0, theta, alpha) and v in the outputs.

    y' u comes from the tangent linear sweep, y'^T v from the adjoint sweep. Arguments as in `gradient_error`.

    Returns
    -------
    float : |<v, y' u> - <y'^T v, u>| over sum_i |v_i (y' u)_i|, the size to which rounding is relative (the product
        itself may happen to be small); to be compared with 50 eps sqrt(N) for N steps

    It says that the two sweeps are each other's transpose, not that either is the derivative: `taylor_slopes` does.
    """
    asked = Request(
        func=func,
        y0=y0,
        t=t,
        alpha=alpha,
        method=method,
        step_size=step_size,
        history=history,
        params=params,
        options=options,
    )
    return _dot_product_error(Case(asked, None, seed), gradient or Discrete())


def _dot_product_error(case: Case, gradient: Gradient) -> float:
    generator = torch.Generator().manual_seed(case.seed + 1)
    y_leaf, a_leaf = case.leaves()
    y = rows_of(case.solve(y_leaf, a_leaf, gradient))
    v = random_like(y, generator)
    inputs = [*y_leaf, *case.parameters, *a_leaf]
    u = [random_like(x, generator) for x in inputs]
    bars = torch.autograd.grad(y, inputs, v, allow_unused=True)
    adjoint = sum(_dot(bar, dot) for bar, dot in zip(bars, u, strict=True) if bar is not None)
    last = len(u) - len(a_leaf)
    tangent = case.tangent(u[: len(y_leaf)], u[len(y_leaf) : last], u[last:])
    terms = v.double() * tangent.double()
    scale = float(terms.abs().sum())
    return abs(float(terms.sum()) - adjoint) / (scale or 1.0)


def taylor_slopes(
    func: Func,
    y0: Any,
    t: Tensor,
    alpha: float | Tensor,
    *,
    method: Method = "trapezoid",
    step_size: float | None = None,
    gradient: Discrete | None = None,
    history: History | None = None,
    params: Sequence[Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
    first_step: float | None = None,
    halvings: int = 3,
) -> TaylorSlopes:
    """Observe how fast the Taylor remainders of J(y(p + e u)) vanish: rates 1, and 2 with the gradient's term.

    Parameters
    ----------
    func, ..., seed : as in `gradient_error`
    first_step : the largest e; u is random and, group by group, as long as the input it perturbs (alpha is lowered, so
        that it stays below 1)
    halvings : the lengths are first_step / 2^k, k = 0..halvings

    Returns
    -------
    TaylorSlopes : log2 of the ratios of successive remainders

    NOTE 1. The default first_step is eps^(1/4), 1.2e-4 in float64: the second remainder, of the order e^2, then lies
    1e7 above the rounding of J, and terms of the order e^3 bend the rate by 1e-4. In float32 (0.02) it lies 1e3 above,
    and falls to it within a few halvings. So the rounding r of J is measured, as the remainder at lengths of a few eps,
    where nothing else is left of it, and a rate between the remainders R and R' may be off by

        0.02 + 2 e + (r / R + r / R') / ln 2,

    the second for the next order, the third for r. A remainder below 4 r is rounding, and tells no rate; then the
    gradient is right to 4 r / e. A gradient wrong by a part d leaves d e, of rate 1, as long as that is above r.

    NOTE 2. A Taylor test may mislead (compare the verification module of tlm_adjoint, doi:10.1137/18M1209465).
    It passes with a gradient that is wrong by less than e, or wrong across u only; so use it beside
    `gradient_error`, not in its place. It fails with a right gradient where J is not twice differentiable (a ReLU kink
    between p and p + e u), where a second derivative is far
    above or below the size of J (give another first_step), and where func draws random numbers or carries state.
    """
    asked = Request(
        func=func,
        y0=y0,
        t=t,
        alpha=alpha,
        method=method,
        step_size=step_size,
        history=history,
        params=params,
        options=options,
    )
    return _taylor_slopes(Case(asked, loss, seed), gradient or Discrete(), first_step, halvings)


def _taylor_slopes(case: Case, gradient: Gradient, first_step: float | None = None, halvings: int = 3) -> TaylorSlopes:
    if halvings < 1:
        raise ValueError(f"halvings must be at least 1: got {halvings}")
    e = torch.finfo(case.dtype).eps ** 0.25 if first_step is None else first_step
    if not 0 < e < 0.5:
        raise ValueError(f"first_step must be in (0, 0.5), relative to the inputs' size: got {e:g}")
    generator = torch.Generator().manual_seed(case.seed + 1)
    u = [[random_like(x, generator) for x in group] for group in case.groups()]
    u[2] = [-direction.abs() for direction in u[2]]
    for group, directions in zip(case.groups(), u, strict=True):
        _scale(directions, math.hypot(*(float(x.norm()) for x in group)) or 1.0)
    bars = case.gradient(gradient)
    start, eps = case.value(u, 0.0), torch.finfo(case.dtype).eps

    def remainders(step: float) -> tuple[float, float]:
        """The two remainders at a length."""
        difference = case.value(u, step) - start
        moved = case.moves(u, step)  # what e u is, once it is added to p and rounded
        slope = sum(_dot(b, d) for bar, group in zip(bars, moved, strict=True) for b, d in zip(bar, group, strict=True))
        return abs(difference), abs(difference - slope)

    noise = max(eps * abs(start), 2 * max(remainders(eps * 2**k)[1] for k in range(3, 7)))
    steps = [e / 2**k for k in range(halvings + 1)]
    zeroth, first = zip(*map(remainders, steps), strict=True)
    return TaylorSlopes(_rates(zeroth), _rates(first), _allowed(zeroth, steps, noise), _allowed(first, steps, noise))


def verify(
    func: Func,
    y0: Any,
    t: Tensor,
    alpha: float | Tensor,
    *,
    method: Method = "trapezoid",
    step_size: float | None = None,
    gradient: Discrete | None = None,
    history: History | None = None,
    params: Sequence[Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Report:
    """Run the whole battery on a model; the report says what was measured, and `report.passed` whether all is well.

    Arguments as in `gradient_error`. Allowed: 4500 eps against autograd (1e-12 in float64, 5e-4 in float32),
    50 eps sqrt(N) in the dot product, slopes within 0.02 and what the dtype's rounding does to them (`taylor_slopes`).

    Examples
    --------
    >>> report = pfde.testing.verify(model.double(), y0, torch.linspace(0, 1, 41), 0.7, method="trapezoid")
    >>> assert report.passed, report
    """
    case = Case(
        Request(
            func=func,
            y0=y0,
            t=t,
            alpha=alpha,
            method=method,
            step_size=step_size,
            history=history,
            params=params,
            options=options,
        ),
        loss,
        seed,
    )
    how, eps = gradient or Discrete(), torch.finfo(case.dtype).eps
    return Report(
        case.method,
        case.steps,
        case.dtype,
        _gradient_error(case, how),
        _dot_product_error(case, how),
        _taylor_slopes(case, how),
        tolerance=4500 * eps,
        dot_tolerance=50 * eps * math.sqrt(case.steps),
    )


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())


def _scale(directions: list[Tensor], length: float) -> None:
    """Scale a group of directions to this length, in place."""
    norm = math.hypot(*(float(d.norm()) for d in directions)) or 1.0
    for d in directions:
        d.mul_(length / norm)


def _relative_error(measured: list[Tensor], reference: list[Tensor]) -> float:
    """|a - b| / |b| of a group; |a - b| where b vanishes."""
    distance = math.hypot(*(float((a.double() - b.double()).norm()) for a, b in zip(measured, reference, strict=True)))
    return distance / (math.hypot(*(float(b.double().norm()) for b in reference)) or 1.0)


def _rates(remainders: Sequence[float]) -> tuple[float, ...]:
    """log2 of successive ratios; NaN where a remainder is zero."""
    return tuple(math.log2(a / b) if a > 0 and b > 0 else math.nan for a, b in pairwise(remainders))


def _allowed(remainders: Sequence[float], steps: Sequence[float], noise: float) -> tuple[float, ...]:
    """How far each rate may be off; infinity where a remainder is nothing but rounding."""
    return tuple(
        math.inf if min(a, b) <= 4 * noise else SLOPE_TOLERANCE + 2 * e + (noise / a + noise / b) / math.log(2)
        for a, b, e in zip(remainders, remainders[1:], steps, strict=False)
    )
