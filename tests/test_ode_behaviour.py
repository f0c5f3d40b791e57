"""What `odeint` does beside its errors: torchdiffeq's calls, kinds of states, outputs and steps, memory, mass matrices,
random numbers, and the gradients that are not the discrete adjoint.

Reference values are closed forms, or were computed with mpmath's Taylor series to 20 digits.
"""

import gc
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torchdiffeq
from torch import Tensor, nn

import pfde
from pfde.ordinary import solve_ode

D = torch.float64
C = torch.complex128
SPIRAL = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=D)
SPIRAL_TIMES = [0.0, 0.5, 1.0, 2.0]
SPIRAL_VALUES = torch.tensor(  # mpmath, tolerance 1e-20
    [
        [2.0, 0.0],
        [-1.71480949036211984, 0.496601093343958324],
        [0.70926174325310324, -1.50410845784038426],
        [-0.811407015625775994, 1.22311053686933908],
    ],
    dtype=D,
)
ADAPTIVE = ["bosh3", "fehlberg", "dopri5", "tsit5", "dopri8", "sdirk4", "esdirk3", "esdirk4", "ark2", "ark3", "ark4"]


class Spiral(nn.Module):
    """torchdiffeq's example, y' = A^T y^3 with its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(SPIRAL.clone())

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return y**3 @ self.A


def spiral(_t: Tensor, y: Tensor) -> Tensor:
    return y**3 @ SPIRAL.to(y)


def pendulum(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], -torch.sin(y[0]) + 0.1 * torch.cos(t)])


def times(*values: float) -> Tensor:
    return torch.tensor(values, dtype=D)


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    """In the maximum norm, relative to the largest entry."""
    error = float((got - expected).detach().abs().max() / expected.detach().abs().max())
    assert error <= tolerance, f"off by {error:.2e} (relative, of the largest entry), more than {tolerance:.0e}"


# -- torchdiffeq's calls -----------------------------------------------------------------------------------------------


@pytest.mark.smoke
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
        y = module.odeint(f, y0, t, rtol=1e-9, atol=1e-11, method=method, **keywords)
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


# -- kinds of states ---------------------------------------------------------------------------------------------------


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


class Waves(nn.Module):
    """y' = i w y - c |y|^2 y with complex parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0 + 0.1j, 2.0 - 0.2j], dtype=C))
        self.c = nn.Parameter(torch.tensor(0.3 + 0.2j, dtype=C))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return 1j * self.w.to(y) * y - self.c.to(y) * (y * y.conj()) * y

    def real(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.view_as_real(self(t, torch.view_as_complex(y)))


WAVE_START = torch.tensor([1.0 + 0.5j, -0.3 + 0.8j], dtype=C)
WAVE_WEIGHTS = torch.tensor([0.7 - 0.2j, 0.1 + 0.9j], dtype=C)
COMPLEX_FORMS = [
    {"method": "dopri5", "rtol": 1e-7, "atol": 1e-9},
    {"method": "rk4", "step_size": 0.1},
    {"method": "cn", "step_size": 0.25},
    {"method": "esdirk3", "rtol": 1e-3, "atol": 1e-4},
]


def wave_loss(y: Tensor) -> Tensor:
    return (y * WAVE_WEIGHTS).real.sum() + y[1].abs().square().sum()


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


# -- random numbers ----------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(3, 3, dtype=D)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.linear(y)))


def noisy_gradient(gradient: object, **keywords: object) -> list[Tensor]:
    f, y0 = Noisy(), torch.tensor([1.0, -0.4, 0.3], dtype=D, requires_grad=True)
    torch.manual_seed(3)
    y = pfde.odeint(f, y0, torch.linspace(0, 1, 6, dtype=D), gradient=gradient, **keywords)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (y0, f.linear.weight))]


SCHEDULES = [
    pfde.Discrete(schedule=pfde.Online(1, leaf=1)),
    pfde.Discrete(schedule=pfde.Online(2, leaf=2)),
    pfde.Discrete(schedule=pfde.Revolve(1, leaf=1)),
]


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_dropout_with_fixed_steps_is_backprops(method: str) -> None:
    """With the same seed: each step draws once, and its stages share the numbers."""
    expected = noisy_gradient(pfde.Backprop(), method=method, step_size=0.1)
    for gradient in (pfde.Discrete(), pfde.Discrete(store="graph")):
        for a, b in zip(noisy_gradient(gradient, method=method, step_size=0.1), expected, strict=True):
            close(a, b, 1e-12)


