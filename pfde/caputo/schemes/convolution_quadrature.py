"""Convolution quadrature: D^alpha (y - y_0) by a power of a generating polynomial (Lubich 1986, doi:10.1137/0517050).

    h^-alpha sum_{j<=n} omega_{n-j} (y_j - y_0) = f(t_n, y_n),       sum_k omega_k zeta^k = delta(zeta)^alpha

    gl     delta = 1 - zeta                         omega_k = g_k = (-1)^k C(alpha, k)   (Gruenwald-Letnikov)
    bdf2   delta = (1 - zeta) + (1 - zeta)^2 / 2 = (3/2) (1 - zeta) (1 - zeta/3)

The second factorises, so that omega = (3/2)^alpha (g * g_k 3^-k): a convolution with a sequence that has died away
after 40 terms, free of the recursion's rounding. bdf2 adds F_0 / 2 to the right-hand side of the first step (the
start correction of Jin, Li, Zhou 2017, doi:10.1137/17M1118816), which restores order 2 for y that is not smooth at t_0.
Solved for y_n: w = h^alpha / omega_0, kappa_k = -omega_k / omega_0. At alpha = 1: backward Euler and BDF2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..special import binomial_coefficients
from .base import METHODS, ImplicitScheme, Weights

_TAIL = 40  # 3^-40 is below 1e-19


@METHODS.register("gl", rank=2)
class GruenwaldLetnikov(ImplicitScheme):
    """Implicit Gruenwald-Letnikov on y - y_0."""

    name = "gl"
    form = "derivative"
    uses_initial_slope = False
    window = 4
    order = "1"
    stability = "A-stable"
    cost = "1 nonlinear solve"

    def weights(self, alpha: Tensor, h: float | Tensor, steps: int) -> Weights:
        """kappa_k = -g_k, w = h^alpha."""
        return Weights(-binomial_coefficients(steps + 1, alpha).unsqueeze(0), None, h**alpha)


def bdf2_coefficients(count: int, alpha: Tensor) -> Tensor:
    """omega_k / omega_0 of bdf2, k = 0..count-1, shape (count, G); omega_0 = (3/2)^alpha."""
    g = binomial_coefficients(count, alpha)
    tail = min(count, _TAIL)
    omega = g
    for j in range(1, tail):
        shifted = torch.cat([g.new_zeros(j, g.shape[1]), g[: count - j]])
        omega = omega + shifted * (g[j] * 3.0**-j)
    return omega


@METHODS.register("bdf2", rank=4)
class BackwardDifferentiation2(ImplicitScheme):
    """BDF2 convolution quadrature on y - y_0 with its start correction."""

    name = "bdf2"
    form = "derivative"
    uses_initial_slope = True
    window = 20  # the factor 3^-k has died away
    order = "2 (linear f), min(2, 1+2 alpha) (nonlinear f)"
    stability = "A-stable"
    cost = "1 nonlinear solve"

    def weights(self, alpha: Tensor, h: float | Tensor, steps: int) -> Weights:
        """kappa_k = -omega_k / omega_0, w = h^alpha / omega_0, sigma_1 = w / 2."""
        kernel = -bdf2_coefficients(steps + 1, alpha)
        w = (h / 1.5) ** alpha
        start = torch.cat([w.new_zeros(1, len(w)), 0.5 * w.unsqueeze(0), w.new_zeros(steps - 1, len(w))])
        return Weights(kernel.unsqueeze(0), start.unsqueeze(0), w)
