"""The systems that a gradient trusts, A^T x = b of the adjoint and A x = b of the tangent, A = M - w J.

They have a KSP of their own (`solver_defaults.adjoint_ksp`), and what it returns is measured: with the true residual
rho = b - A^T x, recomputed with the A of this system,

    |rho| <= 10 rtol |b| + 16 eps (|b| + |x| + |A^T x|)

in the norm over the state, where rtol is that of the KSP and the second term what rounding allows. Where large terms
cancel in A^T x rounding is larger; then 16 eps |A^T (u x)| counts too, the largest for some fixed factors u of random
sign. What is not met is corrected, twice at most, by a solve for rho, since a norm of PETSc's may be that of a
preconditioned residual, and if it is still not met it is an error of the gradient: ConvergenceError.

NOTE. rho costs one product. It is formed from the matrix that `BlockLU` has factorised where that is the matrix of this
system, so that no function is called. GMRES without a preconditioner updates the norm of rho itself; it is measured
nevertheless, because that update is wrong where the Krylov basis has lost its orthogonality.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .base import Failure, Linearisation, Weight
from .operators import block_lu, signed_product
from .solver_defaults import adjoint_ksp
from .solver_options import require_preconditioner
from .start import PETSc
from .vectors import load, read, write

_ASKED = 10.0
_ROUNDING = 16.0
_CORRECTIONS = 2
_DRAWS = 4


class Operator(Protocol):
    """The Mat of M - w J and how to move it."""

    mat: PETSc.Mat
    pmat: PETSc.Mat
    failure: Failure
    assembled: bool  # whether the Mats have entries
    systems: int  # the independent ones of equal size that the state consists of

    def update(self, at: Linearisation, w: Weight) -> None:
        """Let the Mat be M - w J at this linearisation."""

    def configure(self, ksp: PETSc.KSP) -> None:
        """The Krylov method and preconditioner that suit this form, before the options are read."""

    def forget(self) -> None:
        """Let go of the linearisation, until the next update."""


class LinearSolver:
    """Solves with A^T and A, and measures what it has solved.

    Parameters
    ----------
    operator : A
    vec : a Vec of the state's size to duplicate
    dtype, precision : of the model; that in which it computes f
    prefix : of the options
    run : calls a function of PETSc's and raises what its callbacks failed with
    """

    def __init__(
        self,
        operator: Operator,
        vec: PETSc.Vec,
        dtype: torch.dtype,
        prefix: str,
        run: Callable[..., None],
        *,
        precision: torch.dtype,
    ) -> None:
        self._operator, self._dtype, self._run, self._precision = operator, dtype, run, precision
        self._x, self._b, self._rho, self._total = (vec.duplicate() for _ in range(4))
        self._ksp = adjoint_ksp(vec.comm, prefix, precision, operator.configure)
        require_preconditioner(self._ksp, assembled=operator.assembled)
        self._blocks = block_lu(self._ksp)
        self.iterations = 0

    def destroy(self) -> None:
        """Destroy the KSP and the vectors. Collective."""
        for own in (self._ksp, self._x, self._b, self._rho, self._total):
            own.destroy()

    def silence(self) -> None:
        """Cancel the monitors."""
        self._ksp.monitorCancel()

    def solve(self, n: int, t: float, at: Linearisation, w: Weight, b: Tensor, *, transpose: bool) -> Tensor:
        """x with A^T x = b, or A x = b. Collective. Raises ConvergenceError."""
        what = "adjoint" if transpose else "tangent linear"
        self._operator.update(at, w)
        self._ksp.setOperators(self._operator.mat, self._operator.pmat)
        try:
            return self._measured(what, n, t, b, transpose=transpose)
        except ConvergenceError:
            raise
        except BaseException:
            self._renew()
            raise

    def _renew(self) -> None:
        """Where an exception has come through PETSc, it leaves its vectors locked."""
        self._ksp.reset()
        self._x, self._b, self._rho, self._total = (
            own.duplicate() for own in (self._x, self._b, self._rho, self._total)
        )

    def _measured(self, what: str, n: int, t: float, b: Tensor, *, transpose: bool) -> Tensor:
        """x, its true residual measured."""
        multiply = partial(self._multiply, transpose=transpose)
        rtol = self._ksp.getTolerances()[0]
        write(self._b, b)
        allowed = 0.0
        for attempt in range(_CORRECTIONS + 1):
            self._step(what, n, t, transpose=transpose)
            if attempt:
                self._x.axpy(1.0, self._total)
                write(self._b, b)
            residual, most = true_residual(self._b, self._x, self._rho, multiply, rtol, self._precision)
            allowed = max(allowed, most)
            if residual <= allowed:
                return load(self._x, self._dtype)
            if not math.isfinite(residual):
                break
            self._x.copy(self._total)
            self._rho.copy(self._b)
        raise ConvergenceError(
            f"the {what} system was not solved at t={t:.6g}, step {n}: its true residual is {residual:.3g}, where "
            f"{allowed:.3g} was asked for, although the KSP reports {reason_name(self._ksp)}; the "
            "gradient would be wrong; see options 'adjoint_ksp_type', 'adjoint_pc_type', 'adjoint_ksp_rtol', "
            "'adjoint_ksp_monitor_true_residual'"
        )

    def _step(self, what: str, n: int, t: float, *, transpose: bool) -> None:
        """x from b by the KSP."""
        ksp = self._ksp
        self._run(ksp.solveTranspose if transpose else ksp.solve, self._b, self._x)
        self.iterations += ksp.getIterationNumber()
        if ksp.getConvergedReason() < 0:
            raise ConvergenceError(
                f"the {what} system did not converge at t={t:.6g}, step {n}: {reason_name(ksp)} after "
                f"{ksp.getIterationNumber()} iterations, |residual| = {ksp.getResidualNorm():.3g}; see options "
                "'adjoint_ksp_monitor', 'adjoint_ksp_rtol', 'adjoint_ksp_gmres_restart', 'fde_jacobian': 'blocks'"
            )

    def _multiply(self, x: PETSc.Vec, y: PETSc.Vec, *, transpose: bool) -> None:
        if self._blocks is not None and self._blocks.is_current:
            write(y, self._blocks.multiply(read(x), transpose=transpose))
        else:
            mat = self._operator.mat
            self._run(mat.multTranspose if transpose else mat.mult, x, y)


def true_residual(
    b: PETSc.Vec, x: PETSc.Vec, rho: PETSc.Vec, multiply: Callable[..., None], rtol: float, dtype: torch.dtype
) -> tuple[float, float]:
    """|rho| and what is allowed, |b| being that of b; rho = b - A x is left in the Vec. Collective.

    multiply : (x, y) -> y = A x
    """
    multiply(x, rho)
    rounding = _ROUNDING * torch.finfo(dtype).eps
    allowed = _ASKED * rtol * b.norm() + rounding * (b.norm() + x.norm() + rho.norm())
    rho.aypx(-1.0, b)
    residual = rho.norm()
    least = allowed
    for draw in range(_DRAWS):
        if not allowed < residual < math.inf:
            break
        allowed = max(allowed, least + rounding * signed_product(multiply, x, draw).norm())
    return residual, allowed


_REASONS = {v: k for k, v in vars(PETSc.KSP.ConvergedReason).items() if isinstance(v, int)}


def reason_name(ksp: PETSc.KSP) -> str:
    """PETSc's word for how the last solve ended."""
    reason = ksp.getConvergedReason()
    return str(_REASONS.get(reason, f"reason {reason}"))
