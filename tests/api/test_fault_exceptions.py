"""Exceptions in func and in its products come out as they were raised, and spoil nothing that comes after."""

import contextlib
import functools
from itertools import product

import pytest
import torch
from torch import Tensor

from support.covering import EXHAUSTIVE
from support.faults import (
    FORMS,
    FRACTIONAL,
    GRADIENTS,
    IMPLICIT,
    KEPT,
    ORDINARY,
    Field,
    Pending,
    T,
    assert_same,
    gradients,
    solve,
    start,
)

STORES = ["state", "stages", "graph"]
STORED = [*product(FRACTIONAL, STORES), *product(ORDINARY, KEPT)]
every_store = pytest.mark.parametrize(("form", "gradient"), STORED)


@functools.cache
def expected(form: str, gradient: str) -> list[Tensor]:
    return gradients(form, gradient=GRADIENTS[gradient])


BOOM, CTRL_C = ValueError("boom"), KeyboardInterrupt("ctrl-c")


def solver_forms(form: str) -> list[dict]:
    return [{}, {"options": {"fde_jacobian": "matrix_free"}}] if form in IMPLICIT else [{}]


def interrupted(form: str, error: BaseException, k: int, forward: int, keywords: dict) -> None:
    """A solve whose k-th evaluation raises: the very error comes out, of the pass that it belongs to."""
    f = Field()

    def hook(call: int) -> None:
        if call == k:
            raise error

    f.hook, stage = hook, "forward"
    with pytest.raises(type(error)) as caught:
        solved = Pending(form, f, **keywords)
        stage = "backward"
        solved.backward()
    assert caught.value is error
    assert error.__cause__ is None
    assert stage == ("forward" if k <= forward else "backward")


def evaluations(form: str, keywords: dict) -> tuple[int, int]:
    """How many there are in the forward pass, and in both."""
    solved = Pending(form, **keywords)
    forward = solved.f.calls
    solved.backward()
    return forward, solved.f.calls


@pytest.mark.parametrize("form", FRACTIONAL)
def test_an_exception_in_func_at_any_evaluation(form: str) -> None:
    """Forward and backward, at each evaluation: at step 0, midway, inside Newton's method; of two kinds in turn."""
    for keywords in solver_forms(form):
        before = gradients(form, **keywords)
        forward, last = evaluations(form, keywords)
        for k in range(1, last + 1):
            for error in (BOOM, CTRL_C) if EXHAUSTIVE else ((BOOM, CTRL_C)[k % 2],):
                interrupted(form, error, k, forward, keywords)
        assert_same(gradients(form, **keywords), before)


@pytest.mark.parametrize(
    ("form", "gradient"),
    [
        *product(
            ["dopri5", "rk4", "cn", "sdirk4", "ark3 fixed"],
            ["state", "graph", "online", "symplectic", "continuous", "backprop"],
        )
    ],
)
def test_an_exception_in_func_of_an_ordinary_equation(form: str, gradient: str) -> None:
    """Forward and backward, at the first, some middle and the last evaluation; of two kinds in turn."""
    keywords = {"gradient": GRADIENTS[gradient]}
    before = gradients(form, **keywords)
    forward, last = evaluations(form, keywords)
    times = {1, 3, forward // 2, forward, forward + 1, (forward + last) // 2, last} & set(range(1, last + 1))
    for i, k in enumerate(sorted(times)):
        interrupted(form, (BOOM, CTRL_C)[(i + len(gradient)) % 2], k, forward, keywords)
    assert_same(gradients(form, **keywords), before)


class Explosive(torch.autograd.Function):
    """The identity, whose vjp and jvp raise `error` at their `fuse`-th product."""

    error: BaseException
    fuse = 0
    products = 0

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, y_bar: Tensor) -> Tensor:
        Explosive.products += 1
        if Explosive.products == Explosive.fuse:
            raise Explosive.error
        return y_bar * 1.0


@pytest.mark.parametrize("form", FRACTIONAL)
def test_an_exception_in_any_product(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the Jacobian products of KSP (forward), its transposed ones and the vjps (backward), and in the LU's setup."""
    a = start(0.5, -0.3, 0.8)

    def run(keywords: dict, fuse: int, error: BaseException = BOOM) -> Tensor:
        for name, value in {"error": error, "fuse": fuse, "products": 0}.items():
            monkeypatch.setattr(Explosive, name, value, raising=False)
        y0 = start()
        y = solve(lambda t, y: torch.sin(a * Explosive.apply(y)), y0, form, t=T[:4], params=[a], **keywords)
        return torch.autograd.grad(y.sum(), y0)[0]

    for keywords in solver_forms(form):
        before = run(keywords, 0)
        products = Explosive.products
        assert products >= 2
        for fuse in sorted({*range(1, min(products, 12) + 1), products // 2, products - 1, products}):
            error = (BOOM, CTRL_C)[fuse % 2]
            with pytest.raises(type(error)) as caught:
                run(keywords, fuse, error)
            assert caught.value is error
        assert torch.equal(run(keywords, 0), before)


@every_store
def test_a_backward_pass_after_a_failed_one(form: str, gradient: str) -> None:
    """The failed one has overwritten some of what was kept: the next computes it anew and gives the same bits."""
    solved, stop = Pending(form, gradient=GRADIENTS[gradient]), [0]

    def hook(k: int) -> None:
        if k == stop[0]:
            raise KeyboardInterrupt

    solved.f.hook = hook
    stop[0] = solved.f.calls + (2 if gradient != "graph" or form in FRACTIONAL else 0)
    with contextlib.suppress(KeyboardInterrupt):
        solved.backward(retain_graph=True)
    stop[0] = 0
    assert_same(solved.backward(), expected(form, gradient))


def test_the_cause_of_an_exception_in_func_is_kept() -> None:
    cause = KeyError("why")

    def func(t: Tensor, y: Tensor) -> Tensor:
        if t > 0.5:
            raise ValueError("boom") from cause
        return -y

    for form in FORMS:
        with pytest.raises(ValueError, match="boom") as caught:
            solve(func, start(), form)
        assert caught.value.__cause__ is cause, form
