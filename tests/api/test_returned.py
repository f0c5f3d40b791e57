"""What func returns: its argument, a view, a constant, something kept, sparse; and what it was made with outside.

All of it is right under `Backprop`, the oracle here, and so it is under every gradient, store and schedule.
"""

import pytest
import torch
from torch import nn

import pfde
from support.covering import pairs

D = torch.float64
T = torch.tensor([0.0, 0.5, 1.0], dtype=D)

ODE = {  # method -> step_size; None for adaptive steps
    "dopri5": None,
    "tsit5": None,
    "bosh3": None,
    "fehlberg": None,
    "dopri8": None,
    "rk4": 0.25,
    "cn": 0.25,
    "implicit_midpoint": 0.25,
    "sdirk4": 0.5,
}
FDE = ("euler", "pece", "trapezoid", "bdf2")
HOW = {
    "state": pfde.Discrete(),
    "stages": pfde.Discrete(store="stages"),
    "graph": pfde.Discrete(store="graph"),
    "online": pfde.Discrete(schedule=pfde.Online(2)),
    "symplectic": pfde.Symplectic(),
}


def solve(func, y0, method, how, params):
    if method in ODE:
        keywords = {"rtol": 1e-5, "atol": 1e-7} if ODE[method] is None else {"step_size": ODE[method]}
        return pfde.odeint(func, y0, T, method=method, gradient=how, params=params, **keywords)
    return pfde.fdeint(func, y0, T, 0.7, method=method, step_size=0.25, gradient=how, params=params)


def parameter() -> torch.Tensor:
    return torch.tensor([0.5, -0.3], dtype=D, requires_grad=True)


def parts(p):
    a, _ = torch.stack([p, 2.0 * p]).unbind()
    return lambda t, y: -a * y


def attention(p):
    weights = torch.softmax(p[:, None] * p[None, :], 1)  # computed once, used by f
    return lambda t, y: torch.tanh(y) @ weights - y


def nested(p):
    k = p.exp()
    twice = 2.0 * k
    return lambda t, y: -k * y + torch.tanh(twice)


def mixed(p):
    k = p.exp()
    return lambda t, y: -k * y + p


def sparse(p):
    matrix = torch.sparse_coo_tensor(
        torch.tensor([[0, 1], [1, 0]]), torch.tensor([1.0, -2.0], dtype=D), (2, 2), check_invariants=True
    )
    return lambda t, y: (torch.sparse.mm(matrix, (y * p)[:, None])[:, 0]).to_sparse()


def kept(p):
    buffer = torch.tensor([0.2, 0.4], dtype=D)
    return lambda t, y: buffer


def energy(p):
    """A gradient of its own inside, of y where it requires one and of a copy where it does not."""

    def func(t, y):
        with torch.enable_grad():
            z = y if y.requires_grad else y.detach().requires_grad_()
            (slope,) = torch.autograd.grad((p * torch.cos(z)).sum(), z, create_graph=True)
        return slope

    return func


FUNCS = {
    "y": lambda p: lambda t, y: y,
    "a view of y": lambda p: lambda t, y: y[:],
    "y, turned": lambda p: lambda t, y: y.flip(0),
    "a constant": kept,
    "the parameter": lambda p: lambda t, y: p,
    "a derived tensor": lambda p: (lambda k: lambda t, y: k)(p.exp()),
    "made with a derived tensor": lambda p: (lambda k: lambda t, y: -k * y)(p.exp()),
    "one of several parts": parts,
    "attention": attention,
    "derived twice": nested,
    "derived and direct": mixed,
    "sparse": sparse,
    "a gradient": energy,
}


def gradients(name, method, how):
    p, y0 = parameter(), torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    y = solve(FUNCS[name](p), y0, method, how, [p])
    loss = (torch.tensor([1.0, 2.0, 3.0], dtype=D)[:, None] * y.square()).sum()
    found = torch.autograd.grad(loss, (y0, p), allow_unused=True, retain_graph=True)
    again = torch.autograd.grad(loss, (y0, p), allow_unused=True)  # what is outside f serves twice
    assert all(a is b or torch.equal(a, b) for a, b in zip(found, again, strict=True))
    return [torch.zeros(2, dtype=D) if x is None else x for x in found]


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    ("method", "how", "name"),
    pairs([*ODE, *FDE], HOW, FUNCS, valid=lambda method, how, _: method in ODE or how != "symplectic"),
)
def test_what_func_may_return(method, how, name) -> None:
    exact = gradients(name, method, pfde.Backprop())
    found = gradients(name, method, HOW[how])
    scale = max(float(x.norm()) for x in exact)
    for a, b in zip(found, exact, strict=True):
        assert (a - b).norm() < 1e-12 * scale


