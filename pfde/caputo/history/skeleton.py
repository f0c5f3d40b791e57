"""Far pulls at r / M of their flops: a Toeplitz block of a smooth kernel is interpolated between r of its M rows.

Where every lag exceeds D, the rows of T[i, v] = kappa[l_v + i], 0 <= i < M, l_v > D, sample a function of i whose
only singularity, lag 0, lies at -(1 + 2 D / M) in the coordinate of [-1, 1].  Its polynomial interpolant of degree
r - 1 in Chebyshev points thus errs by O(rho^-r), rho = 3.7 for D = M / 2: so T = P T[nodes] to rounding, with r
integers near those points and P (M, r) the Lagrange polynomials, the same for all kernels.  Whether it holds is not
assumed but measured on the kernel at hand, by `Skeleton.residual`.
"""

from __future__ import annotations

import functools
import math

import torch

from .toeplitz import Toeplitz

# The interpolation error at D = M / 2, for M = 48, 64, 100, 128 in float64, in eps of the largest |kappa| in the
# window: worst of k^(a-1), k^(-1-a), k^(-1-a) log k, a = .01, .3, .7, .99, l = D + 1, D + 2, D + 16.
# float32: .41 at r = 15, .12 at 16.  float64: 15 at 28, 6 at 30 and 32, rounding of the
# kernels; MKL multiplies 32 rows faster than 30.
NODES = {torch.float32: 16, torch.float64: 32}
# The residual allowed, in eps.  Rounding of the kernel gives up to (1 + |P|_inf) / 2 = 3, recurrences (BDF2) up to 9.
TOLERANCE = 16.0
TINY = 1e-300


def nodes(M: int, r: int) -> list[int]:
    """r distinct integers in 0..M-1, increasing, both ends included, near the Chebyshev points."""
    ends = math.cos(math.pi / (2 * r))
    points = [round((M - 1) / 2 * (1 - math.cos((2 * k + 1) * math.pi / (2 * r)) / ends)) for k in range(r)]
    for k in range(1, r):
        points[k] = max(points[k], points[k - 1] + 1)
    return [min(points[k], M - r + k) for k in range(r)]


@functools.cache
def interpolation(M: int, r: int) -> torch.Tensor:
    """P (M, r): row i holds the Lagrange polynomials of the nodes at i, correctly rounded to float64."""
    x = nodes(M, r)
    scale = [math.prod(a - b for b in x if b != a) for a in x]
    P = torch.zeros(M, r, dtype=torch.float64)
    for i in range(M):
        if i in x:
            P[i, x.index(i)] = 1
        else:
            top = math.prod(i - b for b in x)
            P[i] = torch.tensor([top / ((i - a) * w) for a, w in zip(x, scale, strict=True)], dtype=torch.float64)
    return P


class Skeleton:
    """The far blocks of M steps: `length` or fewer rows, all lags beyond D, of one kernel without groups."""

    def __init__(self, toeplitz: Toeplitz, M: int, D: int, length: int, dtype: torch.dtype) -> None:
        self.M, self.D, self.length, self.r = M, D, length, NODES[dtype]
        self._toeplitz = toeplitz
        # The block's table runs from lag D + length + M - 1 to D + 1 forward, from D + 1 up in reverse.
        self._origin = M + D if toeplitz.reverse else toeplitz.Q - D - length
        device = toeplitz.kernel.device
        self._points = torch.tensor(nodes(M, self.r), device=device)
        self._P64 = interpolation(M, self.r).to(device)
        self.P = self._P64.to(dtype)
        self.matrices: list[torch.Tensor] = []

    def residual(self) -> float:
        """The interpolation error of the kernel, in eps of the largest entry of its window, of windows M / 4 apart."""
        worst, end = 0.0, self.length - 1
        which = torch.tensor([*range(0, end, self.M // 4), end], device=self._points.device)
        for i in range(self._toeplitz.I):
            columns = self._windows(i).index_select(2, which).flip(1).double()
            error = (columns - self._P64 @ columns[:, self._points]).abs().amax(1)
            ratio = error / columns.abs().amax(1).clamp(min=TINY)
            worst = max(worst, float(ratio.nan_to_num(math.inf).max()))
        return worst / torch.finfo(self.P.dtype).eps

    def keep(self) -> None:
        """Build T[nodes] of every input, (r O, length), rows interleaving the outputs."""
        for i in range(self._toeplitz.I):
            part = self._windows(i).index_select(1, self.M - 1 - self._points).transpose(0, 1)
            self.matrices.append(part.reshape(-1, self.length))

    def _windows(self, i: int) -> torch.Tensor:
        """T of input i as a view, (O, M, length), its rows in reverse order."""
        w = self._toeplitz.window(i, self._origin - self.M + 1, self.M + self.length - 1)
        return w.unfold(1, self.length, 1)

    def pull(self, out: torch.Tensor, at: int, inputs: list[torch.Tensor], work: torch.Tensor) -> None:
        """out (m, O d) += P[at : at + m] T[nodes] x; the inputs x, (L, d), end (reverse: begin) D steps away."""
        L = len(inputs[0])
        for i, (matrix, x) in enumerate(zip(self.matrices, inputs, strict=True)):
            matrix = matrix[:, :L] if self._toeplitz.reverse else matrix[:, self.length - L :]
            work.addmm_(matrix, x, beta=1 if i else 0)
        out.addmm_(self.P[at : at + len(out)], work.view(self.r, -1))
