"""A PETSc TS's own callbacks as right-hand side: RHSFunction, RHSJacobian and RHSJacobianP.

The Jacobian is assembled by the user's callback into the user's Mat, only when a product with it is asked for.
One Mat serves all linearisations of a TS, so each checks that what the Mat holds is its own.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .operators import Assembled
from .peers import Peers
from .stage_solver import Staged, StageSolver
from .start import PETSc
from .vectors import load, write


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
    ts : with a RHSFunction
    vec : a Vec of the state
    implicit : whether stages are to be solved, with the TS's SNES
    """

    def __init__(self, ts: PETSc.TS, vec: PETSc.Vec, *, implicit: bool) -> None:
        self._ts = ts
        self._jacobian_p: PETSc.Mat | None = None
        self._y, self._f, self._product = vec.duplicate(), vec.duplicate(), vec.duplicate()
        self._assembled: CallbackLinearisation | None = None
        self._mat, self._pmat, jacobian = ts.getRHSJacobian()
        self._has_jacobian = jacobian is not None
        self.evaluations = 0
        if implicit:
            self._require_jacobian("an implicit method")
            ts.computeRHSJacobian(ts.getTime(), vec, self._mat, self._pmat)  # gives the Mat its nonzero pattern
            operator = Assembled(self._mat, self._pmat, vec)
            peers = Peers(vec.comm.tompi4py())
            self.stages = StageSolver(ts.getSNES(), self.linearise, operator, vec, torch.float64, peers)

    def _require_jacobian(self, who: str) -> None:
        if not self._has_jacobian:
            raise ValueError(f"{who} needs the Jacobian of the TS: call ts.setRHSJacobian(function, J, P) first")

    def evaluate(self, n: int, t: float, y: Tensor) -> Tensor:
        """f(t, y) by the TS's RHSFunction. Raises NonFiniteError on every rank."""
        write(self._y, y)
        self._ts.computeRHSFunction(t, self._y, self._f)
        self.evaluations += 1
        if not math.isfinite(self._f.norm(PETSc.NormType.INFINITY)):  # global: every rank sees the same
            raise NonFiniteError(f"RHSFunction returned NaN or inf at t={t:.6g}, step {n}")
        return load(self._f, torch.float64)

    def linearise(self, n: int, t: float, y: Tensor) -> CallbackLinearisation:
        """f(t, y), with products to come."""
        return CallbackLinearisation(self, t, y, self.evaluate(n, t, y))

    def assemble(self, at: CallbackLinearisation, t: float, y: Tensor) -> None:
        """Compute J at (t, y) unless the Mat holds it already."""
        if self._assembled is at:
            return
        self._require_jacobian("the adjoint")
        write(self._y, y)
        self._ts.computeRHSJacobian(t, self._y, self._mat, self._pmat)
        self._assembled = at

    def product(self, v: Tensor, *, transpose: bool) -> Tensor:
        """J v or J^T v with the J that is assembled."""
        write(self._y, v)
        (self._mat.multTranspose if transpose else self._mat.mult)(self._y, self._product)
        return load(self._product, torch.float64)

    def use_jacobian_p(self, jacobian_p: PETSc.Mat | None, mu: PETSc.Vec) -> None:
        """Let the callback of setRHSJacobianP fill this Mat, or an AIJ one of the sizes of the state and of mu."""
        if not self._ts.getDict().get("__rhsjacobianp__"):  # PETSc has no getter, and leaves the Mat as it was
            raise ValueError("the cost gradient mu needs df/dp: call ts.setRHSJacobianP(function) first")
        if jacobian_p is None and self._jacobian_p is None:
            jacobian_p = PETSc.Mat().createAIJ((self._y.getSizes(), mu.getSizes()), comm=mu.comm)
            jacobian_p.setUp()
        self._jacobian_p = jacobian_p or self._jacobian_p

    def add_parameter_product(self, mu: PETSc.Vec, t: float, y: Tensor, v: Tensor) -> None:
        """mu += P^T v."""
        assert self._jacobian_p is not None
        write(self._y, y)
        self._ts.computeRHSJacobianP(t, self._y, self._jacobian_p)
        write(self._y, v)
        self._jacobian_p.multTransposeAdd(self._y, mu, mu)

    def parameter_cotangent(self) -> VecBar:
        """No parameter's cotangent; `adjoint_solve` names mu."""
        return VecBar(None)
