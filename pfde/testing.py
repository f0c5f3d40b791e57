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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from . import ts
from .arguments import check_alpha, check_grid, check_method, check_options, check_parameters, check_state, check_times
from .gradients import Backprop, Discrete
from .history import Exact
from .solving import fdeint
from .sweeps.discretisation import Discretisation, Orders
from .sweeps.tangent import tangent_sweep
from .sweeps.trajectory import Trajectory
from .system.peers import Peers
from .system.torch_function import TorchFunction

Func = Callable[[Tensor, Any], Any]
Loss = Callable[[Any], Tensor]

SLOPE_TOLERANCE = 0.02


@dataclass(frozen=True)
class GradientErrors:
    """Relative errors of a gradient, |grad - grad_ref| / |grad_ref| in the 2-norm, by group of inputs.

    Attributes
    ----------
    y0 : of the initial state
    theta : of all parameters together; None for a model without
    alpha : of the order or orders
    """

    y0: float
    theta: float | None
    alpha: float

    @property
    def worst(self) -> float:
        """The largest of them; NaN if one is."""
        errors = [self.y0, self.alpha] + ([] if self.theta is None else [self.theta])
        return math.nan if any(map(math.isnan, errors)) else max(errors)


@dataclass(frozen=True)
class TaylorSlopes:
    """Observed rates of the two Taylor remainders, one for each halving of the step length.

    Attributes
    ----------
    zeroth : of |J(p + e u) - J(p)|, which should be 1
    first : of |J(p + e u) - J(p) - e <grad, u>|, which should be 2
    """

    zeroth: tuple[float, ...]
    first: tuple[float, ...]

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
    slopes : of the Taylor remainders; allowed: 1 and 2, each within `slope_tolerance`
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

        def rates(name: str, observed: tuple[float, ...], expected: int) -> tuple[str, str, str, bool]:
            worst = max(observed, key=lambda s: math.inf if math.isnan(s) else abs(s - expected))
            passed = abs(worst - expected) <= self.slope_tolerance
            return name, f"{worst:.4f}", f"{expected} +- {self.slope_tolerance:g}", passed

        groups = (("y0", self.gradient.y0), ("theta", self.gradient.theta), ("alpha", self.gradient.alpha))
        return [
            *(small(f"against autograd, {name}", x, self.tolerance) for name, x in groups if x is not None),
            small("tangent-adjoint dot product", self.dot_product, self.dot_tolerance),
            rates("Taylor slope, zeroth order", self.slopes.zeroth, 1),
            rates("Taylor slope, first order", self.slopes.first, 2),
        ]

    def __str__(self) -> str:
        lines = [f"method {self.method}, {self.steps} steps, {self.dtype}"]
        for name, measured, allowed, passed in self.checks():
            lines.append(f"  {name:<28} {measured:>9}   allowed {allowed:<9}  {'pass' if passed else 'FAIL'}")
        return "\n".join(lines)


