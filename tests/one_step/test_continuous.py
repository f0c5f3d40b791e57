"""The continuous adjoint, which is as good as its tolerance and no better."""

import pytest
import torch
from torch import Tensor

import pfde
from support.pendulum import WAVE_START, Clock, D, Waves, close, times, wave_loss


def pendulum_gradient(gradient: object, **keywords: object) -> list[Tensor]:
    f, y0 = Clock(), torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    t = times(0.0, 0.7, 2.0).requires_grad_()
    y = pfde.odeint(f, y0, t, gradient=gradient, **keywords)
    return list(torch.autograd.grad(y.square().sum(), (y0, f.a, t)))


def off(got: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "esdirk4"])
def test_the_continuous_adjoint_is_as_good_as_its_tolerance(method: str) -> None:
    keywords = {"method": method, "rtol": 1e-5, "atol": 1e-6}
    exact = pendulum_gradient(None, method="dopri8", rtol=1e-11, atol=1e-12)
    assert off(pendulum_gradient(None, **keywords), exact) < 1e-3
    assert off(pendulum_gradient(pfde.Continuous(), **keywords), exact) < 1e-3
    loose = off(pendulum_gradient(pfde.Continuous(rtol=1e-2, atol=1e-2), **keywords), exact)
    tight = off(pendulum_gradient(pfde.Continuous(rtol=1e-6, atol=1e-7), **keywords), exact)
    assert tight < loose / 10, f"rtol 1e-2: {loose:.1e}, 1e-6: {tight:.1e}"
    other = off(pendulum_gradient(pfde.Continuous(method="dopri8"), **keywords), exact)
    assert 0 < other < 1e-3


def test_the_continuous_adjoint_with_steps_of_its_own() -> None:
    keywords = {"method": "dopri8", "rtol": 1e-11, "atol": 1e-12}
    exact = pendulum_gradient(None, **keywords)
    errors = [
        off(pendulum_gradient(pfde.Continuous(method="rk4", step_size=h), **keywords), exact) for h in (0.1, 0.05)
    ]
    assert errors[1] < 1e-5
    assert 10 < errors[0] / errors[1] < 25, f"order 4: {errors}"
    fixed = {"method": "rk4", "step_size": 0.1}
    assert off(pendulum_gradient(pfde.Continuous(), **fixed), exact) < 1e-3
    assert off(pendulum_gradient(pfde.Continuous(step_size=0.05), **fixed), exact) < 1e-4


def test_the_continuous_adjoint_of_complex_parameters() -> None:
    t = times(0.0, 0.5, 1.0)
    results = []
    for how in (pfde.Discrete(), pfde.Continuous()):
        f, y0 = Waves(), WAVE_START.clone().requires_grad_()
        y = pfde.odeint(f, y0, t, gradient=how, rtol=1e-9, atol=1e-10)
        results.append(torch.autograd.grad(wave_loss(y), (y0, f.w, f.c)))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-7)
