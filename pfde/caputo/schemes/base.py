"""A scheme: convolution weights and one local step, with the step's tangent and transpose.

On the uniform grid t_n = t_0 + n h, n = 0..N, every scheme for D^alpha y = f(t, y), y(t_0) = y_0, is

    r_n = y_0 + sum_{1<=j<n} kappa_{n-j} X_j + sigma_n F_0        (one r for each channel; the history's part)
    (y_n, X_n) = Phi(t_n, r_n, w)                                 (the step; w is the local weight)

with F_0 = f(t_0, y_0), and X_n = f(t_n, y_n) in the integral form (y = y_0 + I^alpha f) or X_n = y_n - y_0 in the
derivative form (D^alpha (y - y_0) = f). Three kinds of step cover all methods:

    explicit              y = r
    implicit              y = r + w f(t, y)
    predictor-corrector   p = r^P,  y = r^C + w f(t, p)           (two channels)

The transpose of a step takes y_bar, the cotangent of y_n as an output, and X_bar, that of X_n (what later rows draw
from it), and gives r_bar, one for each channel, which is at once what the transposed history is fed with:

    explicit              r_bar = y_bar + J^T X_bar                                  theta_bar += P^T X_bar
    implicit, integral    (I - w J)^T r_bar = y_bar + J^T X_bar                      theta_bar += P^T (X_bar + w r_bar)
    implicit, derivative  (I - w J)^T r_bar = y_bar + X_bar                          theta_bar += P^T (w r_bar)
    predictor-corrector   r_bar^C = y_bar + J(y)^T X_bar,  r_bar^P = J(p)^T (w r_bar^C)   (theta_bar likewise)

and the elementwise cotangent of w, f * r_bar (for the predictor-corrector f(t, p) * r_bar^C). J = df/dy,
P = df/dtheta at the state of the step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from ...registry import Registry
from ...system.base import Linearisation, Slope, Stepping, System, Weight


class Weights(NamedTuple):
    """All weights of N steps, for G orders; float64, differentiable functions of alpha.

    kernel : (C, N+1, G), lag k at index k, lag 0 unused
    start : (C, N+1, G), sigma_n at index n, or None when F_0 does not enter
    local : (G,)
    """

    kernel: Tensor
    start: Tensor | None
    local: Tensor


class StepData(NamedTuple):
    """Where a step takes place.

    n, t : its number and time
    w : the local weight
    last : whether n = N, so that no later row draws from X_n
    keep : linearises f where its graphs are to be kept for the backward pass
    """

    n: int
    t: float
    w: Weight
    last: bool
    keep: System | None = None


class Stage(NamedTuple):
    """What a forward step leaves: y_n, X_n, and what its transpose may reuse.

    x : X_n; None for the last step of an explicit scheme, where f need not be evaluated
    predictor : p of a predictor-corrector step
    kept : the linearisations at p and at y, where they were kept or came free
    slopes : the values of f that the step is made of, for the backward pass to compare with
    """

    y: Tensor
    x: Tensor | None = None
    predictor: Tensor | None = None
    kept: tuple[Linearisation | None, ...] = (None, None)
    slopes: tuple[Tensor, ...] = ()


class StepAdjoint(NamedTuple):
    """What the transpose of a step gives: r_bar by channel, X_n once more, and the elementwise cotangent of w.

    slopes : the values of f, as in `Stage`
    """

    r_bar: tuple[Tensor, ...]
    x: Tensor | None
    w_bar: Tensor | None
    slopes: tuple[Tensor, ...] = ()


class Scheme(ABC):
    """A method: its weights and its step. Stateless; one instance serves all solves.

    Class attributes
    ----------------
    name : as in `method=`
    form : "integral" (X = f) or "derivative" (X = y - y_0)
    implicit : whether a step solves an equation
    channels : how many convolutions of X a step needs
    uses_initial_slope : whether F_0 enters (a start column)
    window : the lag from which the kernel is smooth, a sum of decaying exponentials to rounding
    rules : the quadrature of each channel on a nonuniform grid (`intervals`); () where only uniform grids will do
    order, stability, cost : for the tables of the documentation
    """

    name: ClassVar[str]
    form: ClassVar[Literal["integral", "derivative"]]
    implicit: ClassVar[bool]
    channels: ClassVar[int] = 1
    uses_initial_slope: ClassVar[bool]
    rules: ClassVar[tuple[str, ...]] = ()
    window: ClassVar[int] = 2
    order: ClassVar[str]
    stability: ClassVar[str]
    cost: ClassVar[str]

    @property
    def title(self) -> str:
        """What -ts_view says."""
        return f"Caputo equation, method {self.name} (order {self.order}; {self.stability})"

    @property
    def exponents(self) -> tuple[float, float]:
        """kappa_k decays like k^-beta, with beta in this range for the orders in (0, 1]."""
        return (0.0, 1.0) if self.form == "integral" else (1.0, 2.0)

    @abstractmethod
    def weights(self, alpha: Tensor, h: float | Tensor, steps: int) -> Weights:
        """The weights of `steps` steps of size h, a number or 0-d float64, for the orders alpha, (G,) in (0, 1]."""

    @abstractmethod
    def step(self, system: Stepping, at: StepData, r: tuple[Tensor, ...], y0: Tensor, guess: Tensor) -> Stage:
        """One step from its r (C tensors of shape (d,)). `guess` starts an implicit solve."""

    @abstractmethod
    def step_tangent(
        self, system: System, at: StepData, stage: Stage, tangent: StepTangent
    ) -> tuple[Tensor, Tensor | None]:
        """The tangents of y_n and X_n along those of r, w, y_0 and theta, at a step already taken."""

    @abstractmethod
    def step_adjoint(
        self,
        system: System,
        at: StepData,
        stage: Stage,
        y0: Tensor,
        y_bar: Tensor | None,
        x_bar: Tensor | None,
        theta_bar: Any,
    ) -> StepAdjoint:
        """The transpose of a step; `stage` has at least y_n, and the predictor of a predictor-corrector step."""


METHODS: Registry[Scheme] = Registry("method")
"""The schemes by the names that `method=` takes; `rank` orders them in messages and tables, explicit ones first."""


class StepTangent(NamedTuple):
    """The tangents that enter a step: of r (by channel), of w, of y_0, and of the parameters."""

    r: tuple[Tensor, ...]
    w: Weight
    y0: Tensor
    theta: Any


class ExplicitScheme(Scheme):
    """y = r, X = f(t, y)."""

    form = "integral"
    implicit = False

    def step(self, system: Stepping, at: StepData, r: tuple[Tensor, ...], y0: Tensor, guess: Tensor) -> Stage:
        """y = r, and f there unless nothing follows."""
        (y,) = r
        return Stage(y) if at.last else with_slope(system, at, Stage(y))

    def step_tangent(
        self, system: System, at: StepData, stage: Stage, tangent: StepTangent
    ) -> tuple[Tensor, Tensor | None]:
        """y_dot = r_dot, X_dot = J y_dot + P theta_dot."""
        (y_dot,) = tangent.r
        return y_dot, None if at.last else linearised(system, at, stage).jvp(y_dot, tangent.theta)

    def step_adjoint(
        self,
        system: System,
        at: StepData,
        stage: Stage,
        y0: Tensor,
        y_bar: Tensor | None,
        x_bar: Tensor | None,
        theta_bar: Any,
    ) -> StepAdjoint:
        """r_bar = y_bar + J^T x_bar."""
        if x_bar is None:
            return StepAdjoint((total(y_bar, stage.y),), None, None)
        f = linearised(system, at, stage)
        r_bar = plus(f.vjp(x_bar, theta_bar), y_bar)
        return StepAdjoint((r_bar,), f.value, None, (f.value,))


class ImplicitScheme(Scheme):
    """y = r + w f(t, y); X = f(t, y) in the integral form, y - y_0 in the derivative form."""

    implicit = True

    def step(self, system: Stepping, at: StepData, r: tuple[Tensor, ...], y0: Tensor, guess: Tensor) -> Stage:
        """Solve for y; f at y comes free."""
        f: Slope
        kept: Linearisation | None = None
        if at.keep is None:
            y, f = system.solve(at.n, at.t, r[0], at.w, guess)
        else:
            y, kept = at.keep.solve(at.n, at.t, r[0], at.w, guess)
            f = kept
        slope = f.value
        return Stage(y, slope if self.form == "integral" else y - y0, kept=(None, kept), slopes=(slope,))

    def step_tangent(
        self, system: System, at: StepData, stage: Stage, tangent: StepTangent
    ) -> tuple[Tensor, Tensor | None]:
        """(I - w J) y_dot = r_dot + w P theta_dot + w_dot f, and X_dot."""
        f = linearised(system, at, stage)
        p_dot = f.jvp(tangent.y0.new_zeros(tangent.y0.shape), tangent.theta)
        y_dot = system.solve_tangent(at.n, at.t, f, at.w, tangent.r[0] + p_dot * at.w + f.value * tangent.w)
        if self.form == "derivative":
            return y_dot, y_dot - tangent.y0
        return y_dot, f.jvp(y_dot, tangent.theta)

    def step_adjoint(
        self,
        system: System,
        at: StepData,
        stage: Stage,
        y0: Tensor,
        y_bar: Tensor | None,
        x_bar: Tensor | None,
        theta_bar: Any,
    ) -> StepAdjoint:
        """(I - w J)^T r_bar = y_bar + (J^T x_bar or x_bar)."""
        f = linearised(system, at, stage)
        integral = self.form == "integral"
        if x_bar is None:
            b = total(y_bar, stage.y)
        else:
            b = plus(f.vjp(x_bar, retain=True) if integral else x_bar, y_bar)
        r_bar = system.solve_transpose(at.n, at.t, f, at.w, b)
        f_bar = r_bar * at.w
        f.vjp(f_bar if x_bar is None or not integral else f_bar + x_bar, theta_bar)
        x = f.value if integral else stage.y - y0
        return StepAdjoint((r_bar,), x, f.value * r_bar, (f.value,))


def check_order(name: str, alpha: Iterable[float]) -> None:
    """Raise ValueError unless every order is in (0, 1]."""
    for value in alpha:
        if not 0.0 < value <= 1.0:
            raise ValueError(f"{name} must be in (0, 1]: got {value:g}; orders above 1 need y'(t0), not implemented")


def with_slope(system: Stepping, at: StepData, stage: Stage) -> Stage:
    """The stage with X = f(t, y), its graph kept where asked for."""
    if at.keep is None:
        x = system.evaluate(at.n, at.t, stage.y)
        return stage._replace(x=x, slopes=(*stage.slopes, x))
    f = at.keep.linearise(at.n, at.t, stage.y)
    return stage._replace(x=f.value, kept=(stage.kept[0], f), slopes=(*stage.slopes, f.value))


def linearised(system: System, at: StepData, stage: Stage) -> Linearisation:
    """The linearisation of f at y_n: the kept one, or a new one."""
    return stage.kept[1] or system.linearise(at.n, at.t, stage.y)


def plus(x: Tensor, y_bar: Tensor | None) -> Tensor:
    """x + y_bar."""
    return x if y_bar is None else x + y_bar


def total(y_bar: Tensor | None, like: Tensor) -> Tensor:
    """y_bar, or zero where step n is no output."""
    return like.new_zeros(like.shape) if y_bar is None else y_bar
