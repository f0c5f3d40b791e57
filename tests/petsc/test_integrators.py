"""PETSc's own integrators: their gradients against autograd through the same steps written by hand."""

import math
import types
from itertools import pairwise

import pytest
import torch
from petsc4py import PETSc

from pfde.petsc import problem as module
from pfde.system.layout import StateLayout
from support.integrator_steps import ARKIMEX, BY_HAND, RK, allowed, by_hand
from support.integrators import DOUBLE, STEP, TIMES, Model, difference, gradient, inputs, loss, new_stats, solve


@pytest.mark.parametrize("backwards", [False, True], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("method", BY_HAND)
def test_gradient_equals_autograd_through_the_steps(method, backwards):
    y0, W, b = inputs()
    times = [-t for t in TIMES] if backwards else TIMES
    expected = by_hand(method, Model(W, b), y0, times)
    stats = new_stats()
    y = solve(method, Model(W, b), y0, (W, b), times, stats=stats)
    assert difference(y, expected) < allowed(method)
    error = difference(gradient(y, (y0, W, b)), gradient(expected, (y0, W, b)))
    assert error < allowed(method), f"{method}: {error:.1e}"
    assert (stats.steps, stats.rejected, stats.nfe_recompute) == (9, 0, 0)
    assert stats.nfe_forward >= 9
    assert stats.nfe_backward >= 9
    assert (stats.newton_iterations > 0) == (stats.linear_iterations > 0) == (":rk:" not in method)


@pytest.mark.parametrize("method", ["petsc:rk:4", "petsc:cn", "petsc:theta:0.5"])
def test_parts_that_are_not_there(method):
    """f without y, f without parameters, a parameter without f, only y0, only parameters."""
    y0, _, b = inputs()
    unused = torch.ones(2, 2, dtype=DOUBLE, requires_grad=True)

    def without_y(t, y):
        return b * torch.cos(t) + 0 * y.detach()

    y, expected = solve(method, without_y, y0, (unused, b)), by_hand(method, without_y, y0, TIMES)
    found = gradient(y, (y0, unused, b))
    assert difference(found[::2], gradient(expected, (y0, b))) < allowed(method)
    assert float(found[1].abs().max()) == 0.0
    (found,) = gradient(solve(method, lambda t, y: -y * t, y0), (y0,))
    (wanted,) = gradient(by_hand(method, lambda t, y: -y * t, y0, TIMES), (y0,))
    assert difference([found], [wanted]) < allowed(method)
    (found,) = gradient(solve(method, lambda t, y: -y * b, y0.detach(), (b,)), (b,))
    (wanted,) = gradient(by_hand(method, lambda t, y: -y * b, y0.detach(), TIMES), (b,))
    assert difference([found], [wanted]) < allowed(method)
    assert not solve(method, lambda t, y: -y, y0.detach()).requires_grad


@pytest.mark.parametrize("method", ["petsc:theta:0.5", "petsc:beuler", "petsc:cn"])
def test_without_step_size_the_times_are_the_grid(method):
    y0, W, b = inputs()
    times = [0.0, 0.1, 0.25, 0.5]
    expected = torch.stack([y := y0] + [y := BY_HAND[method](Model(W, b), s, t - s, y) for s, t in pairwise(times)])
    y = solve(method, Model(W, b), y0, (W, b), times, step_size=None)
    assert difference(gradient(y, (y0, W, b)), gradient(expected, (y0, W, b))) < allowed(method)


def taylor_slopes(method, **kwargs):
    at = inputs()
    torch.manual_seed(5)
    direction = [torch.randn_like(x) for x in at]

    def J(e):
        y0, W, b = (x.detach() + e * d for x, d in zip(at, direction, strict=True))
        return float(loss(solve(method, Model(W, b), y0, (W, b), **kwargs)))

    y0, W, b = at
    g = gradient(solve(method, Model(W, b), y0, (W, b), **kwargs), at)
    slope = sum(float((a * d).sum()) for a, d in zip(g, direction, strict=True))
    J0, steps = J(0.0), [1e-3 * 2.0**-k for k in range(3)]
    zeroth = [abs(J(e) - J0) for e in steps]
    first = [abs(J(e) - J0 - e * slope) for e in steps]
    return [[math.log2(r / s) for r, s in pairwise(rs)] for rs in (zeroth, first)]


@pytest.mark.parametrize(
    "method", [f"petsc:rk:{x}" for x in RK] + [f"petsc:arkimex:{x}" for x in ARKIMEX] + ["petsc:cn", "petsc:theta:0.7"]
)
def test_taylor(method):
    zeroth, first = taylor_slopes(method, times=[0.0, 0.1, 0.3, 0.4], step_size=0.1)
    assert all(abs(s - 1) < 0.02 for s in zeroth), zeroth
    assert all(abs(s - 2) < 0.02 for s in first), first


@pytest.mark.parametrize("backwards", [False, True], ids=["increasing", "decreasing"])
@pytest.mark.parametrize("method", ["petsc:rk:5dp", "petsc:rk:8vr", "petsc:arkimex:4"])
def test_adaptive(method, backwards):
    """The steps change with the tolerance, and with them the gradient by no more than it."""
    y0, W, b = inputs()
    times = [-t for t in TIMES] if backwards else TIMES
    stats = new_stats()
    y = solve(method, Model(W, b), y0, (W, b), times, step_size=None, tolerance=1e-9, stats=stats)
    tight = solve("petsc:rk:8vr", Model(W, b), y0, (W, b), times, step_size=None, tolerance=1e-13)
    error = difference(gradient(y, (y0, W, b)), gradient(tight, (y0, W, b)))
    assert error < 1e-6, f"{error:.1e}"
    assert stats.steps > 3


def test_all_of_f_is_implicit_without_a_split():
    y0, W, b = inputs()
    model = Model(W, b)
    y = solve("petsc:arkimex:ars443", lambda t, y: model(t, y), y0, (W, b))
    whole = types.SimpleNamespace(stiff=model, nonstiff=lambda t, y: 0 * y)
    expected = by_hand("petsc:arkimex:ars443", whole, y0, TIMES)
    assert difference(gradient(y, (y0, W, b)), gradient(expected, (y0, W, b))) < 1e-10


# What callbacks leave behind


@pytest.mark.parametrize("method", ["petsc:rk:4", "petsc:cn", "petsc:arkimex:3"])
def test_products_are_of_the_point_that_their_matrix_was_given(method, monkeypatch):
    """J at one point, P at another, products of both in turn with two vectors: nothing of one is in the other."""
    y0, W, b = inputs()
    model, runs = Model(W, b), []
    init = module.Integration.__init__
    monkeypatch.setattr(module.Integration, "__init__", lambda run, *a, **k: (init(run, *a, **k), runs.append(run))[0])
    solve(method, model, y0, (W, b))  # not differentiated: the run would be spent
    y = solve(method, model, y0, (W, b))
    ts, explicit = runs[-1]._ts, ":rk:" in method
    part = model.stiff if "arkimex" in method else model
    vec = lambda x: PETSc.Vec().createWithArray(x.detach().clone().numpy(), comm=PETSc.COMM_SELF)  # noqa: E731
    points = [(0.2, torch.tensor([0.4, -1.0, 0.3], dtype=DOUBLE)), (1.7, torch.tensor([-0.9, 0.2, 1.5], dtype=DOUBLE))]
    if explicit:
        jacobian = ts.getRHSJacobian()[0]
        (parameter,) = (m for m in runs[-1]._owned if isinstance(m, PETSc.Mat) and m.getSize()[1] == 12)
    else:
        jacobian = ts.getIJacobian()[0]
        parameter = [m for m in runs[-1]._owned if isinstance(m, PETSc.Mat) and m.getSize()[1] == 12][-1]

    def at_point(k, matrix, of_rhs, of_implicit):
        t, u = points[k]
        if explicit:
            of_rhs(t, vec(u), matrix)
        else:
            of_implicit(t, vec(u), vec(0 * u), 5.0, matrix, imex=True)

    def set_jacobian(k):
        at_point(k, jacobian, ts.computeRHSJacobian, ts.computeIJacobian)

    def set_parameter(k):
        at_point(k, parameter, ts.computeRHSJacobianP, ts.computeIJacobianP)

    def dense(k):
        t, u = torch.tensor(points[k][0], dtype=DOUBLE), points[k][1]

        def f(u, W, b):
            m = Model(W, b)
            return (m.stiff if "arkimex" in method else m)(t, u)

        J, JW, Jb = torch.autograd.functional.jacobian(f, (u, W.detach(), b.detach()))
        P = torch.cat([JW.reshape(3, 9), Jb], dim=1)
        return (J, P) if explicit else (5 * torch.eye(3, dtype=DOUBLE) - J, -P)

    def check(mat, A, v, w):
        out, back = mat.createVecLeft(), mat.createVecRight()
        mat.multTranspose(vec(w), back)
        assert float((torch.tensor(back.array) - A.T @ w).abs().max()) < 1e-13
        mat.mult(vec(v), out)
        assert float((torch.tensor(out.array) - A @ v).abs().max()) < 1e-13

    assert callable(part)
    torch.manual_seed(8)
    for j, p in [(0, 1), (1, 0), (0, 0)]:
        set_jacobian(j)
        set_parameter(p)
        J, P = dense(j)[0], dense(p)[1]
        for _ in range(2):
            check(jacobian, J, torch.randn(3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE))
            check(parameter, P, torch.randn(12, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE))
        set_jacobian(1 - j)  # leaves the other matrix as it is
        check(parameter, P, torch.randn(12, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE))
    del y


@pytest.mark.parametrize("method, step_size", [("petsc:rk:5dp", None), ("petsc:rk:4", STEP), ("petsc:cn", STEP)])
def test_second_backward_and_pending_solves(method, step_size):
    y0, W, b = inputs()
    stats, other_stats = new_stats(), new_stats()
    y = solve(method, Model(W, b), y0, (W, b), step_size=step_size, stats=stats)
    other = solve(method, Model(W, b), 2 * y0, (W, b), step_size=step_size, stats=other_stats)
    first = gradient(y, (y0, W, b), retain_graph=True)
    assert stats.nfe_recompute == 0
    from_pending = gradient(other, (y0, W, b))
    second = gradient(y, (y0, W, b))
    assert stats.nfe_recompute == stats.nfe_forward > 0
    alone = gradient(solve(method, Model(W, b), 2 * y0, (W, b), step_size=step_size), (y0, W, b))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(from_pending, alone, strict=True))


