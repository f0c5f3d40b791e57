"""Solves of both kinds of equation that are to go wrong, and the gradient of one that does not.

What a fault must leave behind is checked the same way everywhere: the original exception object comes out, and a solve
after it gives, bit for bit, the gradient of a solve in a fresh state.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import pfde
from pfde.caputo.schemes import METHODS

D = torch.float64
T = torch.linspace(0, 1, 6, dtype=D)
NAN = float("nan")
LOOSE = {"rtol": 1e-4, "atol": 1e-6}
# Every method of fdeint; of odeint one form of each kind: explicit, implicit, and both, with adaptive and fixed steps.
FRACTIONAL = {name: {"method": name} for name in METHODS}
ORDINARY = {
    "dopri5": {"method": "dopri5", **LOOSE},
    "dopri5 fixed": {"method": "dopri5", "step_size": 0.2},
    "rk4": {"method": "rk4"},
    "cn": {"method": "cn"},
    "sdirk4": {"method": "sdirk4", "rtol": 1e-2, "atol": 1e-3},
    "ark2": {"method": "ark2", "rtol": 1e-2, "atol": 1e-3},
    "ark3 fixed": {"method": "ark3", "step_size": 0.2},
}
FORMS = FRACTIONAL | ORDINARY
IMPLICIT = [name for name, scheme in METHODS.items() if scheme.implicit]
KEPT = {
    "state": pfde.Discrete(),
    "stages": pfde.Discrete(store="stages"),
    "graph": pfde.Discrete(store="graph"),
    "online": pfde.Discrete(schedule=pfde.Online(1, leaf=2)),
    "symplectic": pfde.Symplectic(),
}
GRADIENTS = {**KEPT, "backprop": pfde.Backprop(), "continuous": pfde.Continuous()}


def takes(form: str, gradient: str, *_: object) -> bool:
    """Whether this form has this gradient."""
    return form in ORDINARY or gradient not in ("symplectic", "continuous")


class Field(nn.Module):
    """f = sin(a y) + t, which calls `hook(k)` at its k-th evaluation, k = 1, 2, ..."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.5, -0.3, 0.8], dtype=D))
        self.calls = 0
        self.hook: Callable[[int], object] = lambda _: None

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        self.hook(self.calls)
        return torch.sin(self.a * y) + t


class Frozen(Field):
    """The same with a frozen factor beside the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=D), requires_grad=False)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(t, y) * self.scale


def start(*values: float, grad: bool = True) -> Tensor:
    return torch.tensor(values or (1.0, 2.0, -0.5), dtype=D, requires_grad=grad)


def order() -> Tensor:
    return torch.tensor(0.6, dtype=D, requires_grad=True)


def decay(_t: Tensor, y: Tensor) -> Tensor:
    return -y / (1 + y * y)


def rest(_t: Tensor, y: Tensor) -> Tensor:
    return -0.1 * y


def split(f: Callable, form: str) -> Callable:
    """f, for the methods that need two parts with a second one that is smooth."""
    return pfde.Split(f, rest) if form.startswith("ark") else f


def solve(f: Callable, y0: Tensor, form: str, *, alpha: object = 0.6, t: Tensor = T, **keywords: object) -> Tensor:
    keywords = FORMS[form] | keywords
    if form in FRACTIONAL:
        return pfde.fdeint(f, y0, t, alpha, **keywords)
    return pfde.odeint(split(f, form), y0, t, **keywords)


class Pending:
    """A solve that awaits its backward pass: y, the sum of its squares, and all that requires a gradient."""

    def __init__(self, form: str, f: Field | None = None, **keywords: object) -> None:
        self.f, self.y0, self.alpha = f or Field(), start(), order()
        self.y = solve(self.f, self.y0, form, alpha=self.alpha, **keywords)
        self.loss = self.y.square().sum()
        self.inputs = (self.y0, self.f.a, *((self.alpha,) if form in FRACTIONAL else ()))

    def backward(self, *, retain_graph: bool = False) -> list[Tensor]:
        return list(torch.autograd.grad(self.loss, self.inputs, retain_graph=retain_graph))


def gradients(form: str, **keywords: object) -> list[Tensor]:
    """d(sum of squares of all outputs)/d(y0, a, alpha if there is one) of a fresh solve."""
    return Pending(form, **keywords).backward()


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b), f"got {a}, expected bitwise {b}"


@contextlib.contextmanager
def without_collector() -> Iterator[None]:
    """What goes meanwhile goes with its last reference."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
