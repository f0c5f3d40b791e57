"""What `odeint` does beside its errors: torchdiffeq's calls, two parts, other APIs."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import pfde
from support.pendulum import ADAPTIVE, SPIRAL_TIMES, SPIRAL_VALUES, Clock, D, Spiral, close, pendulum, spiral, times
from support.solution import solve_ode

# -- torchdiffeq's calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "tolerance"),
    [
        ({}, 1e-6),
        ({"method": "dopri5"}, 1e-6),
        ({"rtol": 1e-9, "atol": 1e-11, "method": "dopri8"}, 1e-8),
        ({"rtol": 1e-9, "atol": 1e-11, "method": "tsit5", "options": {}}, 1e-7),
        ({"rtol": 1e-6, "atol": 1e-8, "method": "bosh3"}, 1e-4),
        ({"method": "rk4", "options": {"step_size": 0.005}}, 1e-6),
        ({"method": "midpoint", "options": {"step_size": 0.0025}}, 2e-3),
        ({"method": "euler", "options": {"step_size": 0.0025}}, 0.3),
        (
            {"rtol": 1e-8, "atol": 1e-10, "options": {"first_step": 0.01, "safety": 0.8, "max_num_steps": 2**31 - 1}},
            1e-6,
        ),
        ({"rtol": 1e-8, "atol": 1e-10, "options": {"min_step": 1e-8, "ifactor": 5.0, "dfactor": 0.2}}, 1e-6),
    ],
)
def test_the_calls_of_torchdiffeq(keywords: dict, tolerance: float) -> None:
    t = times(*SPIRAL_TIMES)
    y = pfde.odeint(Spiral(), torch.tensor([2.0, 0.0], dtype=D), t, **keywords)
    assert y.shape == (4, 2)
    close(y, SPIRAL_VALUES, tolerance)
    y = pfde.odeint(spiral, torch.tensor([[2.0, 0.0]], dtype=D), t, **keywords)
    assert y.shape == (4, 1, 2)


def steps_by_hand(method: str, f: Callable, y: Tensor, t: Tensor) -> Tensor:
    """torchdiffeq's fixed steps, as its source has them."""
    found = [y]
    for t0, t1 in pairwise(t):
        h = t1 - t0
        k1 = f(t0, y)
        if method == "euler":
            y = y + h * k1
        elif method == "midpoint":
            y = y + h * f(t0 + h / 2, y + h / 2 * k1)
        else:  # the 3/8 rule
            k2 = f(t0 + h / 3, y + h * k1 / 3)
            k3 = f(t0 + h * 2 / 3, y + h * (k2 - k1 / 3))
            k4 = f(t1, y + h * (k1 - k2 + k3))
            y = y + h * (k1 + 3 * (k2 + k3) + k4) / 8
        found.append(y)
    return torch.stack(found)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4"])
def test_fixed_steps_are_torchdiffeqs(method: str) -> None:
    """On a nonuniform grid, and their gradients."""
    t = times(0.0, 0.1, 0.25, 0.3, 0.6)
    results = []
    for solve in (lambda f, y, t: pfde.odeint(f, y, t, method=method), lambda f, y, t: steps_by_hand(method, f, y, t)):
        y0 = torch.tensor([1.2, -0.3], dtype=D, requires_grad=True)
        y = solve(pendulum, y0, t)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), y0)[0]))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-14)


@pytest.mark.parametrize("method", ["euler", "midpoint", "rk4", "bosh3", "dopri5", "dopri8"])
def test_against_torchdiffeq(method: str) -> None:
    f, y0, t = Spiral(), torch.tensor([2.0, 0.0], dtype=D), times(0.0, 0.5, 1.0)
    keywords = {"options": {"step_size": 0.01}} if method in ("euler", "midpoint", "rk4") else {}
    results = []
    for module in (pfde, torchdiffeq):
        rtol = 1e-8 if method == "bosh3" else 1e-9  # of order 3, it would take a thousand steps
        y = module.odeint(f, y0, t, rtol=rtol, atol=rtol / 100, method=method, **keywords)
        results.append((y.detach(), torch.autograd.grad(y.square().sum(), f.A)[0]))
    if keywords:
        for a, b in zip(*results, strict=True):
            close(a, b, 1e-12)
        return
    # Adaptive steps are not the same ones. Against steps of rounding level pfde is 7e-8 off at most; torchdiffeq's
    # interpolants are of lower order, and its steps are differentiated, which puts its gradients up to 6e-6 off.
    y = pfde.odeint(f, y0, t, rtol=1e-13, atol=1e-14, method="dopri8")
    reference = y.detach(), torch.autograd.grad(y.square().sum(), f.A)[0]
    for (ours, theirs), exact in zip(zip(*results, strict=True), reference, strict=True):
        close(ours, exact, 1e-6)
        close(theirs, exact, 1e-4)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_decreasing_times_undo_increasing_ones(method: str) -> None:
    f = pfde.Split(pendulum, lambda t, y: 0.1 * y) if method.startswith("ark") else pendulum
    keywords = {"method": method, "rtol": 1e-5, "atol": 1e-6} | ({"rtol": 1e-3} if method == "ark2" else {})
    y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    there = pfde.odeint(f, y0, times(0.0, 0.4, 1.0), **keywords)
    back = pfde.odeint(f, there[-1], times(1.0, 0.4, 0.0), **keywords)
    close(back[-1], y0, 2e-3)
    close(back[1], there[1], 2e-3)
    weights = torch.tensor([0.3, -0.7], dtype=D)
    (bar,) = torch.autograd.grad(back[-1] @ weights, y0)
    close(bar, weights, 5e-3)


