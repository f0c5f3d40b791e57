"""When a stage y = r + w f(t, y) is done: each component at its own rounding floor.

A norm over the state ends Newton's method as soon as the large components are done, and an increment below 32 eps of
the largest one is lost. So the test is made component by component, with G = M y - r - w f(t, y) at the iterate, delta
the step that led there and eps of the model's dtype. A stage is done when for every component

    |G_i| <= 4 eps (|M y|_i + |r_i| + |w f_i|)              (1) rounding in the terms of G_i alone, or
    |delta_i| <= eps^(3/4) |y_i|                            (2) Newton's error is the square of its step, or underflow

where (2) may serve a component only if the others have small steps too (those for which (1) holds, in the measure of
(1)), as their squares enter it. Newton's linear systems, solved to a relative error tau of the norm, leave tau |delta|
in every component: (2) also asks for tau max|delta| <= eps |y_i|. Independent systems (`fde_jacobian=blocks`) are
judged one by one. Where y itself is rounded, f changes by J times that, more than (1) where large terms cancel, in
f_i = k (y_1 - y_2) say. No Newton step can do better, so a component is also at its floor when

    |G_i| <= 4 eps (|A| |y|)_i,   A = M - w J               (3)

or, where A is not known by its entries, its estimate |A (u y)|_i with fixed factors u of random sign and sizes from 1/2
to 3/2. It is formed only when (1), (2) do not hold and the state as a whole is done, or |G| falls no more. What no
estimate sees (a function that cancels inside) ends when two iterations in a row have not halved the largest excess.

All this is for Newton's method. Those that converge linearly (`-snes_type anderson`, ngmres, ...) end by the norm of G.
The first iterate is done only if G = 0. -snes_rtol, -snes_atol and -snes_stol, when given, end Newton's method as PETSc
documents them, in norms, besides this test; a -snes_stol below eps^(3/4) takes its place in (2).
`-snes_convergence_test default` puts PETSc's test with these tolerances in the place of this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .peers import Peers
from .solver_defaults import step_tolerance
from .start import PETSc
from .vectors import read

_FLOOR = 4.0  # rounding errors in G_i, in units of eps
_NORM = 32.0  # and in |G|
_STALLS = 2  # iterations without progress


class _Reason:
    """PETSc's reasons to end, or not to."""

    CONVERGED_FNORM_ABS: int = PETSc.SNES.ConvergedReason.CONVERGED_FNORM_ABS
    CONVERGED_FNORM_RELATIVE: int = PETSc.SNES.ConvergedReason.CONVERGED_FNORM_RELATIVE
    CONVERGED_ITERATING: int = PETSc.SNES.ConvergedReason.CONVERGED_ITERATING
    CONVERGED_SNORM_RELATIVE: int = PETSc.SNES.ConvergedReason.CONVERGED_SNORM_RELATIVE
    DIVERGED_DTOL: int = PETSc.SNES.ConvergedReason.DIVERGED_DTOL
    DIVERGED_FUNCTION_COUNT: int = PETSc.SNES.ConvergedReason.DIVERGED_FUNCTION_COUNT
    DIVERGED_FUNCTION_NANORINF: int = PETSc.SNES.ConvergedReason.DIVERGED_FUNCTION_NANORINF


