"""PETSc's own integrators: their gradients against autograd through the same steps written by hand."""

import ctypes
import gc
import math
import types
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from petsc4py import PETSc

import pfde
from pfde import ConvergenceError, NonFiniteError
from pfde import native as module
from pfde.autograd import Solve
from pfde.native import NativeProblem
from pfde.native_setting import _TYPES, parse_native
from pfde.system.layout import StateLayout
from pfde.system.peers import Peers

DOUBLE = torch.float64
TIMES = [0.1, 0.3, 0.6, 1.0]
STEP = 0.1
LAYOUT = StateLayout((torch.Size([3]),), False)
COTANGENT = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.7, -1.1], [-0.4, 1.3, 0.9], [2.0, 0.1, -0.6]], dtype=DOUBLE)


class Model:
    """f = stiff + nonstiff, nonlinear in y, dependent on t and two parameters."""

    def __init__(self, W, b):
        self.W, self.b = W, b

    def stiff(self, t, y):
        return -2 * y + torch.tanh(self.W @ y) * torch.cos(t)

    def nonstiff(self, t, y):
        return torch.sin(t) * self.b * torch.sin(y) + self.W[0]

    def __call__(self, t, y):
        return self.stiff(t, y) + self.nonstiff(t, y)


def inputs():
    torch.manual_seed(3)
    y0, W, b = torch.randn(3, dtype=DOUBLE), 0.6 * torch.randn(3, 3, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)
    return [x.requires_grad_() for x in (y0, W, b)]


def new_stats():
    names = "steps rejected nfe_forward nfe_recompute nfe_backward newton_iterations linear_iterations"
    return types.SimpleNamespace(**dict.fromkeys(names.split(), 0))


def solve(method, func, y0, parameters=(), times=TIMES, step_size=STEP, tolerance=1e-9, layout=LAYOUT, **kwargs):
    problem = NativeProblem(
        method=parse_native(method),
        func=func,
        layout=layout,
        times=tuple(times),
        parameters=tuple(parameters),
        **{
            "step_size": step_size,
            "rtol": tolerance,
            "atol": tolerance,
            "options_prefix": "",
            "peers": Peers(None),
            "stats": new_stats(),
            "dtype": y0.dtype,
            "device": y0.device,
        }
        | kwargs,
    )
    return Solve.apply(problem, 1, y0, *parameters) if problem.needs_gradient(y0) else problem.integrate(y0)


def loss(y):
    return (COTANGENT * y).sum() + (y[-1] ** 2).sum()


def gradient(y, at, **kwargs):
    return torch.autograd.grad(loss(y), at, **kwargs)


def difference(found, expected):
    return max(float((a - b).detach().norm() / b.detach().norm()) for a, b in zip(found, expected, strict=True))


# The same steps by hand


def tableau(*rows):
    n = max(len(row.split()) for row in rows)
    return [[float(Fraction(x)) for x in row.split()] + [0.0] * (n - len(row.split())) for row in rows]


DORMAND_PRINCE = (
    tableau(
        "0 0 0 0 0 0",
        "1/5",
        "3/40 9/40",
        "44/45 -56/15 32/9",
        "19372/6561 -25360/2187 64448/6561 -212/729",
        "9017/3168 -355/33 46732/5247 49/176 -5103/18656",
    ),
    tableau("35/384 0 500/1113 125/192 -2187/6784 11/84")[0],
)
EXPLICIT = {
    "1fe": (tableau("0"), [1.0]),
    "2a": (tableau("0 0", "1"), [0.5, 0.5]),
    "3bs": (tableau("0 0 0", "1/2", "0 3/4"), tableau("2/9 1/3 4/9")[0]),
    "4": (tableau("0 0 0 0", "1/2", "0 1/2", "0 0 1"), tableau("1/6 1/3 1/3 1/6")[0]),
    "5dp": DORMAND_PRINCE,
}
ARS443 = (  # Ascher, Ruuth, Spiteri (1997): implicit, explicit
    tableau("0 0 0 0 0", "0 1/2", "0 1/6 1/2", "0 -1/2 1/2 1/2", "0 3/2 -3/2 1/2 1/2"),
    tableau("0 0 0 0 0", "1/2", "11/18 1/18", "5/6 -5/6 1/2", "1/4 7/4 3/4 -7/4 0"),
)


