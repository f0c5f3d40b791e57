"""Adaptive steps at NaN, stages that do not converge, and limits: they shrink, raise, or return what was reached."""

import math

import pytest
import torch
from torch import Tensor

import pfde
from support.faults import GRADIENTS, LOOSE, NAN, D, Field, T, decay, solve, start
from support.solution import solve_ode


def stiff(t: Tensor, y: Tensor) -> Tensor:
    """y' = -50 (y - cos t), which is NaN where a step that is too large leads."""
    return torch.where(y.abs() < 1.5, -50 * (y - torch.cos(t)), NAN)


@pytest.mark.smoke
@pytest.mark.parametrize("method", ["bosh3", "fehlberg", "dopri5", "tsit5", "dopri8"])
def test_nan_in_a_step_that_is_tried_rejects_it(method: str) -> None:
    y0 = start(1.0, 0.5)
    t = torch.tensor([0.0, 0.7, 1.0], dtype=D)
    keywords = {"method": method, "rtol": 1e-5, "atol": 1e-7, "options": {"first_step": 1.0}}
    solution = solve_ode(stiff, y0, t, **keywords)
    assert solution.stats.rejected > 0
    end = (2500 * torch.cos(t[1:]) + 50 * torch.sin(t[1:])) / 2501  # e^-35 is gone
    assert torch.allclose(solution.y[1:], end[:, None].expand(2, 2), atol=2e-5)
    got = torch.autograd.grad(solution.y.square().sum(), y0)
    y = pfde.odeint(stiff, y0, t, gradient=pfde.Backprop(), **keywords)
    assert torch.allclose(got[0], torch.autograd.grad(y.square().sum(), y0)[0], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("method", ["sdirk4", "esdirk3", "esdirk4"])
def test_nan_in_newtons_method_rejects_a_step_that_is_tried(method: str) -> None:
    """y' = 200 log(2.2 - y): Newton's first iterate is beyond 2.2 where the step is too large."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return 200 * torch.log(2.2 - y)

    y0 = start(-20.0, -10.0)
    t = torch.tensor([0.0, 0.02, 1.0], dtype=D)
    keywords = {"method": method, "rtol": 1e-3, "atol": 1e-4, "options": {"first_step": 1.0}}
    solution = solve_ode(func, y0, t, **keywords)
    assert solution.stats.rejected > 0
    with torch.no_grad():
        expected = pfde.odeint(func, y0, t, rtol=1e-6, atol=1e-6)
    assert torch.allclose(solution.y, expected, rtol=1e-2, atol=5e-2)
    got = torch.autograd.grad(solution.y.square().sum(), y0)
    y = pfde.odeint(func, y0, t, gradient=pfde.Backprop(), **keywords)
    assert torch.allclose(got[0], torch.autograd.grad(y.square().sum(), y0)[0], rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("method", ["sdirk4", "esdirk3", "esdirk4"])
def test_a_stage_that_does_not_converge_shrinks_an_adaptive_step(method: str) -> None:
    """y = tan(t / 2): a stage y = r + w (y^2 + 1) / 2 has no real solution for large w."""

    def func(t: Tensor, y: Tensor) -> Tensor:
        return (y * y + 1) * 0.5

    y0, t = start(0.0), torch.tensor([0.0, 2.8], dtype=D)
    solution = solve_ode(func, y0, t, method=method, rtol=1e-6, atol=1e-8, options={"first_step": 2.8})
    assert solution.stats.rejected > 0
    assert torch.allclose(solution.y[-1], torch.tan(t[-1:] / 2), rtol=1e-3)
    (slope,) = torch.autograd.grad(solution.y[-1].sum(), y0)
    assert torch.allclose(slope, 1 / torch.cos(t[-1:] / 2) ** 2, rtol=1e-2)


def test_a_solution_that_ends() -> None:
    """y' = y^2, y(0) = 1 ends at t = 1."""
    t = torch.tensor([0.0, 2.0], dtype=D)
    with pytest.raises(pfde.StepLimitError, match=r"the step size fell to \S+ at t=1, below") as caught:
        pfde.odeint(lambda t, y: y * y, start(1.0), t, rtol=1e-8, atol=1e-8)
    assert caught.value.t == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("form", ["dopri5", "sdirk4", "ark2"])
def test_too_many_steps(form: str) -> None:
    func = lambda t, y: -y  # noqa: E731
    y0 = start().detach().reshape(3, 1).requires_grad_()
    options = {"max_num_steps": 4, "first_step": 1e-4, "max_step": 1e-2}
    with pytest.raises(
        pfde.StepLimitError, match=r"4 steps were tried and t=\S+ reached: raise .*max_num_st"
    ) as caught:
        solve(func, y0, form, options=options)
    error = caught.value
    assert error.t is not None
    assert 0 < error.t < 0.05
    assert f"t={error.t:.6g}" in str(error)
    rate = 1.1 if form == "ark2" else 1.0
    expected = y0.detach() * math.exp(-rate * error.t)
    assert isinstance(error.y, Tensor)
    assert not error.y.requires_grad
    assert torch.allclose(error.y.reshape(3, 1), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("y0", "shapes"),
    [
        (torch.ones(2, 3, dtype=D), [(2, 3)]),
        (torch.tensor(1.0, dtype=D), [()]),
        ((torch.ones(2, dtype=D), torch.ones(1, 3, dtype=D)), [(2,), (1, 3)]),
        (torch.ones(2, dtype=torch.complex128), [(2,)]),
    ],
)
def test_what_a_limit_reached_is_of_y0s_shape(y0: object, shapes: list) -> None:
    f = lambda t, y: tuple(-x for x in y) if isinstance(y, tuple) else -y  # noqa: E731
    with pytest.raises(pfde.StepLimitError) as caught:
        pfde.odeint(f, y0, T, options={"max_num_steps": 2})
    y = caught.value.y
    assert isinstance(y, tuple) == isinstance(y0, tuple)
    parts, given = (y, y0) if isinstance(y, tuple) else ((y,), (y0,))
    assert [tuple(part.shape) for part in parts] == shapes
    assert [part.dtype for part in parts] == [part.dtype for part in given]


def test_min_step() -> None:
    message = r"the step size fell to \S+ at t=0, below 0.5, min_step: the error estimate asks for less; use"
    with pytest.raises(pfde.StepLimitError, match=message):
        pfde.odeint(lambda t, y: torch.sin(50 * y), start(), T, options={"min_step": 0.5, "first_step": 0.5})
    y = pfde.odeint(lambda t, y: -y, start(), T, options={"min_step": 1e-6})
    assert torch.equal(y, pfde.odeint(lambda t, y: -y, start(), T))


EARLY = "the forward pass ended early, so it has no gradient"


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("method", ["dopri5", "sdirk4"])
def test_a_limit_may_return_what_was_reached(method: str, gradient: str) -> None:
    f, y0 = Field(), start()
    options = {"max_step": 0.15, "first_step": 0.1, "max_num_steps": 4, "on_limit": "return"}
    keywords = {"method": method, "gradient": GRADIENTS[gradient], **LOOSE}
    solution = solve_ode(f, y0, T, options=options, **keywords)
    assert solution.status == "limit"
    assert torch.equal(solution.t, T[: len(solution.t)])
    assert len(solution.t) == 3  # t = 0.55 was reached
    assert solution.y.shape == (3, 3)
    whole = solve_ode(f, y0, T, options={"max_step": 0.15, "first_step": 0.1}, **keywords)
    assert whole.status == "completed"
    assert torch.allclose(solution.y, whole.y[:3], rtol=1e-12)
    with pytest.raises(pfde.PfdeError, match=EARLY):
        solution.y.sum().backward()
    assert y0.grad is None
    y = pfde.odeint(f, y0, T, options=options, **keywords)
    assert len(y) == 3
    with pytest.raises(pfde.PfdeError, match=EARLY):
        (y.square().sum() + y0.sum()).backward()
    with torch.no_grad():
        assert len(pfde.odeint(f, y0, T, options=options, **keywords)) == 3
    pfde.odeint(f, y0, T, **keywords).sum().backward()  # the next one works


def test_a_limit_that_is_not_reached_changes_nothing() -> None:
    y0 = start()
    solution = solve_ode(decay, y0, T, options={"on_limit": "return"})
    assert solution.status == "completed"
    solution.y.sum().backward()
    assert torch.equal(solution.y, pfde.odeint(decay, y0, T))


def test_a_step_that_becomes_too_small_may_return() -> None:
    func = lambda t, y: torch.where(t > 0.5, NAN, -y)  # noqa: E731
    solution = solve_ode(func, start(), T, options={"on_limit": "return"})
    assert solution.status == "limit"
    assert torch.allclose(solution.y[:, 0], torch.exp(-T[:3]), rtol=1e-6)
    assert solution.stats.rejected > 0
