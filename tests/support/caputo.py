"""A model of D^alpha y = f with its gradient by pfde and by `oracle`, and how two results are compared."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import pfde
from pfde.caputo.schemes import METHODS
from support import oracle

RTOL = 1e-12
EPS = torch.finfo(torch.float64).eps
IMPLICIT = [name for name, scheme in METHODS.items() if scheme.implicit]
STORES = ["state", "stages", "graph"]
GRADIENTS = {store: pfde.Discrete(store=store) for store in STORES} | {"backprop": pfde.Backprop()}
ALPHAS = {
    "number": 0.6,
    "scalar": torch.tensor(0.6, dtype=torch.float64),
    "one": torch.tensor([1.0], dtype=torch.float64),
    "row": torch.tensor([0.35, 0.7, 0.95], dtype=torch.float64),
    "column": torch.tensor([[0.45], [0.8]], dtype=torch.float64),
    "full": torch.tensor([[0.35, 0.7, 0.7], [0.7, 0.35, 0.95]], dtype=torch.float64),
}
every_method = pytest.mark.parametrize("method", METHODS)
every_store = pytest.mark.parametrize("store", STORES)


class Net(nn.Module):
    """A nonlinear right-hand side on (..., 3) that depends on t."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(7)
        for name, shape in {"W1": (4, 3), "b1": (4,), "c": (4,), "W2": (3, 4), "b2": (3,)}.items():
            setattr(self, name, nn.Parameter(0.4 * torch.randn(shape, generator=g, dtype=torch.float64)))

    def forward(self, t, y):
        return torch.tanh(y @ self.W1.T + self.b1 + self.c * torch.sin(3 * t)) @ self.W2.T + self.b2


@dataclass
class Result:
    y: torch.Tensor
    y0: torch.Tensor
    theta: torch.Tensor
    alpha: torch.Tensor | None


def state():
    return torch.randn(2, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def cotangent(steps, arriving="all"):
    v = torch.randn(steps + 1, 2, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    keep = torch.zeros(steps + 1, 1, 1, dtype=torch.float64)
    keep[
        {"all": slice(None), "terminal": slice(-1, None), "initial": slice(0, 1), "some": slice(0, None, 4)}[arriving]
    ] = 1
    return v * keep


def differentiate(solve, alpha, v, func=None):
    """y and the gradient of <v, y> for y = solve(func, y0, alpha), with fresh leaves."""
    func = func or Net()
    y0 = state().requires_grad_()
    tensor = isinstance(alpha, torch.Tensor)
    alpha = alpha.clone().requires_grad_() if tensor else alpha
    y = solve(func, y0, alpha)
    parameters = [p for p in func.parameters() if p.requires_grad] if isinstance(func, nn.Module) else []
    inputs = [y0, *parameters, *([alpha] if tensor else [])]
    bars = torch.autograd.grad((v * y).sum(), inputs, allow_unused=True)
    bars = [torch.zeros_like(x) if b is None else b for x, b in zip(inputs, bars, strict=True)]
    theta = torch.cat([b.reshape(-1) for b in bars[1 : 1 + len(parameters)]] or [y0.new_zeros(0)])
    return Result(y.detach(), bars[0], theta, bars[-1] if tensor else None)


def by_pfde(method, steps, alpha, gradient, v, func=None, **keywords):
    t = torch.linspace(0.2, 1.4, steps + 1, dtype=torch.float64)

    def solve(func, y0, alpha):
        return pfde.fdeint(func, y0, t, alpha, method=method, gradient=gradient, **keywords)

    return differentiate(solve, alpha, v, func)


_cache = {}


def by_oracle(method, steps, alpha, v, func=None, key=None):
    """As `by_pfde`, by the dense oracle; results for the standard model are kept by `key`."""

    def solve(func, y0, alpha):
        order = torch.as_tensor(alpha, dtype=torch.float64)
        order = order.reshape(1) if order.numel() == 1 else order.expand(2, 3).reshape(-1)

        def flat(t, y):
            return func(torch.tensor(t, dtype=torch.float64), y.view(2, 3)).reshape(-1)

        y = oracle.solve(method, flat, y0.reshape(-1), order, 0.2, 1.2 / steps, steps)
        return y.view(-1, 2, 3)

    if key is None:
        return differentiate(solve, alpha, v, func)
    if (key := (method, steps, *key)) not in _cache:
        _cache[key] = differentiate(solve, alpha, v, func)
    return _cache[key]


def assert_close(a, b, rtol=RTOL):
    for name in ("y", "y0", "theta", "alpha"):
        x, ref = getattr(a, name), getattr(b, name)
        assert (x is None) == (ref is None), name
        if x is None or not x.numel():
            continue
        assert x.shape == ref.shape and x.dtype == ref.dtype, name
        error = float((x - ref).norm() / (ref.norm() or 1.0))
        assert error <= rtol, f"{name}: relative error {error:.2e}, allowed {rtol:.1e}"


def assert_bitwise(a, b):
    for name in ("y", "y0", "theta", "alpha"):
        x, ref = getattr(a, name), getattr(b, name)
        assert (x is None and ref is None) or torch.equal(x, ref), name
