"""What a right-hand side offers: f, its linearisation, the solution of an implicit stage, and what replays need.

A scheme meets the equation D^alpha y = f(t, y, theta) only through the protocols below, each as small as its user:

    Stepping    f and the solution of a stage               a step; on autograd's graph too (`torch_system.GraphSystem`)
    System      and linearised, transposed                  a step's tangent and transpose
    Replayed    monitors, counts, random numbers            the execution of a checkpoint schedule

and `OneStepping`, `OneStepSystem`, the first two for one-step methods, which have a mass matrix and split right-hand
sides. Two systems exist: torch callables (`system.torch_system`) and the callbacks of a PETSc TS
(`system.petsc_callbacks`), for Caputo equations. A state is a flat tensor of shape (d,), this rank's part of it where a
communicator is shared. A local weight w is a number, or a tensor of shape (d,) when the order alpha differs between
components. M is the mass matrix of M y' = f, else the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

Weight = float | Tensor
T = TypeVar("T")


class Slope(Protocol):
    """f at one (t, y)."""

    @property
    def value(self) -> Tensor:
        """f(t, y), shape (d,); shares memory with nothing that changes."""


class Linearisation(Slope, Protocol):
    """f at one (t, y), with the products of its Jacobians J = df/dy and P = df/dtheta.

    `theta_bar` and `theta_dot` are the system's own: what its `parameter_cotangent` makes, and a tangent of that form.
    """

    def vjp(self, v: Tensor, theta_bar: Any | None = None, *, retain: bool = False) -> Tensor:
        """J^T v; with `theta_bar`, P^T v is added to it. `retain` keeps what a further product needs."""

    def jvp(self, v: Tensor, theta_dot: Any | None = None) -> Tensor:
        """J v, and + P theta_dot where a parameter tangent is given."""


class Stepping(Protocol):
    """What a step needs."""

    def evaluate(self, n: int, t: float, y: Tensor) -> Tensor:
        """f(t, y) at step n, shape (d,). Raises NonFiniteError."""

    def solve(self, n: int, t: float, r: Tensor, w: Weight, guess: Tensor) -> tuple[Tensor, Slope]:
        """Solve M y = r + w f(t, y) from `guess`; return y and f there. Raises ConvergenceError."""


class System(Stepping, Protocol):
    """What a step, its tangent and its transpose need; without a graph."""

    def linearise(self, n: int, t: float, y: Tensor) -> Linearisation:
        """The linearisation of f at (t, y)."""

    def solve(self, n: int, t: float, r: Tensor, w: Weight, guess: Tensor) -> tuple[Tensor, Linearisation]:
        """Solve M y = r + w f(t, y) from `guess`; return y and the linearisation there. Raises ConvergenceError."""

    def solve_transpose(self, n: int, t: float, at: Linearisation, w: Weight, b: Tensor) -> Tensor:
        """Solve (M - w J)^T x = b, the transpose of the linearised `solve`. Raises ConvergenceError."""

    def solve_tangent(self, n: int, t: float, at: Linearisation, w: Weight, b: Tensor) -> Tensor:
        """Solve (M - w J) x = b, the linearised `solve`. Raises ConvergenceError."""


class OneStepping(Stepping, Protocol):
    """What a step of a one-step method needs."""

    @property
    def parts(self) -> Sequence[Stepping]:
        """The system itself; of a split right-hand side its stiff and its nonstiff part."""

    def mass(self, y: Tensor) -> Tensor:
        """M y; y itself where there is no mass matrix."""


class OnGraph(NamedTuple):
    """A system on autograd's graph.

    system : evaluates f there
    leaves : y, and t, h where f's time counts
    at : the step, on these leaves
    begin : how many nodes of autograd there were before
    """

    system: OneStepping
    leaves: tuple[Tensor, ...]
    at: Any
    begin: int


class OneStepSystem(System, Protocol):
    """What a step of a one-step method, its tangent and its transpose need."""

    @property
    def parts(self) -> Sequence[System]:
        """The system itself; of a split right-hand side its stiff and its nonstiff part."""

    def mass(self, y: Tensor) -> Tensor:
        """M y; y itself where there is no mass matrix."""

    def mass_transpose(self, y: Tensor) -> Tensor:
        """M^T y; y itself where there is no mass matrix."""

    def require_finite(self, n: int, t: float, t1: float, *values: Tensor) -> None:
        """Raise NonFiniteError, on every rank, where one of step n's values is NaN or inf."""

    def on_graph(self, at: Any, y: Tensor) -> OnGraph:
        """The system on autograd's graph, the leaves y (and t, h where f's time counts), the step on them."""

    def require_reached(self, out: Tensor, begin: int, *inputs: Tensor) -> None:
        """Raise ValueError where the graph from inputs to out has a leaf that no gradient will reach. Collective."""

    def pull(
        self, outputs: Sequence[tuple[Tensor, Tensor]], leaves: tuple[Tensor, ...], begin: int, theta_bar: Any
    ) -> list[Tensor]:
        """The cotangents of such leaves from (output, its cotangent), flat; the parameters' are added to theta_bar."""


class RandomNumbers(Protocol):
    """The random numbers that f draws, for steps that are taken again to draw them again."""

    def now(self) -> list[Tensor]:
        """torch's random states now: what `restart` needs; none if f draws nothing."""

    def restart(self, states: list[Tensor]) -> None:
        """Let the steps to come draw what they drew when these were the states."""

    def leaf(self, first: int, last: int) -> list[Tensor]:
        """The random states of the steps first+1..last, (steps, bytes) for each generator; none if f draws nothing."""

    def load(self, first: int, leaf: list[Tensor]) -> None:
        """Let the steps after `first` draw what they drew when this was their `leaf`."""

    def forget(self, n: int) -> None:
        """The steps up to n, but the first, will not be evaluated again from what is known of them now."""


class Replayed(Protocol):
    """What the execution of a schedule needs, which takes steps again."""

    @property
    def evaluations(self) -> int:
        """Evaluations of f so far."""

    @property
    def draws(self) -> RandomNumbers:
        """The random numbers of f."""

    def silence(self) -> None:
        """Cancel the monitors of the solvers: what follows is recomputation."""


class Failure:
    """The first exception in the callbacks of one solver.

    Raised through PETSc's C it would leave locked vectors and a half-done solver behind. So a callback runs under
    `guard`, lets the solver end by itself on NaN, and whoever started the solver raises it with `release`.
    """

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def guard(self, function: Callable[..., T], *args: Any) -> T | None:
        """`function(*args)`; None when it fails, or when something has failed before."""
        if self._error is None:
            try:
                return function(*args)
            except BaseException as error:  # KeyboardInterrupt too
                self._error = error
        return None

    def release(self) -> None:
        """Raise what has failed, as it was raised, and be ready for the next solve."""
        error, self._error = self._error, None
        try:
            if error is not None:
                raise error
        finally:
            del error  # else it and its traceback would keep each other, and all the solve holds, alive


def scaled(w: Weight, x: Tensor) -> Tensor:
    """w x, for a weight that is a number or one number a component."""
    return x * w


def add_scaled(target: Tensor, w: Weight, x: Tensor) -> Tensor:
    """target += w x in place."""
    return target.addcmul_(x, w) if isinstance(w, Tensor) else target.add_(x, alpha=w)
