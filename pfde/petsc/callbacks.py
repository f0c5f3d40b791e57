"""What PETSc calls back in a solve by one of its own integrators: f, its Jacobians and their products, and the clock.

    f = explicit + implicit,   J = df/dy,   P = df/dtheta          in s = sign t, increasing, with sign f(sign s, y)

The explicit part enters as RHSFunction, RHSJacobian J and RHSJacobianP P; the implicit part as IFunction y' - f,
IJacobian sigma I - J and IJacobianP -P. The Mats are of type python: products with J and P and with their transposes.

NOTE 1. No callback knows of another. Each makes the linearisation at the (t, u) that it is given and leaves it in the
Mat that it is given; a product uses what is in that Mat and the vector that it is given, nothing else. A vector kept
from one product for the next, to save a reverse pass, is another step's as soon as PETSc calls in another order.

NOTE 2. A TSTrajectory in memory does not store the step with which a TSSolve ends: the adjoint expects to start there.
Continuing a TS by a second TSSolve therefore loses a step. So one TSSolve does all segments: PreStep sets each step
size, PostStep takes the outputs. A segment's share of the steps is given to TSAdjointSetSteps.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import ConvergenceError
from ..system.base import Failure
from ..system.start import PETSc
from ..system.vectors import load, read, write
from .function import Counter, Linear, Part
from .setting import Setting


class Clock:
    """The steps: PreStep sets the size of each, PostStep takes the outputs (NOTE 2).

    Fixed steps start at s_k + i h exactly. Adaptive ones are the controller's, cut to hit each output: to what is
    left, or, if two would go beyond it, to half of that; what the controller wanted before is tried again afterwards.
    """

    def __init__(self, setting: Setting, failure: Failure) -> None:
        self._s, self._sign, self._dtype, self._failure = setting.s, setting.sign, setting.dtype, failure
        self.fixed = setting.fixed
        self.outputs: list[Tensor] = []
        self.counts: list[int] = []  # steps in each interval
        self.sizes: list[float] = []
        self.slack = 8 * math.ulp(max(abs(s) for s in setting.s))
        self._k = self._i = 0  # the interval, and the steps that are done in it
        self._start = self._size = self._wanted = 0.0
        if self.fixed:
            spans = [b - a for a, b in zip(setting.s, setting.s[1:], strict=False)]
            self.counts = [1 if setting.step_size is None else max(1, round(w / setting.step_size)) for w in spans]
            self.sizes = [w / count for w, count in zip(spans, self.counts, strict=True)]

    def begin(self, y0: Tensor) -> None:
        """A solve begins: its first output is y_0."""
        self.outputs = [y0.detach().clone()]

    def take_outputs(self) -> list[Tensor]:
        """The outputs, given away."""
        outputs, self.outputs = self.outputs, []
        return outputs

    def pre_step(self, ts: PETSc.TS) -> None:
        """PETSc's PreStep."""
        if self._failure.guard(self._prepare, ts) is None:
            ts.setConvergedReason(_FAILED)

    def post_step(self, ts: PETSc.TS) -> None:
        """PETSc's PostStep; called after a failed step too."""
        if ts.getConvergedReason() >= 0 and self._failure.guard(self._take, ts) is None:
            ts.setConvergedReason(_FAILED)

    def _prepare(self, ts: PETSc.TS) -> bool:
        k, i = self._k, self._i
        if k == len(self._s) - 1:
            return True
        if self.fixed:
            self._start, self._size = self._s[k] + i * self.sizes[k], self.sizes[k]
        else:
            self._start = self._s[k] if i == 0 else ts.getTime()
            wanted, left = max(ts.getTimeStep(), self._wanted), self._s[k + 1] - self._start
            if wanted < self.slack:
                raise ConvergenceError(
                    f"the step size fell to {wanted:.3g} at t={self._sign * self._start:.6g}: loosen rtol and atol, "
                    "use an implicit method for stiff problems, or check func for a singularity"
                )
            self._size = left if 1.01 * wanted >= left else min(wanted, left / 2)
            self._wanted = wanted if self._size < wanted else 0.0
        ts.setTime(self._start)
        ts.setTimeStep(self._size)
        return True

    def _take(self, ts: PETSc.TS) -> bool:
        t = ts.getTime()
        cut = t - self._start < 0.999 * self._size
        self._i += 1
        if self.fixed:
            if cut:
                raise ConvergenceError(
                    f"PETSc cut the step at t={self._sign * self._start:.6g} from {self._size:.6g} to "
                    f"{t - self._start:.6g}: with fixed steps reduce step_size, and leave ts_max_snes_failures alone"
                )
            ended = self._i == self.counts[self._k]
        else:
            if cut:  # the controller has rejected it: what it wanted before is too large
                self._wanted = 0.0
            ended = t >= self._s[self._k + 1] - self.slack
        if ended:
            self.outputs.append(load(ts.getSolution(), self._dtype))
            if not self.fixed:
                self.counts.append(self._i)
            self._k, self._i = self._k + 1, 0
        return True


