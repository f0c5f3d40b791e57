"""The one rule by which every engine sets up its SNES and KSP: what Newton starts from, and what a gradient trusts.

    Newton's linear systems    rtol max(1e-8, 10 eps): their error only slows Newton's method
    the adjoint's              rtol 10 eps: their error goes into the gradient

eps is that of the model's dtype. The adjoint (and the tangent) has a KSP of its own. What makes a solve fast, its
method and preconditioner, it takes from Newton's KSP: `-ksp_type`, `-pc_type` and the like hold for both. What makes a
solve loose, tolerances, norms, convergence tests, limits of iterations, guesses, stale preconditioners, it does not:
those it has only from options of its own prefix, `<options_prefix>adjoint_` (`-adjoint_ksp_rtol`, ...).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .start import PETSc

MAX_NEWTON = 50
MAX_KRYLOV = 10000


def step_tolerance(dtype: torch.dtype) -> float:
    """eps^(3/4): Newton's error is the square of its last step, so that no smaller step can be of use."""
    return float(torch.finfo(dtype).eps ** 0.75)


def set_newton_defaults(snes: PETSc.SNES, dtype: torch.dtype, configure: Callable[[PETSc.KSP], None]) -> None:
    """What a SNES is before its options are read. `configure` sets the Krylov method and preconditioner."""
    eps = torch.finfo(dtype).eps
    snes.setType(PETSc.SNES.Type.NEWTONLS)
    snes.setTolerances(rtol=10 * eps, atol=0.0, stol=step_tolerance(dtype), max_it=MAX_NEWTON)
    snes.setDivergenceTolerance(1e100)  # a stiff stage's residual may grow a lot in the first iteration
    snes.getLineSearch().setType("basic")  # at the rounding floor no decrease can be asked for
    ksp = snes.getKSP()
    ksp.setTolerances(rtol=max(1e-8, 10 * eps), atol=0.0, max_it=MAX_KRYLOV)
    configure(ksp)


def adjoint_ksp(comm: PETSc.Comm, prefix: str, dtype: torch.dtype, configure: Callable[[PETSc.KSP], None]) -> PETSc.KSP:
    """The KSP of the transposed and the tangent systems, its options read."""
    ksp = PETSc.KSP().create(comm)
    ksp.setOptionsPrefix(prefix)
    configure(ksp)
    ksp.setFromOptions()  # the method that Newton's solver has
    ksp.setOptionsPrefix(f"{prefix}adjoint_")
    ksp.setTolerances(rtol=10 * torch.finfo(dtype).eps, atol=0.0, divtol=1e5, max_it=MAX_KRYLOV)
    ksp.setNormType(PETSc.KSP.NormType.DEFAULT)
    ksp.setConvergenceTest(None)  # PETSc's own
    ksp.setInitialGuessNonzero(False)
    ksp.setInitialGuessKnoll(False)
    ksp.getPC().setReusePreconditioner(False)
    ksp.setFromOptions()
    return ksp


def matrix_free(ksp: PETSc.KSP) -> None:
    """GMRES on products alone."""
    ksp.setType(PETSc.KSP.Type.GMRES)
    ksp.setGMRESRestart(100)
    ksp.getPC().setType(PETSc.PC.Type.NONE)