def runge_kutta(A, b):
    def step(f, t, h, y):
        slopes = []
        for row in A:
            stage = y + h * sum(a * k for a, k in zip(row, slopes, strict=False))
            slopes.append(f(torch.tensor(t + h * sum(row), dtype=DOUBLE), stage))
        return y + h * sum(w * k for w, k in zip(b, slopes, strict=True))

    return step


def implicit_stage(f, t, r, w, guess):
    """y = r + w f(t, y), with the derivative of the implicit function: a Newton step on the graph at the solution."""
    t = torch.tensor(t, dtype=DOUBLE)
    y = guess.detach()
    for _ in range(12):
        with torch.no_grad():
            A = torch.eye(len(y), dtype=DOUBLE) - w * torch.autograd.functional.jacobian(lambda z: f(t, z), y)
            y = y - torch.linalg.solve(A, y - r - w * f(t, y))
    A = (torch.eye(len(y), dtype=DOUBLE) - w * torch.autograd.functional.jacobian(lambda z: f(t, z), y)).detach()
    return y - torch.linalg.solve(A, y - r - w * f(t, y))


def one_stage_theta(theta):
    def step(f, t, h, y):
        return y + (implicit_stage(f, t + theta * h, y, theta * h, y) - y) / theta

    return step


def crank_nicolson(f, t, h, y):
    return implicit_stage(f, t + h, y + h / 2 * f(torch.tensor(t, dtype=DOUBLE), y), h / 2, y)


def imex(At, A):
    def step(f, t, h, y):
        stage, implicit, explicit = y, [], []
        for row, row_ex in zip(At, A, strict=True):
            i = len(implicit)
            r = y + h * sum(a * k for a, k in zip(row[:i], implicit, strict=True))
            r = r + h * sum(a * k for a, k in zip(row_ex[:i], explicit, strict=True))
            s = t + h * sum(row)
            stage = implicit_stage(f.stiff, s, r, h * row[i], stage) if row[i] else r
            s = torch.tensor(s, dtype=DOUBLE)
            implicit.append(f.stiff(s, stage))
            explicit.append(f.nonstiff(s, stage))
        # PETSc takes one b for both parts, where the paper's explicit part ends with the last row of its A.
        return y + h * sum(a * (k + g) for a, k, g in zip(At[-1], implicit, explicit, strict=True))

    return step


BY_HAND = {f"petsc:rk:{name}": runge_kutta(*pair) for name, pair in EXPLICIT.items()} | {
    "petsc:theta:0.5": one_stage_theta(0.5),
    "petsc:theta:0.8": one_stage_theta(0.8),
    "petsc:theta:1": one_stage_theta(1.0),
    "petsc:beuler": one_stage_theta(1.0),
    "petsc:cn": crank_nicolson,
    "petsc:arkimex:ars443": imex(*ARS443),
}


def by_hand(method, f, y, times, step_size=STEP):
    outputs, step = [y], BY_HAND[method]
    for a, b in pairwise(times):
        count = round(abs(b - a) / step_size)
        h = (b - a) / count
        for i in range(count):
            y = step(f, a + i * h, h, y)
        outputs.append(y)
    return torch.stack(outputs)


def allowed(method):
    return 1e-12 if ":rk:" in method else 1e-10


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


ARKIMEX = ["1bee", "a2", "l2", "ars122", "2c", "2d", "2e", "prssp2", "3", "bpr3", "ars443", "4", "5"]
RK = ["1fe", "2a", "2b", "3", "3bs", "4", "5f", "5dp", "5bs", "6vr", "7vr", "8vr"]


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
    init = module._Run.__init__
    monkeypatch.setattr(module._Run, "__init__", lambda run, *a, **k: (init(run, *a, **k), runs.append(run))[0])
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

    def set_jacobian(k):
        t, u = points[k]
        if explicit:
            ts.computeRHSJacobian(t, vec(u), jacobian)
        else:
            ts.computeIJacobian(t, vec(u), vec(0 * u), 5.0, jacobian, imex=True)

    def set_parameter(k):
        t, u = points[k]
        if explicit:
            ts.computeRHSJacobianP(t, vec(u), parameter)
        else:
            ts.computeIJacobianP(t, vec(u), vec(0 * u), 5.0, parameter, imex=True)

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


