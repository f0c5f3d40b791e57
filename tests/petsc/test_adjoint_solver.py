"""The solver that the gradient trusts: an option makes the gradient right or a typed error, never another number."""

import functools
import itertools

import pytest
import torch
from petsc4py import PETSc

import pfde
from pfde.ts import FractionalTS, adjoint_solve

D = torch.float64
RATES = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=D)
METHODS = ["trapezoid", "bdf2", "cn", "esdirk3", "petsc:cn", "petsc:arkimex:3"]
CHANGED = [  # what makes Newton's solver loose, stale or blind
    {"snes_ksp_ew": True, "fde_jacobian": "matrix_free"},
    {"ksp_rtol": 1e-3, "fde_jacobian": "matrix_free"},
    {"ksp_convergence_test": "skip", "ksp_max_it": 3, "fde_jacobian": "matrix_free"},
    {"snes_lag_preconditioner": 2, "fde_jacobian": "dense"},
    {"snes_lag_preconditioner": -2, "fde_jacobian": "dense"},
    {"snes_lag_jacobian": 2, "fde_jacobian": "matrix_free"},
    {"snes_lag_jacobian": -2},
    {"ksp_reuse_preconditioner": True, "fde_jacobian": "dense"},
]


def gradient(method, options=None, how=None):
    """The gradient of a loss on two outputs, in W and y_0."""
    torch.manual_seed(0)
    W, y0 = (torch.randn(*shape, dtype=D, requires_grad=True) for shape in ((4, 4), (4,)))
    options = dict(options or {})
    keywords = {"method": method, "params": [W]}
    if method.startswith("petsc:"):
        options.pop("fde_jacobian", None)
    if how is not None:
        keywords["gradient"] = how
    t = torch.linspace(0, 1, 4, dtype=D)

    def f(t, y):
        return torch.tanh(y @ W) - RATES * y

    if method in ("trapezoid", "bdf2"):
        y = pfde.fdeint(f, y0, t, 0.6, options=options, **keywords)
    else:
        y = pfde.odeint(f, y0, t, step_size=1 / 3, options=options, **keywords)
    return torch.cat([g.reshape(-1) for g in torch.autograd.grad(y[-1].sum() + y[1].sum(), (W, y0))])


@functools.cache
def plain(method):
    """With no option at all."""
    return gradient(method)


def assert_equal_to_rounding(a, b):
    assert float((a - b).norm() / b.norm()) < 1e-12


@pytest.mark.parametrize("options", CHANGED, ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()))
@pytest.mark.parametrize("method", METHODS)
def test_what_newton_is_given_does_not_change_the_gradient(method, options):
    if method.startswith("petsc:") and "reuse" in "".join(options):
        options = {"ksp_reuse_preconditioner": True, "ksp_rtol": 1e-2}
    assert_equal_to_rounding(gradient(method, options), plain(method))


@pytest.mark.parametrize(
    "method, how",
    [
        *(
            ("bdf2", how)
            for how in (pfde.Backprop(), pfde.Discrete(store="graph"), pfde.Discrete(schedule=pfde.Revolve(1)))
        ),
        *(("cn", how) for how in (pfde.Backprop(), pfde.Symplectic(), pfde.Discrete(schedule=pfde.Revolve(1)))),
    ],
)
@pytest.mark.parametrize("options", CHANGED[:5:2], ids=str)
def test_the_same_under_every_gradient(method, how, options):
    assert_equal_to_rounding(gradient(method, options, how), plain(method))


@pytest.mark.parametrize("method", METHODS)
def test_the_adjoint_s_own_options(method):
    """A tolerance given to it is kept, and is what its gradient is worth; a name that nothing asks for is refused."""
    free = {"fde_jacobian": "matrix_free"}
    exact = plain(method)
    loose = gradient(method, free | {"adjoint_ksp_rtol": 1e-2})
    assert float((loose - exact).norm() / exact.norm()) < 1.0
    assert_equal_to_rounding(gradient(method, free | {"adjoint_ksp_type": "bcgs"}), exact)
    with pytest.raises(ValueError, match="'adjoint_ksp_rtoll' does not apply"):
        gradient(method, {"adjoint_ksp_rtoll": 1})