def gradient_error(
    func: Func,
    y0: Any,
    t: Tensor,
    alpha: float | Tensor,
    *,
    method: str = "trapezoid",
    step_size: float | None = None,
    gradient: Discrete | None = None,
    history: Exact | None = None,
    params: Sequence[Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> GradientErrors:
    """Compare the gradient of the discrete adjoint with autograd through the same steps.

    Parameters
    ----------
    func, y0, t, alpha, method, step_size, gradient, history, params, options : as in `pfde.fdeint`; the derivative is
        taken in y0, in alpha and in the parameters that require a gradient, whatever requires_grad y0 and alpha have
    loss : y -> 0-d tensor, y as `fdeint` returns it; default the random functional of this module
    seed : of the random functional

    Returns
    -------
    GradientErrors : float64, and a model without cancellation of its own: 1e-12 or less (typically 1e-15)

    Raises what `fdeint` raises, and ValueError when `loss` returns no 0-d tensor. Nothing is left in any `.grad`, and
    torch's random generator is left as it was.
    """
    case = _Case(func, y0, t, alpha, method, step_size, history, params, options, loss, seed)
    measured, reference = case.gradient(gradient or Discrete()), case.gradient(Backprop())
    errors = [_relative_error(a, b) for a, b in zip(measured, reference, strict=True)]
    return GradientErrors(errors[0], errors[1] if case.parameters else None, errors[2])


def dot_product_error(
    func: Func,
    y0: Any,
    t: Tensor,
    alpha: float | Tensor,
    *,
    method: str = "trapezoid",
    step_size: float | None = None,
    gradient: Discrete | None = None,
    history: Exact | None = None,
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
    case = _Case(func, y0, t, alpha, method, step_size, history, params, options, None, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    y_leaf, a_leaf = case.leaves()
    y = _rows(case.solve(y_leaf, a_leaf, gradient or Discrete()))
    v = _random(y, generator)
    inputs = [*y_leaf, *case.parameters, a_leaf]
    u = [_random(x, generator) for x in inputs]
    bars = torch.autograd.grad(y, inputs, v, allow_unused=True)
    adjoint = sum(_dot(bar, dot) for bar, dot in zip(bars, u, strict=True) if bar is not None)
    tangent = case.tangent(u[: len(y_leaf)], u[len(y_leaf) : -1], u[-1])
    terms = v.double() * tangent.double()
    scale = float(terms.abs().sum())
    return abs(float(terms.sum()) - adjoint) / (scale or 1.0)


def taylor_slopes(
    func: Func,
    y0: Any,
    t: Tensor,
    alpha: float | Tensor,
    *,
    method: str = "trapezoid",
    step_size: float | None = None,
    gradient: Discrete | None = None,
    history: Exact | None = None,
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
    1e7 above the rounding of J, and terms of the order e^3 bend the rate by 1e-4. In float32 (0.02) the
    two leave no room for a rate within 0.02: convert the model to double for this test.

    NOTE 2. A Taylor test may mislead (compare the verification module of tlm_adjoint, doi:10.1137/18M1209465).
    It passes with a gradient that is wrong by less than e, or wrong across u only; so use it beside
    `gradient_error`, not in its place. It fails with a right gradient where J is not twice differentiable (a ReLU kink
    between p and p + e u), where J is affine along u (nothing remains but rounding), where a second derivative is far
    above or below the size of J (give another first_step), and where func draws random numbers or carries state.
    """
    case = _Case(func, y0, t, alpha, method, step_size, history, params, options, loss, seed)
    if halvings < 1:
        raise ValueError(f"halvings must be at least 1: got {halvings}")
    e = torch.finfo(case.dtype).eps ** 0.25 if first_step is None else first_step
    if not 0 < e < 0.5:
        raise ValueError(f"first_step must be in (0, 0.5), relative to the inputs' size: got {e:g}")
    generator = torch.Generator().manual_seed(seed + 1)
    u = [[_random(x, generator) for x in group] for group in case.groups()]
    u[2][0] = -u[2][0].abs()
    for group, directions in zip(case.groups(), u, strict=True):
        _scale(directions, math.hypot(*(float(x.norm()) for x in group)) or 1.0)
    bars = case.gradient(gradient or Discrete())
    slope = sum(
        _dot(b, d) for bar, directions in zip(bars, u, strict=True) for b, d in zip(bar, directions, strict=True)
    )
    start = case.value(u, 0.0)
    steps = [e / 2**k for k in range(halvings + 1)]
    differences = [case.value(u, step) - start for step in steps]
    first = [abs(d - step * slope) for d, step in zip(differences, steps, strict=True)]
    return TaylorSlopes(_rates([abs(d) for d in differences]), _rates(first))


def verify(
    func: Func,
    y0: Any,
    t: Tensor,
    alpha: float | Tensor,
    *,
    method: str = "trapezoid",
    step_size: float | None = None,
    gradient: Discrete | None = None,
    history: Exact | None = None,
    params: Sequence[Tensor] | None = None,
    options: Mapping[str, Any] | None = None,
    loss: Loss | None = None,
    seed: int = 0,
) -> Report:
    """Run the whole battery on a model; the report says what was measured, and `report.passed` whether all is well.

    Arguments as in `gradient_error`. Allowed: 4500 eps against autograd (1e-12 in float64, 5e-4 in float32),
    50 eps sqrt(N) in the dot product, slopes within 0.02 (which float32 does not resolve: see `taylor_slopes`).

    Examples
    --------
    >>> report = pfde.testing.verify(model.double(), y0, torch.linspace(0, 1, 41), 0.7, method="trapezoid")
    >>> assert report.passed, report
    """
    case = _Case(func, y0, t, alpha, method, step_size, history, params, options, loss, seed)
    eps = torch.finfo(case.dtype).eps
    keywords: dict[str, Any] = dict(
        method=method,
        step_size=step_size,
        gradient=gradient,
        history=history,
        params=params,
        options=options,
        seed=seed,
    )
    return Report(
        method,
        case.grid.steps,
        case.dtype,
        gradient_error(func, y0, t, alpha, loss=loss, **keywords),
        dot_product_error(func, y0, t, alpha, **keywords),
        taylor_slopes(func, y0, t, alpha, loss=loss, **keywords),
        tolerance=4500 * eps,
        dot_tolerance=50 * eps * math.sqrt(case.grid.steps),
    )


class _Case:
    """One model with the arguments of its solve, differentiable in y0, the parameters and alpha."""

    def __init__(
        self,
        func: Func,
        y0: Any,
        t: Any,
        alpha: Any,
        method: str,
        step_size: float | None,
        history: Exact | None,
        params: Sequence[Tensor] | None,
        options: Mapping[str, Any] | None,
        loss: Loss | None,
        seed: int,
    ) -> None:
        self.func, self.t, self.loss, self.seed = func, torch.as_tensor(t), loss, seed
        self.scheme, self.history, self.options = check_method(method), history, options
        self.layout, flat = check_state(y0)
        self.y0 = [part.detach() for part in (y0 if self.layout.is_tuple else (y0,))]
        self.dtype = flat.dtype
        self.grid, self.outputs = check_grid(check_times(self.t), step_size, torch.finfo(self.t.dtype).eps)
        order, self.group = check_alpha(alpha, self.layout, flat.device)
        self.alpha = order.detach().double()
        self.parameters = check_parameters(func, params)
        self._keywords: dict[str, Any] = dict(
            method=method, step_size=step_size, history=history, params=params, options=options
        )

    def leaves(self) -> tuple[list[Tensor], Tensor]:
        """Fresh leaves with the values of y0 (its parts) and alpha."""
        return [x.clone().requires_grad_() for x in self.y0], self.alpha.clone().requires_grad_()

    def groups(self) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The values of the inputs: y0, theta, alpha."""
        return self.y0, [p.detach() for p in self.parameters], [self.alpha]

    def solve(self, y0: list[Tensor], alpha: Tensor, gradient: Discrete | Backprop) -> Any:
        """y as `fdeint` returns it."""
        state = tuple(y0) if self.layout.is_tuple else y0[0]
        return fdeint(self.func, state, self.t, alpha, gradient=gradient, **self._keywords)

    def functional(self, y: Any) -> Tensor:
        """J(y)."""
        if self.loss is None:
            rows = _rows(y)
            return (_random(rows, torch.Generator().manual_seed(self.seed)) * (rows + rows.square() / 2)).sum()
        value = self.loss(y)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise ValueError(f"loss must return a 0-d tensor: got {value!r}; reduce it with .sum() or .mean()")
        return value

    def gradient(self, gradient: Discrete | Backprop) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """dJ by group, with zeros for what J does not depend on."""
        y0, alpha = self.leaves()
        inputs = [*y0, *self.parameters, alpha]
        with torch.enable_grad():
            value = self.functional(self.solve(y0, alpha, gradient))
        bars = torch.autograd.grad(value, inputs, allow_unused=True)
        full = [torch.zeros_like(x) if bar is None else bar for x, bar in zip(inputs, bars, strict=True)]
        return full[: len(y0)], full[len(y0) : -1], full[-1:]

    def value(self, u: list[list[Tensor]], e: float) -> float:
        """J(y(p + e u))."""
        y0 = [x + e * d for x, d in zip(self.y0, u[0], strict=True)]
        with torch.no_grad(), _moved(self.parameters, u[1], e):
            return float(self.functional(self.solve(y0, self.alpha + e * u[2][0], Discrete())))

    def tangent(self, y0_dot: list[Tensor], theta_dot: list[Tensor], alpha_dot: Tensor) -> Tensor:
        """y' u at the outputs, (T, d)."""
        flat = torch.cat([x.reshape(-1) for x in self.y0])
        peers = Peers(None)
        function = TorchFunction(
            self.func, self.layout, self.parameters, flat.dtype, flat.device, self.grid.times(), peers
        )
        orders = Orders(self.alpha.cpu().reshape(-1), self.group)
        discretisation = Discretisation(
            self.scheme, self.grid, orders, self.history or Exact(), flat.dtype, flat.device
        )
        with torch.no_grad(), ts.solver_options(check_options(self.options), "", peers):
            found = tangent_sweep(
                Trajectory(discretisation, flat, None),
                ts.bare_system(self.scheme, function),
                torch.cat([x.reshape(-1) for x in y0_dot]),
                alpha_dot.cpu().reshape(-1),
                theta_dot,
                self.outputs,
            )
        return torch.stack([found[n] for n in self.outputs])


@contextmanager
def _moved(parameters: Sequence[Tensor], directions: Sequence[Tensor], e: float) -> Iterator[None]:
    """The parameters at p + e u, and back at p bit for bit."""
    before = [p.data for p in parameters]
    try:
        for p, data, direction in zip(parameters, before, directions, strict=True):
            p.data = data + e * direction  # other storage: what the caller's graphs have saved stays valid
        yield
    finally:
        for p, data in zip(parameters, before, strict=True):
            p.data = data


def _rows(y: Any) -> Tensor:
    """What fdeint returns as (T, d)."""
    parts = y if isinstance(y, tuple) else (y,)
    return torch.cat([part.reshape(len(part), -1) for part in parts], dim=1)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of like's shape, drawn on the CPU so that a device gets the same."""
    return torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


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


def _rates(remainders: list[float]) -> tuple[float, ...]:
    """log2 of successive ratios; NaN where a remainder is zero."""
    return tuple(math.log2(a / b) if a > 0 and b > 0 else math.nan for a, b in pairwise(remainders))
