"""What func returns and what it uses without telling: an error of every API that says so, with gradients or without."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import nn

import pfde
from pfde.caputo.schemes import METHODS
from support.covering import pairs
from support.faults import FORMS, FRACTIONAL, GRADIENTS, ORDINARY, Field, T, gradients, solve, start, takes

RESULTS = [
    (lambda y: y[:2], ValueError, r"func must return the shape of y, \(3,\): got \(2,\)"),
    (lambda y: y.unsqueeze(0), ValueError, r"func must return the shape of y, \(3,\): got \(1, 3\)"),
    (lambda y: y.sum(), ValueError, r"func must return the shape of y, \(3,\): got \(\)"),
    (lambda y: y.float(), TypeError, "func must return the dtype of y, torch.float64: got torch.float32; convert"),
    (lambda y: y.long(), TypeError, "func must return the dtype of y, torch.float64: got torch.int64"),
    (lambda y: y + 0j, TypeError, "func must return the dtype of y, torch.float64: got torch.complex128"),
    (lambda y: None, TypeError, "func must return a tensor like y: got NoneType"),
    (lambda y: (y,), TypeError, "func must return a tensor like y: got tuple"),
    (lambda y: 1.0, TypeError, "func must return a tensor like y: got float"),
    (lambda y: y.detach().numpy(), TypeError, "func must return a tensor like y: got ndarray"),
    (lambda y: y.to("meta"), ValueError, "func must return a tensor on y's device, cpu: got meta"),
]


@pytest.mark.parametrize(("result", "form", "grad", "when"), pairs(RESULTS, FORMS, [True, False], ["at once", "late"]))
def test_what_func_returns(result: tuple, form: str, grad: bool, when: str) -> None:
    make, error, message = result
    if form.startswith("ark"):  # at t[0] the sum of the parts is looked at, where torch may refuse first
        error, message = (ValueError, RuntimeError, TypeError), ".*"
    func = (lambda t, y: make(y)) if when == "at once" else (lambda t, y: make(y) if t > 0.5 else -y)
    with torch.set_grad_enabled(grad), pytest.raises(error, match=message):
        solve(func, start(grad=grad), form)


@pytest.mark.parametrize(
    ("result", "error", "message"),
    [
        (lambda y: y[0], TypeError, "func must return a tuple of 2 tensors like y: got a tensor of shape"),
        (lambda y: (y[0],), TypeError, "func must return a tuple of 2 tensors like y: got tuple of 1"),
        (lambda y: (y[1], y[0]), ValueError, r"func must return the shape of y, \(3,\): got \(2,\)"),
        (lambda y: (y[0], y[1].float()), TypeError, "func must return the dtype of y, torch.float64"),
        (lambda y: (y[0], None), TypeError, "func must return tensors like y: got NoneType in its tuple"),
    ],
)
def test_what_func_returns_for_a_tuple(result: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pfde.fdeint(lambda t, y: result(y), (start(), start(1.0, 2.0)), T, 0.6)


CLOSURE = r"func uses a tensor of shape \(3,\) that requires grad but is none of its parameters.*pass params="


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("form", "gradient", "kind"),
    pairs(
        FORMS,
        ["state", "symplectic", "continuous", "backprop"],
        ["leaf", "inner", "module", "y0", "buffer"],
        valid=takes,
    ),
)
def test_a_closure_that_would_get_none(form: str, gradient: str, kind: str) -> None:
    leaf, y0, module = start(), start(), Field()
    inner = leaf * 2
    holder = nn.Module()
    holder.register_buffer("w", leaf)
    holder.forward = lambda t, y: y * holder.w  # type: ignore[method-assign]
    func = {
        "leaf": lambda t, y: y * leaf,
        "inner": lambda t, y: y * inner,
        "module": lambda t, y: module(t, y),
        "y0": lambda t, y: y0 - y,
        "buffer": holder,
    }[kind]
    with pytest.raises(ValueError, match=CLOSURE):
        solve(func, y0, form, gradient=GRADIENTS[gradient])
    with torch.no_grad():
        solve(func, y0, form)  # no gradient is asked for: nothing is lost


@pytest.mark.parametrize(
    ("form", "gradient"),
    [*product(FRACTIONAL, ["state", "stages", "graph"]), *product(ORDINARY, ["state", "symplectic", "continuous"])],
)
def test_a_closure_that_appears_late(form: str, gradient: str) -> None:
    """The forward pass of an explicit method keeps no graph that could tell: the backward pass refuses."""
    w, y0 = start(), start()
    func = lambda t, y: y * w if 0.55 < t < 0.95 else y * w.detach()  # noqa: E731
    y = solve(func, y0, form, gradient=GRADIENTS[gradient])
    with pytest.raises(ValueError, match=CLOSURE):
        y.sum().backward()
    assert y0.grad is None


def test_closures_given_as_params_get_their_gradient() -> None:
    w, y0, unused = start(), start(), start()
    inner = w * 2
    for params, of in (((w,), w), ((inner,), w), ((w, unused), w), (iter([w]), w)):
        factor = inner if isinstance(params, tuple) and params[0] is inner else w
        y = pfde.fdeint(lambda t, y, factor=factor: y * factor, y0, T, 0.6, params=params)
        assert torch.autograd.grad(y.sum(), of, retain_graph=True)[0].abs().min() > 0
    y = pfde.fdeint(lambda t, y: y * w, y0, T, 0.6, params=(w, unused))
    assert torch.autograd.grad(y.sum(), unused, allow_unused=True) == (None,)


def test_closures_given_as_params_of_odeint_get_theirs() -> None:
    w, y0 = start(), start()
    for params in ((w,), iter([w])):
        y = pfde.odeint(lambda t, y: y * w, y0, T, params=params)
        (w_bar,) = torch.autograd.grad(y[-1].sum(), w)
        assert torch.allclose(w_bar, (y0 * w.exp()).detach(), rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_only_the_parameters_require_a_gradient(method: str) -> None:
    f, y0 = Field(), start(grad=False)
    pfde.fdeint(f, y0, T, 0.6, method=method).square().sum().backward()
    assert y0.grad is None
    assert torch.equal(f.a.grad, gradients(method)[1])
