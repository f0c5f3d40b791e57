"""One implicit stage y = r + w f(t, y) through PETSc's SNES, and its linearised and transposed systems through KSP.

Newton's method on G(y) = y - r - w f(t, y); f is linearised once per iterate, and that one graph serves the
residual, the Jacobian products and, at the solution, the caller. The adjoint step solves (I - w J)^T x = b with a
KSP of its own.

Tolerances. Defaults are near rounding, because an unconverged stage is an error of the gradient: a stage is done when
each of its components is at its rounding floor (`stage_test`), a linear system of the adjoint when its true residual
is (`linear_solver`). -snes_rtol, -snes_atol, -snes_stol, -ksp_rtol, ... with the solve's options prefix are those of
Newton's method, and let it end earlier; the adjoint's have the prefix adjoint_ (-adjoint_ksp_rtol, ...).

In a float32 model the iterate x is a double, f is evaluated at y, x rounded, and G = x - r - w f(t, y): where G = 0 the
caller's y is r + w f(t, y) rounded once. A stage solved in floats could only end between two of them.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConvergenceError, PfdeError
from .base import Linearisation, Weight
from .linear_solver import LinearSolver, Operator
from .mass import Mass
from .operators import block_lu, signed_product
from .peers import Peers
from .solver_defaults import set_newton_defaults
from .solver_options import require_residual_solver
from .stage_test import StageTest
from .start import PETSc
from .vectors import load, read, write

Linearise = Callable[[int, float, Tensor], Linearisation]


class StageSolver:
    """Solves the stages of one integration; owns its vectors and uses the SNES it is given.

    Parameters
    ----------
    snes : a fresh SNES (a TS's own, so that the TS's options reach it)
    linearise : (step, t, y) -> linearisation of f
    operator : the Newton operator
    vec : a Vec of the state's size to duplicate
    dtype, precision : of the model; that in which it computes f, a narrower one under autocast
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
        precision: torch.dtype | None = None,
    ) -> None:
        self._snes, self._linearise, self._operator, self._mass = snes, linearise, operator, mass
        self._dtype, self._peers, self._failure = dtype, peers, operator.failure
        self._x, self._g = vec.duplicate(), vec.duplicate()
        self._stage: tuple[int, float, Tensor, Weight] | None = None
        self._at: Linearisation | None = None
        self._y: Tensor | None = None
        self._r_abs = torch.empty(0)
        self._newton_iterations = self._linear_iterations = 0
        self._attach()
        precision = precision or dtype
        set_newton_defaults(snes, precision, operator.configure)
        me = weakref.proxy(self)
        snes.setConvergenceTest(lambda _snes, k, norms: me._converged(k, norms))
        snes.setFromOptions()
        require_residual_solver(snes, assembled=operator.assembled)
        prefix = snes.getOptionsPrefix() or ""
        # With a Jacobian that lags Newton goes on with what the Mat holds: let that be this stage's, not an adjoint's.
        self._lags = PETSc.Options(prefix).hasName("snes_lag_jacobian")
        # A method of the proxy's would be one of this object's, and a cycle.
        self._test = StageTest(
            snes, precision, peers, operator.systems, lambda x: me._scale(x), lambda x: me._coupling(x)
        )
        self._linear = LinearSolver(
            operator, vec, dtype, prefix, lambda *arguments: me._run(*arguments), precision=precision
        )
        self._blocks = block_lu(snes.getKSP())

    def _attach(self) -> None:
        me = weakref.proxy(self)  # this solver keeps the SNES alive: the SNES must not keep the solver
        mat, pmat = self._operator.mat, self._operator.pmat
        self._snes.setFunction(lambda _snes, x, g: me._show_residual(x, g), self._g)
        self._snes.setJacobian(lambda _snes, x, _a, _p: me._failure.guard(me._jacobian, x), mat, pmat)

    def solve(self, n: int, t: float, r: Tensor, w: Weight, guess: Tensor) -> tuple[Tensor, Linearisation]:
        """y with y = r + w f(t, y), and the linearisation at y. Collective. Raises ConvergenceError."""
        self._stage = (n, t, r, w)
        self._r_abs = r.abs()
        write(self._x, guess)
        if self._lags:
            self._failure.guard(self._jacobian, self._x)
        try:
            self._run(self._snes.solve, None, self._x)
        except BaseException:  # it leaves its vectors locked where an exception has come through it
            self._snes.reset()
            self._x, self._g = self._x.duplicate(), self._g.duplicate()
            self._attach()
            raise
        self._newton_iterations += self._snes.getIterationNumber()
        self._linear_iterations += self._snes.getLinearSolveIterations()
        reason = self._snes.getConvergedReason()
        if reason < 0:
            raise ConvergenceError(
                f"the stage equation did not converge at t={t:.6g}, step {n}: "
                f"{_REASONS.get(reason, f'reason {reason}')} after {self._snes.getIterationNumber()} Newton "
                f"iterations, |residual| = {self._snes.getFunctionNorm():.3g}; "
                "reduce step_size, or see options 'snes_monitor', 'snes_linesearch_type': 'bt', 'ksp_rtol', 'snes_atol'"
                f"{self._doubt()}"
            )
        at, y = self._move_to(self._x), self._y
        self._at = self._y = self._stage = None
        assert y is not None
        return y, at

    def _doubt(self) -> str:
        """For the error of a stage: whether J v, which Newton's method needs, is the transpose of J^T v. Collective."""
        assert self._stage is not None
        n, t, r, _ = self._stage
        try:
            at = self._linearise(n, t, r)  # Newton's last iterate may be far out
        except PfdeError:
            return ""
        generator = torch.Generator().manual_seed(1)
        u, v = (torch.randn(at.value.shape, generator=generator).to(at.value) for _ in range(2))
        forward, back = at.jvp(v), at.vjp(u, retain=True)
        pairs = ((u, forward), (back, v), (u, u), (forward, forward), (back, back), (v, v))
        jv, vj, *squares = (self._peers.sum(float(torch.dot(x, y))) for x, y in pairs)
        size = (squares[0] * squares[1]) ** 0.5 + (squares[2] * squares[3]) ** 0.5
        if not abs(jv - vj) > torch.finfo(self._dtype).eps ** 0.5 * size:
            return ""
        return (
            "; func's products J v are not the transpose of its J^T v: a custom autograd.Function in it, or an "
            "exchange, has a backward pass that is not differentiable itself, and Newton's method lacks its part: make "
            "it so, or use 'fde_jacobian': 'dense' or 'blocks', which need J^T v only"
        )

    def solve_transpose(self, n: int, t: float, at: Linearisation, w: Weight, b: Tensor) -> Tensor:
        """x with (I - w J)^T x = b. Collective. Raises ConvergenceError."""
        return self._linear.solve(n, t, at, w, b, transpose=True)

    def solve_tangent(self, n: int, t: float, at: Linearisation, w: Weight, b: Tensor) -> Tensor:
        """x with (I - w J) x = b. Collective. Raises ConvergenceError."""
        return self._linear.solve(n, t, at, w, b, transpose=False)

    def take_iterations(self) -> tuple[int, int]:
        """The Newton and linear iterations since the last call."""
        taken = self._newton_iterations, self._linear_iterations + self._linear.iterations
        self._newton_iterations = self._linear_iterations = self._linear.iterations = 0
        return taken

    def destroy(self) -> None:
        """Destroy the vectors and the hold on the SNES, at once, not when PETSc collects its garbage. Collective."""
        for own in (self._snes, self._x, self._g, self._linear):
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
        self._linear.silence()

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
        return (read(x) if self._mass is None else self._mass.apply(read(x))) - r - self._at.value * w

    def _converged(self, k: int, norms: tuple[float, float, float]) -> int:
        """The SNES's convergence test."""
        reason = self._failure.guard(self._judge, k, norms)
        return PETSc.SNES.ConvergedReason.DIVERGED_FUNCTION_NANORINF if reason is None else reason

    def _judge(self, k: int, norms: tuple[float, float, float]) -> int:
        return self._test.ended(self._snes, k, norms, read(self._snes.getFunction()[0]))

    def _scale(self, x: PETSc.Vec) -> Tensor:
        """The sizes of the terms of G at x."""
        assert self._stage is not None
        wf = self._move_to(x).value * self._stage[3]
        y = read(x)
        return wf.abs_().add_(self._r_abs) + (y if self._mass is None else self._mass.apply(y)).abs()

    def _coupling(self, x: PETSc.Vec) -> Tensor:
        """|A| |x|, or its estimate, with the matrix of the last Newton step; a new tensor."""
        if self._blocks is not None and self._blocks.is_current:
            return self._blocks.sizes(read(x))
        product = signed_product(self._operator.mat.mult, x)
        return read(product).abs()

    def _jacobian(self, x: PETSc.Vec) -> None:
        assert self._stage is not None
        self._operator.update(self._move_to(x), self._stage[3])

    def _move_to(self, x: PETSc.Vec) -> Linearisation:
        """f linearised at x; a line search may have tried another point last. Collective."""
        assert self._stage is not None
        n, t, _, _ = self._stage
        y = load(x, self._dtype)
        if self._is_elsewhere(y):
            self._y, self._at = y, self._linearise(n, t, y)
        assert self._at is not None
        return self._at

    def _is_elsewhere(self, y: Tensor) -> bool:
        """Whether f was last linearised at another state than y, on any rank. Collective."""
        return self._peers.sum(self._at is None or self._y is None or not torch.equal(y, self._y)) > 0


class Staged:
    """The implicit part of a System, done by a StageSolver; None for explicit methods."""

    stages: StageSolver | None = None

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

    def _solver(self) -> StageSolver:
        assert self.stages is not None
        return self.stages


_REASONS = {
    v: k for k, v in vars(PETSc.SNES.ConvergedReason).items() if isinstance(v, int) and k.startswith("DIVERGED")
}