# -- two parts, other doors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_tuple", [False, True])
def test_a_split_is_the_sum(as_tuple: bool) -> None:
    class Part(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.tensor(value, dtype=D))

        def forward(self, t: Tensor, y: object) -> object:
            return tuple(torch.sin(self.a * x) + t for x in y) if as_tuple else torch.sin(self.a * y) + t

    one, two = Part(-3.0), Part(0.7)
    y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    whole = lambda t, y: tuple(map(torch.add, one(t, y), two(t, y))) if as_tuple else one(t, y) + two(t, y)  # noqa: E731

    def gradient(f: Callable, **keywords: object) -> list[Tensor]:
        y = pfde.odeint(f, (y0, 2 * y0) if as_tuple else y0, times(0.0, 0.5, 1.0), **keywords)
        loss = sum(part.square().sum() for part in y) if as_tuple else y.square().sum()
        return [loss.detach(), *torch.autograd.grad(loss, (y0, one.a, two.a))]

    split = pfde.Split(one, two)
    expected = gradient(whole, params=[one.a, two.a])
    for got, value in zip(gradient(split), expected, strict=True):
        assert torch.equal(got, value)
    for method, tolerance in (("ark3", 1e-2), ("ark4", 1e-2)):
        for got, value in zip(gradient(split, method=method, rtol=1e-5, atol=1e-6), expected, strict=True):
            close(got, value, tolerance)


@pytest.mark.parametrize("reverse", [False, True])
def test_petscs_dopri5_is_ours(reverse: bool) -> None:
    """The same tableau, and PETSc's own adjoint of it, on the same fixed steps."""
    results = []
    for method in ("petsc:rk:5dp", "dopri5"):
        f, y0 = Clock(), torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
        t = times(0.0, 0.5, 2.0)
        y = pfde.odeint(f, y0, t.flip(0) if reverse else t, method=method, step_size=0.125)
        results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (y0, f.a))))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-12)


@pytest.mark.parametrize("keywords", [{"method": "dopri5"}, {"method": "rk4", "step_size": 0.1}, {"method": "esdirk4"}])
def test_solve_takes_these_methods(keywords: dict) -> None:
    f, y0, t = Clock(), torch.tensor([1.0, 0.5], dtype=D, requires_grad=True), times(0.0, 0.5, 1.0)
    try:
        solution = pfde.solve(f, y0, t, **keywords)
    except (ValueError, TypeError) as error:
        if "method must be one of" not in str(error):
            raise
        pytest.skip("pfde.solve has no ODE methods yet")
    expected = pfde.odeint(f, y0, t, **keywords)
    assert torch.equal(solution.y, expected)
    assert solution.status == "completed"
    assert torch.equal(
        torch.autograd.grad(solution.y.square().sum(), y0)[0], torch.autograd.grad(expected.square().sum(), y0)[0]
    )


def test_stats() -> None:
    f, y0 = Clock(), torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    solution = solve_ode(f, y0, times(0.0, 2.0), method="dopri5", step_size=0.1)
    stats = solution.stats
    assert stats.steps == 20
    assert stats.rejected == 0
    assert stats.nfe_forward == len(f.times)
    solution.y.square().sum().backward()
    assert stats.nfe_forward + stats.nfe_recompute + stats.nfe_backward == len(f.times)
    assert stats.schedule == "StoreAll()"
    with torch.no_grad():
        assert solve_ode(f, y0, times(0.0, 2.0)).stats.schedule == ""
