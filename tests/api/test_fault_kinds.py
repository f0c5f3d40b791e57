"""What changes between the passes is either held, and the gradient right, or noticed, and ReplayError names the step.

Never a third: random API, method, gradient, store and schedule, and a fault among those that the documentation's table
lists. The reference is Backprop without the fault, which is what the forward pass computed.

f that gives other values at every call has no solution of an implicit or adaptive step: fixed explicit steps there.
PFDE_PROPERTY_EXAMPLES=2000 takes so many examples, at random.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import pfde
from pfde.caputo.schemes import METHODS
from pfde.one_step.methods import METHODS as ODE_METHODS
from support.cases import HISTORIES, SCHEDULES, STORES, bounded

pytestmark = pytest.mark.filterwarnings("ignore:Numba not available:RuntimeWarning")
ORDINARY = [name for name in ODE_METHODS if not ODE_METHODS[name].split]
EXPLICIT = ["euler", "midpoint", "heun2", "bosh3", "rk4", "fehlberg", "dopri5", "tsit5", "dopri8"]
NATIVE = ["petsc:rk:4", "petsc:rk:5dp"]
RTOL = 1e-10


class Field(nn.Module):
    """f = g s (net(y) - y) + c t, with a buffer s, a tensor attribute c, a number g and a list."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 3, dtype=torch.float64)
        with torch.no_grad():
            self.net.weight.copy_(torch.tensor([[0.3, -0.2, 0.1], [0.0, 0.4, 0.2], [-0.1, 0.2, 0.3]]))
            self.net.bias.copy_(torch.tensor([0.1, -0.2, 0.3]))
        self.register_buffer("s", torch.tensor(0.9, dtype=torch.float64))
        self.c = torch.tensor(0.2, dtype=torch.float64)
        self.g, self.factors = 1.1, [0.8]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.g * self.factors[0] * self.s * (torch.tanh(self.net(y)) - y) + self.c * t


class Train(Field):
    """Another function in train mode than in eval mode."""

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) * (1.0 if self.training else 0.5)


class Normed(Field):
    """With batch statistics, which are those of the batch in train mode; the running ones are only kept."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 0.3 * self.norm(super().forward(t, y))


class Spectral(Field):
    """Spectral normalisation in train mode: a power iteration at every call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.net = torch.nn.utils.parametrizations.spectral_norm(self.net, n_power_iterations=1)


class Drawing(Field):
    """With numbers that torch's default generator knows nothing of."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) * (1 + 1e-3 * self.draw())


class Counting(Field):
    """A call counter of Python's."""

    calls = 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(t, y) * (1 + 1e-4 * self.calls)


def own_generator() -> Callable[[], float]:
    """Uniform numbers of a generator of one's own."""
    generator = torch.Generator().manual_seed(3)
    return lambda: float(torch.rand((), generator=generator))


def numpys() -> Callable[[], float]:
    """Uniform numbers of numpy's, without its global state."""
    return np.random.default_rng(3).random


# -- what must be noticed: made before the solve, changed after it --------------------------------------------------

Change = Callable[[Any], None]


def _nothing(f: Any) -> None:
    """What changes does so by itself."""


def _through_data(f: Field) -> None:
    f.net.weight.data.mul_(1.01)


def _step(f: Field) -> None:
    with torch.no_grad():
        f.net.bias.add_(0.01)


def _buffer_in_place(f: Field) -> None:
    f.s.mul_(1.01)


def _number(f: Field) -> None:
    f.g = 1.2


def _list(f: Field) -> None:
    f.factors[0] = 0.81


NOTICED: dict[str, tuple[Callable[[], Field], Change]] = {
    "a parameter through .data": (Field, _through_data),
    "an optimizer's step": (Field, _step),
    "a buffer in place": (Field, _buffer_in_place),
    "a number": (Field, _number),
    "a list's content": (Field, _list),
}
BY_ITSELF: dict[str, Callable[[], Field]] = {
    "an own generator": lambda: Drawing(own_generator()),
    "numpy": lambda: Drawing(numpys()),
    "Python": lambda: Drawing(random.Random(3).random),
    "a counter": Counting,
    "spectral_norm": Spectral,
}


