"""A PETSc TS's own callbacks as right-hand side: RHSFunction, RHSJacobian and RHSJacobianP.

The Jacobian is assembled by the user's callback into the user's Mat, only when a product with it is asked for.
One Mat serves all linearisations of a TS, so each checks that what the Mat holds is its own.

NOTE 1. The TS holds its context, the context holds this system, and the hold of the TS is in C, where no garbage
collector would see the cycle. So the system knows the TS only while one of its methods runs: `CallbackSystem.using`.

NOTE 2. PETSc makes a matrix, a dense one of a TS without DM, for who asks for the Mat of a Jacobian that was never set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .operators import Assembled
from .peers import Peers
from .random import NO_DRAWS
from .stage_solver import Staged, StageSolver
from .start import PETSc
from .vectors import load, read, write


class VecBar:
    """The cotangent of a TS's parameters: the Vec mu that TSSetCostGradients names, added to in place."""

    def __init__(self, mu: PETSc.Vec | None) -> None:
        self.mu = mu


class CallbackLinearisation:
    """f at one (t, y), with J and P from the TS's callbacks."""

    __slots__ = ("_system", "_t", "_y", "value")

    def __init__(self, system: CallbackSystem, t: float, y: Tensor, value: Tensor) -> None:
        self._system, self._t, self._y, self.value = system, t, y, value

    def assemble(self) -> None:
        """Let the user's Mat hold J here."""
        self._system.assemble(self, self._t, self._y)

    def vjp(self, v: Tensor, theta_bar: VecBar | None = None, *, retain: bool = False) -> Tensor:
        """J^T v, and P^T v added to mu."""
        self.assemble()
        if theta_bar is not None and theta_bar.mu is not None:
            self._system.add_parameter_product(theta_bar.mu, self._t, self._y, v)
        return self._system.product(v, transpose=True)

    def jvp(self, v: Tensor, theta_dot: object | None = None) -> Tensor:
        """J v."""
        assert theta_dot is None
        self.assemble()
        return self._system.product(v, transpose=False)


