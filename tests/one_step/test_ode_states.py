"""Kinds of states of `odeint`: tuples, complex numbers, float32, states without dimensions."""

import math

import pytest
import torch
from torch import Tensor

import pfde
from support.pendulum import (
    COMPLEX_FORMS,
    WAVE_START,
    C,
    D,
    Waves,
    close,
    times,
    wave_loss,
)


@pytest.mark.parametrize("keywords", [{}, {"method": "rk4", "step_size": 0.1}, {"method": "cn", "step_size": 0.1}])
def test_a_tuple_is_one_state(keywords: dict) -> None:
    """To the bit, with its gradient and that of t."""

    def parts(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = y
        return -a * b.sum() + t, torch.cos(b) * a.mean()

    def whole(t: Tensor, y: Tensor) -> Tensor:
        a, b = parts(t, (y[:4].view(2, 2), y[4:]))
        return torch.cat([a.reshape(-1), b])

    start = torch.tensor([0.1, 0.2, -0.3, 0.5, 1.0, 0.7], dtype=D)
    t, y0 = times(0.0, 0.3, 1.0).requires_grad_(), start.clone().requires_grad_()
    y = pfde.odeint(whole, y0, t, **keywords)
    expected = torch.autograd.grad(y.square().sum(), (y0, t))
    s, a0, b0 = t.detach().clone().requires_grad_(), start[:4].view(2, 2).requires_grad_(), start[4:].requires_grad_()
    a, b = pfde.odeint(parts, (a0, b0), s, **keywords)
    assert a.shape == (3, 2, 2)
    assert b.shape == (3, 2)
    assert torch.equal(torch.cat([a.reshape(3, 4), b], dim=1), y)
    got = torch.autograd.grad(a.square().sum() + b.square().sum(), (a0, b0, s))
    assert torch.equal(torch.cat([got[0].reshape(-1), got[1]]), expected[0])
    assert torch.equal(got[2], expected[1])


@pytest.mark.parametrize("keywords", COMPLEX_FORMS, ids=lambda k: k["method"])
def test_a_complex_state_is_a_real_one_of_twice_the_size(keywords: dict) -> None:
    t, f = times(0.0, 0.5, 1.0), Waves()
    y0 = WAVE_START.clone().requires_grad_()
    y = pfde.odeint(f, y0, t, **keywords)
    assert y.dtype == C
    got = torch.autograd.grad(wave_loss(y), (y0, f.w, f.c))
    x0 = torch.view_as_real(WAVE_START.clone()).requires_grad_()
    x = torch.view_as_complex(pfde.odeint(f.real, x0, t, params=[f.w, f.c], **keywords))
    expected = torch.autograd.grad(wave_loss(x), (x0, f.w, f.c))
    close(y.detach(), x.detach(), 1e-14)
    close(torch.view_as_real(got[0]), expected[0], 1e-13)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert a.dtype == C
        close(a, b, 1e-13)


@pytest.mark.parametrize("gradient", [pfde.Discrete(), pfde.Symplectic(), pfde.Discrete(store="graph")], ids=str)
@pytest.mark.parametrize("keywords", COMPLEX_FORMS, ids=lambda k: k["method"])
def test_complex_gradients_are_autograds(keywords: dict, gradient: object) -> None:
    t = times(0.0, 0.5, 1.0)
    results = []
    for how in (gradient, pfde.Backprop()):
        f, y0 = Waves(), WAVE_START.clone().requires_grad_()
        y = pfde.odeint(f, y0, t, gradient=how, **keywords)
        results.append(torch.autograd.grad(wave_loss(y), (y0, f.w, f.c)))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-11)


def test_complex_gradients_against_differences() -> None:
    """dL = Re(conj(grad) dz), torch's convention."""
    t, keywords = times(0.0, 0.5, 1.0), {"method": "rk4", "step_size": 0.1}
    f, y0 = Waves(), WAVE_START.clone().requires_grad_()
    y0_bar, c_bar = torch.autograd.grad(wave_loss(pfde.odeint(f, y0, t, **keywords)), (y0, f.c))
    for direction in (1e-5, 1e-5j):
        with torch.no_grad():
            ends = [wave_loss(pfde.odeint(f, y0 + s * direction, t, **keywords)) for s in (1, -1)]
            assert abs((ends[0] - ends[1]) / 2 - (y0_bar.conj() * direction).real.sum()) < 1e-13
            ends = []
            for s in (1, -1):
                g = Waves()
                g.c += s * direction
                ends.append(wave_loss(pfde.odeint(g, y0, t, **keywords)))
            assert abs((ends[0] - ends[1]) / 2 - (c_bar.conj() * direction).real) < 1e-13


