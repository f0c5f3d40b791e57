"""What func is when the backward pass evaluates it: what it was in the forward pass, by identity, or ReplayError.

The oracle is `Backprop`, whose graph holds what func used; it evaluates nothing again.
"""

import functools
import random

import numpy as np
import pytest
import torch
from torch import nn

import pfde
from support.covering import pairs

D = torch.float64
T = torch.tensor([0.0, 0.5, 1.0], dtype=D)

APIS = {
    "dopri5": lambda f, y0, **k: pfde.odeint(f, y0, T, method="dopri5", rtol=1e-4, atol=1e-6, **k),
    "rk4": lambda f, y0, **k: pfde.odeint(f, y0, T, method="rk4", step_size=0.1, **k),
    "cn": lambda f, y0, **k: pfde.odeint(f, y0, T, method="cn", step_size=0.25, **k),
    "implicit_midpoint": lambda f, y0, **k: pfde.odeint(f, y0, T, method="implicit_midpoint", step_size=0.25, **k),
    "esdirk3": lambda f, y0, **k: pfde.odeint(f, y0, T, method="esdirk3", step_size=0.5, **k),
    "euler": lambda f, y0, **k: pfde.fdeint(f, y0, T, 0.7, method="euler", step_size=0.1, **k),
    "pece": lambda f, y0, **k: pfde.fdeint(f, y0, T, 0.7, method="pece", step_size=0.1, **k),
    "trapezoid": lambda f, y0, **k: pfde.fdeint(f, y0, T, 0.7, method="trapezoid", step_size=0.25, **k),
    "bdf2": lambda f, y0, **k: pfde.fdeint(f, y0, T, 0.7, method="bdf2", step_size=0.25, **k),
}
EXPLICIT = ("rk4", "euler", "pece")
NATIVE = {"petsc:rk:4": "rk4_classic", "petsc:cn": "cn"}
GRADIENTS = {
    "state": pfde.Discrete(),
    "stages": pfde.Discrete(store="stages"),
    "online": pfde.Discrete(schedule=pfde.Online(2)),
    "revolve": pfde.Discrete(schedule=pfde.Revolve(2, leaf=2)),
    "symplectic": pfde.Symplectic(),
}