@dataclass(frozen=True)
class Case:
    """A solve by either API."""

    method: str
    ordinary: bool
    adaptive: bool
    store: str
    schedule: str
    symplectic: bool
    history: str
    steps: int

    def gradient(self) -> Any:
        """As drawn, where it goes together."""
        if self.by_petsc:
            return None
        if self.ordinary and self.symplectic:
            return pfde.Symplectic()
        schedule = self.schedule
        if self.chooses_steps and schedule not in ("store all", "online"):
            schedule = "online"
        return pfde.Discrete(store=self.store, schedule=SCHEDULES[schedule]())

    @property
    def by_petsc(self) -> bool:
        """Whether it is one of PETSc's own methods."""
        return self.method.startswith("petsc:")

    @property
    def chooses_steps(self) -> bool:
        """Whether steps are adaptive."""
        return self.ordinary and self.adaptive and not self.by_petsc and ODE_METHODS[self.method].adaptive

    @property
    def keeps_graphs(self) -> bool:
        """Whether the backward pass evaluates no f again: all graphs are kept, or those of the last leaf are all."""
        return self.store == "graph" and not self.symplectic and self.schedule == "store all"

    def solve(self, f: Any, y0: Tensor, gradient: Any) -> Tensor:
        """y at three times."""
        h = 0.6 / self.steps
        t = torch.tensor([0.0, h, 0.6], dtype=torch.float64)
        if not self.ordinary:
            history = HISTORIES[self.history]()
            return pfde.fdeint(f, y0, t, 0.7, method=self.method, step_size=h, history=history, gradient=gradient)
        size = None if self.chooses_steps else h
        return pfde.odeint(f, y0, t, method=self.method, step_size=size, rtol=1e-4, atol=1e-5, gradient=gradient)


def cases(methods, ordinary):
    return st.builds(
        Case,
        method=st.sampled_from(methods),
        ordinary=st.just(ordinary),
        adaptive=st.booleans(),
        store=st.sampled_from(STORES),
        schedule=st.sampled_from(list(SCHEDULES)),
        symplectic=st.sampled_from([False, False, True]) if ordinary else st.just(False),
        history=st.sampled_from(list(HISTORIES)),
        steps=st.integers(3, 8),
    )


every_case = st.one_of(cases(ORDINARY, True), cases(list(METHODS), False))
explicit_case = st.one_of(cases(EXPLICIT, True), cases(["euler", "pece"], False))
any_case = st.one_of(cases(ORDINARY, True), cases(list(METHODS), False), cases(NATIVE, True))


def start() -> Tensor:
    return torch.tensor([[0.5, -0.3, 0.8], [1.0, 0.2, -0.6], [0.1, 0.7, 0.4]], dtype=torch.float64).requires_grad_()


def reference(case: Case, make: Callable[[], Any]) -> list[Tensor]:
    """By Backprop, nothing changed."""
    f, y0 = make(), start()
    y = case.solve(f, y0, pfde.Backprop())
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (y0, *f.net.parameters()))]


def assert_close(found, expected, rtol=RTOL):
    size = max(float(x.norm()) for x in expected)
    for x, ref in zip(found, expected, strict=True):
        error = float((x - ref).norm()) / size
        assert error <= rtol, f"relative error {error:.1e}, allowed {rtol:.0e}"


def gradient_unless_noticed(case, y, inputs):
    """The gradient of |y|^2, or None where func was found to be another."""
    try:
        return torch.autograd.grad(y.square().sum(), inputs)
    except pfde.ReplayError as error:
        assert "step " in str(error) and "what it was in the forward pass" in str(error)
        assert not case.keeps_graphs
        return None


@bounded(20)
@given(every_case, st.sampled_from(list(NOTICED)))
def test_what_cannot_be_held_is_noticed(case, kind):
    make, change = NOTICED[kind]
    f, y0 = make(), start()
    y = case.solve(f, y0, case.gradient())
    change(f)
    try:
        found = gradient_unless_noticed(case, y, (y0, *f.net.parameters()))
    except RuntimeError as error:  # torch's own check, of what a graph keeps and of parameters
        assert "modified by an inplace operation" in str(error)
        return
    if found is None:
        return
    assert case.store == "graph" and not case.symplectic, "neither noticed nor kept"
    if kind != "a parameter through .data":  # which is there to go behind autograd's back
        assert_close([y.detach(), *found], reference(case, make))


@bounded(20)
@given(explicit_case, st.sampled_from(list(BY_ITSELF)))
def test_what_is_another_at_each_call_is_noticed(case, kind):
    case = Case(**{**vars(case), "adaptive": False})
    make = BY_ITSELF[kind]
    f, y0 = make(), start()
    y = case.solve(f, y0, case.gradient())
    found = gradient_unless_noticed(case, y, (y0, *f.net.parameters()))
    if found is None:
        return
    if kind != "spectral_norm":  # which is the same function once its iteration has converged
        assert case.store == "graph" and not case.symplectic, "neither noticed nor kept"
    elif not case.keeps_graphs:
        assert_close([y.detach(), *found], reference(case, make), rtol=1e-7)
        return
    assert_close([y.detach(), *found], reference(case, make))