def test_a_repeated_forward_pass_has_the_options_of_the_first():
    """They may have left the database since. The tolerance shows in the steps."""
    y0, W, b = inputs()
    options = PETSc.Options()
    options["once_ts_rtol"] = 1e-3
    try:
        y = solve("petsc:rk:5dp", Model(W, b), y0, (W, b), step_size=None, options_prefix="once_")
    finally:
        options.delValue("once_ts_rtol")
    first = gradient(y, (y0, W, b), retain_graph=True)
    assert all(torch.equal(p, q) for p, q in zip(first, gradient(y, (y0, W, b)), strict=True))


# Dtypes and shapes


@pytest.mark.parametrize("method", ["petsc:rk:4", "petsc:cn"])
def test_float32_and_tuples(method):
    y0, W, b = inputs()
    expected = gradient(by_hand(method, Model(W, b), y0, TIMES), (y0, W, b))
    layout = StateLayout((torch.Size([2]), torch.Size([1])), True)
    y32, W32, b32 = (x.detach().float().requires_grad_() for x in (y0, W, b))
    seen = set()

    def func(t, y):
        seen.update({t.dtype, y[0].dtype})
        value = Model(W32, b32)(t, torch.cat(y))
        return value[:2], value[2:]

    y = solve(method, func, y32, (W32, b32), layout=layout)
    assert y.dtype == torch.float32
    found = gradient(y, (y32, W32, b32))
    assert seen == {g.dtype for g in found} == {torch.float32}
    assert difference(found, expected) < 1e-5


def test_complex_parameter():
    """y' = Re(z^2) y: its real gradient, as torch has it, by autograd through the steps."""
    y0 = inputs()[0]
    z = torch.tensor([0.3 + 0.4j, -0.2 + 1.0j, 0.5 - 0.1j], dtype=torch.complex128, requires_grad=True)

    def func(t, y):
        return (z**2).real * y

    for method in ("petsc:rk:4", "petsc:cn"):
        found = gradient(solve(method, func, y0, (z,)), (y0, z))
        assert difference(found, gradient(by_hand(method, func, y0, TIMES), (y0, z))) < 1e-10