class CallbackSystem(Staged):
    """The System of a TS that has callbacks.

    Parameters
    ----------
    ts : with a RHSFunction; not kept (NOTE 1)
    vec : a Vec of the state
    implicit : whether stages are to be solved, with the TS's SNES
    """

    def __init__(self, ts: PETSc.TS, vec: PETSc.Vec, *, implicit: bool) -> None:
        self._ts: PETSc.TS | None = None
        self.implicit, self._peers = implicit, Peers(vec.comm.tompi4py())
        self._jacobian_p: PETSc.Mat | None = None
        self._own: list[PETSc.Object] = [vec.duplicate() for _ in range(3)]
        self._y, self._f, self._product = self._own
        self._assembled: CallbackLinearisation | None = None
        self._mats: tuple[PETSc.Mat, PETSc.Mat] | None = None
        self.evaluations, self.draws = 0, NO_DRAWS
        if not implicit:
            return
        with self.using(ts):
            mat, pmat = self.require_jacobian("an implicit method")
            ts.computeRHSJacobian(ts.getTime(), vec, mat, pmat)  # gives the Mat its nonzero pattern
        operator = Assembled(mat, pmat, vec)
        self.stages = StageSolver(ts.getSNES(), self.linearise, operator, vec, torch.float64, self._peers)
        self._own += [self.stages, operator]

    @contextmanager
    def using(self, ts: PETSc.TS) -> Iterator[None]:
        """Call back through this TS, the one that the system was made for, in the body (NOTE 1)."""
        before, self._ts = self._ts, ts
        try:
            yield
        finally:
            self._ts = before

    def destroy(self) -> None:
        """Destroy what belongs to the system, at once instead of when PETSc collects its garbage. Collective."""
        own, self._own, self.stages, self._mats, self._assembled = self._own, [], None, None, None
        for one in own:
            one.destroy()

    def _called(self) -> PETSc.TS:
        assert self._ts is not None, "outside `using`"
        return self._ts

    def require_jacobian(self, who: str) -> tuple[PETSc.Mat, PETSc.Mat]:
        """The Mats of J and of what it is preconditioned with. Raises ValueError where there is no RHSJacobian."""
        if self._mats is None:
            ts = self._called()
            if ts.getDict().get("__rhsjacobian__") is None:  # NOTE 2
                raise ValueError(f"{who} needs the Jacobian of the TS: call ts.setRHSJacobian(function, J, P) first")
            mat, pmat, _ = ts.getRHSJacobian()
            self._mats = mat, pmat
            self._own += self._mats
        return self._mats

    def evaluate(self, n: int, t: float, y: Tensor) -> Tensor:
        """f(t, y) by the TS's RHSFunction. Raises NonFiniteError on every rank, and PeerError for another's failure."""
        write(self._y, y)
        error = self._attempt(self._called().computeRHSFunction, t, self._y, self._f)
        try:
            if error is not None:
                write(self._f, torch.full_like(y, math.nan))  # seen by every rank, without a message for it
            self.evaluations += 1
            # A sum, which NaN on any rank makes NaN on all: MPI's largest of 1 and NaN may be 1.
            if not math.isfinite(self._f.norm(PETSc.NormType.NORM_1)):
                self._peers.agree(error)
                finite = bool(torch.isfinite(read(self._f)).all())  # else the sum has merely overflowed
                if self._peers.largest(int(not finite)):
                    raise NonFiniteError(f"RHSFunction returned NaN or inf at t={t:.6g}, step {n}")
        finally:
            del error
        return load(self._f, torch.float64)

    @staticmethod
    def _attempt(callback: Callable[..., None], *arguments: object) -> BaseException | None:
        try:
            callback(*arguments)
        except BaseException as error:  # KeyboardInterrupt too: the other ranks must not wait for this one
            return error
        return None

    def linearise(self, n: int, t: float, y: Tensor) -> CallbackLinearisation:
        """f(t, y), with products to come."""
        return CallbackLinearisation(self, t, y, self.evaluate(n, t, y))

    def assemble(self, at: CallbackLinearisation, t: float, y: Tensor) -> None:
        """Compute J at (t, y) unless the Mat holds it already."""
        if self._assembled is at:
            return
        mat, pmat = self.require_jacobian("the adjoint")
        write(self._y, y)
        self._peers.call(self._called().computeRHSJacobian, t, self._y, mat, pmat)
        self._assembled = at

    def product(self, v: Tensor, *, transpose: bool) -> Tensor:
        """J v or J^T v with the J that is assembled."""
        mat, _ = self.require_jacobian("a product")
        write(self._y, v)
        (mat.multTranspose if transpose else mat.mult)(self._y, self._product)
        return load(self._product, torch.float64)

    def use_jacobian_p(self, jacobian_p: PETSc.Mat | None, mu: PETSc.Vec) -> None:
        """Let the callback of setRHSJacobianP fill this Mat, or an AIJ one of the sizes of the state and of mu."""
        if not self._called().getDict().get("__rhsjacobianp__"):  # PETSc has no getter, and leaves the Mat as it was
            raise ValueError("the cost gradient mu needs df/dp: call ts.setRHSJacobianP(function) first")
        if jacobian_p is None and self._jacobian_p is None:
            jacobian_p = PETSc.Mat().createAIJ((self._y.getSizes(), mu.getSizes()), comm=mu.comm)
            jacobian_p.setUp()
            self._own.append(jacobian_p)
        self._jacobian_p = jacobian_p or self._jacobian_p

    def add_parameter_product(self, mu: PETSc.Vec, t: float, y: Tensor, v: Tensor) -> None:
        """mu += P^T v."""
        assert self._jacobian_p is not None
        write(self._y, y)
        self._peers.call(self._called().computeRHSJacobianP, t, self._y, self._jacobian_p)
        write(self._y, v)
        self._jacobian_p.multTransposeAdd(self._y, mu, mu)

    def parameter_cotangent(self) -> VecBar:
        """No parameter's cotangent; `adjoint_solve` names mu."""
        return VecBar(None)