class Net(nn.Module):
    """A small network with everything that a program may change between two passes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 5), nn.Linear(5, 3)
        self.register_buffer("scale", torch.linspace(0.5, 1.0, 3))
        self.graph = torch.eye(3, dtype=D)  # a plain attribute
        self.factor, self.calls = 1.0, 0

    def forward(self, t, y):
        self.calls += 1
        value = (self.outer(torch.tanh(self.inner(y))) * self.scale) @ self.graph * self.factor
        return value if self.training else 0.5 * value


def net() -> Net:
    torch.manual_seed(1)
    return Net().double()


def start() -> torch.Tensor:
    return torch.linspace(-1.0, 1.0, 6, dtype=D).reshape(2, 3).clone().requires_grad_()


def new_matrices():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(3, 3, generator=generator, dtype=D) for _ in range(2)]


def by_attribute(solve):
    f, y = net(), start()
    z = y
    for matrix in new_matrices():
        f.graph = matrix
        z = solve(f, z)[-1]
    return z, [y, *f.parameters()], f


def by_buffer(solve):
    f, y = net(), start()
    z = y
    for matrix in new_matrices():
        f.scale = matrix[0]
        z = solve(f, z)[-1]
    return z, [y, *f.parameters()], f


def by_closure(solve):
    y = start()
    z = y
    for matrix in new_matrices():
        z = solve(lambda t, x: torch.tanh(x) @ matrix, z)[-1]  # noqa: B023  (late binding is what is tested)
    return z, [y], None


def by_new_memory(solve):
    f, y = net(), start()
    z = solve(f, y)[-1]
    for p in f.parameters():
        p.data = 1.5 * p.data
    return z, [y, *f.parameters()], f


def by_eval(solve):
    f, y = net(), start()
    z = solve(f, y)[-1]
    f.eval()
    return z, [y, *f.parameters()], f


def by_thaw(solve):
    f, y = net(), start()
    f.inner.weight.requires_grad_(False)
    z = solve(f, y)[-1]
    f.inner.weight.requires_grad_(True)
    return z, [y, f.outer.weight], f


def by_method(solve):
    f, y = net(), start()
    z = solve(f.forward, y, params=list(f.parameters()))[-1]
    f.graph, f.scale = 2.0 * f.graph, 3.0 * f.scale
    f.eval()
    return z, [y, *f.parameters()], f


def by_functional_call(solve, *, frozen):
    f, y = net(), start()
    f.requires_grad_(not frozen)
    block = nn.Module()
    block.f = f
    block.forward = lambda z: solve(f, z)[-1]
    factor = torch.ones((), dtype=D, requires_grad=True)
    weights = {name: p * factor for name, p in block.named_parameters()}
    z = torch.func.functional_call(block, weights, (y,))
    return z, [y, factor, *(p for p in f.parameters() if p.requires_grad)], f


CHANGES = {
    "attribute": by_attribute,
    "buffer": by_buffer,
    "closure": by_closure,
    "p.data": by_new_memory,
    "eval": by_eval,
    "thaw": by_thaw,
    "bound method": by_method,
    "functional_call, frozen": lambda solve: by_functional_call(solve, frozen=True),
    "functional_call": lambda solve: by_functional_call(solve, frozen=False),
}


def gradients(change, api, **keywords):
    z, inputs, f = CHANGES[change](lambda *a, **k: api(*a, **k, **keywords))
    before = None if f is None else ({k: v.clone() for k, v in f.state_dict().items()}, f.graph, f.training)
    found = torch.autograd.grad(z.square().sum(), inputs)
    if f is not None:  # all is as the program had it
        assert all(torch.equal(value, before[0][name]) for name, value in f.state_dict().items())
        assert f.graph is before[1] and f.training is before[2]
    return torch.cat([x.reshape(-1) for x in found])


FRACTIONAL = ("euler", "pece", "trapezoid", "bdf2")


def together(api, kind, *_):
    """Whether this api takes this gradient."""
    return not (api in FRACTIONAL and kind == "symplectic")


exact_gradients = functools.cache(lambda change, api: gradients(change, APIS[api], gradient=pfde.Backprop()))


@pytest.mark.parametrize(
    ("api", "kind", "change"),
    [
        pytest.param(*row, marks=[pytest.mark.smoke] if row[1] == "state" else [])
        for row in pairs(APIS, GRADIENTS, CHANGES, valid=together)
    ],
)
def test_what_is_set_anew_is_put_back_for_the_backward_pass(api, kind, change) -> None:
    exact = exact_gradients(change, api)
    found = gradients(change, APIS[api], gradient=GRADIENTS[kind])
    assert (found - exact).norm() < 1e-11 * exact.norm()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", NATIVE)
def test_for_petscs_own_methods_too(method, change) -> None:
    def petscs(f, y0, **k):
        return pfde.odeint(f, y0, T, method=method, step_size=0.25, **k)

    def ours(f, y0, **k):
        return pfde.odeint(f, y0, T, method=NATIVE[method], step_size=0.25, gradient=pfde.Backprop(), **k)

    exact, found = gradients(change, ours), gradients(change, petscs)
    assert (found - exact).norm() < 1e-9 * exact.norm()


def test_for_the_continuous_adjoint_too() -> None:
    keywords = {"gradient": pfde.Continuous(rtol=1e-9, atol=1e-11)}
    for change in ("attribute", "eval", "p.data", "functional_call"):
        exact = gradients(change, APIS["dopri5"], gradient=pfde.Backprop())
        found = gradients(change, APIS["dopri5"], **keywords)
        assert (found - exact).norm() < 1e-2 * exact.norm()  # its own error, of the forward tolerance; 0.3 without


def test_a_parameter_frozen_after_the_forward_pass_gets_none() -> None:
    """As in plain autograd: its gradient is computed and not kept, and the others' are right."""
    found = []
    for how in (pfde.Backprop(), pfde.Discrete()):
        f, y0 = net(), start()
        z = APIS["rk4"](f, y0, gradient=how)[-1]
        f.inner.weight.requires_grad_(False)
        z.square().sum().backward()
        assert f.inner.weight.grad is None and not f.inner.weight.requires_grad
        found.append(torch.cat([y0.grad.reshape(-1), f.outer.weight.grad.reshape(-1)]))
    assert (found[1] - found[0]).norm() < 1e-12 * found[0].norm()


@pytest.mark.parametrize("derived", [False, True], ids=["leaf", "derived"])
@pytest.mark.parametrize("kind", GRADIENTS)
def test_a_hook_acts_once_on_the_whole_gradient(kind, derived) -> None:
    """A hook that is not linear tells one call on the sum from a call on each term."""
    found = []
    for how in (pfde.Backprop(), GRADIENTS[kind]):
        calls = []
        leaf = torch.tensor([0.3, -0.4, 0.5], dtype=D, requires_grad=True)
        p = leaf.exp() if derived else leaf
        p.register_hook(lambda g, calls=calls: (calls.append(1), g.clamp(-0.05, 0.05))[1])
        y = APIS["rk4"](lambda t, y, p=p: -p * y, start(), params=[p], gradient=how)
        y[-1].square().sum().backward()
        assert len(calls) == 1
        found.append(leaf.grad)
    assert torch.allclose(found[0], found[1], rtol=1e-12, atol=0)
    assert float(found[0].abs().max()) > 0.01


@pytest.mark.parametrize(("api", "kind"), pairs(EXPLICIT, GRADIENTS, valid=together))
def test_buffers_are_afterwards_what_the_forward_pass_left(api, kind) -> None:
    torch.manual_seed(3)
    f = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()
    exact, found = [], []
    for how, out in ((pfde.Backprop(), exact), (GRADIENTS[kind], found)):
        y0 = torch.randn(5, 3, dtype=D, generator=torch.Generator().manual_seed(4)).requires_grad_()
        z = APIS[api](lambda t, y: f(y), y0, params=list(f.parameters()), gradient=how)[-1]
        left = {name: value.clone() for name, value in f.named_buffers()}
        out.extend(torch.autograd.grad(z.square().sum(), [y0, *f.parameters()]))
        assert all(torch.equal(value, left[name]) for name, value in f.named_buffers())
    scale = max(float(x.norm()) for x in exact)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() < 1e-11 * scale


