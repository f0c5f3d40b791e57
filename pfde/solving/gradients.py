"""How a solve is differentiated: the values of the argument `gradient`.

`Discrete` is the adjoint of the discrete scheme, exact to rounding; `Backprop` is autograd through the same steps, its
oracle and the baseline that its time and memory are measured against. A gradient says which equations it is for, and
what the forward pass keeps for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from ..schedules import Foreign, Schedule, StoreAll, adopt

Equation = Literal["caputo", "ordinary"]
Store = Literal["state", "stages", "graph"]
Keep = Store | Literal["symplectic"]

_GRADIENTS: list[type[Gradient]] = []


class Gradient:
    """Base of the values of `gradient`; each registers itself.

    Class attributes
    ----------------
    equations : those that it is for
    """

    equations: ClassVar[tuple[Equation, ...]] = ("caputo", "ordinary")

    def __init_subclass__(cls) -> None:
        _GRADIENTS.append(cls)

    @property
    def keep(self) -> Keep | None:
        """What a forward pass keeps beside the states; None where no adjoint of its steps is to follow."""
        return None

    @property
    def plan(self) -> Schedule:
        """The checkpoint schedule of such a forward pass."""
        return StoreAll()

    @property
    def signature(self) -> Any:
        """What has to be the same on the ranks that share a solve."""
        return repr(self)

    @property
    def redraws(self) -> bool:
        """Whether the backward pass evaluates func again, and so has to know of random numbers that it draws."""
        return self.keep is not None


@dataclass(frozen=True, kw_only=True)
class Discrete(Gradient):
    """The discrete adjoint (reverse-accurate).

    Parameters
    ----------
    schedule : when states are kept and when computed again: `StoreAll()` (None), `Revolve(...)`, `Online(...)`, or a
        schedule of the library checkpoint_schedules that has not been used. The gradient is bitwise the same with all,
        for one history (history=None may choose another one when a schedule is to bound the memory) and store="state"
    store : what is kept beside the history's buffer. "state": nothing, f is evaluated again in the backward pass (two
        N x d buffers for the integral-form methods, one for the derivative-form ones). "stages": also the predictors of
        `pece` (a third), otherwise built again from the history, and the stages of an implicit one-step method,
        otherwise solved for again; of other methods nothing more. "graph": the graph of f at every step, as autograd
        would: the most memory, one evaluation of f less a step.
    """

    schedule: Any = None
    store: Store = "state"

    def __post_init__(self) -> None:
        if self.store not in get_args(Store):
            raise ValueError(f"store must be one of {', '.join(get_args(Store))}: got {self.store!r}")
        _ = self.plan  # raises for what is no schedule

    @property
    def keep(self) -> Keep | None:
        """The store."""
        return self.store

    @property
    def signature(self) -> Any:
        """Store and schedule; the folder of snapshots may differ from rank to rank."""
        plan = self.plan
        if isinstance(plan, Foreign):
            return self.store, type(plan.schedule).__name__, plan.schedule.max_n
        parts = tuple((name, value) for name, value in vars(plan).items() if name != "directory")
        return self.store, type(plan).__name__, parts

    @property
    def plan(self) -> Schedule:
        """The schedule, as one of ours."""
        return StoreAll() if self.schedule is None else adopt(self.schedule)

    @property
    def redraws(self) -> bool:
        """Not where all graphs are kept."""
        return not (self.store == "graph" and isinstance(self.plan, StoreAll))


@dataclass(frozen=True)
class Symplectic(Gradient):
    """The discrete adjoint of a one-step method in the least memory beside the states.

    The states of all steps are kept, the stages of a step computed again, and one graph of f is alive at a time:
    N + s + L for N steps, s stages, and a graph of size L. f is evaluated once more a stage than with `Discrete()`,
    which has the s graphs of a step alive.

    The gradient is that of `Discrete`. Matsubara, Miyatake, Yaguchi (2021, arXiv:2102.09750).
    """

    equations = ("ordinary",)

    @property
    def keep(self) -> Keep | None:
        """The states."""
        return "symplectic"


@dataclass(frozen=True, kw_only=True)
class Continuous(Gradient):
    """The continuous adjoint, discretised: y, lambda and theta_bar are integrated backwards in time.

    Memory is that of the outputs, but the gradient is that of no discrete solution: it has the error of both passes,
    and where y' = f is dissipative, going backwards is unstable and the gradient may be wrong altogether, without a
    sign (docs/odes.md has an example). Here for comparison, and for what needs O(1) memory and is not stiff.

    Parameters
    ----------
    rtol, atol : of the backward pass; None takes those of the forward pass
    method : of the backward pass, an explicit one; None takes that of the forward pass, or dopri5 if it is implicit
    step_size : of the backward pass; None takes that of the forward pass
    """

    equations = ("ordinary",)

    rtol: float | None = None
    atol: float | None = None
    method: Any = None
    step_size: float | None = None


@dataclass(frozen=True)
class Backprop(Gradient):
    """Autograd through the same steps: memory O(N (d + f's graph)), time O(N^2 d); supports double backward for
    explicit methods."""


def check_gradient(value: Any, equation: Equation) -> Gradient:
    """The gradient; None is `Discrete()`. Raises TypeError for what is none of this equation."""
    if value is None:
        return Discrete()
    kinds = tuple(kind for kind in _GRADIENTS if equation in kind.equations)
    if not isinstance(value, kinds):
        *others, last = [f"pfde.{kind.__name__}()" for kind in kinds]
        raise TypeError(f"gradient must be {', '.join(others)} or {last}: got {value!r}")
    return value
