"""`fdeint`: orders on the boundary, grids, states and options that only it has; what all APIs share is in api."""

import pytest
import torch
from torch import Tensor

import pfde
from pfde.caputo.schemes import METHODS
from support.faults import T, decay, start


def test_vector_alpha_for_a_tuple_state() -> None:
    with pytest.raises(ValueError, match=r"alpha must be a single number for a tuple y0: got shape \(2,\)"):
        pfde.fdeint(lambda t, y: y, (start(), start()), T, torch.tensor([0.5, 0.6]))


@pytest.mark.parametrize("method", METHODS)
def test_alpha_on_the_boundary_is_differentiable(method: str) -> None:
    """At alpha = 1 the derivative is one-sided but the formulas are smooth there: Richardson from below agrees."""

    def loss(alpha: Tensor) -> Tensor:
        return pfde.fdeint(decay, start(), T, alpha, method=method).sum()

    alpha = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(alpha), alpha)
    with torch.no_grad():
        one, half, full = (loss(alpha - step) for step in (0.0, 1e-4, 2e-4))
    observed = (3 * one - 4 * half + full) / 2e-4  # error O(1e-8)
    assert abs(slope - observed) < 1e-6 * max(1, abs(observed)), f"{slope} against {observed}"


@pytest.mark.parametrize("method", METHODS)
def test_a_nonuniform_grid_is_for_product_integration(method: str) -> None:
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    if METHODS[method].rules:
        pfde.fdeint(decay, start(), t, 0.6, method=method).sum().backward()
        return
    message = (
        rf"t must be uniformly spaced for method '{method}' when it is the grid: t\[1\]=0.3 is not t\[0\] \+ 1 h with "
        r"h=0.5; give step_size, or use one of the methods euler, pece, beuler, trapezoid"
    )
    with pytest.raises(ValueError, match=message):
        pfde.fdeint(decay, start(), t, 0.6, method=method)
    pfde.fdeint(decay, start(), t, 0.6, method=method, step_size=0.1).sum().backward()


def test_a_step_size_in_float32_times_is_whole_to_their_rounding() -> None:
    t = torch.tensor([0.0, 0.1, 0.7], dtype=torch.float32)
    assert pfde.fdeint(decay, start(), t, 0.6, step_size=0.05).shape == (3, 3)


@pytest.mark.parametrize("method", METHODS)
def test_a_state_that_is_not_contiguous_works(method: str) -> None:
    base = torch.arange(12, dtype=torch.float64).view(3, 4) / 10
    results = []
    for y0 in (base.t(), base.t().contiguous(), base.t().expand(4, 3)):
        y0 = y0.detach().requires_grad_()
        y = pfde.fdeint(decay, y0, T, 0.6, method=method)
        (y_bar,) = torch.autograd.grad(y.square().sum(), y0)
        results.append((y.detach(), y_bar))
    for y, y_bar in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(y_bar, results[0][1])
    strided = torch.ones(1, dtype=torch.float64).expand(3).requires_grad_()  # stride 0: one number three times
    y = pfde.fdeint(decay, strided, T, 0.6, method=method)
    plain = torch.ones(3, dtype=torch.float64, requires_grad=True)
    expected = pfde.fdeint(decay, plain, T, 0.6, method=method)
    assert torch.equal(torch.autograd.grad(y.sum(), strided)[0], torch.autograd.grad(expected.sum(), plain)[0])


@pytest.mark.parametrize("name", ["snes_rtol", "ksp_type", "pc_type", "fde_jacobian"])
def test_options_of_implicit_methods_do_not_apply_to_explicit_ones(name: str) -> None:
    with pytest.raises(ValueError, match=f"options: '{name}' does not apply to method 'euler', which is explicit"):
        pfde.fdeint(decay, start(), T, 0.6, method="euler", options={name: "none"})


def test_gradient_settings() -> None:
    with pytest.raises(ValueError, match="store must be one of state, stages, graph: got 'disk'"):
        pfde.Discrete(store="disk")
    with pytest.raises(
        TypeError, match=r"schedule must be StoreAll\(\), Revolve\(.*Online\(.*: got 'revolve'; make one"
    ):
        pfde.Discrete(schedule="revolve")
    with pytest.raises(TypeError, match="positional"):
        pfde.Discrete(None)
    with pytest.raises(ValueError, match=r"algorithm must be None or one of .*: got 'fast'"):
        pfde.Exact("fast")
