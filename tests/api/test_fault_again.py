"""Backward passes one after another and of solves that are pending; double backward and transforms are refused."""

import functools
from itertools import product

import pytest
import torch
from torch import Tensor

import pfde
from support.covering import pairs
from support.faults import (
    FORMS,
    FRACTIONAL,
    GRADIENTS,
    KEPT,
    LOOSE,
    ORDINARY,
    D,
    Pending,
    T,
    assert_same,
    decay,
    gradients,
    solve,
    start,
    takes,
)

STORES = ["state", "stages", "graph"]
STORED = [*product(FRACTIONAL, STORES), *product(ORDINARY, KEPT)]
every_store = pytest.mark.parametrize(("form", "gradient"), STORED)


@functools.cache
def expected(form: str, gradient: str) -> list[Tensor]:
    return gradients(form, gradient=GRADIENTS[gradient])


@pytest.mark.parametrize(("form", "gradient"), [*STORED, *((form, "continuous") for form in ORDINARY)])
def test_backward_twice(form: str, gradient: str) -> None:
    solved = Pending(form, gradient=GRADIENTS[gradient])
    first = solved.backward(retain_graph=True)
    assert_same(solved.backward(), first)
    assert_same(first, expected(form, gradient))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        solved.backward()


@every_store
def test_two_solves_pending(form: str, gradient: str) -> None:
    for solved in [Pending(form, gradient=GRADIENTS[gradient]) for _ in range(2)]:
        assert_same(solved.backward(), expected(form, gradient))


@pytest.mark.smoke
@pytest.mark.parametrize(("form", "gradient"), pairs(FORMS, ["state", "symplectic", "continuous"], valid=takes))
def test_double_backward_is_refused(form: str, gradient: str) -> None:
    y0 = start()
    for whole in (True, False):
        y = solve(decay, y0 * 1.0, form, gradient=GRADIENTS[gradient])
        loss = y.square().sum() if whole else (y[-1] * y0).sum() + y0.pow(3).sum()
        with pytest.raises(RuntimeError, match=r"double backward \(create_graph=True\) .* not implemented: use"):
            torch.autograd.grad(loss, y0, create_graph=True)
    (slope,) = torch.autograd.grad(y0.pow(3).sum() + y.detach().sum(), y0, create_graph=True)  # no solve on the way
    assert torch.allclose(torch.autograd.grad(slope.sum(), y0)[0], 6 * y0.detach())


@pytest.mark.parametrize("form", FORMS)
def test_double_backward_through_backprop(form: str) -> None:
    """Explicit methods give it, on their frozen steps; implicit ones, whose stages are solved for, refuse."""
    y0 = start(0.4, 0.3, 0.2)

    def slope(y0: Tensor) -> Tensor:
        y = solve(decay, y0, form, gradient=pfde.Backprop())
        return torch.autograd.grad(y[-1].sum(), y0, create_graph=True)[0]

    if form not in ("euler", "pece", "dopri5", "dopri5 fixed", "rk4"):
        message = r"double backward .* implicit method is not implemented: use an explicit"
        with pytest.raises(RuntimeError, match=message):
            slope(y0)
        return
    (curvature,) = torch.autograd.grad(slope(y0).sum(), y0)
    observed = (slope(y0 + 1e-5) - slope(y0 - 1e-5)) / 2e-5  # f acts on each entry alone
    rtol = 1e-8 if form in FRACTIONAL else 1e-3 if form == "dopri5" else 1e-6
    assert torch.allclose(curvature, observed, rtol=rtol)


def test_a_solve_inside_func_of_another() -> None:
    """f calls fdeint: two integrations and two solvers at once."""
    inner_t = torch.linspace(0, 0.5, 3, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return pfde.fdeint(decay, y, inner_t, 0.5)[-1] - y

    y0 = start(grad=False)
    with torch.no_grad():
        assert torch.isfinite(pfde.fdeint(func, y0, T, 0.6)).all()
    (y0_bar,) = torch.autograd.grad(pfde.fdeint(func, y0.requires_grad_(), T, 0.6, method="euler")[-1].sum(), y0)
    shifts = torch.eye(3, dtype=torch.float64) * 1e-6
    with torch.no_grad():
        ends = [[pfde.fdeint(func, y0 + s * e, T, 0.6, method="euler")[-1].sum() for s in (1, -1)] for e in shifts]
    assert torch.allclose(y0_bar, torch.tensor([(a - b) / 2e-6 for a, b in ends], dtype=torch.float64), atol=1e-8)


def test_transforms_of_torch_func_are_refused() -> None:
    message = r"a solve inside torch.func .* not implemented: use torch.autograd.grad or backward\(\), and a batch as a"
    y0, closure = torch.ones(3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)

    def solve(y: Tensor) -> Tensor:
        return pfde.fdeint(decay, y, T, 0.6)

    for misuse in (
        lambda: torch.vmap(solve)(y0.expand(2, 3)),
        lambda: torch.vmap(lambda w: pfde.fdeint(lambda t, y: w * y, y0, T, 0.6))(closure),
        lambda: torch.func.grad(lambda y: solve(y).sum())(y0),
        lambda: torch.func.grad(lambda w: pfde.fdeint(lambda t, y: w * y, y0, T, 0.6).sum())(y0),
        lambda: torch.func.jvp(solve, (y0,), (y0,)),
        lambda: torch.func.jacrev(solve)(y0),
        lambda: torch.autograd.functional.jvp(solve, y0, y0, strict=True) and torch.func.jacfwd(solve)(y0),
    ):
        with pytest.raises(
            RuntimeError, match=message if misuse.__code__.co_names[-1] != "jacfwd" else "double backward"
        ):
            misuse()
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=message):
        solve(torch.autograd.forward_ad.make_dual(y0, y0))


def test_vmap_over_the_backward_pass_is_refused_or_right() -> None:
    """is_grads_batched runs the backward pass under vmap."""
    y0 = start()
    y = pfde.fdeint(decay, y0, T, 0.6)[-1]
    with pytest.raises(RuntimeError):
        torch.autograd.grad(y, y0, torch.eye(3, dtype=torch.float64), is_grads_batched=True)


def test_a_solve_inside_func_of_another_by_odeint() -> None:
    inner_t = torch.tensor([0.0, 0.5], dtype=D)

    def func(t: Tensor, y: Tensor) -> Tensor:
        return pfde.odeint(decay, y, inner_t, **LOOSE)[-1] - 1.5 * y

    for method in ("dopri5", "cn"):
        y0 = start()
        (y0_bar,) = torch.autograd.grad(pfde.odeint(func, y0, T, method=method, rtol=1e-4, atol=1e-6)[-1].sum(), y0)
        assert torch.isfinite(y0_bar).all()


def test_transforms_of_torch_func_are_refused_by_odeint() -> None:
    y0 = start(grad=False)
    for method in ("dopri5", "rk4", "petsc:rk:5dp"):
        with pytest.raises(RuntimeError, match=r"a solve inside torch.func .* not implemented"):
            torch.vmap(lambda y, method=method: pfde.odeint(decay, y, T, method=method))(y0.expand(2, 3))