@pytest.mark.parametrize(
    "keywords", [{"method": "rk4", "step_size": 0.1}, {"method": "bosh3", "rtol": 1e-2, "atol": 1e-3}]
)
def test_dropout_is_replayed_to_the_bit(keywords: dict) -> None:
    expected = noisy_gradient(pfde.Discrete(), **keywords)
    for gradient in SCHEDULES:
        for a, b in zip(noisy_gradient(gradient, **keywords), expected, strict=True):
            assert torch.equal(a, b), f"{gradient}: {a} against {b}"
    for gradient in (pfde.Discrete(store="stages"), pfde.Discrete(store="graph"), pfde.Symplectic()):
        for a, b in zip(noisy_gradient(gradient, **keywords), expected, strict=True):
            close(a, b, 1e-14)


# -- outputs and steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ADAPTIVE)
def test_outputs_do_not_change_the_steps(method: str) -> None:
    """And all of them are as accurate as the solution."""
    f = pfde.Split(lambda t, y: y @ torch.diag(times(-0.2, -0.3)), pendulum) if method.startswith("ark") else pendulum
    y0 = torch.tensor([1.0, 0.5], dtype=D)
    loose = method in ("ark2", "bosh3")
    keywords = {"method": method, "rtol": 1e-4 if loose else 1e-6, "atol": 1e-4 if loose else 1e-7}
    few = solve_ode(f, y0, times(0.0, 3.0), **keywords)
    t = torch.cat([torch.linspace(0, 3, 51, dtype=D)[:-1], times(2.9999, 3.0)])
    many = solve_ode(f, y0, t, **keywords)
    assert many.stats.steps == few.stats.steps
    assert many.stats.rejected == few.stats.rejected
    assert torch.equal(many.y[-1], few.y[-1])
    exact = pfde.odeint(f, y0, t, method="dopri8", rtol=1e-11, atol=1e-12)
    end = float((many.y[-1] - exact[-1]).abs().max())
    error = (many.y - exact).abs().amax(dim=1)
    assert end < (2e-2 if loose else 2e-4)
    assert float(error.max()) < max(20 * end, 2e-5), f"{error.tolist()}"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ["bosh3", "fehlberg", "dopri5", "dopri8", "esdirk4"])
def test_an_output_that_lies_at_the_end_of_a_step_by_chance(method: str, reverse: bool) -> None:
    """Its own time moves it along the solution: t_bar = <y_bar, f>, whatever the steps do."""
    t = times(0.0, 0.25, 1.0)
    results = []
    for gradient in (pfde.Discrete(), pfde.Backprop()):
        y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
        s = (-t if reverse else t).clone().requires_grad_()
        y = pfde.odeint(
            pendulum, y0, s, method=method, rtol=1e-5, atol=1e-5, options={"first_step": 0.25}, gradient=gradient
        )
        loss = y[1] @ times(0.3, -0.7) + y[2].sum()
        results.append((y.detach(), *torch.autograd.grad(loss, (y0, s))))
    for a, b in zip(*results, strict=True):
        close(a, b, 1e-12)
    y, _, t_bar = results[0]
    slope = pendulum((-t if reverse else t)[1], y[1])
    assert float(t_bar[1]) == pytest.approx(float(slope @ times(0.3, -0.7)), abs=1e-3)