def test_parameters_changed_in_place_and_double_backward_are_refused():
    y0, W, b = inputs()
    y = solve("petsc:rk:4", Model(W, b), y0, (W, b))
    with pytest.raises(RuntimeError, match="double backward"):
        gradient(y, (y0,), create_graph=True)
    y = solve("petsc:rk:4", Model(W, b), y0, (W, b))
    with torch.no_grad():
        W += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(y, (y0,))


@pytest.mark.parametrize("method", ["petsc:rk:4", "petsc:cn"])
def test_nothing_is_left_of_a_solve(method):
    """Vectors of 4 MB: one that a solve kept would show. Python's collector is off, so cycles would show too."""
    small = torch.ones(3, dtype=DOUBLE, requires_grad=True)
    large = torch.ones(500_000, dtype=DOUBLE, requires_grad=True)
    layout = StateLayout((large.shape,), False)

    def resident():
        ctypes.CDLL(None).malloc_trim(0)  # else what is free but not given back hides what is kept
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * 4096

    def once(y0, layout, step):
        y = solve(method, lambda t, y: -y, y0, times=[0.0, 0.1], step_size=step, layout=layout)
        torch.autograd.grad(y.sum(), y0)

    once(large, layout, 0.1)
    once(small, LAYOUT, 0.05)
    gc.collect()
    objects, before = len(gc.get_objects()), resident()
    gc.disable()
    try:
        for _ in range(5):
            once(large, layout, 0.1)
        assert resident() - before < 3 * large.nbytes
        for _ in range(200):
            once(small, LAYOUT, 0.05)
        assert len(gc.get_objects()) - objects < 50
    finally:
        gc.enable()


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


# Errors


@pytest.mark.parametrize(
    "name, match",
    [
        ("petsc:bdf:2", "petsc:rk:TYPE.*got 'petsc:bdf:2'"),
        ("rk4", "got 'rk4'"),
        ("petsc:rk", "5dp.*got 'petsc:rk'"),
        ("petsc:rk:dopri5", "5dp.*got 'petsc:rk:dopri5'"),
        ("petsc:arkimex:9", "ars443.*got 'petsc:arkimex:9'"),
        ("petsc:theta:0", r"\(0, 1\].*got 'petsc:theta:0'"),
        ("petsc:theta:half", r"\(0, 1\].*got 'petsc:theta:half'"),
        ("petsc:cn:2", "has no types"),
    ],
)
def test_unknown_methods(name, match):
    with pytest.raises(ValueError, match=match):
        parse_native(name)


def test_types_are_those_of_petsc():
    """Of each type that we name PETSc has the tableau, and it has an embedded pair exactly when we say so."""
    assert set(_TYPES["rk"]) == set(RK)
    assert set(_TYPES["arkimex"]) == set(ARKIMEX)
    y0 = inputs()[0]
    for family, names in _TYPES.items():
        for name in names:
            method = parse_native(f"petsc:{family}:{name}")
            if not method.embedded:
                with pytest.raises(ValueError, match="no embedded pair"):
                    solve(method.name, lambda t, y: -y, y0, step_size=None)
                continue
            stats = new_stats()
            solve(method.name, lambda t, y: -y, y0.detach(), step_size=None, tolerance=1e-3, stats=stats)
            assert stats.steps < 100, name


class BoomError(Exception):
    """Raised by a func."""


