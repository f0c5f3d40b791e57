"""PETSc's own integrators as methods of the torch API, differentiated by PETSc's own adjoint (TSAdjoint).

    y' = f(t, y, theta),  y(t_0) = y_0        TSSolve:    y_{n+1} = Phi_n(y_n, theta)
    lambda_n = (dPhi_n/dy)^T lambda_{n+1},    TSAdjoint:  mu_n = mu_{n+1} + (dPhi_n/dtheta)^T lambda_{n+1}

Phi_n is a step of TSRK, TSTHETA, TSBEULER, TSCN or TSARKIMEX; lambda_N = dL/dy_N, and at every output y_bar is added to
lambda. The step sizes are data of the adjoint, also where a controller chose them. H. Zhang, E. M. Constantinescu,
B. F. Smith, PETSc TSAdjoint, SIAM J. Sci. Comput. 44 (2022), doi:10.1137/21M140078X. The explicit types are given f
and J = df/dy as RHSFunction and RHSJacobian, the implicit ones F = y' - f as IFunction, with sigma I - J; TSARKIMEX may
have both, for f = stiff + nonstiff. P = df/dtheta enters as RHSJacobianP and, with its sign, as IJacobianP.
For decreasing times s = -t is integrated, with -f(-s, y).

NOTE. TSARKIMEX without a RHSFunction wants the diagonal of F's Jacobian and, of a method with explicit first stage,
the slope of the step before. With a RHSFunction of zero it evaluates f there, which is the same and needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceError, PfdeError
from ..system.base import Failure
from ..system.prefixes import private_prefix
from ..system.real import real, unreal
from ..system.solver_defaults import matrix_free, set_newton_defaults
from ..system.solver_options import require_preconditioner, require_residual_solver
from ..system.start import PETSc
from ..system.vectors import read, state_vec, write
from .callbacks import Clock, Functions, ParameterProducts, Products, StateProducts
from .function import Counter
from .setting import Setting, own_options, snapshot_options
from .solvers import AdjointSolver, NewtonTest

_FACTORISED = "a method of pfde's own, such as 'cn', with 'fde_jacobian': 'dense' or 'blocks'"


@dataclass(frozen=True, eq=False, kw_only=True)
class PetscProblem(Setting):
    """A validated solve by one of PETSc's own integrators, for autograd: `pfde.solving.autograd.Solvable`.

    The gradient is that of the discrete scheme at the steps it took, to rounding and to the tolerances of the stages.
    The state is stored at all stages, s (N + 1) d doubles for s stages and N steps. After a backward pass a second one
    (retain_graph=True) computes the trajectory again.

    A solve raises `pfde.NonFiniteError`, `pfde.ConvergenceError`, `pfde.PfdeError` for other failures of PETSc's, and
    what func raises.
    """

    @property
    def frozen(self) -> tuple[Tensor, ...]:
        """Nothing beside y_0 and the parameters."""
        return ()

    def needs_gradient(self, y0: Tensor) -> bool:
        """Whether autograd is to follow the solve."""
        return torch.is_grad_enabled() and (y0.requires_grad or bool(self.parameters))

    def integrate(self, y0: Tensor) -> Tensor:
        """y at the times, (T, d), without a graph. Collective."""
        with torch.no_grad():
            run = Integration(self, adjoint=False)
            try:
                return run.forward(y0)
            finally:
                run.close()

    def forward(self, y0: Tensor) -> tuple[Tensor, Solved]:
        """y at the times, (T, d), and what the backward pass needs. Collective."""
        options = snapshot_options(self.options_prefix)
        run = Integration(self, adjoint=True)
        try:
            return run.forward(y0), Solved(y0.detach(), options, run)
        except BaseException:
            run.close()
            raise

    def backward(
        self, run: Solved, y_bar: Tensor, needed: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The cotangents of y_0 and of the parameters, by TSAdjoint; a second time, after a new TSSolve. Collective."""
        integration = run.take()
        again = integration is None
        integration = integration or Integration(self, adjoint=True, again=run.options)
        try:
            if again:
                integration.forward(run.y0)
            return integration.reverse(y_bar)
        finally:
            integration.close()


@dataclass(eq=False)
class Solved:
    """What a forward pass leaves: its TS, for one backward pass, and y_0 with the options, to solve again."""

    y0: Tensor
    options: Mapping[str, str]
    integration: Integration | None

    def take(self) -> Integration | None:
        """The TS, whose one backward pass is to follow, whatever becomes of it; None a second time."""
        integration, self.integration = self.integration, None
        return integration


