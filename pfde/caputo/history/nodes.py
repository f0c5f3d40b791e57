"""Sums of exponentials for a history's kernel: nodes that serve every order, weights that are linear in the kernel.

A kernel of a Caputo derivative or integral falls like a power of the lag. Behind a window of n0 - 1 exact lags it is
replaced by

    kappa_k ~ sum_q W_q exp(-s_q (k - n0)),   k = n0..N,

after which a history needs Q numbers per component instead of N. Both parts start from the identity

    x^-beta = 1/Gamma(beta) integral exp(-x e^v + beta v) dv,   x = k / n0 in [1, R]

(Braess, Hackbusch 2005, doi:10.1093/imanum/dri015; Jiang, Zhang, Zhang, Zhang 2017, doi:10.4208/cicp.OA-2016-0136).
Its trapezoidal sum with step Delta has nodes exp(j Delta), the same for all beta, and the error

    sum_{k != 0} Gamma(beta + 2 pi i k / Delta) x^(-beta - 2 pi i k / Delta) / Gamma(beta),

log-periodic in x, so that its relative size is known for all x at once and fixes Delta. The sum is cut where exp(-s)
is negligible, and its slow end, which on [1, R] is a polynomial of low degree in all but name, is replaced by the m
nodes of the Gauss rule of that discrete measure (Lanczos, Golub, Welsch 1969, doi:10.1090/S0025-5718-69-99647-1).

The weights of the rule are not used. W = P kappa minimises || D (kappa - E W) || over sampled lags, with
E_{pq} = exp(-s_q (k_p - n0)), which adapts to a discrete kernel, saves nodes at both ends, and lets one set of nodes
serve a whole range of exponents. P depends on nodes, lags and D = diag(k^b), b fixed, but not on the order: hence
W' = P kappa' exactly, and the gradient of a compressed scheme is the gradient of a scheme, at every tolerance. What
was lost is told by `certificate`, the largest relative error over all lags.

The window: n0 = 2 for product integration (euler's kernel is singular at lag 1), 3 for l1, 4 for gl (at alpha = 1 both
vanish from lag 2 on, and exponentials do not), 20 for bdf2, whose part 3^-k has gone by then. With these windows 11 000
fits of random N in 20..5e4, tolerance in 1e-13..1e-2 and all orders reached 0.91 of the tolerance or less.

Symbols: beta the kernel's exponent (1 - alpha for weights of an integral, 1 + alpha of a derivative), R the ratio of
the largest to the smallest distance, s nodes, Q their number, G orders, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_MARGIN = 0.6  # nodes reach this part of the tolerance on pure powers, since discrete kernels differ from them
_FLOOR = 2e-15  # no double precision fit gets below: the step shrinks no further
_CUTOFF = 1e-15  # singular values below this part of the largest are dropped
_DENSITY = 24  # samples per factor e of distance: at least 6 per period Delta down to tolerances of 1e-14
_TEMPORARY = 2**16  # numbers of a block of `certificate`


def exponential_nodes(ratio: float, tolerance: float, exponents: tuple[float, float]) -> Tensor:
    """Decays s_q, (Q,) float64 increasing: sum_q w_q exp(-s_q x) can be x^-beta on [1, ratio] to relative `tolerance`.

    They serve all beta in `exponents` = (smallest, largest), within [0, 2]; unit: 1 / the nearest distance.
    Q is about (ln ratio + 4) ln(2/tolerance) / pi^2 for the exponent 0.5 alone and tolerances below 1e-6, 10 to 20 %
    more for (0, 1), 20 to 25 % for (1, 2).
    The number is the smallest in this family of nodes for which `Fit` reaches 0.6 tolerance on pure powers, at nine
    exponents of the range. A tolerance below about 1e-14 cannot be met in double precision: some set of nodes is
    returned all the same, and the certificate tells. Cost: 5 to 20 ms, cached; the result is the caller's own.
    """
    if not (math.isfinite(ratio) and ratio >= 1):
        raise ValueError(f"ratio must be finite and at least 1: got {ratio!r}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be in (0, 1): got {tolerance!r}")
    low, high = exponents
    if not 0 <= low <= high <= 2:
        raise ValueError(f"exponents must be 0 <= smallest <= largest <= 2: got {exponents!r}")
    return torch.from_numpy(_search(float(ratio), float(tolerance), float(low), float(high)).copy())


def sample_points(n0: int, steps: int) -> Tensor:
    """Lags n0..steps at which a discrete kernel is sampled, int64, not decreasing, from n0 to steps.

    A geometric grid rounded to integers, all lags up to about 30, then 24 per factor e, near the end 96: 500 at 1e6.
    The first lags are repeated, as often as points of the grid round to them: so least squares weigh a factor e of
    distances as for a continuous kernel, however few lags are in it (without this the lags 3..9 err up to 1.9 times
    the tolerance near alpha = 1). The error over all lags exceeds that over the samples by some per cent.
    """
    if not 1 <= n0 <= steps:
        raise ValueError(f"n0 must be in 1..steps = {steps}: got {n0}")
    lags = np.rint(np.exp(_log_grid(float(n0), float(steps)))).astype(np.int64)
    return torch.from_numpy(lags.clip(n0, steps))


def sample_distances(ratio: float) -> Tensor:
    """Distances in [1, ratio] at which a continuous kernel is sampled, float64, increasing, both ends included."""
    return torch.from_numpy(np.exp(_log_grid(1.0, ratio)).clip(1.0, ratio))


class Fit:
    """The least squares problem min_W || D (kappa - E W) ||, E_{pq} = exp(-s_q x_p), factorised once.

    Frozen: nodes s (Q,), points x (P,) >= 0 (distances from the first compressed lag, in the unit of 1/s), and the
    diagonal of D, `scale` (P,), usually k^((smallest + largest exponent) / 2) with k = x + n0, the distance from the
    singularity. All float64. Nothing depends on the order, so the weights are linear in the kernel.

    NOTE 1. D must fit the middle of the exponents. With D = 1 and 1e6 lags the kernel of gl is fitted to 1e-5 instead
    of 1e-10; with the mean exponent the error is that of a D made for each order, within 10 %.

    NOTE 2. With D = k^b and a kernel k^-beta, rounding of size 2^-53 D kappa at one end reaches the other end
    magnified by up to R^|b - beta|, 1e3 at R = 1e6. A second pass on the residual kappa - E W, which is accurate
    relative to kappa_k at each k, removes this (from 5e-12 to 5e-14 at R = 1e6); it is linear, too. The pseudo-inverse
    is never formed: that would lose four digits.

    NOTE 3. Columns are scaled to norm 1. Singular values below 1e-15 of the largest are dropped, which together with
    as few nodes as will do bounds the cancellation: at the windows above max sum_q |W_q| / |kappa_n0| is 1 to 5 for
    tolerances down to 1e-12, up to 33 at 1e-13.
    """

    def __init__(self, nodes: Tensor, points: Tensor, scale: Tensor) -> None:
        if nodes.dim() != 1 or points.dim() != 1 or scale.shape != points.shape:
            raise ValueError(
                "nodes (Q,), points (P,), scale (P,) expected: "
                f"got {tuple(nodes.shape)}, {tuple(points.shape)}, {tuple(scale.shape)}"
            )
        self._E = torch.exp(-points[:, None] * nodes)
        self._D = scale[:, None]
        scaled = self._E * self._D
        columns = 1 / scaled.norm(dim=0)
        U, sigma, Vh = torch.linalg.svd(scaled * columns, full_matrices=False)
        inverse = torch.where(sigma > _CUTOFF * sigma[0], 1 / sigma, torch.zeros_like(sigma))
        self._Ut = (U * inverse).T.contiguous()
        self._V = columns[:, None] * Vh.T

    def weights(self, values: Tensor) -> Tensor:
        """W = P kappa, (..., Q, G), from kappa at the points, (..., P, G); linear and differentiable.

        Differentiate in forward mode: W' = P kappa'. P has entries of up to 1 / (smallest singular value), and W is
        determined to that times 2^-53 only, though E W is accurate at each point. The transpose, reverse mode,
        magnifies rounding errors of the cotangent of W by as much, and nothing damps them.
        """
        W = self._solve(values)
        return W + self._solve(values - self.evaluate(W))

    def evaluate(self, weights: Tensor) -> Tensor:
        """E W, the sum of exponentials at the points, (..., P, G), for weights (..., Q, G)."""
        return self._E @ weights

    def _solve(self, values: Tensor) -> Tensor:
        weights: Tensor = self._V @ (self._Ut @ (self._D * values))
        return weights


@torch.no_grad()
def certificate(kernel: Tensor, n0: int, nodes: Tensor, weights: Tensor) -> float:
    """max over lags k = n0..N, channels and orders of |kappa_k - sum_q W_q exp(-s_q (k - n0))| / |kappa_k|.

    kernel (C, N+1, G), weights (C, Q, G), nodes (Q,) per lag. 0/0 counts as 0, x/0 as inf. Every lag is looked at:
    exp(-s (a B + b)) = exp(-s a B) exp(-s b) makes it C G matrix products, 10 ms each for a million lags at Q = 50.
    Temporaries: about 3 * 2^16 numbers and 2 Q sqrt(N).
    """
    channels, lags, orders = kernel.shape
    count = lags - n0
    if count <= 0:
        return 0.0
    B = max(1, min(1024, math.isqrt(count)))
    blocks = -(-count // B)
    fine = torch.exp(-nodes[:, None] * torch.arange(B, dtype=nodes.dtype, device=nodes.device))
    coarse = torch.exp(-nodes * torch.arange(0, blocks * B, B, dtype=nodes.dtype, device=nodes.device)[:, None])
    rows = max(1, _TEMPORARY // B)
    worst = 0.0
    together = max(1, _TEMPORARY // (min(rows, blocks) * B))  # orders
    for c in range(channels):
        for g in range(0, orders, together):
            scale = weights[c, :, g : g + together].T.unsqueeze(1)
            for a in range(0, blocks, rows):
                exact = kernel[c, n0 + a * B : n0 + (a + rows) * B, g : g + together].to(nodes.dtype).T
                approximate = ((coarse[a : a + rows] * scale) @ fine).view(len(scale), -1)[:, : exact.shape[1]]
                worst = max(worst, _largest_relative(approximate, exact))
    return worst


@torch.no_grad()
def certificate_continuous(kernel: Callable[[Tensor], Tensor], ratio: float, nodes: Tensor, weights: Tensor) -> float:
    """max over x in [1, ratio] and orders of |kappa(x) - sum_q W_q exp(-s_q x)| / |kappa(x)|.

    kernel : distances (P,) -> (P, G), such as x^(alpha-1) / Gamma(alpha); nodes (Q,), weights (Q, G).
    The error is log-periodic with period Delta, the log-distance of the fastest nodes (towards the slow end it varies
    on longer scales). With 32 points per Delta the top of a cosine is missed by at most 1 - cos(pi / 32) = 0.5 %.
    Towards x = 1, where oscillations are up to 4 times as fast, the grid is 4 times as dense.
    """
    delta = min(0.5, float(torch.log(nodes[-1] / nodes[-2]))) if len(nodes) > 1 else 0.5
    grid = torch.from_numpy(np.exp(_log_grid(1.0, ratio, 32 / delta)).clip(1.0, ratio))
    worst = 0.0
    for x in torch.split(grid, max(1, _TEMPORARY // max(1, len(nodes)))):
        worst = max(worst, _largest_relative(torch.exp(-x[:, None] * nodes) @ weights, kernel(x)))
    return worst


def _largest_relative(approximate: Tensor, exact: Tensor) -> float:
    """max |approximate - exact| / |exact|, 0/0 = 0; nan counts as inf."""
    error = (approximate - exact).abs()
    ratio = torch.where(error == 0, error, error / exact.abs())
    return float(ratio.nan_to_num(math.inf, math.inf).max())


@lru_cache(maxsize=256)
def _search(ratio: float, tolerance: float, low: float, high: float) -> np.ndarray:
    """The nodes of `exponential_nodes`: their smallest number that reaches the tolerance."""
    target = _MARGIN * max(tolerance, _FLOOR)
    delta = _step(0.4 * target, high)
    span = math.log(2 / target)
    # Fitted weights stand in for the nodes above this one; of 5 offsets tried it gives the smallest Q, within 1.
    top = math.log(span) - 0.75 + 0.2 * min(1.0, span / 20) + 0.15 * high
    slow = 3 if span < 7 else 5 if span < 18 else 7
    reference = max(0.25, (low + high) / 2)
    x = sample_distances(ratio)
    beta = torch.from_numpy(np.linspace(low, high, 9 if high > low else 1))
    powers = x[:, None] ** -beta

    def error(count: int) -> float:
        fit = Fit(torch.from_numpy(_family(count, slow, delta, top, reference)), x - 1, x ** ((low + high) / 2))
        return float((fit.evaluate(fit.weights(powers)) / powers - 1).abs().max())

    for _ in range(8):
        # The geometric nodes end between e^3 / ratio and e^-2 / ratio. With each further node the error falls tenfold
        # or more, then it is level: at too high a level the step was too long, and more nodes would only cancel.
        count = max(0, math.floor((math.log(ratio) + top - 3) / delta))
        most = math.ceil((math.log(ratio) + top + 2) / delta)
        previous, found = math.inf, error(count)
        while found > target and count < most and not 0.7 * previous < found < 4 * target:
            count += 1
            previous, found = found, error(count)
        if found <= target:
            while count > 0 and error(count - 1) <= target:
                count -= 1
            break
        delta *= 0.97
    return _family(count, slow, delta, top, reference)


def _step(target: float, beta: float) -> float:
    """Delta with 2 |Gamma(beta + i y)| / Gamma(beta) = target, y = 2 pi / Delta, for the largest beta of a range.

    The left side increases with beta; |Gamma(beta + i y)| ~ sqrt(2 pi) y^(beta - 1/2) exp(-pi y / 2).
    """
    beta = max(beta, 0.1)
    y = 5.0
    for _ in range(30):
        log_ratio = math.log(2 * math.sqrt(2 * math.pi) / (target * math.gamma(beta))) + (beta - 0.5) * math.log(y)
        y = max(2.0, 2 / math.pi * log_ratio)
    return 2 * math.pi / y


def _family(count: int, slow: int, delta: float, top: float, beta: float) -> np.ndarray:
    """`count` geometric nodes down from e^top, and `slow` Gauss nodes of all below them under the measure s^beta."""
    fast = np.exp(top - delta * np.arange(count))
    below = np.exp(-delta * np.arange(math.ceil(40 / (beta * delta))))
    gauss = math.exp(top - delta * count) * _gauss_nodes(below, below**beta, slow)
    return np.concatenate([gauss, fast[::-1]])


def _gauss_nodes(points: np.ndarray, measure: np.ndarray, count: int) -> np.ndarray:
    """The nodes of the Gauss rule of a discrete measure, increasing: eigenvalues of the Lanczos matrix.

    Every Lanczos vector is orthogonalised twice against all its predecessors.
    """
    basis = np.zeros((count + 1, len(points)))
    basis[0] = np.sqrt(measure / measure.sum())
    diagonal, off = np.zeros(count), np.zeros(count)
    for k in range(count):
        v = points * basis[k]
        diagonal[k] = v @ basis[k]
        for _ in range(2):
            v = v - basis[: k + 1].T @ (basis[: k + 1] @ v)
        off[k] = np.linalg.norm(v)
        basis[k + 1] = v / off[k]
    return np.linalg.eigvalsh(np.diag(diagonal) + np.diag(off[:-1], 1) + np.diag(off[:-1], -1))


def _log_grid(start: float, stop: float, density: float = _DENSITY) -> np.ndarray:
    """ln of a geometric grid over [start, stop], both included, of `density` points per factor e.

    Four times as many over the first and the last factor e, where the error of a least squares fit oscillates faster
    than in between.
    """
    first, last = math.log(start), math.log(stop)
    end = min(1.0, last - first)
    dense = np.linspace(0.0, end, 2 + math.ceil(4 * density * end))
    middle = np.linspace(first, last, 2 + math.ceil(density * (last - first)))
    return np.unique(np.concatenate([first + dense, middle, last - dense]))