class Clock(nn.Module):
    """The pendulum, which notes the times it is called at."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.1, dtype=D))
        self.times: list[float] = []

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.times.append(float(t.detach()))
        return pendulum(t, y) - self.a * y


@pytest.mark.parametrize(
    "gradient", [pfde.Discrete(), pfde.Symplectic(), pfde.Discrete(schedule=pfde.Online(2, leaf=4))], ids=str
)
@pytest.mark.parametrize("method", ["dopri5", "dopri8", "esdirk3"])
def test_a_replay_uses_the_very_times(method: str, gradient: object) -> None:
    f, y0 = Clock(), torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    y = pfde.odeint(f, y0, times(0.1, 1.234, 3.3), method=method, rtol=1e-4, atol=1e-4, gradient=gradient)
    seen, f.times = set(f.times), []
    y.square().sum().backward()
    assert f.times
    assert set(f.times) <= seen


def stage_times(t1: float, **options: float) -> list[float]:
    """The times at which f is evaluated over [0, t1] by bosh3, whose nodes are 0, 1/2, 3/4, 1."""
    found = []

    def f(t: Tensor, y: Tensor) -> Tensor:
        found.append(float(t))
        return -y

    y0 = torch.ones(1, dtype=D)
    solution = solve_ode(f, y0, times(0.0, t1), method="bosh3", rtol=1e-2, atol=1e-2, options=options)
    assert solution.stats.rejected == 0
    return sorted(set(found))


def test_first_step() -> None:
    seen = stage_times(1.0, first_step=0.0625)
    assert [t for t in seen if t <= 0.0625] == [0.0, 0.03125, 0.046875, 0.0625]
    assert stage_times(0.5, first_step=100.0) == [0.0, 0.25, 0.375, 0.5]


def test_max_step() -> None:
    for end in (0.5, 0.1005, 1.0):
        seen = stage_times(end, first_step=0.1, max_step=0.1)
        assert len(seen) % 3 == 1
        ends = seen[::3]  # of the steps
        largest = max(b - a for a, b in pairwise(ends))
        assert largest <= 0.1 * (1 + 1e-12), f"a step of {largest} over [0, {end}]"


def test_safety_and_factors() -> None:
    y0, t = torch.tensor([1.0, 0.5], dtype=D), times(0.0, 10.0)

    def count(**options: float) -> int:
        return solve_ode(pendulum, y0, t, rtol=1e-6, atol=1e-6, options=options).stats.steps

    usual = count()
    assert count(safety=0.9) == usual
    assert count(safety=0.45) > 1.5 * usual
    first = {"first_step": 1e-6}
    assert count(**first, ifactor=1.5) > count(**first) + 10
    with_small = solve_ode(pendulum, y0, t, rtol=1e-6, atol=1e-6, options={"first_step": 10.0, "dfactor": 0.9})
    with_large = solve_ode(pendulum, y0, t, rtol=1e-6, atol=1e-6, options={"first_step": 10.0, "dfactor": 0.01})
    assert with_small.stats.rejected > with_large.stats.rejected


def test_tolerances_of_each_entry() -> None:
    """A fast oscillation beside a slow one: where its tolerance is wide the steps are the slow one's."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -y[0], 20 * y[3], -20 * y[2]])

    y0, t = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=D), times(0.0, 2.0)
    narrow = solve_ode(f, y0, t, rtol=0.0, atol=1e-6)
    wide = solve_ode(f, y0, t, rtol=0.0, atol=torch.tensor([1e-6, 1e-6, 1e6, 1e6], dtype=D))
    assert wide.stats.steps < narrow.stats.steps / 4
    assert abs(float(wide.y[-1, 0]) - math.cos(2)) < 1e-4
    same = solve_ode(f, y0, t, rtol=torch.zeros(4, dtype=D), atol=torch.full((4,), 1e-6, dtype=D))
    assert torch.equal(same.y, narrow.y)

    def parts(t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        dy = f(t, torch.cat(y))
        return dy[:2], dy[2:]

    by_part = solve_ode(parts, (y0[:2], y0[2:]), t, rtol=0.0, atol=(1e-6, 1e6))
    assert torch.equal(torch.cat(by_part.y, dim=1), wide.y)
    z0 = torch.view_as_complex(y0.view(2, 2))

    def waves(t: Tensor, z: Tensor) -> Tensor:
        return -1j * torch.tensor([1.0, 20.0], dtype=D) * z

    by_wave = solve_ode(waves, z0, t, rtol=0.0, atol=torch.tensor([1e-6, 1e6], dtype=D))
    assert by_wave.stats.steps == wide.stats.steps
    close(torch.view_as_real(by_wave.y).reshape(2, 4), wide.y, 1e-9)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["dopri5", "sdirk4"])
@pytest.mark.parametrize("snapshots", [1, 3])
def test_online_bounds_the_snapshots(method: str, snapshots: int) -> None:
    y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    tolerance = 1e-6 if method == "dopri5" else 3e-4
    keywords = {"method": method, "rtol": tolerance, "atol": tolerance}
    t = times(0.0, 1.0, 4.0)
    how = pfde.Discrete(schedule=pfde.Online(snapshots, leaf=2))
    solution = solve_ode(pendulum, y0, t, gradient=how, **keywords)
    assert solution.stats.steps > 8
    (got,) = torch.autograd.grad(solution.y.square().sum(), y0)
    assert solution.stats.snapshots_peak == snapshots
    assert solution.stats.snapshot_bytes_peak <= snapshots * 3 * 2 * 8  # of the last block, its leaf
    assert solution.stats.nfe_recompute > 0
    (expected,) = torch.autograd.grad(pfde.odeint(pendulum, y0, t, **keywords).square().sum(), y0)
    assert torch.equal(got, expected)