class StageTest:
    """The convergence test of one SNES: `ended` is asked for each iterate, 0 first. Collective.

    Parameters
    ----------
    snes : its options read
    dtype : of the model
    peers : the ranks that share the state
    systems : the number of independent systems of equal size that the state consists of
    scale : x -> the sizes of the terms of G there, the bracket of (1)
    coupling : x -> the right-hand side of (3) without its factor, with the matrix of the last Newton step
    """

    def __init__(
        self,
        snes: PETSc.SNES,
        dtype: torch.dtype,
        peers: Peers,
        systems: int,
        scale: Callable[[PETSc.Vec], Tensor],
        coupling: Callable[[PETSc.Vec], Tensor],
    ) -> None:
        self._peers, self._systems, self._scale, self._coupling = peers, systems, scale, coupling
        self._eps, self._tiny = torch.finfo(dtype).eps, torch.finfo(dtype).tiny
        rtol, atol, stol, _ = snes.getTolerances()
        options = PETSc.Options(snes.getOptionsPrefix() or "")
        self._rtol, self._atol, self._stol = (
            value if options.hasName(f"snes_{name}") else 0.0
            for name, value in (("rtol", rtol), ("atol", atol), ("stol", stol))
        )
        self._small = min(stol, step_tolerance(dtype))
        self._quadratic = "newton" in snes.getType()
        self._forced = options.getBool("snes_force_iteration", False)
        self._direct = snes.getKSP().getType() == PETSc.KSP.Type.PREONLY
        self._divergence, self._most = snes.getDivergenceTolerance(), snes.getMaxFunctionEvaluations()
        self._last = torch.empty(0)
        self._first = self._excess = self._norm_before = 0.0
        self._stalls = 0

    def ended(self, snes: PETSc.SNES, k: int, norms: tuple[float, float, float], g: Tensor) -> int:
        """PETSc's reason to end at iterate k with this G; 0 to go on. norms : |x|, |step|, |G|."""
        x_norm, step_norm, g_norm = norms
        if not math.isfinite(g_norm):
            return _Reason.DIVERGED_FUNCTION_NANORINF
        if g_norm == 0.0 or (g_norm < self._atol and (k > 0 or not self._forced)):
            return _Reason.CONVERGED_FNORM_ABS
        if 0 <= self._most <= snes.getFunctionEvaluations():
            return _Reason.DIVERGED_FUNCTION_COUNT
        x = read(snes.getSolution())
        if k == 0:
            self._first, self._norm_before, self._last = g_norm, math.inf, x.clone()
            self._excess, self._stalls = math.inf, 0
            return _Reason.CONVERGED_ITERATING
        if g_norm <= self._rtol * self._first:
            return _Reason.CONVERGED_FNORM_RELATIVE
        if step_norm < self._stol * x_norm:
            return _Reason.CONVERGED_SNORM_RELATIVE
        if 0 < self._divergence * self._first < g_norm:
            return _Reason.DIVERGED_DTOL
        return self._judge(snes, x, g.abs(), g_norm)

    def _judge(self, snes: PETSc.SNES, x: Tensor, g: Tensor, g_norm: float) -> int:
        size, scale = x.abs(), self._scale(snes.getSolution())
        if not self._quadratic:  # a small step of a method that is not Newton's says nothing of its error
            small = g_norm <= max(10 * self._eps * self._first, _NORM * self._eps * self._norm(scale))
            return _Reason.CONVERGED_FNORM_ABS if small else _Reason.CONVERGED_ITERATING
        large = g > scale * (_FLOOR * self._eps)  # (1) does not hold
        if not self._anywhere(large):
            return _Reason.CONVERGED_FNORM_ABS
        step = (x - self._last).abs_()
        self._last = x.clone()
        longest, largest = self._largest(step), self._largest(size)
        tau = 0.0 if self._direct else snes.getKSP().getTolerances()[0]
        moved = (
            torch.clamp((step - self._tiny) / self._small, min=longest * tau / self._eps) > size
        )  # (2) does not hold
        waits = moved & (large | (step > scale * self._small))
        left = large & self._in_system(waits)
        if not self._anywhere(left):
            return _Reason.CONVERGED_SNORM_RELATIVE
        done = (
            longest <= self._small * largest
            or g_norm <= 10 * self._eps * self._first
            or g_norm <= _NORM * self._eps * self._norm(scale)
        )
        stagnant, self._norm_before = g_norm > 0.5 * self._norm_before, g_norm
        if not (done or stagnant):
            self._excess, self._stalls = math.inf, 0
            return _Reason.CONVERGED_ITERATING
        left &= g > self._coupling(snes.getSolution()).mul_(_FLOOR * self._eps)  # nor does (3)
        if not self._anywhere(left):
            return _Reason.CONVERGED_FNORM_ABS
        if not done:
            return _Reason.CONVERGED_ITERATING
        worst = torch.fmin(g / (scale * (_FLOOR * self._eps)), step / (size * self._small))[left]
        excess = self._largest(worst)
        if excess < 0.5 * self._excess:
            self._excess, self._stalls = excess, 0
        else:
            self._stalls += 1
        return _Reason.CONVERGED_SNORM_RELATIVE if self._stalls == _STALLS else _Reason.CONVERGED_ITERATING

    def _in_system(self, mask: Tensor) -> Tensor | bool:
        """For each component, whether the mask holds anywhere in its system."""
        if self._systems == 1:
            return self._anywhere(mask)
        rows = mask.view(self._systems, -1)
        return rows.any(1, keepdim=True).expand_as(rows).reshape(-1)

    def _anywhere(self, mask: Tensor) -> bool:
        return self._peers.sum(bool(mask.any())) > 0

    def _largest(self, x: Tensor) -> float:
        return self._peers.largest(float(x.max()) if x.numel() else 0.0)

    def _norm(self, x: Tensor) -> float:
        return math.sqrt(self._peers.sum(float(torch.dot(x, x))))
