"""One implicit stage y = r + w f(t, y) through PETSc's SNES, and its linearised and transposed systems through KSP.

Newton's method on G(y) = y - r - w f(t, y); f is linearised once per iterate, and that one graph serves the
residual, the Jacobian products and, at the solution, the caller. The adjoint step solves (I - w J)^T x = b with the
same KSP, transposed.

Tolerances. Defaults are near rounding, because an unconverged stage is an error of the gradient: a stage is done
when |G| <= 32 eps (|r| + |w f|) (eps of the model's dtype), when |G| has fallen by the factor 10 eps, or when a
Newton step is below eps^(3/4) of |y| (2e-12 in double: the error left is its square, and still small where f's products
are inexact and Newton converges only linearly). A stiff stage ends by the last of the three.
Linear systems: 1e-8 in Newton and 10 eps in the adjoint for float64. -snes_rtol, -snes_atol, -snes_stol, -ksp_rtol,
... with the solve's options prefix loosen or tighten them; a -ksp_rtol given holds for the adjoint as well.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..errors import ConvergenceError
from .base import Failure, Linearisation, OnGraph, System, Weight
from .mass import Mass
from .peers import Peers
from .solver_options import require_residual_solver
from .start import PETSc
from .vectors import load, read, write

Linearise = Callable[[int, float, Tensor], Linearisation]


class Operator(Protocol):
    """The Mat of I - w J and how to move it."""

    mat: PETSc.Mat
    pmat: PETSc.Mat
    failure: Failure
    assembled: bool  # whether the Mats have entries

    def update(self, at: Linearisation, w: Weight) -> None:
        """Let the Mat be I - w J at this linearisation."""

    def configure(self, ksp: PETSc.KSP) -> None:
        """The Krylov method and preconditioner that suit this form, before the options are read."""

    def forget(self) -> None:
        """Let go of the linearisation, until the next update."""


class StageSolver:
    """Solves the stages of one integration; owns its vectors and uses the SNES it is given.

    Parameters
    ----------
    snes : a fresh SNES (a TS's own, so that the TS's options reach it)
    linearise : (step, t, y) -> linearisation of f
    operator : the Newton operator
    vec : a Vec of the state's size to duplicate
    dtype : of the model
    peers : the ranks that share the state
    mass : M, where the stage is M y = r + w f(t, y)
    """

    def __init__(
        self,
        snes: PETSc.SNES,
        linearise: Linearise,
        operator: Operator,
        vec: PETSc.Vec,
        dtype: torch.dtype,
        peers: Peers,
        mass: Mass | None = None,
    ) -> None:
        self._snes, self._linearise, self._operator, self._mass = snes, linearise, operator, mass
        self._dtype, self._peers, self._failure = dtype, peers, operator.failure
        self._x, self._g, self._b = vec.duplicate(), vec.duplicate(), vec.duplicate()
        self._stage: tuple[int, float, Tensor, Weight] | None = None
        self._at: Linearisation | None = None
        self._y: Tensor | None = None
        self.newton_iterations = 0
        self.linear_iterations = 0
        self._attach()
        self._set_defaults()
        snes.setFromOptions()
        require_residual_solver(snes, assembled=operator.assembled)
        self._atol = snes.getTolerances()[1]
        prefix = snes.getOptionsPrefix() or ""
        self._linear_rtol = None if PETSc.Options().hasName(f"{prefix}ksp_rtol") else 10 * torch.finfo(dtype).eps

    def _attach(self) -> None:
        me = weakref.proxy(self)  # this solver keeps the SNES alive: the SNES must not keep the solver
        mat, pmat = self._operator.mat, self._operator.pmat
        self._snes.setFunction(lambda _snes, x, g: me._show_residual(x, g), self._g)
        self._snes.setJacobian(lambda _snes, x, _a, _p: me._failure.guard(me._jacobian, x), mat, pmat)

    def _set_defaults(self) -> None:
        eps = torch.finfo(self._dtype).eps
        self._snes.setType(PETSc.SNES.Type.NEWTONLS)
        self._snes.setTolerances(rtol=10 * eps, atol=0.0, stol=eps**0.75, max_it=50)
        self._snes.setDivergenceTolerance(1e100)  # a stiff stage's residual may grow a lot in the first iteration
        self._snes.getLineSearch().setType("basic")  # at the rounding floor no decrease can be asked for
        ksp = self._snes.getKSP()
        ksp.setTolerances(rtol=max(1e-8, 10 * eps), max_it=10000)
        self._operator.configure(ksp)

    def solve(self, n: int, t: float, r: Tensor, w: Weight, guess: Tensor) -> tuple[Tensor, Linearisation]:
        """y with y = r + w f(t, y), and the linearisation at y. Collective. Raises ConvergenceError."""
        self._stage = (n, t, r, w)
        write(self._x, guess)
        self._run(self._snes.solve, None, self._x)
        self.newton_iterations += self._snes.getIterationNumber()
        self.linear_iterations += self._snes.getLinearSolveIterations()
        reason = self._snes.getConvergedReason()
        if reason < 0:
            raise ConvergenceError(
                f"the stage equation did not converge at t={t:.6g}, step {n}: {_name(_SNES_REASONS, reason)} "
                f"after {self._snes.getIterationNumber()} Newton iterations, "
                f"|residual| = {self._snes.getFunctionNorm():.3g}; "
                "reduce step_size, or see options 'snes_monitor', 'snes_linesearch_type': 'bt', 'ksp_rtol', 'snes_atol'"
            )
        y = load(self._x, self._dtype)
        if self._is_elsewhere(y):  # a line search may have tried another point last
            self._at = self._linearise(n, t, y)
        at, self._at, self._y, self._stage = self._at, None, None, None
        assert at is not None
        return y, at

    def solve_transpose(self, n: int, t: float, at: Linearisation, w: Weight, b: Tensor) -> Tensor:
        """x with (I - w J)^T x = b. Collective. Raises ConvergenceError."""
        return self._linear("adjoint", n, t, at, w, b)

    def solve_tangent(self, n: int, t: float, at: Linearisation, w: Weight, b: Tensor) -> Tensor:
        """x with (I - w J) x = b. Collective. Raises ConvergenceError."""
        return self._linear("tangent linear", n, t, at, w, b)

    def take_iterations(self) -> tuple[int, int]:
        """The Newton and linear iterations since the last call."""
        taken = self.newton_iterations, self.linear_iterations
        self.newton_iterations = self.linear_iterations = 0
        return taken

    def destroy(self) -> None:
        """Destroy the vectors and the hold on the SNES, at once, not when PETSc collects its garbage. Collective."""
        for own in (self._snes, self._x, self._g, self._b):
            own.destroy()

    def rest(self) -> None:
        """Between two passes: hold no linearisation of f. PETSc's hold on the operator is in C, where no garbage
        collector would see a cycle from there through func, which may keep the solution."""
        self._operator.forget()

    def silence(self) -> None:
        """Cancel the monitors. The TS may be gone, and with it went the SNES's callbacks and Mat: set them again."""
        self._attach()
        self._snes.monitorCancel()
        self._snes.getKSP().monitorCancel()

    def _linear(self, what: str, n: int, t: float, at: Linearisation, w: Weight, b: Tensor) -> Tensor:
        ksp = self._snes.getKSP()
        rtol = ksp.getTolerances()[0]
        self._operator.update(at, w)
        ksp.setOperators(self._operator.mat, self._operator.pmat)
        write(self._b, b)
        try:
            if self._linear_rtol is not None:
                ksp.setTolerances(rtol=self._linear_rtol)
            self._run(ksp.solveTranspose if what == "adjoint" else ksp.solve, self._b, self._x)
        finally:
            ksp.setTolerances(rtol=rtol)
        self.linear_iterations += ksp.getIterationNumber()
        reason = ksp.getConvergedReason()
        if reason < 0:
            raise ConvergenceError(
                f"the {what} system did not converge at t={t:.6g}, step {n}: {_name(_KSP_REASONS, reason)} after "
                f"{ksp.getIterationNumber()} iterations, |residual| = {ksp.getResidualNorm():.3g}; see options "
                "'ksp_monitor', 'ksp_rtol', 'ksp_gmres_restart', 'fde_jacobian': 'blocks'"
            )
        return load(self._x, self._dtype)

    def _run(self, solve: Callable[..., None], *vectors: PETSc.Vec) -> None:
        """A solve of PETSc's; what its callbacks failed with comes out as it was raised."""
        error: BaseException | None = None
        try:
            solve(*vectors)
        except PETSc.Error as caught:
            error = caught
        try:
            self._failure.release()
            if error is not None:
                raise error
        finally:
            del error

    def _show_residual(self, x: PETSc.Vec, g: PETSc.Vec) -> None:
        value = self._failure.guard(self._residual, x)
        if value is None:
            g.set(math.nan)  # ends Newton's method
        else:
            write(g, value)

    def _residual(self, x: PETSc.Vec) -> Tensor:
        assert self._stage is not None
        n, t, r, w = self._stage
        self._y = load(x, self._dtype)
        self._at = self._linearise(n, t, self._y)
        wf = self._at.value * w
        # The rounding floor of this residual: asking for less would never end. Norms are global, as SNES's are.
        floor = 32 * torch.finfo(self._dtype).eps * self._norm(r, wf)
        self._snes.setTolerances(atol=max(self._atol, floor))
        return (read(x) if self._mass is None else self._mass.apply(self._y)) - r - wf

    def _norm(self, *parts: Tensor) -> float:
        square = sum(float(torch.dot(p, p)) for p in parts)
        return self._peers.sum(square) ** 0.5

    def _jacobian(self, x: PETSc.Vec) -> None:
        assert self._stage is not None
        n, t, _, w = self._stage
        y = load(x, self._dtype)
        if self._is_elsewhere(y):
            self._y, self._at = y, self._linearise(n, t, y)
        assert self._at is not None
        self._operator.update(self._at, w)

    def _is_elsewhere(self, y: Tensor) -> bool:
        """Whether f was last linearised at another state than y, on any rank. Collective."""
        return self._peers.sum(self._at is None or self._y is None or not torch.equal(y, self._y)) > 0


