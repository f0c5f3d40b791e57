"""The solvers of PETSc's own integrators, as those of pfde's: when a stage is done, and a KSP for the adjoint.

A stage of theirs is F = u_dot - f(s, u) = 0 with u_dot = shift u + what is known: shift times the G of
`system.stage_test`, whose terms are shift u, u_dot and f. TSAdjoint solves with the KSP of the TS's SNES; it is given
another one for that time (`system.solver_defaults`), each of whose solves is measured (`system.linear_solver`).

NOTE. What PETSc holds of these objects is held in C, where no garbage collector sees a cycle: they know what the
callbacks saw last (`Recent`), never func, the TS or its run, and a SNES or KSP for the time of a call only.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceError
from ..system.base import Failure
from ..system.linear_solver import reason_name, true_residual
from ..system.operators import signed_product
from ..system.peers import Peers
from ..system.petsc_options import Entries, database_in_use
from ..system.solver_defaults import adjoint_ksp, matrix_free
from ..system.stage_test import StageTest
from ..system.start import PETSc
from ..system.vectors import read
from .callbacks import Recent
from .function import Counter
from .setting import Setting


class NewtonTest:
    """The convergence test of the TS's SNES."""

    def __init__(self, recent: Recent, dtype: torch.dtype, peers: Peers, failure: Failure) -> None:
        self._recent, self._failure = recent, failure
        self._dtype, self._peers = dtype, peers
        self._test: StageTest | None = None
        self._snes: Any = None

    def read_options(self, snes: PETSc.SNES) -> None:
        """Take over the tolerances that are given, while the options of this solve are in the database."""
        me = weakref.proxy(self)  # a method of this object's would be a cycle
        self._test = StageTest(snes, self._dtype, self._peers, 1, lambda x: me._scale(x), lambda x: me._coupling(x))

    def __call__(self, snes: PETSc.SNES, k: int, norms: tuple[float, float, float]) -> int:
        """PETSc's reason to end at iterate k; 0 to go on."""
        self._snes = snes
        try:
            reason = self._failure.guard(self._ended, snes, k, norms)
        finally:
            self._snes = None
        return PETSc.SNES.ConvergedReason.DIVERGED_FUNCTION_NANORINF if reason is None else reason

    def _ended(self, snes: PETSc.SNES, k: int, norms: tuple[float, float, float]) -> int:
        assert self._test is not None
        return self._test.ended(snes, k, norms, read(snes.getFunction()[0]))

    def _scale(self, x: PETSc.Vec) -> Tensor:
        return read(x).abs().mul_(abs(self._recent.shift)).add_(self._recent.terms)

    def _coupling(self, x: PETSc.Vec) -> Tensor:
        product = signed_product(self._snes.getJacobian()[0].mult, x)
        return read(product).abs()


class AdjointSolver:
    """The KSP that TSAdjoint is given, made while the options of the solve are in the database.

    Parameters
    ----------
    setting : of the solve
    prefix : of its options
    comm : of the TS
    counter : counts the iterations
    failure : takes the ConvergenceError of a system that is not solved
    recent : where TSAdjoint is
    """

    def __init__(
        self,
        setting: Setting,
        prefix: str,
        comm: PETSc.Comm,
        counter: Counter,
        failure: Failure,
        recent: Recent,
    ) -> None:
        self.ksp = adjoint_ksp(comm, prefix, setting.dtype, matrix_free)
        self.ksp.setPostSolve(_Measure(setting, counter, failure, recent))
        # SNESComputeJacobian, which TSAdjoint calls too, leaves the Jacobian or the preconditioner as it was for these.
        options = PETSc.Options(prefix)
        self._lags = [name for name in ("snes_lag_jacobian", "snes_lag_preconditioner") if options.hasName(name)]

    def serve(self, ts: PETSc.TS) -> None:
        """Let TSAdjoint use this KSP, at the Jacobian of each step."""
        snes = ts.getSNES()
        if self._lags:
            prefix = snes.getOptionsPrefix() or ""
            with database_in_use:
                entries = Entries({prefix + name: 1 for name in self._lags})
                try:
                    snes.setFromOptions()
                finally:
                    entries.remove()
            snes.monitorCancel()
        snes.setKSP(self.ksp)


class _Measure:
    """The KSP's PostSolve: counts, and refuses what is not solved."""

    def __init__(self, setting: Setting, counter: Counter, failure: Failure, recent: Recent) -> None:
        self._sign, self._dtype, self._recent = setting.sign, setting.dtype, recent
        self._counter, self._failure = counter, failure

    def __call__(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        """Count an adjoint system that has been solved, and measure it."""
        self._counter.add_linear(ksp, b, x)
        self._failure.guard(self._require, ksp, b, x)

    def _require(self, ksp: PETSc.KSP, b: PETSc.Vec, x: PETSc.Vec) -> None:
        if ksp.getConvergedReason() < 0:
            return  # TSAdjoint's own error
        mat, rho = ksp.getOperators()[0], b.duplicate()
        rtol = ksp.getTolerances()[0]
        residual, allowed = true_residual(b, x, rho, mat.multTranspose, rtol, self._dtype)
        if not residual <= allowed:
            raise ConvergenceError(
                f"the adjoint system was not solved at t={self._sign * self._recent.time:.6g}: its true residual is "
                f"{residual:.3g}, where {allowed:.3g} was asked for, although the KSP reports {reason_name(ksp)}; the "
                "gradient would be wrong; see options "
                "'adjoint_ksp_type', 'adjoint_ksp_rtol', 'adjoint_ksp_monitor_true_residual'"
            )
