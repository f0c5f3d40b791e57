"""Models of M y' = f with their gradients by pfde and by `ode_oracle`, grids and steps, how results are compared."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import pfde
from pfde.one_step.methods import METHODS as ODE_METHODS
from pfde.one_step.tableaux import ADDITIVE, TABLEAUX
from support import ode_oracle

RTOL = 1e-12
EPS = torch.finfo(torch.float64).eps
EXPLICIT = [name for name in ODE_METHODS if not ODE_METHODS[name].implicit]
IMPLICIT = [name for name in ODE_METHODS if ODE_METHODS[name].implicit]
WITH_MASS = [name for name in IMPLICIT if name not in ADDITIVE]
ADAPTIVE = [name for name in ODE_METHODS if ODE_METHODS[name].adaptive]
GRADIENTS = {
    "state": pfde.Discrete(),
    "stages": pfde.Discrete(store="stages"),
    "graph": pfde.Discrete(store="graph"),
    "symplectic": pfde.Symplectic(),
    "backprop": pfde.Backprop(),
}
LOOSE = {"rtol": 1e-3, "atol": 1e-5}  # for methods of low order, which would take many steps
TIGHT = {"rtol": 1e-5, "atol": 1e-7}
every_method = pytest.mark.parametrize("method", ODE_METHODS)


def coefficients(name):
    """The method's coefficients as plain numbers."""
    if name in ADDITIVE:
        pair = ADDITIVE[name]
        one, two = pair.implicit, pair.explicit
        return ode_oracle.Coefficients(one.a, one.weights, one.nodes, one.dense, two.a, two.weights)
    one = TABLEAUX[name]
    return ode_oracle.Coefficients(one.a, one.weights, one.nodes, one.dense)


# -- models -----------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A nonlinear right-hand side on (2, 2) that depends on t, with a parameter that it does not use."""

    def __init__(self, seed=7):
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        for name, shape in {"W1": (3, 2), "b1": (3,), "c": (3,), "unused": (2,), "W2": (2, 3), "b2": (2,)}.items():
            setattr(self, name, nn.Parameter(0.6 * torch.randn(shape, generator=g, dtype=torch.float64)))

    def forward(self, t, y):
        return torch.tanh(y @ self.W1.T + self.b1 + self.c * torch.sin(3 * t)) @ self.W2.T + self.b2


class Autonomous(nn.Module):
    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([[0.8, -0.3], [0.5, 1.1]], dtype=torch.float64))

    def forward(self, t, y):
        return torch.sin(y @ self.k)