# -- what cannot be held is noticed ------------------------------------------------------------------------------------


class Restless(nn.Module):
    """f times a factor that is another one in the backward pass."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind, self.calls = net(), kind, 0
        self.own = torch.Generator().manual_seed(5)

    def forward(self, t, y):
        self.calls += 1
        factor = {
            "numpy": lambda: float(np.random.rand()),
            "random": random.random,
            "generator": lambda: float(torch.rand((), generator=self.own)),
            "counter": lambda: 1.0 + 1e-3 * self.calls,
        }[self.kind]()
        return self.net(t, y) * (0.5 + factor)


@pytest.mark.parametrize(
    ("api", "gradient", "kind"),
    pairs(EXPLICIT, GRADIENTS, ["numpy", "random", "generator", "counter"], valid=together),
)
def test_a_function_that_is_not_the_same_at_every_call_is_noticed(api, gradient, kind) -> None:
    """With adaptive or implicit steps such a function does not get as far as a gradient."""
    y0 = start()
    y = APIS[api](Restless(kind), y0, gradient=GRADIENTS[gradient])
    with pytest.raises(pfde.ReplayError, match=r"step \d+ of 10.*store='graph'"):
        y[-1].sum().backward()


def moving_average(f):
    for p in f.parameters():
        p.data.mul_(0.9999)


def one_entry(f):
    f.outer.weight.data[0, 0] += 1e-7


def number(f):
    f.factor = 1.0 + 1e-9


@pytest.mark.parametrize(
    ("api", "kind", "change"), pairs(APIS, GRADIENTS, [moving_average, one_entry, number], valid=together)
)
def test_a_change_in_place_is_noticed(api, kind, change) -> None:
    f, y0 = net(), start()
    y = APIS[api](f, y0, gradient=GRADIENTS[kind])
    change(f)
    with pytest.raises(pfde.ReplayError, match="not what it was in the forward pass"):
        y[-1].sum().backward()


@pytest.mark.parametrize("method", NATIVE)
def test_petscs_own_methods_notice_too(method) -> None:
    for change in (moving_average, number):
        f, y0 = net(), start()
        y = pfde.odeint(f, y0, T, method=method, step_size=0.25)
        change(f)
        with pytest.raises(pfde.ReplayError, match=r"at t=\S+, is not what it was"):
            y[-1].sum().backward()


def test_spectral_norm_in_training_is_noticed() -> None:
    """Every call of f moves its estimate of the largest singular value."""
    layer = nn.Linear(3, 3).double()
    with torch.no_grad():  # singular values close to each other: it moves slowly, and for long
        layer.weight.copy_(torch.diag(torch.tensor([1.0, 0.99, 0.98])).roll(1, 0))
    layer = nn.utils.parametrizations.spectral_norm(layer, n_power_iterations=1)
    y = APIS["rk4"](lambda t, y: torch.tanh(layer(y)), start(), params=list(layer.parameters()))
    with pytest.raises(pfde.ReplayError):
        y[-1].sum().backward()


def test_one_row_of_a_large_batch_is_noticed_in_single_precision() -> None:
    """A change of 1e-3 in one of 4096 rows: 4e-6 of the state's norm."""
    torch.manual_seed(0)
    factor = torch.ones(4096, 1)
    for api in ("rk4", "euler", "pece"):
        y0 = torch.randn(4096, 4, requires_grad=True)
        y = APIS[api](lambda t, y: -factor * torch.tanh(y), y0)
        factor[1234] += 1e-3
        with pytest.raises(pfde.ReplayError):
            y[-1].sum().backward()


@pytest.mark.parametrize(("api", "kind", "dtype"), pairs(APIS, GRADIENTS, [torch.float32, D], valid=together))
def test_an_equilibrium_is_no_false_alarm(api, kind, dtype) -> None:
    """There f is nothing but rounding, and stages that are built again differ by rounding."""
    matrix = torch.tensor([[-40.0, 39.9, 0.0], [39.9, -40.0, 0.0], [0.3, 0.3, -1.0]], dtype=dtype)
    rest = torch.tensor([1.0, 1.0, 0.6], dtype=dtype)

    def f(t, y):
        return 0.05 * (y - rest) @ matrix.T

    y0 = (rest + torch.tensor([[0.0, 0.0, 0.0], [1e-6, 0.0, 0.0]], dtype=dtype)).requires_grad_()
    y = APIS[api](f, y0, gradient=GRADIENTS[kind])
    (bar,) = torch.autograd.grad(y[-1].sum(), y0)
    assert bool(torch.isfinite(bar).all())
