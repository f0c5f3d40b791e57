"""NaN, inf and stages that are not solved: the error names t and step, and spoils nothing that comes after."""

import math

import pytest
import torch
from torch import Tensor

import pfde
from pfde.caputo.schemes import METHODS
from support.faults import FORMS, IMPLICIT, NAN, D, Field, T, assert_same, gradients, solve, start


@pytest.mark.smoke
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_a_value_that_is_not_finite_names_t_and_step(method: str, bad: float) -> None:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(torch.tensor([False, True, False]) & (t > 0.5), bad, -y)

    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(pfde.NonFiniteError, match=r"t=0.6, step 3 of 5: reduce step"):
            pfde.fdeint(func, start(), T, 0.6, method=method)
    with pytest.raises(pfde.NonFiniteError, match=r"NaN or inf at t=0, step 0 of 5"):
        pfde.fdeint(lambda t, y: y * bad, start(), T, 0.6, method=method)


@pytest.mark.parametrize("form", FORMS)
def test_nan_at_the_start(form: str) -> None:
    with pytest.raises(pfde.NonFiniteError, match=r"NaN or inf at t=0, step 0"):
        solve(lambda t, y: y * NAN, start(), form)


@pytest.mark.parametrize(
    ("form", "where"),
    [
        ("rk4", r"t=0\.4 and t=0\.6, step 3"),
        ("dopri5 fixed", r"t=0\.4 and t=0\.6, step 3"),
        ("cn", "t=0.6, step 3"),
        ("ark3 fixed", "t=0"),
    ],
)
def test_nan_with_fixed_steps_names_t_and_step(form: str, where: str) -> None:
    func = lambda t, y: torch.where(t > 0.5, NAN, -y)  # noqa: E731
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(pfde.NonFiniteError, match=f"NaN or inf (at|between) {where}"):
            solve(func, start(grad=grad), form)
        with torch.set_grad_enabled(grad), pytest.raises(pfde.NonFiniteError, match="step 3: reduce step_size, use an"):
            solve(func, start(grad=grad), form)
    assert_same(gradients(form), gradients(form))


@pytest.mark.parametrize("bad", [NAN, math.inf])
@pytest.mark.parametrize("form", ["dopri5", "sdirk4", "ark2"])
def test_nan_that_no_step_size_helps_against(form: str, bad: float) -> None:
    func = lambda t, y: torch.where(t > 0.5, bad, -y)  # noqa: E731
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(pfde.StepLimitError, match=r"at t=0\.5, .*NaN or inf") as got:
            solve(func, start(grad=grad), form)
        assert got.value.t == pytest.approx(0.5, abs=1e-9)
    assert_same(gradients(form), gradients(form))


@pytest.mark.parametrize("method", METHODS)
def test_parameters_that_turn_nan_in_the_backward_pass(method: str) -> None:
    """Not by an in-place change, which torch refuses, but in f itself: here a number it reads."""
    f, table = Field(), {"factor": 1.0}
    y = pfde.fdeint(lambda t, y: f(t, y) * table["factor"], start(), T, 0.6, method=method, params=[f.a])
    table["factor"] = float("nan")
    with pytest.raises(pfde.ReplayError, match="not what it was in the forward pass"):
        y.sum().backward()
    assert f.a.grad is None


def test_large_finite_values_are_no_error() -> None:
    """Their sum overflows; none of them has."""
    y0 = torch.full((4,), 3e38, dtype=torch.float32)
    y = pfde.fdeint(
        lambda t, y: torch.zeros_like(y) + 3e38 * (y > 0), y0, torch.tensor([0.0, 1e-3]), 1.0, method="euler"
    )
    assert torch.isfinite(y).all()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", IMPLICIT)
def test_a_stage_that_does_not_converge(method: str, grad: bool) -> None:
    """y = r + w K (y^2 + 1) has no real solution for large K."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return (y * y + 1) * (1e3 if t > 0.5 else 0.01)

    message = (
        r"stage equation did not converge at t=0.6, step 3: DIVERGED_\w+ after \d+ Newton iterations.*reduce step_size"
    )
    with torch.set_grad_enabled(grad), pytest.raises(pfde.ConvergenceError, match=message):
        pfde.fdeint(func, start(grad=grad), T, 0.6, method=method)
    assert_same(gradients(method), gradients(method))


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("method", ["beuler", "cn", "implicit_midpoint", "sdirk4", "esdirk3", "esdirk4"])
def test_a_stage_that_does_not_converge_with_fixed_steps(method: str, grad: bool) -> None:
    """y = r + w K (y^2 + 1) has no real solution for large K."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return (y * y + 1) * (1e3 if t > 0.65 else 0.01)

    message = r"the stage equation did not converge at t=0\.[678]\d*, step 4: DIVERGED_\w+ after .*reduce step_size"
    with torch.set_grad_enabled(grad), pytest.raises(pfde.ConvergenceError, match=message):
        pfde.odeint(func, start(grad=grad), T, method=method, step_size=0.2)
    assert_same(gradients("cn"), gradients("cn"))


@pytest.mark.parametrize("method", IMPLICIT)
def test_an_adjoint_system_that_does_not_converge(method: str) -> None:
    """The forward pass stays in an eigenspace of A, where GMRES needs one iteration; its transpose does not."""
    A = torch.tensor([[-1.0, 2.0], [0.0, -3.0]], dtype=torch.float64)
    y0 = start(1.0, 0.0)
    options = {"fde_jacobian": "matrix_free", "adjoint_ksp_max_it": 1}
    y = pfde.fdeint(lambda t, y: A @ y, y0, T, 0.6, method=method, options=options)
    message = r"adjoint system did not converge at t=1, step 5: DIVERGED_\w+ after 1 iterations.*'adjoint_ksp_monitor'"
    for _ in range(2):
        with pytest.raises(pfde.ConvergenceError, match=message):
            y[:, 0].sum().backward(retain_graph=True)
    assert y0.grad is None
    assert_same(gradients(method), gradients(method))


def test_an_adjoint_system_of_odeint_that_does_not_converge() -> None:
    """The forward pass stays in an eigenspace of A, where GMRES needs one iteration; its transpose does not."""
    A = torch.tensor([[-1.0, 2.0], [0.0, -3.0]], dtype=D)
    y0 = start(1.0, 0.0)
    y = pfde.odeint(
        lambda t, y: A @ y, y0, T, method="cn", options={"fde_jacobian": "matrix_free", "adjoint_ksp_max_it": 1}
    )
    with pytest.raises(pfde.ConvergenceError, match=r"adjoint system did not converge at t=1, step 5: DIVERGED_\w+"):
        y[:, 0].sum().backward()
    assert y0.grad is None