class Quadrature(nn.Module):
    """f does not depend on y."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([[0.8, -0.3], [0.5, 1.1]], dtype=torch.float64))

    def forward(self, t, y):
        return torch.sin(self.k * t) + 1


def plain(t, y):
    """No parameters."""
    return torch.cos(y) * (1 + t) - y.flip(0)


def model(method, make=Net):
    """A right-hand side for the method: in two parts for an implicit-explicit one."""
    if method not in ADDITIVE:
        return make()
    return pfde.Split(make(), Net(3))


def state():
    return torch.randn(2, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def cotangent(outputs, seed=5):
    return torch.randn(outputs, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- grids ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """Output times, and the steps between them; None for adaptive ones."""

    t: tuple[float, ...]
    pieces: tuple[int, ...] | None
    keywords: dict

    def times(self):
        return torch.tensor(self.t, dtype=torch.float64)


def grid(case, method):
    low = ODE_METHODS[method].order <= 3 or method in IMPLICIT
    if case == "grid":
        if method in ADAPTIVE:  # which take a grid of t as steps only where step_size says so
            return Grid((1.3, 1.2, 1.0, 0.9), (1, 2, 1), {"step_size": 0.1})
        return Grid((1.3, 1.22, 1.0, 0.93, 0.6), (1,) * 4, {})
    if case == "step_size":
        return Grid((0.2, 0.5, 0.65), (2, 1), {"step_size": 0.15})
    if case == "long":
        return Grid((0.2, 0.65, 0.8, 1.1), (3, 1, 2), {"step_size": 0.15})
    t = (0.1, 0.17, 0.5, 0.52, 0.55, 0.9, 1.3, 1.5)
    return Grid(t if case == "adaptive" else tuple(1.6 - x for x in t), None, LOOSE if low else TIGHT)


def cases(method):
    """Adaptive steps in both directions where that is quick."""
    if method not in ADAPTIVE:
        return ("grid", "step_size")
    return ("grid", "step_size", "adaptive", *(("adaptive_down",) if method in EXPLICIT or method == "ark3" else ()))


# -- the two solutions ------------------------------------------------------------------------------------------------


@dataclass
class Result:
    y: torch.Tensor
    y0: torch.Tensor
    theta: torch.Tensor
    t: torch.Tensor | None


def differentiate(solve, func, t, v, y0=None):
    """y and the gradient of <v, y> for y = solve(func, y0, t), with fresh leaves."""
    y0 = (state() if y0 is None else y0).clone().requires_grad_()
    t = t.clone().requires_grad_()
    y = solve(func, y0, t)
    parameters = list(func.parameters()) if isinstance(func, nn.Module) else []
    bars = torch.autograd.grad((v * y).sum(), [y0, t, *parameters], allow_unused=True)
    for (name, _), bar in zip(func.named_parameters() if parameters else (), bars[2:], strict=True):
        assert not name.endswith("unused") or bar is None or not bar.any()
    bars = [torch.zeros_like(x) if b is None else b for x, b in zip([y0, t, *parameters], bars, strict=True)]
    theta = torch.cat([b.reshape(-1) for b in bars[2:]] or [y0.new_zeros(0)])
    return Result(y.detach(), bars[0], theta, bars[1])


def by_pfde(method, grid, gradient, func, v, y0=None, **keywords):
    def solve(func, y0, t):
        return pfde.odeint(func, y0, t, method=method, gradient=gradient, **grid.keywords, **keywords)

    return differentiate(solve, func, grid.times(), v, y0)


def by_oracle(method, grid, func, v, recorded=None, y0=None, mass=None):
    parts = (func.stiff, func.nonstiff) if method in ADDITIVE else (func, None)
    shape = (2, 2) if y0 is None else y0.shape

    def flat(part):
        return None if part is None else lambda t, y: part(t, y.view(shape)).reshape(-1)

    def solve(func, y0, t):
        if grid.pieces is None:
            times = ode_oracle.frozen_times(t, [grid.t[0], *recorded])
        else:
            times = ode_oracle.fixed_times(t, grid.pieces)
        f, g = map(flat, parts)
        y = ode_oracle.solve(coefficients(method), f, y0.reshape(-1), times, t, g=g, mass=mass)
        return y.view(-1, *shape)

    return differentiate(solve, func, grid.times(), v, y0)


def assert_close(a, b, rtol=RTOL, what=""):
    for name in ("y", "y0", "theta", "t"):
        x, ref = getattr(a, name), getattr(b, name)
        if not x.numel():
            continue
        assert x.shape == ref.shape and x.dtype == ref.dtype, name
        error = float((x - ref).norm() / (ref.norm() or 1.0))
        assert error <= rtol, f"{what} {name}: relative error {error:.2e}, allowed {rtol:.1e}"


def assert_bitwise(a, b, what=""):
    for name in ("y", "y0", "theta", "t"):
        assert torch.equal(getattr(a, name), getattr(b, name)), f"{what} {name}"


MASSES = {
    "full": torch.tensor([[2.0, 0.3], [-0.5, 1.5]], dtype=torch.float64),
    "diagonal": torch.tensor([2.0, 0.7], dtype=torch.float64),
    "singular": torch.tensor([[1.0, 0.0], [0.4, 0.0]], dtype=torch.float64),
}


class Algebraic(nn.Module):
    """f of M y' = f, regular on the kernel of the singular M: of index 1."""

    def __init__(self):
        super().__init__()
        self.k = nn.Parameter(torch.tensor([0.7, 1.3, 0.4], dtype=torch.float64))

    def forward(self, t, y):
        a, b = y[..., 0], y[..., 1]
        rate = -self.k[0] * a + torch.sin(b) * torch.cos(t)
        constraint = self.k[1] * b + 0.2 * torch.tanh(a * b) - self.k[2] * a
        return torch.stack([rate, 0.4 * rate + constraint], dim=-1)


class Counted:
    """A right-hand side that knows how often it was called."""

    def __init__(self, func):
        self.func, self.calls = func, 0

    def __call__(self, t, y):
        self.calls += 1
        return self.func(t, y)