def test_complex_values_are_right() -> None:
    w = torch.tensor([1.0 + 0.1j, 2.0 - 0.2j], dtype=C)
    t = times(0.0, 0.5, 2.0)
    y = pfde.odeint(lambda t, y: 1j * w * y, WAVE_START, t)
    close(y, WAVE_START * torch.exp(1j * w * t[:, None]), 1e-6)
    single = pfde.odeint(
        lambda t, y: 1j * w.to(torch.complex64) * y, WAVE_START.to(torch.complex64), t, rtol=1e-4, atol=1e-5
    )
    assert single.dtype == torch.complex64
    close(single.to(C), y, 1e-3)


def test_a_tuple_of_real_and_complex_parts() -> None:
    def f(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, z = y
        assert not x.is_complex()
        assert z.is_complex()
        return -x, 1j * z

    x, z = pfde.odeint(f, (torch.ones(2, dtype=D), WAVE_START), times(0.0, 1.0))
    close(x[-1], torch.full((2,), math.exp(-1), dtype=D), 1e-6)
    close(z[-1], WAVE_START * complex(math.cos(1), math.sin(1)), 1e-6)


@pytest.mark.parametrize("method", ["dopri5", "tsit5", "rk4", "cn", "esdirk3"])
def test_float32(method: str) -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        assert t.dtype == y.dtype == torch.float32
        assert t.shape == ()
        return -y + torch.sin(t)

    y0 = torch.tensor([1.0, 0.0], requires_grad=True)
    for t in (torch.linspace(0, 1, 11), torch.linspace(0, 1, 11, dtype=D)):
        y = pfde.odeint(f, y0, t, method=method, rtol=1e-4, atol=1e-5)
        assert y.dtype == torch.float32
        end = 1.5 * math.exp(-1) + (math.sin(1) - math.cos(1)) / 2
        assert float(y[-1, 0].detach()) == pytest.approx(end, abs=2e-3)
        (bar,) = torch.autograd.grad(y[-1].sum(), y0)
        assert bar.dtype == torch.float32
        assert torch.allclose(bar, torch.full((2,), math.exp(-1)), atol=2e-3)


def test_float32_times_of_a_double_state() -> None:
    t = torch.tensor([0.0, 0.3, 1.0], requires_grad=True)
    y0 = torch.tensor([1.0], dtype=D)
    y = pfde.odeint(lambda t, y: -y, y0, t)
    close(y.detach(), torch.exp(-t.detach().double())[:, None], 1e-7)
    (t_bar,) = torch.autograd.grad(y[1:].sum(), t)
    assert t_bar.dtype == torch.float32
    decay = torch.exp(-t.detach().double())[1:]
    close(t_bar.double(), torch.stack([decay.sum(), *-decay]), 1e-6)


@pytest.mark.parametrize("keywords", [{}, {"method": "rk4"}, {"method": "cn"}, {"method": "petsc:rk:5dp"}])
def test_a_state_without_dimensions(keywords: dict) -> None:
    y0 = torch.tensor(1.0, dtype=D, requires_grad=True)
    y = pfde.odeint(lambda t, y: -y, y0, torch.linspace(0, 1, 21, dtype=D), **keywords)
    assert y.shape == (21,)
    (bar,) = torch.autograd.grad(y[-1], y0)
    assert bar.shape == ()
    assert float(bar) == pytest.approx(math.exp(-1), rel=1e-3)


def test_func_may_ignore_t_or_y() -> None:
    t = times(0.0, 0.5, 1.0).requires_grad_()
    y0 = torch.zeros(1, dtype=D, requires_grad=True)
    y = pfde.odeint(lambda t, y: torch.cos(t).reshape(1), y0, t)
    close(y.detach()[:, 0], torch.sin(t.detach()), 1e-7)
    y0_bar, t_bar = torch.autograd.grad(y[-1].sum(), (y0, t))
    assert float(y0_bar) == 1.0
    close(t_bar, times(-1.0, 0.0, math.cos(1)), 1e-6)
    y = pfde.odeint(lambda t, y: torch.ones_like(y), y0, t, method="cn")
    assert torch.equal(torch.autograd.grad(y[-1].sum(), (y0, t))[1], times(-1.0, 0.0, 1.0))