class Token(torch.autograd.Function):
    """The identity, which counts the graphs of itself that are alive."""

    alive = peak = 0

    class Life:
        def __init__(self) -> None:
            Token.alive += 1
            Token.peak = max(Token.peak, Token.alive)

        def __del__(self) -> None:
            Token.alive -= 1

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.life = Token.Life()
        return y.clone()

    @staticmethod
    def backward(ctx: object, y_bar: Tensor) -> Tensor:
        return y_bar * 1.0


@pytest.mark.parametrize(
    ("gradient", "forward", "backward"),
    [
        (pfde.Symplectic(), 0, 1),
        (pfde.Discrete(), 0, "s"),
        (pfde.Discrete(store="stages"), 0, 1),
        (pfde.Discrete(schedule=pfde.Online(2, leaf=2)), 0, "s"),
        (pfde.Discrete(store="graph"), "N s", "N s"),
        (pfde.Backprop(), "N s", "N s"),
        (pfde.Continuous(), 0, 1),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "keywords",
    [{"method": "rk4", "step_size": 0.1}, {"method": "dopri5", "step_size": 0.1}, {"method": "dopri5"}],
    ids=str,
)
def test_graphs_that_are_alive(gradient: object, forward: object, backward: object, keywords: dict) -> None:
    """Symplectic holds one graph of f at a time, Discrete those of a step, "graph" and Backprop those of all steps."""
    gc.collect()
    y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
    Token.alive = 0
    solution = solve_ode(lambda t, y: pendulum(t, Token.apply(y)), y0, times(0.0, 1.0), gradient=gradient, **keywords)
    s = 4 if keywords["method"] == "rk4" else 6
    bound = {"s": s, "N s": solution.stats.steps * s}
    held = bound.get(forward, forward)
    assert Token.alive == held, f"{Token.alive} graphs after the forward pass, expected {held}"
    Token.peak = Token.alive
    solution.y.square().sum().backward()
    peak = bound.get(backward, backward)
    assert Token.peak <= peak, f"{Token.peak} graphs at a time, expected at most {peak}"
    del solution
    assert Token.alive == 0


# -- mass matrices -----------------------------------------------------------------------------------------------------

IMPLICIT = ["beuler", "cn", "implicit_midpoint", "sdirk4", "esdirk3", "esdirk4"]


@pytest.mark.parametrize("gradient", [pfde.Discrete(), pfde.Discrete(store="graph"), pfde.Symplectic()], ids=str)
@pytest.mark.parametrize("method", IMPLICIT)
def test_a_mass_matrix_is_the_transformed_equation(method: str, gradient: object) -> None:
    """Diagonal and full, for each row of a state: M y' = f is y' = M^-1 f, stage by stage."""
    full = torch.tensor([[2.0, 0.5], [-0.3, 1.5]], dtype=D)
    for mass, matrix in ((full, full), (times(2.0, 0.5), torch.diag(times(2.0, 0.5)))):
        inverse = torch.linalg.inv(matrix)
        results = []
        for transformed in (False, True):
            y0 = torch.tensor([[1.0, 0.5], [-0.4, 0.9], [0.2, 0.1]], dtype=D, requires_grad=True)
            a = torch.tensor([0.7, -1.1], dtype=D, requires_grad=True)
            t = times(0.0, 0.5, 1.0).requires_grad_()

            def f(t: Tensor, y: Tensor, a: Tensor = a) -> Tensor:
                return torch.sin(a * y) - y.flip(1) + t

            g = (lambda t, y, f=f, inverse=inverse: f(t, y) @ inverse.T) if transformed else f
            y = pfde.odeint(
                g,
                y0,
                t,
                method=method,
                step_size=0.25,
                gradient=gradient,
                params=[a],
                mass=None if transformed else mass,
            )
            results.append((y.detach(), *torch.autograd.grad(y.square().sum(), (y0, a, t))))
        for got, expected in zip(*results, strict=True):
            close(got, expected, 1e-12)


def root(gradient: object, method: str, p: Tensor, a: Tensor, steps: int) -> Tensor:
    """y1' = -p y1, 0 = y1 - y2^2 from consistent values: (a e^(-p t), sqrt(a) e^(-p t / 2))."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-p * y[0], y[0] - y[1] ** 2])

    y0 = torch.stack([a, a.sqrt()])
    keywords = {"step_size": 1 / steps, "mass": times(1.0, 0.0), "params": [p], "gradient": gradient}
    return pfde.odeint(f, y0, times(0.0, 1.0), method=method, **keywords)[-1]


@pytest.mark.parametrize("method", IMPLICIT)
def test_a_differential_algebraic_equation(method: str) -> None:
    def parameters() -> tuple[Tensor, Tensor]:
        return tuple(torch.tensor(x, dtype=D, requires_grad=True) for x in (0.8, 1.3))  # type: ignore[return-value]

    weights = times(0.6, -1.7)
    p, a = parameters()
    end = torch.stack([a * torch.exp(-p), a.sqrt() * torch.exp(-p / 2)])
    exact = [end.detach(), *torch.autograd.grad(end @ weights, (p, a))]
    order = {"beuler": 1, "cn": 2, "implicit_midpoint": 2}.get(method, 3)
    errors = []
    for steps in (6, 12):
        p, a = parameters()
        y = root(None, method, p, a, steps)
        got = [y.detach(), *torch.autograd.grad(y @ weights, (p, a))]
        errors.append(max(float((x - z).abs().max()) for x, z in zip(got, exact, strict=True)))
    assert errors[1] < {1: 5e-2, 2: 5e-3, 3: 2e-5}[order], f"errors {errors}"
    assert errors[0] / errors[1] > 0.8 * 2**order or errors[0] < 1e-10, f"errors {errors}"
    for gradient in (pfde.Backprop(), pfde.Symplectic()):
        p, a = parameters()
        for x, z in zip(torch.autograd.grad(root(gradient, method, p, a, 12) @ weights, (p, a)), got[1:], strict=True):
            assert abs(x - z) < 1e-11 * max(1.0, abs(z))
    with torch.no_grad():
        for i in range(2):
            ends = []
            for sign in (1, -1):
                values = list(parameters())
                values[i] = values[i] + sign * 1e-5
                ends.append(root(None, method, *values, 12) @ weights)
            assert abs((ends[0] - ends[1]) / 2e-5 - got[1 + i]) < 1e-6


@pytest.mark.parametrize("method", ["beuler", "sdirk4"])
def test_robertsons_equations_with_a_conservation_law(method: str) -> None:
    """0 = y1 + y2 + y3 - 1 in place of the third equation: the solution of the three, and its gradient in the rates."""
    t = times(0.0, 0.1, 0.4)
    rates = times(0.04, 3e7, 1e4)

    def reactions(y: Tensor, k: Tensor) -> list[Tensor]:
        r1, r2, r3 = k[0] * y[0], k[1] * y[1] ** 2, k[2] * y[1] * y[2]
        return [r3 - r1, r1 - r2 - r3, r2]

    def algebraic(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([*reactions(y, k)[:2], y.sum() - 1])

    def differential(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack(reactions(y, k))

    found = []
    for f, keywords in (
        (algebraic, {"method": method, "step_size": 0.05, "mass": times(1.0, 1.0, 0.0)}),
        (differential, {"method": method, "step_size": 0.05}),
        (differential, {"method": "esdirk4", "rtol": 1e-5, "atol": 1e-8}),
    ):
        k, y0 = rates.clone().requires_grad_(), times(1.0, 0.0, 0.0)
        y = pfde.odeint(f, y0, t, params=[k], **keywords)
        found.append((y.detach(), torch.autograd.grad(y[-1, 2], k)[0] * rates))
    close(found[0][0], found[1][0], 1e-9)
    close(found[0][1], found[1][1], 1e-6)
    tolerance = 2e-3 if method == "beuler" else 1e-5  # y2's first layer, of 1e-4, is inside one step
    close(found[0][0], found[2][0], tolerance)
    close(found[0][1], found[2][1], 50 * tolerance)
    assert float(found[0][0].sum(dim=1).sub(1).abs().max()) < 1e-12
    assert found[2][0][-1].tolist() == pytest.approx([0.985172, 3.38640e-5, 0.0147940], rel=1e-4)  # Hairer, Wanner


# -- the continuous adjoint --------------------------------------------------------------------------------------------


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
