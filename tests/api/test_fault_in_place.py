"""Writing in place: what func does to y is an error, what the program does to inputs and results one or right."""

import contextlib
import functools
from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

import pfde
from pfde.caputo.schemes import METHODS
from support.covering import pairs
from support.faults import (
    FORMS,
    FRACTIONAL,
    GRADIENTS,
    KEPT,
    ORDINARY,
    Field,
    Frozen,
    Pending,
    T,
    assert_same,
    decay,
    gradients,
    order,
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


def always(t: Tensor, y: Tensor) -> Tensor:
    y += 1
    return -y


def late(t: Tensor, y: Tensor) -> Tensor:
    if t > 0.5:
        y.mul_(2)
    return -y


def through_a_detached_view(t: Tensor, y: Tensor) -> Tensor:
    if t > 0.5:
        y.detach()[0] = 0.0
    return -y


CONTEXTS = {"with gradients": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}


@pytest.mark.parametrize(
    ("form", "gradient", "func", "context"),
    pairs(FORMS, [*KEPT, "backprop"], [always, late, through_a_detached_view], CONTEXTS, valid=takes),
)
def test_func_changes_y_in_place(form: str, gradient: str, func: Callable, context: str) -> None:
    y0 = start(grad=context == "with gradients")
    message = r"write y = y \+ \.\.\. instead of y \+= \.\.\. in func"
    with CONTEXTS[context](), pytest.raises(RuntimeError, match=message):
        solve(func, y0 * 1.0, form, gradient=GRADIENTS[gradient])


@pytest.mark.parametrize("method", METHODS)
def test_func_changes_y_in_place_in_the_backward_pass(method: str) -> None:
    f, y0, spoil = Field(), start(), [False]

    def func(t: Tensor, y: Tensor) -> Tensor:
        if spoil[0] and t < 0.5:
            y.detach().zero_()
        return f(t, y)

    y = pfde.fdeint(func, y0, T, 0.6, method=method, params=[f.a])
    spoil[0] = True
    with pytest.raises(RuntimeError, match=r"func changed y in place at t=0\.4: write y = y"):
        torch.autograd.grad(y.square().sum(), (y0, f.a), retain_graph=True)
    spoil[0] = False
    expected = gradients(method)
    assert_same(list(torch.autograd.grad(y.square().sum(), (y0, f.a))), expected[:2])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("result", ["y", "a view of y", "its own buffer"])
def test_func_may_return_memory_it_uses_again(method: str, result: str) -> None:
    buffer = torch.empty(3, dtype=torch.float64)

    def func(t: Tensor, y: Tensor) -> Tensor:
        if result != "its own buffer":
            return y if result == "y" else y.view(3)
        if y.requires_grad:
            return y * 1.0
        torch.mul(y, 1.0, out=buffer)
        return buffer

    y0 = start()
    expected = pfde.fdeint(lambda t, y: y * 1.0, y0, T, 0.6, method=method)
    got = pfde.fdeint(func, y0, T, 0.6, method=method)
    assert torch.equal(got, expected)
    assert_same(list(torch.autograd.grad(got.sum(), y0)), list(torch.autograd.grad(expected.sum(), y0)))


CHANGED = "modified by an inplace operation"


@pytest.mark.parametrize(
    ("form", "gradient", "which"),
    pairs(
        FORMS,
        ["state", "symplectic", "continuous"],
        ["theta", "frozen theta", "alpha", "y0"],
        valid=lambda form, gradient, which: takes(form, gradient) and (form in FRACTIONAL or which != "alpha"),
    ),
)
def test_an_input_changed_in_place_before_the_backward_pass(form: str, gradient: str, which: str) -> None:
    f, y0, alpha = Frozen(), start(), order()
    y = solve(f, y0, form, alpha=alpha, gradient=GRADIENTS[gradient])
    with torch.no_grad():
        {"theta": f.a, "frozen theta": f.scale, "alpha": alpha, "y0": y0}[which].mul_(0.9)
    with pytest.raises(RuntimeError, match=CHANGED):
        y.sum().backward()


def test_a_strided_y0_is_copied_and_may_change() -> None:
    y0 = torch.ones(3, 2, dtype=torch.float64).t().requires_grad_()
    y = pfde.fdeint(decay, y0, T, 0.6)
    expected = torch.autograd.grad(y.sum(), y0, retain_graph=True)
    with torch.no_grad():
        y0.zero_()
    assert_same(list(torch.autograd.grad(y.sum(), y0)), list(expected))


@every_store
def test_the_result_may_be_changed_in_place(form: str, gradient: str) -> None:
    """It shares no memory with what is kept."""
    solved = Pending(form, gradient=GRADIENTS[gradient])
    kept = solved.y.detach().clone()
    solved.y.detach().zero_()
    assert_same(list(torch.autograd.grad(solved.y, solved.inputs, 2 * kept)), expected(form, gradient))


@pytest.mark.parametrize("form", FORMS)
def test_a_part_of_the_result_may_be_changed_where_autograd_sees_it(form: str) -> None:
    solved = Pending(form)
    y, a = solved.y, solved.f.a
    (before,) = torch.autograd.grad(y[2:], a, torch.full_like(y[2:], 3.0), retain_graph=True)
    y[2:].mul_(3.0)
    assert torch.equal(torch.autograd.grad(y[2:].sum(), a)[0], before)
