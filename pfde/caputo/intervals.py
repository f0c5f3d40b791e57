"""Product-integration weights on a nonuniform grid t_0 < t_1 < ... < t_N, interval by interval.

I^alpha f at t_n, with f replaced by an interpolant of F_j = f(t_j, y_j), is a sum over the intervals of

    int u^(alpha-1) p(u) du / Gamma(alpha)    over u = t_n - s in [a, b],    b = a + h,

where p = 1 for the rectangle and p = (b-u)/h or (u-a)/h for the two halves of hat functions (trapezoid; Diethelm, Ford,
Freed 2004, doi:10.1023/B:NUMA.0000027736.85078.be, here for steps of any sizes). Collected by F_j,

    c_n = sum_{1<=j<n} B[n, j] F_j + start[n] F_0 + local[n] F_n.

With L = log(b/a) = log1p(h/a) the integrals are, without a difference of powers,

    rectangle                   b^alpha E(L) / Gamma(alpha+1),                               E(L) = 1 - exp(-alpha L),
    hat at distance tau = t_n - t_j, with x = h_j / tau, q = h_{j+1} / (t_n - t_{j+1}),
                                tau^alpha ((1 + 1/x) (-E(-log1p x)) - E(log1p q) / q) / Gamma(alpha+2).

The two terms of the hat are close to alpha where x and q are small. There, for v = max(h_j, h_{j+1}) / tau <= 1/8, the
kernel is expanded about t_j and integrated against the hat,

    tau^alpha sum_k C(alpha-1, k) (h_j^(k+1) + (-1)^k h_{j+1}^(k+1)) / (tau^(k+1) (k+1) (k+2)) / Gamma(alpha),

of which 54 / log2(1/v) terms are summed, 18 at v = 1/8, 5 at v = 1/2000: what is left out is below 2^-54.

Symbols: n rows, j columns, both numbered as the times are; h_j = t_j - t_{j-1}; G the number of orders alpha in (0, 1];
tau, a, b, u distances from t_n; s, w the exponents and weights of a sum of exponentials. Differences of times are each
one rounded subtraction of the given doubles, which are taken as exact. All weights are plain torch operations,
differentiable in alpha by forward and by reverse mode. Relative error below 1e-14, derivatives below 1e-13.

NOTE 1. On the interval that ends at t_n, a = 0 and L is infinite. It is replaced by 1e300, for which E = 1 exactly with
derivative 0, and no product of a zero and an infinity arises in any derivative.

NOTE 2. Entries are computed in tiles of 2^16 numbers, which stay in cache. The number of terms of the series is chosen
by tile, so that the last bits of an entry may depend on the block it is asked for in: who needs a weight twice (a sum
and its transpose) asks for the same block twice.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from .special import reciprocal_gamma

_TILE_NUMBERS = 2**16  # G * rows * columns of one tile: in cache, yet few calls of torch (0.1 ms each in forward mode)
_TILE_COLUMNS = 256
_BITS = 54  # series stop below 2^-54 of their first term
_FAR = 1 / 8  # the largest v of the series; the closed form loses a factor 2/v, here 16
_TERMS = 18  # ceil(_BITS / log2(1 / _FAR))
_NOTHING = 2.0**-60  # h_0 / h_1 where t_0 - h_0 stands for t_0 and a formula divides by h_0
_INFINITE = 1e300  # L where a = 0
_SMALLEST_STEP = 1e-280  # and of T - t_0, so that no quotient of distances overflows


@dataclass(frozen=True, eq=False)
class Quadrature(ABC):
    """The weights of one rule on one grid. Made by `quadrature`; immutable, shared by whoever likes.

    rule : "left", "right" or "linear"
    t : (N+1,) float64, the times
    h : (N+1,), h_j at index j; h_0 is zero, or next to zero, and makes column 0 the start column

    Every method takes alpha as a float64 tensor (G,) and gives float64 tensors on the device of t.
    """

    rule: ClassVar[str]
    t: Tensor
    h: Tensor

    @property
    def steps(self) -> int:
        """N."""
        return len(self.t) - 1

    @abstractmethod
    def local(self, alpha: Tensor) -> Tensor:
        """The weight of F_n in row n, (N+1, G); zero at n = 0."""

    @abstractmethod
    def near(self, alpha: Tensor) -> Tensor:
        """B[n, n-1], (N+1, G); zero at n = 0, 1."""

    @abstractmethod
    def moments(self, s: Tensor, j0: int, j1: int) -> Tensor:
        """The columns j0..j1-1 (j1 <= N) against exponentials exp(-s u), u = t_n - t, referred to t_{j+1}: (Q, j1-j0).

        With K(u) = u^(alpha-1) / Gamma(alpha) = sum_q w_q exp(-s_q u), the weight B[n, j] of every row n >= j + 2 is
        sum_q w_q exp(-s_q (t_n - t_{j+1})) g[q, j]. s is (Q,), not negative. Relative error below 4e-15.
        """

    @abstractmethod
    def _tile(self, alpha: Tensor, n: slice, j: slice) -> Tensor:
        """B[n, j] for j < N, (G, rows, columns)."""

    def start(self, alpha: Tensor) -> Tensor:
        """The weight of F_0 in row n, (N+1, G); zero at n = 0."""
        return _from_row(1, self.block(alpha, 1, self.steps + 1, 0, 1)[:, 0])

    def block(self, alpha: Tensor, n0: int, n1: int, j0: int, j1: int) -> Tensor:
        """B[n, j], rows n0..n1-1, columns j0..j1-1, shape (n1-n0, j1-j0, G); zero where j >= n. Column 0: `start`.

        Cost: one power an entry, and for the rectangles one log1p and expm1, for hats 5 to 18 multiplications (near the
        diagonal all of that). 1e6 entries: 0.03 s.
        """
        N = self.steps
        assert 0 <= n0 <= n1 <= N + 1 and 0 <= j0 <= j1 <= N + 1
        inner = max(j0, min(j1, N))  # column N is zero, and has no t_{N+1}
        columns = max(1, min(_TILE_COLUMNS, inner - j0))
        rows = max(1, _TILE_NUMBERS // (columns * len(alpha)))
        bands = [alpha.new_zeros(len(alpha), 0, j1 - j0)]
        for n in (slice(k, min(k + rows, n1)) for k in range(n0, n1, rows)):
            height = n.stop - n.start
            band = [alpha.new_zeros(len(alpha), height, 0)]
            for j in (slice(k, min(k + columns, inner)) for k in range(j0, inner, columns)):
                empty = n.stop - 1 <= j.start
                width = j.stop - j.start
                band.append(alpha.new_zeros(len(alpha), height, width) if empty else self._tile(alpha, n, j))
            bands.append(torch.cat([*band, alpha.new_zeros(len(alpha), height, j1 - inner)], dim=2))
        return torch.cat(bands, dim=1).permute(1, 2, 0).contiguous()


class _Rectangle(Quadrature):
    """One interval [t_{j-1+shift}, t_{j+shift}] for each column j."""

    _shift: ClassVar[int]

    def _tile(self, alpha: Tensor, n: slice, j: slice) -> Tensor:
        ends = slice(j.start + self._shift, j.stop + self._shift)
        a = self.t[n, None] - self.t[ends]
        h = self.h[ends]
        order = alpha[:, None, None]
        if a[0, -1] > 0:
            value = (a + h) ** order * -torch.expm1(-order * torch.log1p(h / a))
        else:
            inside = a >= 0 if self._shift else a > 0
            b = torch.where(inside, a + h, 1.0)
            value = torch.where(inside, b**order * -torch.expm1(-order * _log_ratio(a, h)), 0.0)
        return value * reciprocal_gamma(order + 1)


class LeftRectangle(_Rectangle):
    """F_j on [t_j, t_{j+1}]: the explicit rectangle (`euler`, and the predictor of `pece`)."""

    rule = "left"
    _shift = 1

    def local(self, alpha: Tensor) -> Tensor:
        """Zero."""
        return alpha.new_zeros(self.steps + 1, len(alpha))

    def near(self, alpha: Tensor) -> Tensor:
        """h_n^alpha / Gamma(alpha+1)."""
        return _from_row(2, self.h[2:, None] ** alpha * reciprocal_gamma(alpha + 1))

    def moments(self, s: Tensor, j0: int, j1: int) -> Tensor:
        """h_{j+1} phi_0(s h_{j+1})."""
        h = self.h[j0 + 1 : j1 + 1]
        return h * phi_0(s[:, None] * h)


class RightRectangle(_Rectangle):
    """F_j on [t_{j-1}, t_j]: the implicit rectangle (`beuler`)."""

    rule = "right"
    _shift = 0

    def local(self, alpha: Tensor) -> Tensor:
        """h_n^alpha / Gamma(alpha+1)."""
        return _from_row(1, self.h[1:, None] ** alpha * reciprocal_gamma(alpha + 1))

    def near(self, alpha: Tensor) -> Tensor:
        """((h_n + h_{n-1})^alpha - h_n^alpha) / Gamma(alpha+1)."""
        a, h = self.h[2:, None], self.h[1:-1, None]
        value = (a + h) ** alpha * -torch.expm1(-alpha * torch.log1p(h / a))
        return _from_row(2, value * reciprocal_gamma(alpha + 1))

    def moments(self, s: Tensor, j0: int, j1: int) -> Tensor:
        """exp(-s h_{j+1}) h_j phi_0(s h_j)."""
        h, after = self.h[j0:j1], self.h[j0 + 1 : j1 + 1]
        return torch.exp(-s[:, None] * after) * h * phi_0(s[:, None] * h)


@dataclass(frozen=True, eq=False)
class Linear(Quadrature):
    """The hat function at t_j: the product trapezoid (`trapezoid`, and the corrector of `pece`).

    scale : (N,), max(h_j, h_{j+1})
    hats : (18, N), at [k, j] the integral of (u/scale)^k / scale against the hat, u = t_j - t
    """

    rule = "linear"
    scale: Tensor
    hats: Tensor

    def local(self, alpha: Tensor) -> Tensor:
        """h_n^alpha / Gamma(alpha+2)."""
        return _from_row(1, self.h[1:, None] ** alpha * reciprocal_gamma(alpha + 2))

    def near(self, alpha: Tensor) -> Tensor:
        """(h_n + h_{n-1}) ((h_n + h_{n-1})^alpha - h_n^alpha) / (h_{n-1} Gamma(alpha+2))."""
        tau, h = self.h[2:, None], self.h[1:-1, None]
        value = torch.expm1(alpha * torch.log1p(h / tau)) * (1 + tau / h)
        return _from_row(2, tau**alpha * value * reciprocal_gamma(alpha + 2))

    def moments(self, s: Tensor, j0: int, j1: int) -> Tensor:
        """exp(-s h_{j+1}) h_j phi_b(s h_j) + h_{j+1} phi_a(s h_{j+1})."""
        h, after = self.h[j0:j1], self.h[j0 + 1 : j1 + 1]
        x, y = s[:, None] * h, s[:, None] * after
        return torch.exp(-y) * h * phi_b(x) + after * phi_a(y)

    def _tile(self, alpha: Tensor, n: slice, j: slice) -> Tensor:
        tau, scale = self.t[n, None] - self.t[j], self.scale[j]
        order = alpha[:, None, None]
        if tau[0, -1] > 0:
            largest = max(float((scale / tau[0]).amax()), 2.0**-_BITS)
            if largest <= _FAR:
                terms = max(1, math.ceil(-_BITS / math.log2(largest)))
                return tau**order * self._series(alpha, scale / tau, j, terms)
        inside = tau > 0
        tau = torch.where(inside, tau, 1.0)
        far = inside & (scale <= _FAR * tau)
        series = self._series(alpha, torch.where(far, scale / tau, 0.0), j, _TERMS)
        value = torch.where(far, series, self._closed(order, tau, n, j))
        return torch.where(inside, tau**order * value, 0.0)

    def _closed(self, order: Tensor, tau: Tensor, n: slice, j: slice) -> Tensor:
        """B / tau^alpha from the values of u^alpha at the three nodes."""
        before, after = self.h[j], self.h[j.start + 1 : j.stop + 1]
        a = self.t[n, None] - self.t[j.start + 1 : j.stop + 1]
        older = torch.expm1(order * torch.log1p(before / tau)) * (1 + tau / before)
        newer = torch.expm1(-order * _log_ratio(a, after)) * (a.clamp(min=0) / after)
        return (older + newer) * reciprocal_gamma(order + 2)

    def _series(self, alpha: Tensor, v: Tensor, j: slice, terms: int) -> Tensor:
        """B / tau^alpha by the series in v = scale / tau."""
        binomials = _binomials(alpha, terms)
        value: Tensor
        *lower, value = (c[:, None, None] * hat for c, hat in zip(binomials, self.hats[:terms, j], strict=True))
        for coefficient in reversed(lower):
            value = torch.addcmul(coefficient, value, v)
        return value * v


RULES: Mapping[str, type[Quadrature]] = MappingProxyType(
    {rule.rule: rule for rule in (LeftRectangle, RightRectangle, Linear)}
)


def quadrature(rule: str, t: Tensor) -> Quadrature:
    """The weights of a rule ("left", "right", "linear") on the grid t, (N+1,) float64, finite, strictly increasing.

    O(N) time and memory; t is copied. Raises ValueError or TypeError for an unknown rule or an unfit t.
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}: got {rule!r}")
    _check(t)
    t = t.clone()
    h = torch.cat([t.new_zeros(1), t.diff()])
    if rule != "linear":
        return RULES[rule](t, h)
    h[0] = _NOTHING * h[1]
    before, after = h[:-1], h[1:]
    scale = torch.maximum(before, after)
    k = torch.arange(_TERMS, dtype=t.dtype, device=t.device)[:, None]
    sign = 1 - 2 * (k % 2)
    hats = ((before / scale) ** (k + 1) + sign * (after / scale) ** (k + 1)) / ((k + 1) * (k + 2))
    return Linear(t, h, scale, hats)