_FAILED = PETSc.TS.ConvergedReason.DIVERGED_NONLINEAR_SOLVE  # ends a solve; the failure itself is raised instead


class Recent:
    """What the solvers need to know of the last callbacks, and without func: PETSc's hold on it is in C.

    time, shift : s and shift of the last IJacobian
    terms : |u_dot| + |f| of the last IFunction
    """

    def __init__(self) -> None:
        self.time, self.shift = math.nan, 0.0
        self.terms = torch.empty(0)


class Functions:
    """PETSc's callbacks (NOTE 1): f = explicit + implicit, either of which may be absent."""

    def __init__(self, setting: Setting, counter: Counter, failure: Failure) -> None:
        func, self._failure, self._peers = setting.func, failure, setting.peers
        self.explicit: Part | None = None
        self.implicit: Part | None = None
        self.recent = Recent()
        if setting.method.family == "arkimex" and hasattr(func, "stiff") and hasattr(func, "nonstiff"):
            self.explicit = Part(setting, func.nonstiff, counter, "func.nonstiff")
            self.implicit = Part(setting, func.stiff, counter, "func.stiff")
        elif setting.method.implicit:
            self.implicit = Part(setting, func, counter, "func")
        else:
            self.explicit = Part(setting, func, counter, "func")

    def rhs_function(self, ts: PETSc.TS, s: float, u: PETSc.Vec, g: PETSc.Vec) -> None:
        """g = explicit(s, u)."""
        if self.explicit is None:
            g.set(0.0)
            return
        value = self._guard(ts, self.explicit.value, s, u)
        if value is None:
            g.set(math.nan)
        else:
            write(g, value)

    def i_function(self, ts: PETSc.TS, s: float, u: PETSc.Vec, udot: PETSc.Vec, g: PETSc.Vec) -> None:
        """g = udot - implicit(s, u)."""
        assert self.implicit is not None
        value = self._guard(ts, self.implicit.value, s, u)
        if value is None:
            g.set(math.nan)  # ends Newton's method
        else:
            slope = read(udot)
            self.recent.terms = slope.abs().add_(value.abs())
            write(g, slope - value)

    def rhs_jacobian(self, ts: PETSc.TS, s: float, u: PETSc.Vec, mat: PETSc.Mat, pmat: PETSc.Mat) -> None:
        """J of the explicit part."""
        self._fill(ts, self.explicit, s, u, pmat, 0.0, 1.0)
        mat.assemble()

    def i_jacobian(
        self, ts: PETSc.TS, s: float, u: PETSc.Vec, _udot: PETSc.Vec, shift: float, mat: PETSc.Mat, pmat: PETSc.Mat
    ) -> None:
        """shift I - J of the implicit part."""
        self.recent.time, self.recent.shift = s, shift
        self._fill(ts, self.implicit, s, u, pmat, shift, -1.0)
        mat.assemble()  # another one with -snes_mf_operator

    def rhs_jacobian_p(self, ts: PETSc.TS, s: float, u: PETSc.Vec, mat: PETSc.Mat) -> None:
        """P of the explicit part."""
        self._fill(ts, self.explicit, s, u, mat, 0.0, 1.0)

    def i_jacobian_p(
        self, ts: PETSc.TS, s: float, u: PETSc.Vec, _udot: PETSc.Vec, _shift: float, mat: PETSc.Mat
    ) -> None:
        """-P of the implicit part."""
        self._fill(ts, self.implicit, s, u, mat, 0.0, -1.0)

    def _fill(
        self, ts: PETSc.TS, part: Part | None, s: float, u: PETSc.Vec, mat: PETSc.Mat, shift: float, factor: float
    ) -> None:
        products: Products = mat.getPythonContext()
        products.put(None, shift, factor)  # so that a failure leaves no other state's
        if part is not None:
            products.put(self._guard(ts, part.linearise, s, u), shift, factor)
        mat.assemble()

    def _guard(self, ts: PETSc.TS, function: Callable[[float, Tensor], Any], s: float, u: PETSc.Vec) -> Any:
        result = self._failure.guard(self._call, function, s, u)
        if result is None:
            ts.setConvergedReason(_FAILED)
        return result

    def _call(self, function: Callable[[float, Tensor], Any], s: float, u: PETSc.Vec) -> Any:
        return self._peers.call(function, s, load(u, torch.float64))