@pytest.mark.smoke
def test_the_identity_has_the_gradient_of_the_exponential() -> None:
    y0 = torch.ones(1, dtype=D, requires_grad=True)
    y = pfde.odeint(lambda t, y: y, y0, T, rtol=1e-10, atol=1e-12)
    (bar,) = torch.autograd.grad(y[-1].sum(), y0)
    assert abs(float(bar) - torch.e) < 1e-8


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("name", FUNCS)
@pytest.mark.parametrize("method", ["petsc:rk:4", "petsc:cn"])
def test_petscs_own_methods_take_it_too(method, name) -> None:
    p, y0 = parameter(), torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    y = pfde.odeint(FUNCS[name](p), y0, T, method=method, step_size=0.25, params=[p])
    q, z0 = parameter(), torch.tensor([1.0, 2.0], dtype=D, requires_grad=True)
    ours = "rk4_classic" if method == "petsc:rk:4" else "cn"
    z = pfde.odeint(FUNCS[name](q), z0, T, method=ours, step_size=0.25, params=[q], gradient=pfde.Backprop())
    found = torch.autograd.grad(y[-1].square().sum(), (y0, p), allow_unused=True)
    exact = torch.autograd.grad(z[-1].square().sum(), (z0, q), allow_unused=True)
    for a, b in zip(found, exact, strict=True):
        a, b = (torch.zeros(2, dtype=D) if x is None else x for x in (a, b))
        assert (a - b).norm() < 1e-9 * max(1.0, float(b.norm()))


def test_a_cached_parametrisation() -> None:
    """Inside `parametrize.cached()` all evaluations share one graph of the weight."""
    found = []
    for how in (pfde.Backprop(), pfde.Discrete(), pfde.Symplectic()):
        torch.manual_seed(0)
        layer = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2).double())
        with nn.utils.parametrize.cached():
            y = pfde.odeint(
                lambda t, y, layer=layer: torch.tanh(layer(y)),
                torch.tensor([1.0, 2.0], dtype=D),
                T,
                method="rk4",
                step_size=0.25,
                params=list(layer.parameters()),
                gradient=how,
            )
            bars = torch.autograd.grad(y[-1].sum(), list(layer.parameters()))
        found.append(torch.cat([x.reshape(-1) for x in bars]))
    for other in found[1:]:
        assert (other - found[0]).norm() < 1e-12 * found[0].norm()


@pytest.mark.parametrize("method", ["rk4", "cn", "euler", "trapezoid"])
def test_a_sparse_gradient_stays_sparse(method) -> None:
    """nn.Embedding(sparse=True), which torch's SparseAdam needs so."""
    rows, found = torch.tensor([0, 2]), []
    for how in (pfde.Backprop(), pfde.Discrete(), pfde.Discrete(store="graph")):
        torch.manual_seed(0)
        table = nn.Embedding(4, 2, sparse=True).double()
        y = solve(
            lambda t, y, table=table: torch.tanh(table(rows)) - y,
            torch.zeros(2, 2, dtype=D),
            method,
            how,
            list(table.parameters()),
        )
        y[-1].square().sum().backward()
        found.append(table.weight.grad)
    for other in found[1:]:
        assert other.is_sparse
        assert (other.to_dense() - found[0].to_dense()).norm() < 1e-12 * found[0].to_dense().norm()


def test_a_graph_outside_f_is_gone_through_once() -> None:
    """However many steps there are: what made the derived tensor may be dearer than the solve."""
    calls = []

    class Dear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.exp()

        @staticmethod
        def backward(ctx, bar):
            calls.append(1)
            return bar

    p = parameter()
    k = Dear.apply(p)
    y = pfde.odeint(lambda t, y: -k * y, torch.ones(2, dtype=D), T, method="rk4", step_size=0.05, params=[p])
    y[-1].sum().backward()
    assert len(calls) == 1


def test_a_derived_tensor_of_something_that_gets_no_gradient_is_refused() -> None:
    p, other = parameter(), parameter()
    k = other.exp()
    with pytest.raises(ValueError, match="requires grad but is none of its parameters"):
        pfde.odeint(lambda t, y: -k * p * y, torch.ones(2, dtype=D), T, method="rk4", step_size=0.25, params=[p])


def test_an_output_of_a_node_whose_other_output_is_a_parameter_is_refused() -> None:
    """params=[a] names one part of a tensor; what f uses of the other part would get no gradient."""
    w = torch.ones(2, 2, dtype=D, requires_grad=True)
    a, b = w.unbind()
    with pytest.raises(ValueError, match="requires grad but is none of its parameters"):
        pfde.odeint(lambda t, y: -a * y + b, torch.ones(2, dtype=D), T, method="rk4", step_size=0.25, params=[a])


def test_memory_that_func_writes_to_is_still_named() -> None:
    memory = torch.zeros(2, dtype=D)

    def func(t, y):
        return torch.mul(y, -1.0, out=memory)

    with torch.no_grad(), pytest.raises(RuntimeError, match="wrote to what it had returned before"):
        pfde.odeint(func, torch.ones(2, dtype=D), T, method="rk4", step_size=0.25)