def phi_0(x: Tensor) -> Tensor:
    """int_0^1 exp(-x u) du = (1 - e^-x) / x for x >= 0; relative error below 1e-15."""
    safe = torch.where(x > 0, x, 1.0)
    return torch.where(x > 0, -torch.expm1(-safe) / safe, 1.0)


def phi_a(x: Tensor) -> Tensor:
    """int_0^1 u exp(-x u) du = (1 - e^-x (1+x)) / x^2 for x >= 0; relative error below 2e-15.

    Below 1 by e^-x sum_k x^k / (k+2)!, whose terms are positive.
    """
    near = torch.where(x < 1, x, 0.0)
    series = torch.full_like(x, 1 / math.factorial(_TERMS + 1))
    for k in reversed(range(_TERMS - 1)):
        series = series * near + 1 / math.factorial(k + 2)
    far = torch.where(x < 1, 1.0, x)
    decay = torch.exp(-x)
    return torch.where(x < 1, decay * series, ((1 - decay) / far - decay) / far)


def phi_b(x: Tensor) -> Tensor:
    """int_0^1 (1-u) exp(-x u) du = (1 - phi_0(x)) / x for x >= 0; relative error below 2e-15.

    As phi_0 - phi_a, which is at least half of phi_0.
    """
    return phi_0(x) - phi_a(x)