@pytest.mark.parametrize(
    "options",
    [
        {"adjoint_ksp_convergence_test": "skip", "adjoint_ksp_max_it": 1, "fde_jacobian": "matrix_free"},
        {"adjoint_ksp_type": "preonly", "adjoint_pc_type": "none"},
        {"adjoint_ksp_type": "richardson", "adjoint_ksp_max_it": 2, "adjoint_pc_type": "none"},
    ],
    ids=["skip", "preonly", "richardson"],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_system_that_is_not_solved_is_an_error(method, options):
    with pytest.raises(pfde.ConvergenceError, match=r"adjoint .*(was not solved|did not converge) at t=\S+"):
        gradient(method, options)


def test_one_krylov_iteration_is_reported_with_step_and_residual():
    options = {"adjoint_ksp_convergence_test": "skip", "adjoint_ksp_max_it": 1, "fde_jacobian": "matrix_free"}
    message = r"adjoint system was not solved at t=1, step 3: its true residual is \S+, where \S+ was asked for"
    with pytest.raises(pfde.ConvergenceError, match=message):
        gradient("cn", options)


def test_float32_systems_are_solved_to_their_own_rounding():
    """Neither refused for what float32 cannot do, nor loose: matrix-free, dense and blocks agree to 1e-5."""
    torch.manual_seed(0)
    y0 = torch.randn(6, 4)
    found = []
    for form in ("matrix_free", "blocks", "dense"):
        y = y0.clone().requires_grad_()
        keywords = {"method": "cn", "step_size": 0.1, "options": {"fde_jacobian": form}}
        out = pfde.odeint(lambda t, y: torch.sin(y) - RATES.float() * y, y, torch.tensor([0.0, 1.0]), **keywords)
        out[-1].sum().backward()
        found.append(y.grad)
    assert all(float((g - found[0]).norm() / found[0].norm()) < 1e-5 for g in found[1:])


@pytest.mark.parametrize("coupled", [1e8, 1e12])
def test_terms_that_cancel_in_a_product_are_no_error(coupled):
    """J = coupled [[-1, 1], [1, -1]] on a vector near its null space: rounding leaves coupled eps."""
    A = coupled * torch.tensor([[-1.0, 1.0], [1.0, -1.0]], dtype=D) - torch.eye(2, dtype=D)
    for form in ("dense", "matrix_free"):
        y0 = torch.ones(2, dtype=D, requires_grad=True)
        t = torch.tensor([0.0, 1.0], dtype=D)
        y = pfde.odeint(lambda t, y: y @ A, y0, t, method="beuler", step_size=0.25, options={"fde_jacobian": form})
        y[-1].sum().backward()
        assert float((y0.grad - 1.25**-4).abs().max()) < 4 * coupled * torch.finfo(D).eps


def robertson(method, batch, **keywords):
    def f(t, y):
        a, b, c = y.unbind(-1)
        slow, back, fast = 0.04 * a, 1e4 * b * c, 3e7 * b * b
        return torch.stack([back - slow, slow - back - fast, fast], -1)

    y0 = torch.tensor([[1.0, 0.0, 0.0], [0.9, 1e-5, 0.1]][:batch], dtype=D, requires_grad=True)
    alpha = 0.7 if method in ("bdf2", "trapezoid") else 1.0
    t = torch.tensor([0.0, 12.5], dtype=D)
    y = pfde.solve(f, y0, t, alpha, method=method, step_size=0.625, **keywords).y
    return torch.autograd.grad(y[-1].square().sum(), y0)[0]


@functools.cache
def robertson_by_autograd(method, batch):
    return robertson(method, batch, gradient=pfde.Backprop())


@pytest.mark.parametrize(
    "method, form",
    [
        *itertools.product(("bdf2", "cn"), ("dense", "blocks", "matrix_free")),
        ("trapezoid", "dense"),
        ("esdirk4", "blocks"),
    ],
)
def test_fast_and_slow_reactions_are_no_error(method, form):
    """Robertson's problem, whose matrix has entries of 1e-2 to 1e3: what rounding leaves is judged by their sizes."""
    batch = 1 if form == "dense" else 2
    found = robertson(method, batch, options={"fde_jacobian": form})
    exact = robertson_by_autograd(method, batch)
    assert float((found - exact).norm() / exact.norm()) < 1e-7


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"snes_ksp_ew": ""},
        {"ksp_rtol": "1e-2"},
        {"snes_lag_preconditioner": "-2", "pc_type": "lu", "ksp_type": "preonly"},
        {"ksp_convergence_test": "skip", "ksp_max_it": "1", "pc_type": "none"},
    ],
    ids=str,
)
def test_the_petsc_api(options):
    """The gradient of u_0(T) in u(0) of a linear equation by `adjoint_solve`, against a matrix power."""
    database, prefix = PETSc.Options(), "adjointapi_"
    for name, value in options.items():
        database[prefix + name] = value
    J = PETSc.Mat().createAIJ((3, 3), nnz=3, comm=PETSc.COMM_SELF)
    entries = torch.tensor([[-2.0, 1.0, 0.0], [0.5, -30.0, 1.0], [0.0, 2.0, -1.0]], dtype=D)

    def fill(_ts, _t, _u, mat, _p):
        mat.setValues(range(3), range(3), entries.numpy())
        mat.assemble()

    def right(_ts, _t, u, f):
        f.array[:] = entries.numpy() @ u.array_r

    try:
        ts = PETSc.TS().createPython(FractionalTS(alpha=1.0, method="beuler"), comm=PETSc.COMM_SELF)
        ts.setOptionsPrefix(prefix)
        ts.setRHSFunction(right, PETSc.Vec().createSeq(3))
        ts.setRHSJacobian(fill, J, J)
        ts.setTime(0.0)
        ts.setTimeStep(0.25)
        ts.setMaxTime(1.0)
        ts.setFromOptions()
        u, lam = PETSc.Vec().createSeq(3), PETSc.Vec().createSeq(3)
        u.array[:] = [1.0, 2.0, 3.0]
        lam.array[:] = [1.0, 0.0, 0.0]
        ts.solve(u)
        ts.setCostGradients([lam], None)
        adjoint_solve(ts)
    finally:
        for name in options:
            database.delValue(prefix + name)
    inverse = torch.linalg.inv(torch.eye(3, dtype=D) - 0.25 * entries)
    expected = torch.linalg.matrix_power(inverse, 4).T @ torch.tensor([1.0, 0.0, 0.0], dtype=D)
    assert_equal_to_rounding(torch.from_numpy(lam.array_r.copy()), expected)