class Integration:
    """One TS: its forward solve and, once, its adjoint. It owns all PETSc objects; nothing that they hold knows it.

    Parameters
    ----------
    setting : what to solve
    adjoint : whether to store the trajectory
    again : the options of the solve that this repeats, which is counted as such and does not call the monitors
    """

    def __init__(self, setting: Setting, *, adjoint: bool, again: Mapping[str, str] | None = None) -> None:
        self._setting, peers = setting, setting.peers
        self._size = sum(real(p).numel() for p in setting.parameters)
        self._counter = Counter(setting.stats, "forward" if again is None else "recompute")
        self._failure = Failure()
        self._f = Functions(setting, self._counter, self._failure)
        self._clock = Clock(setting, self._failure)
        comm = PETSc.COMM_SELF
        if peers.comm is not None:
            comm = PETSc.Comm(peers.comm)
            PETSc.garbage_cleanup(comm)  # what earlier solves have dropped: destroying it is collective
        self._ts = PETSc.TS().create(comm)
        self._u = state_vec(setting.layout.size, setting.device, comm)
        self._mu = state_vec(self._size, setting.device, comm) if peers.largest(self._size) else None
        self._owned: list[Any] = [self._ts, self._u]
        if self._mu is not None:
            self._owned.append(self._mu)
        self._configure(adjoint=adjoint, again=again)

    def close(self) -> None:
        """Destroy the PETSc objects. Collective."""
        for owned in self._owned:
            owned.destroy()
        self._owned = []

    def forward(self, y0: Tensor) -> Tensor:
        """Solve; y at the times, (T, d)."""
        setting, ts, clock = self._setting, self._ts, self._clock
        write(self._u, y0.detach())
        clock.begin(y0)
        self._start(y0)
        self._solve(ts.solve, self._u)
        stats = setting.stats
        if self._counter.phase == "forward":
            stats.steps += ts.getStepNumber()
            stats.rejected += ts.getStepRejections()
        stats.newton_iterations += ts.getSNESIterations()
        stats.linear_iterations += ts.getKSPIterations()
        if len(clock.outputs) < len(setting.s):
            if (near := abs(setting.s[-1] - self._time())) <= 16 * 2.0**-52 * abs(setting.s[-1]):
                raise ValueError(
                    f"t ends within {near:.3g} of t={self._time():.6g}, which PETSc's step control takes for the same "
                    "time: move the last time, repeat the one before it, or use a method of pfde's own"
                )
            raise PfdeError(
                f"the TS stopped at t={self._time():.6g}, before {setting.sign * setting.s[-1]:.6g}: a hook of its "
                "options ended it"
            )
        return torch.stack(clock.take_outputs())

    def reverse(self, y_bar: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The cotangents of y_0 and of the parameters. y_bar : (T, d)."""
        setting, ts, counts = self._setting, self._ts, self._clock.counts
        self._counter.begin("backward")
        if self._adjoint is not None:
            self._adjoint.serve(ts)
        lam = self._u.duplicate()
        self._owned.append(lam)
        lam.set(0.0)
        if self._mu is not None:
            self._mu.set(0.0)
        ts.setCostGradients([lam], None if self._mu is None else [self._mu])
        for k in range(len(counts), 0, -1):
            write(lam, read(lam) + y_bar[k])
            ts.adjointSetSteps(counts[k - 1])
            self._solve(ts.adjointSolve)
        y0_bar = (read(lam) + y_bar[0]).to(setting.dtype)
        return [y0_bar], self._split(self._mu)

    def _split(self, mu: PETSc.Vec | None) -> list[Tensor | None]:
        parameters = self._setting.parameters
        if mu is None or not parameters:
            return []
        parts = torch.split(read(mu), [real(p).numel() for p in parameters])
        return [unreal(part, p).clone() for part, p in zip(parts, parameters, strict=True)]

    def _configure(self, *, adjoint: bool, again: Mapping[str, str] | None) -> None:
        setting, ts, method = self._setting, self._ts, self._setting.method
        # The options of a solve that is repeated are put into the database again: for it alone.
        prefix = setting.options_prefix if again is None else private_prefix(setting.options_prefix)
        ts.setOptionsPrefix(prefix)
        ts.setType(method.family)
        if method.family == "rk":
            ts.setRKType(method.subtype)
        elif method.family == "arkimex":
            ts.setARKIMEXType(method.subtype)
        elif method.family == "theta":
            ts.setTheta(method.theta)
        self._set_callbacks()
        if method.implicit:
            self._set_solver_defaults()
        ts.setTolerances(rtol=setting.rtol, atol=setting.atol)
        ts.setErrorIfStepFails(False)  # the reason is read, and raised with t
        if adjoint:
            ts.setSaveTrajectory()
        self._adjoint: AdjointSolver | None = None
        with own_options(setting, prefix, again):
            ts.setFromOptions()
            if method.implicit:
                self._newton.read_options(ts.getSNES())
                self._adjoint = AdjointSolver(setting, prefix, ts.comm, self._counter, self._failure, self._f.recent)
                self._owned.append(self._adjoint.ksp)
        if not adjoint:
            ts.removeTrajectory()  # -ts_save_trajectory makes one
        if self._adjoint is not None:
            require_residual_solver(ts.getSNES(), assembled=False, instead=_FACTORISED)
            require_preconditioner(self._adjoint.ksp, assembled=False, instead=_FACTORISED)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        ts.setPreStep(self._clock.pre_step)
        ts.setPostStep(self._clock.post_step)

    def _set_callbacks(self) -> None:
        ts, f, u = self._ts, self._f, self._u
        if f.explicit is not None or self._setting.method.family == "arkimex":  # NOTE
            ts.setRHSFunction(f.rhs_function, self._vec(u))
            jacobian = self._mat(u, u, StateProducts(self._setting.dtype, self._failure))
            ts.setRHSJacobian(f.rhs_jacobian, jacobian, jacobian)
        if f.implicit is not None:
            ts.setIFunction(f.i_function, self._vec(u))
            jacobian = self._mat(u, u, StateProducts(self._setting.dtype, self._failure))
            ts.setIJacobian(f.i_jacobian, jacobian, jacobian)
        if self._mu is None:
            return
        for part, put in ((f.explicit, ts.setRHSJacobianP), (f.implicit, ts.setIJacobianP)):
            if part is not None:
                products = ParameterProducts(self._setting.dtype, self._failure)
                put(f.rhs_jacobian_p if part is f.explicit else f.i_jacobian_p, self._mat(u, self._mu, products))

    def _vec(self, like: PETSc.Vec) -> PETSc.Vec:
        vec = like.duplicate()
        self._owned.append(vec)
        return vec

    def _mat(self, rows: PETSc.Vec, columns: PETSc.Vec, context: Products) -> PETSc.Mat:
        mat = PETSc.Mat().createPython((rows.getSizes(), columns.getSizes()), context=context, comm=rows.comm)
        mat.setVecType(rows.getType())
        mat.setUp()
        self._owned.append(mat)
        return mat

    def _set_solver_defaults(self) -> None:
        """Those of every engine. What PETSc keeps must not keep this run: it gets what it needs of it, and no more."""
        snes, setting = self._ts.getSNES(), self._setting
        set_newton_defaults(snes, setting.dtype, matrix_free)
        self._newton = NewtonTest(self._f.recent, setting.dtype, setting.peers, self._failure)
        snes.setConvergenceTest(self._newton)

    def _start(self, y0: Tensor) -> None:
        ts, clock, s = self._ts, self._clock, self._setting.s
        ts.setTime(s[0])
        if clock.fixed:
            ts.setTimeStep(clock.sizes[0])
            ts.setMaxSteps(sum(clock.counts))
            ts.setMaxTime(2 * s[-1] - s[0])  # out of the way, but not so far that PETSc's step estimate overflows
        else:
            ts.setTimeStep(self._first_step(y0))
            ts.setMaxTime(s[-1] - clock.slack)

    def _first_step(self, y0: Tensor) -> float:
        """h with |h f| a hundredth of |y_0|, in units of the tolerance; the controller corrects it in a few steps.

        (Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, II.4, its first guess.)
        """
        setting, peers = self._setting, self._setting.peers
        y = y0.detach()
        parts = [part for part in (self._f.explicit, self._f.implicit) if part is not None]
        slope = torch.stack([peers.call(part.value, setting.s[0], y) for part in parts]).sum(0)
        scale = setting.atol + setting.rtol * y.abs()
        d0, d1 = (peers.sum(float((x / scale).square().sum())) ** 0.5 for x in (y, slope))
        span = setting.s[1] - setting.s[0]
        return min(span, 0.01 * d0 / d1 if d0 > 1e-5 and d1 > 1e-5 else 1e-6 * span)

    def _solve(self, solve: Callable[..., None], *arguments: Any) -> None:
        """A solve of PETSc's; what its callbacks failed with comes out as it was raised."""
        error: BaseException | None = None
        try:
            solve(*arguments)
        except PETSc.Error as caught:
            error = caught
        try:
            self._failure.release()
            if error is not None:
                raise PfdeError(f"PETSc's {self._where()} failed at t={self._time():.6g}: {error}") from error
        finally:
            del error  # else it and its traceback would keep each other, and all the solve holds, alive
        reason = self._ts.getConvergedReason()
        if reason < 0:
            raise ConvergenceError(
                f"PETSc's {self._where()} did not converge at t={self._time():.6g}, step {self._ts.getStepNumber()}: "
                f"{_REASONS.get(reason, f'reason {reason}')}; reduce step_size, loosen rtol and atol, or see options "
                "'snes_monitor', 'snes_linesearch_type': 'bt', 'ksp_monitor', 'adjoint_ksp_monitor', 'ts_adapt_monitor'"
            )

    def _where(self) -> str:
        return ("adjoint of " if self._counter.phase == "backward" else "") + self._setting.method.name

    def _time(self) -> float:
        return float(self._setting.sign * self._ts.getTime())


_REASONS = {v: k for k, v in vars(PETSc.TS.ConvergedReason).items() if isinstance(v, int) and v < 0}
_REASONS[-3] = "DIVERGED_LINEAR_SOLVE"  # TSADJOINT_, which petsc4py does not name