# -- what must be right ---------------------------------------------------------------------------------------------


def _attribute(f: Field) -> None:
    f.c = torch.tensor(5.0, dtype=torch.float64)


def _buffer(f: Field) -> None:
    f.s = torch.tensor(5.0, dtype=torch.float64)


def _data(f: Field) -> None:
    f.net.weight.data = torch.zeros(3, 3, dtype=torch.float64)


def _eval(f: Field) -> None:
    f.eval()


def _frozen(f: Field) -> None:
    for p in f.net.parameters():
        p.requires_grad_(False)


def _replaced(f: Field) -> None:
    f.net = nn.Linear(3, 3, dtype=torch.float64)


RIGHT: dict[str, tuple[Callable[[], Field], Change]] = {
    "nothing": (Field, _nothing),
    "an attribute set anew": (Field, _attribute),
    "a buffer set anew": (Field, _buffer),
    "p.data set anew": (Field, _data),
    "eval()": (Train, _eval),
    "requires_grad": (Field, _frozen),
    "a submodule set anew": (Field, _replaced),
    "batch norm": (Normed, _nothing),
    "batch norm and eval()": (Normed, _eval),
}


@bounded(30)
@given(any_case, st.sampled_from(list(RIGHT)))
def test_what_can_be_held_is_right(case, kind):
    make, change = RIGHT[kind]
    f, y0 = make(), start()
    parameters = tuple(f.net.parameters())
    y = case.solve(f, y0, case.gradient())
    loss = y.square().sum()
    change(f)
    now = {name: x.clone() for name, x in f.state_dict().items()}
    loss.backward()
    for name, x in f.state_dict().items():
        assert torch.equal(x, now[name]), f"{name} is not what the forward pass left"
    found = [torch.zeros_like(x) if x.grad is None else x.grad for x in (y0, *parameters)]
    expected = (_without_change if case.by_petsc else reference)(case, make)
    if kind == "requires_grad":
        found, expected = found[:1], expected[1:2]
        assert_close(found, expected)
        return
    assert_close([y.detach(), *found], expected)


def _without_change(case: Case, make: Callable[[], Any]) -> list[Tensor]:
    """By the method itself: PETSc's own have no Backprop."""
    f, y0 = make(), start()
    y = case.solve(f, y0, None)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (y0, *f.net.parameters()))]


@bounded(12)
@given(any_case)
def test_generated_weights_get_their_gradient(case):
    """torch.func.functional_call, the call being over before the backward pass."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.f = Field().requires_grad_(False)

        def forward(self, y0: Tensor, gradient: Any) -> Tensor:
            return case.solve(self.f, y0, gradient)

    def gradients(gradient: Any) -> list[Tensor]:
        y0, z = start(), torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
        model = Whole()
        weights = {name: x.detach() * (1 + z) for name, x in model.named_parameters()}
        y = torch.func.functional_call(model, weights, (y0, gradient))
        return [y.detach(), *torch.autograd.grad(y.square().sum(), (y0, z))]

    if not case.by_petsc:
        assert_close(gradients(case.gradient()), gradients(pfde.Backprop()))
        return
    z = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    f, y0 = Field(), start()
    with torch.no_grad():
        for p in f.parameters():
            p.mul_(1.4)
    y = case.solve(f, y0, None)
    bars = torch.autograd.grad(y.square().sum(), (y0, *f.net.parameters()))
    along = sum(float((bar * p.detach() / 1.4).sum()) for bar, p in zip(bars[1:], f.net.parameters(), strict=True))
    assert_close(gradients(None), [y.detach(), bars[0], torch.full_like(z, along).detach()])


@bounded(12)
@given(any_case)
def test_a_hook_acts_once(case):
    f, y0 = Field(), start()
    acted = []

    def hook(bar: Tensor) -> Tensor:
        acted.append(bar)
        return 2 * bar

    f.net.weight.register_hook(hook)
    case.solve(f, y0, case.gradient()).square().sum().backward()
    assert len(acted) == 1
    expected = (_without_change if case.by_petsc else reference)(case, Field)
    assert_close([y0.grad, f.net.weight.grad, f.net.bias.grad], [expected[1], 2 * expected[2], expected[3]])