class Staged:
    """The implicit part of a System, done by a StageSolver; None for explicit methods."""

    stages: StageSolver | None = None
    mass_matrix: Mass | None = None

    def on_graph(self, at: Any, y: Tensor) -> OnGraph:
        """No graph where f is no torch function."""
        raise NotImplementedError

    def require_reached(self, out: Tensor, begin: int, *inputs: Tensor) -> None:
        """No graph where f is no torch function."""
        raise NotImplementedError

    def pull(
        self, outputs: Sequence[tuple[Tensor, Tensor]], leaves: tuple[Tensor, ...], begin: int, theta_bar: Any
    ) -> list[Tensor]:
        """No graph where f is no torch function."""
        raise NotImplementedError

    @property
    def parts(self) -> tuple[System, ...]:
        """The system itself."""
        return (cast(System, self),)

    def mass(self, y: Tensor) -> Tensor:
        """M y; y itself where there is no mass matrix."""
        return y if self.mass_matrix is None else self.mass_matrix.apply(y)

    def mass_transpose(self, y: Tensor) -> Tensor:
        """M^T y; y itself where there is no mass matrix."""
        return y if self.mass_matrix is None else self.mass_matrix.apply_transpose(y)

    def require_finite(self, n: int, t: float, t1: float, *values: Tensor) -> None:
        """Nothing to do: every value of f is checked."""

    def solve(self, n: int, t: float, r: Tensor, w: Weight, guess: Tensor) -> tuple[Tensor, Linearisation]:
        """Solve y = r + w f(t, y)."""
        return self._solver().solve(n, t, r, w, guess)

    def solve_transpose(self, n: int, t: float, at: Linearisation, w: Weight, b: Tensor) -> Tensor:
        """Solve (I - w J)^T x = b."""
        return self._solver().solve_transpose(n, t, at, w, b)

    def solve_tangent(self, n: int, t: float, at: Linearisation, w: Weight, b: Tensor) -> Tensor:
        """Solve (I - w J) x = b."""
        return self._solver().solve_tangent(n, t, at, w, b)

    def silence(self) -> None:
        """Cancel the monitors of the solvers: what follows is recomputation."""
        if self.stages is not None:
            self.stages.silence()

    def generators(self) -> list[Tensor]:
        """torch's random states now, if f draws random numbers: what `restore_generators` needs to draw them again."""
        return []

    def restore_generators(self, n: int, states: list[Tensor]) -> None:
        """Let the steps after n draw what they drew when these were the states."""

    def leaf_generators(self, first: int, last: int) -> list[Tensor]:
        """The random states of the steps first+1..last, (steps, bytes) for each generator; none if f draws nothing."""
        return []

    def load_generators(self, first: int, leaf: list[Tensor]) -> None:
        """Let the steps after `first` draw what they drew when this was their `leaf_generators`."""

    def forget(self, n: int) -> None:
        """The steps up to n, but the first, will not be evaluated again from what is known of them now."""

    def _solver(self) -> StageSolver:
        assert self.stages is not None
        return self.stages


def _names(reasons: type) -> dict[int, str]:
    return {v: k for k, v in vars(reasons).items() if isinstance(v, int) and k.startswith("DIVERGED")}


_SNES_REASONS = _names(PETSc.SNES.ConvergedReason)
_KSP_REASONS = _names(PETSc.KSP.ConvergedReason)


def _name(names: dict[int, str], reason: int) -> str:
    return names.get(reason, f"reason {reason}")