def _check(t: Tensor) -> None:
    """Raise unless t is a grid."""
    if not isinstance(t, Tensor) or t.dtype != torch.float64:
        raise TypeError(f"t must be a float64 tensor: got {t.dtype if isinstance(t, Tensor) else type(t).__name__}")
    if t.dim() != 1 or len(t) < 2:
        raise ValueError(f"t must be one-dimensional with at least two times: got shape {tuple(t.shape)}")
    if t.requires_grad:
        raise ValueError("t requires a gradient, which the weights do not give: pass t.detach()")
    if not torch.isfinite(t).all():
        raise ValueError(f"t must be finite: got {t.tolist()[:8]}")
    h = t.diff()
    i = int(h.argmin())
    smallest, length = float(h[i]), float(t[-1] - t[0])
    if smallest <= 0:
        raise ValueError(
            f"t must be strictly increasing: got t[{i}]={t[i].item():.17g}, t[{i + 1}]={t[i + 1].item():.17g}"
        )
    least = _SMALLEST_STEP * max(1.0, length)
    if not least <= smallest or math.isinf(length):
        raise ValueError(
            f"every step of t must be at least {least:g}, and t[-1] - t[0] finite: got t[{i + 1}] - t[{i}] = "
            f"{smallest:g}; reduce the grading"
        )


def _from_row(first: int, rows: Tensor) -> Tensor:
    """Rows first..N of a table (N+1, G) whose other rows are zero."""
    return torch.cat([rows.new_zeros(first, rows.shape[1]), rows])


def _log_ratio(a: Tensor, h: Tensor) -> Tensor:
    """L = log1p(h/a), and 1e300 where a <= 0 (NOTE 1)."""
    return torch.where(a > 0, torch.log1p(h / torch.where(a > 0, a, 1.0)), _INFINITE)


def _binomials(alpha: Tensor, terms: int) -> tuple[Tensor, ...]:
    """C(alpha-1, k) / Gamma(alpha) for k = 0..terms-1, each (G,).

    The factor alpha - 1, which may vanish, stays out of cumprod: torch (2.13) differentiates it twice wrongly at zero.
    """
    first = alpha * reciprocal_gamma(alpha + 1)
    k = torch.arange(2, terms, dtype=alpha.dtype, device=alpha.device)[:, None]
    later = ((alpha - k) / k).cumprod(0)
    return (first, *((alpha - 1) * first * torch.cat([torch.ones_like(alpha)[None], later])).unbind(0))[:terms]