@pytest.mark.parametrize("step_size", [STEP, None])
@pytest.mark.parametrize("method", ["petsc:rk:5dp", "petsc:cn", "petsc:arkimex:3"])
def test_errors_of_func_come_out_as_they_were_raised(method, step_size):
    y0 = inputs()[0]
    calls, last = 0, 4

    def func(t, y):
        nonlocal calls
        calls += 1
        if calls > last:
            raise BoomError("here")
        return -y

    with pytest.raises(BoomError, match="here"):
        solve(method, func, y0, step_size=step_size)
    calls, last = 0, math.inf
    y = solve(method, func, y0, step_size=step_size)
    last = calls + 3
    with pytest.raises(BoomError, match="here"):
        gradient(y, (y0,))
    with pytest.raises(NonFiniteError, match=r"NaN or inf at t=0\.[3-6]"):
        solve(method, lambda t, y: -y if t < 0.3 else y * math.nan, y0, step_size=step_size)


def test_failures_of_petsc_name_the_time():
    y0 = inputs()[0].detach().abs() + 1
    with pytest.raises(ConvergenceError, match=r"petsc:beuler did not converge at t=0\.1.*DIVERGED_NONLINEAR_SOLVE"):
        solve("petsc:beuler", lambda t, y: 100 * y**2 + 100, y0)
    with pytest.raises(ConvergenceError, match="step size fell"):
        solve("petsc:rk:5dp", lambda t, y: 10 * y**2, y0, step_size=None)
    options = PETSc.Options()
    options["few_ksp_max_it"] = 1
    y0, W, b = inputs()
    try:
        with pytest.raises(ConvergenceError, match=r"t=0\.1"):
            solve("petsc:cn", Model(W, b), y0, (W, b), options_prefix="few_")
    finally:
        options.delValue("few_ksp_max_it")


def test_func_is_checked():
    y0, W, b = inputs()
    with pytest.raises(ValueError, match="shape of y"):
        solve("petsc:rk:4", lambda t, y: y[:2], y0)
    with pytest.raises(RuntimeError, match="in place"):
        solve("petsc:rk:4", lambda t, y: y.mul_(2), y0.detach())
    for parameters in [(), (b,)]:
        y = solve("petsc:cn", Model(W, b), y0, parameters)
        with pytest.raises(ValueError, match="none of its parameters"):
            gradient(y, (y0,))


@pytest.mark.parametrize(
    "name, value, step_size, refused",
    [
        ("mine_ts_type", "bdf", None, True),
        ("mine_ts_dt", "0.1", None, True),
        ("mine_ts_rk_type", "4", None, True),
        ("mine_ts_adapt_type", "dsp", STEP, True),
        ("mine_ts_adapt_type", "dsp", None, False),
        ("ts_trajectory_type", "basic", None, True),
        ("ts_trajectory_max_cps_ram", "3", None, True),
        ("ts_trajectory_type", "memory", None, False),
    ],
)
def test_options_that_do_not_apply(name, value, step_size, refused):
    y0, W, b = inputs()
    options = PETSc.Options()
    options[name] = value
    try:
        if refused:
            with pytest.raises(ValueError, match=f"-{name}.*does not apply here"):
                solve("petsc:rk:5dp", Model(W, b), y0, (W, b), step_size=step_size, options_prefix="mine_")
        else:
            solve("petsc:rk:5dp", Model(W, b), y0, (W, b), step_size=step_size, options_prefix="mine_")
        assert options.getString(name) == value
    finally:
        options.delValue(name)


def test_options_reach_the_solvers():
    y0, W, b = inputs()
    options, stats, default = PETSc.Options(), new_stats(), new_stats()
    solve("petsc:cn", Model(W, b), y0, (W, b), stats=default)
    options["loose_snes_rtol"] = 1e-3
    try:
        solve("petsc:cn", Model(W, b), y0, (W, b), stats=stats, options_prefix="loose_")
    finally:
        options.delValue("loose_snes_rtol")
    assert stats.newton_iterations < default.newton_iterations


def test_a_function_that_draws_random_numbers_is_refused():
    """PETSc's callbacks evaluate it afresh for the adjoint: the gradient would be that of other numbers."""
    drop, y0 = torch.nn.Dropout(0.5), torch.ones(3, dtype=torch.float64, requires_grad=True)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="func draws random numbers, which method 'petsc:rk:4'"):
        pfde.odeint(lambda t, y: -drop(y), y0, times, method="petsc:rk:4", step_size=0.5)
