"""Graded grids: t_n = t_0 + (T - t_0) (n/N)^r, fine at t_0, where solutions of fractional equations are not smooth.

Near t_0 a solution is y_0 + c (t - t_0)^alpha + ..., whose derivatives are infinite at t_0. On a uniform grid the first
steps then limit the error in the maximum norm. With grading r the first step is (T - t_0) N^-r, and the error becomes

    N^-min(p, 2 alpha r)    product integration, p = 1 for the rectangles (`euler`, `beuler`), 2 for `trapezoid`
    N^-min(2 - alpha, alpha r)    `l1`

so that r = 1/(2 alpha), 1/alpha and (2 - alpha)/alpha restore the orders 1, 2 and 2 - alpha, there up to a factor that
grows like log N (Brunner 1985, Math. Comp. 45, 417-437, for weakly singular Volterra equations; Stynes, O'Riordan,
Gracia 2017, doi:10.1137/16M1082329, for L1; product integration measured here). A much larger r gains nothing, and
makes the steps near T, up to r (T - t_0)/N, larger.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def graded(t0: float, T: float, N: int, r: float) -> Tensor:
    """The times t_n = t0 + (T - t0) (n/N)^r, n = 0..N, float64, (N+1,); t[0] = t0 and t[N] = T exactly.

    N : number of steps, at least 1
    r : grading, at least 1 (uniform); the r for a method and an alpha is in the module's docstring

    Raises ValueError or TypeError for other arguments, and ValueError where the first steps are so small that two times
    are one double (t0 = 0 allows steps down to 1e-300, any other t0 only down to 1e-16 |t0|).
    """
    t0, T, r = _finite("t0", t0), _finite("T", T), _finite("r", r)
    if isinstance(N, bool) or not isinstance(N, int):
        raise TypeError(f"N must be an integer, the number of steps: got {N!r}; use int(N)")
    if N < 1:
        raise ValueError(f"N must be at least 1, it is the number of steps: got {N}")
    if r < 1:
        raise ValueError(f"r must be at least 1: got {r:g}; r = 1 is the uniform grid, r > 1 refines it at t0")
    if not t0 < T or not math.isfinite(T - t0):
        raise ValueError(
            f"T must be greater than t0, by a finite amount: got t0={t0:g}, T={T:g}; exchange or move them"
        )
    t = t0 + (T - t0) * (torch.arange(N + 1, dtype=torch.float64) / N) ** r
    t[-1] = T
    if not (t.diff() > 0).all():
        raise ValueError(
            f"r={r:g} with N={N} makes steps that vanish in double precision, the first of size "
            f"{T - t0:g} * {N}^-{r:g} at t0={t0:g}; reduce r or N, or put t0 at 0"
        )
    return t


def _finite(name: str, value: float) -> float:
    """The value as a finite float."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number: got {value!r}; use float({name})")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite: got {value}; choose a finite number")
    return float(value)
