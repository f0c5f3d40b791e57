"""Any gradient is that of the same steps by autograd: random method, history, store, schedule, grid, dtype, shape.

What is drawn is described by a `Case`, whose fields are independent; what does not go together (a graded grid for a
method of uniform grids) is replaced by what does, so that no example is thrown away and a failure shrinks to the fields
that matter. The examples are the same in each run; PFDE_PROPERTY_EXAMPLES=2000 takes so many, at random.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import pfde
from pfde.caputo.schemes import METHODS
from pfde.one_step.methods import METHODS as ODE_METHODS
from support.cases import HISTORIES, SCHEDULES, STORES, bounded
from support.drawn import KINDS, derivatives, function, furthest, start

pytestmark = pytest.mark.filterwarnings("ignore:Numba not available:RuntimeWarning")


# An implicit stage is solved to a few dozen eps a step; all else is rounding of sums of N terms.
RTOL = {torch.float64: lambda steps: 1e-10, torch.float32: lambda steps: 500 * steps * 2.0**-23}


SHAPES = [(3,), (), (1,), (2, 3), (0, 3)]
DTYPES = [torch.float64, torch.float32]
common = {
    "kind": st.sampled_from(list(KINDS)),
    "store": st.sampled_from(STORES),
    "schedule": st.sampled_from(list(SCHEDULES)),
    "dtype": st.sampled_from(DTYPES),
    "shape": st.sampled_from(SHAPES),
    "state": st.sampled_from(["tensor", "tuple", "complex"]),
    "steps": st.integers(3, 10),
    "seed": st.integers(0, 9),
    "moving": st.booleans(),
    "repeated": st.booleans(),
}


@dataclass(frozen=True)
class Case(ABC):
    """What both APIs have in common; `moving`: t requires a gradient; `repeated`: a time comes twice."""

    kind: str
    store: str
    schedule: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    state: str
    steps: int
    seed: int
    moving: bool
    repeated: bool
    method: str

    def compare(self, gradient: Any) -> None:
        """Assert that y and its gradient are those of Backprop."""
        found, expected = self.run(gradient), self.run(pfde.Backprop())
        error, allowed = furthest(found, expected), RTOL[self.dtype](self.steps)
        assert error <= allowed, f"relative error {error:.1e}, allowed {allowed:.1e}: {self}"

    def run(self, gradient: Any) -> list[torch.Tensor]:
        """The solution and its gradients by all that requires one."""
        y0 = start(self.shape, self.dtype, self.state, self.seed)
        drawn = function(self.kind, self.dtype, parts=self.state == "tuple")
        y, more = self.solve(drawn, y0, gradient)
        return derivatives(y, [*(y0 if isinstance(y0, tuple) else (y0,)), *drawn.leaves, *more])

    @abstractmethod
    def solve(self, drawn: Any, y0: Any, gradient: Any) -> tuple[Any, list[torch.Tensor]]:
        """y, and the other inputs that require a gradient."""

    def times(self, points: list[float]) -> torch.Tensor:
        """These times as t, one of them twice if so drawn."""
        if self.repeated:
            points = sorted([*points, points[1]], reverse=points[0] > points[1])
        return torch.tensor(points, dtype=torch.float64)


@dataclass(frozen=True)
class Fractional(Case):
    """A solve by `fdeint`; grid: "t", "step_size" (outputs at every third of the steps and the end) or "graded"."""

    history: str
    grid: str
    order: str

    def solve(self, drawn, y0, gradient):
        graded = self.grid == "graded" and bool(METHODS[self.method].rules)
        history = HISTORIES["exact" if graded and self.history == "short" else self.history]()
        h = 0.8 / self.steps
        points = [0.2 + h * n for n in range(self.steps + 1)]
        size = None
        if graded:
            points = [0.2 + 0.8 * (n / self.steps) ** 2 for n in range(self.steps + 1)]
        elif self.grid == "step_size":
            points, size = [*points[:-1:3], points[-1]], h
        t = self.times(points).requires_grad_(self.moving and not graded)
        alpha = self.alpha()
        y = pfde.fdeint(
            drawn.func,
            y0,
            t,
            alpha,
            method=self.method,
            step_size=size,
            history=history,
            gradient=gradient,
            params=drawn.params,
        )
        return y, [x for x in (alpha, t) if isinstance(x, torch.Tensor) and x.requires_grad]

    def alpha(self):
        """One order, or one for each of the last dimension."""
        if self.order == "number":
            return 0.6
        if self.order == "one":
            return 1.0
        several = self.order == "vector" and self.state != "tuple" and self.shape
        orders = torch.linspace(0.5, 0.9, self.shape[-1]) if several else torch.tensor(0.7)
        return orders.double().requires_grad_()


@bounded(50)
@given(
    st.builds(
        Fractional,
        method=st.sampled_from(list(METHODS)),
        history=st.sampled_from(list(HISTORIES)),
        grid=st.sampled_from(["t", "step_size", "graded"]),
        order=st.sampled_from(["number", "tensor", "vector", "one"]),
        **common,
    )
)
def test_fdeint(case):
    case.compare(pfde.Discrete(store=case.store, schedule=SCHEDULES[case.schedule]()))


@dataclass(frozen=True)
class Ordinary(Case):
    """A solve by `odeint`; grid: "t", "step_size" or "adaptive"."""

    grid: str
    decreasing: bool

    @property
    def adaptive(self) -> bool:
        """Whether the steps are chosen by the error."""
        return self.grid != "step_size" and ODE_METHODS[self.method].adaptive

    def solve(self, drawn, y0, gradient):
        # of unequal lengths, but each a whole number of steps
        points = [0.1 + 0.9 * (n * (n + 1)) / (self.steps * (self.steps + 1)) for n in range(self.steps + 1)]
        size = 0.9 * 2 / (self.steps * (self.steps + 1)) if self.grid == "step_size" else None
        if size is not None:
            points = points[:4]
        if self.adaptive:
            points = [0.1, 0.35, 0.4, 1.0]
        t = self.times(points[::-1] if self.decreasing else points).requires_grad_(self.moving)
        func = drawn.func
        if ODE_METHODS[self.method].split:
            func = pfde.Split(drawn.func, _slow)
        y = pfde.odeint(
            func,
            y0,
            t,
            method=self.method,
            rtol=1e-3,
            atol=1e-4,
            step_size=size,
            gradient=gradient,
            params=drawn.leaves,
        )
        return y, [t] if self.moving else []


def _slow(t, y):
    return tuple(map(lambda x: -x / 4 + t, y)) if isinstance(y, tuple | list) else -y / 4 + t


@bounded(60)
@given(
    st.builds(
        Ordinary,
        method=st.sampled_from(list(ODE_METHODS)),
        grid=st.sampled_from(["t", "step_size", "adaptive"]),
        decreasing=st.booleans(),
        **common,
    ),
    st.booleans(),
)
def test_odeint(case, symplectic):
    if symplectic:
        case.compare(pfde.Symplectic())
        return
    schedule = case.schedule
    if case.adaptive and not (schedule == "store all" or schedule == "online"):
        schedule = "online"  # the others have to know the number of steps
    case.compare(pfde.Discrete(store=case.store, schedule=SCHEDULES[schedule]()))


def test_the_measure_sees_an_error():
    """The property is not one that always holds: with another gradient it fails."""
    case = Ordinary(
        **{"kind": "module", "store": "state", "schedule": "store all", "dtype": torch.float64, "shape": (3,)},
        **{"state": "tensor", "steps": 5, "seed": 0, "moving": False, "repeated": False, "method": "rk4"},
        **{"grid": "t", "decreasing": False},
    )
    case.compare(pfde.Discrete())
    with pytest.raises(AssertionError, match="relative error"):
        case.compare(pfde.Continuous())
    assert math.isclose(RTOL[torch.float64](5), 1e-10)