class Products(ABC):
    """A = shift I + factor D, D a derivative of f at `at`, zero for None: the context of a Mat of type python.

    It holds nothing but what the callback of its Mat has put here last. It does not know its Mat: the Mat's hold on it
    is in C, where no garbage collector would see the cycle.
    """

    def __init__(self, dtype: torch.dtype, failure: Failure) -> None:
        self._dtype, self._failure = dtype, failure
        self.at: Linear | None = None
        self.shift, self.factor = 0.0, 1.0

    def put(self, at: Linear | None, shift: float, factor: float) -> None:
        """The derivative at another state."""
        self.at, self.shift, self.factor = at, shift, factor

    def mult(self, _mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """PETSc's MatMult."""
        self._multiply(self._product, x, y)

    def multTranspose(self, _mat: PETSc.Mat, x: PETSc.Vec, y: PETSc.Vec) -> None:
        """PETSc's MatMultTranspose."""
        self._multiply(self._product_transpose, x, y)

    @abstractmethod
    def _product(self, v: Tensor) -> Tensor:
        """A v."""

    @abstractmethod
    def _product_transpose(self, v: Tensor) -> Tensor:
        """A^T v."""

    def _multiply(self, product: Callable[[Tensor], Tensor], x: PETSc.Vec, y: PETSc.Vec) -> None:
        value = self._failure.guard(product, read(x))
        if value is None:
            y.set(math.nan)  # ends a Krylov method
        else:
            write(y, value)


class StateProducts(Products):
    """shift I + factor J."""

    def _product(self, v: Tensor) -> Tensor:
        if self.at is None:
            return self.shift * v
        return self.shift * v + self.factor * self.at.state_jvp(v.to(self._dtype, copy=True))

    def _product_transpose(self, v: Tensor) -> Tensor:
        if self.at is None:
            return self.shift * v
        return self.shift * v + self.factor * self.at.state_vjp(v.to(self._dtype, copy=True))


class ParameterProducts(Products):
    """factor P."""

    def _product(self, v: Tensor) -> Tensor:
        assert self.at is not None
        return self.factor * self.at.parameter_jvp(v)

    def _product_transpose(self, v: Tensor) -> Tensor:
        assert self.at is not None
        return self.factor * self.at.parameter_vjp(v.to(self._dtype, copy=True))
