"""The L1 scheme: D^alpha y by differentiating the piecewise linear interpolant of y exactly.

    h^-alpha / Gamma(2-alpha) sum_{j<n} ((n-j)^(1-alpha) - (n-j-1)^(1-alpha)) (y_{j+1} - y_j) = f(t_n, y_n)

Summed by parts it is a pure convolution on X_j = y_j - y_0 with X_0 = 0 (the rows of L1 sum to zero):
d_0 = 1, d_k = (k+1)^(1-alpha) - 2 k^(1-alpha) + (k-1)^(1-alpha), times h^-alpha / Gamma(2-alpha). Order 2 - alpha
for smooth y (Sun, Wu 2006, doi:10.1016/j.apnum.2005.03.003), 1 for y ~ t^alpha (Jin, Lazarov, Zhou 2016,
doi:10.1093/imanum/dru063). At alpha = 1: backward Euler.
"""

from __future__ import annotations

from torch import Tensor

from ..special import reciprocal_gamma, second_difference
from .base import METHODS, ImplicitScheme, Weights


@METHODS.register("l1", rank=3)
class L1(ImplicitScheme):
    """L1 on y - y_0."""

    name = "l1"
    form = "derivative"
    uses_initial_slope = False
    window = 3
    order = "2 - alpha (smooth y); 1 at fixed t for y ~ t^alpha"
    stability = "A-stable"
    cost = "1 nonlinear solve"

    def weights(self, alpha: Tensor, h: float | Tensor, steps: int) -> Weights:
        """kappa_k = -d_k, w = Gamma(2-alpha) h^alpha."""
        d = second_difference(steps + 1, 1 - alpha)
        return Weights(-d.unsqueeze(0), None, h**alpha / reciprocal_gamma(2 - alpha))
