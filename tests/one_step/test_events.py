"""Events of `odeint_event`: their times and their gradients, against closed forms, differences and autograd.

A ball in free fall has a quadratic path, which every method of order two or more follows exactly: the time at which it
reaches the floor, and that time's derivatives, are then exact to rounding.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pfde
from support.events import FORMS, HOW, D, number


class Fall(nn.Module):
    """y = (height, speed), y' = (speed, -g)."""

    def __init__(self, g: float = 9.81) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor(g, dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -self.g.expand(())])


def fall_time(h: Tensor, v: Tensor, g: Tensor, floor: Tensor) -> Tensor:
    return (v + (v * v + 2 * g * (h - floor)).sqrt()) / g


@pytest.mark.parametrize("gradient", HOW)
@pytest.mark.parametrize("form", FORMS)
def test_a_ball_reaches_the_floor(form: str, gradient: str) -> None:
    """Its time, height and speed, and their gradients in h, v, t0, g and the floor."""
    h, v, t0, floor, f = number(2.0), number(0.7), number(0.3), number(0.1), Fall()
    keywords = FORMS[form] | {"gradient": HOW[gradient]}
    t, y = pfde.odeint_event(f, torch.stack([h, v]), t0, event_fn=lambda t, y: y[0] - floor, **keywords)
    assert t.shape == ()
    assert y.shape == (2, 2)
    duration = fall_time(h, v, f.g, floor)
    inputs = (h, v, t0, f.g, floor)
    for got, exact in (
        (t, t0 + duration),
        (y[1, 0], floor),
        (y[1, 1], v - f.g * duration),
        (y[0, 0], h),
    ):
        assert float(got.detach()) == pytest.approx(float(exact.detach()), abs=1e-9)
        bars = torch.autograd.grad(got, inputs, retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(exact, inputs, retain_graph=True, allow_unused=True)
        for a, b in zip(bars, expected, strict=True):
            assert float(0 if a is None else a) == pytest.approx(float(0 if b is None else b), abs=1e-9)


def wobble(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1] + 0.1 * torch.sin(t), -torch.sin(y[0]) - 0.2 * y[1]])


class Wobble(nn.Module):
    """A driven pendulum with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.9, dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return wobble(t, y) * torch.stack([torch.ones_like(self.a), self.a])


def reach(
    gradient: object, form: str, values: list[float], *, reverse: bool = False, f: Callable | None = None
) -> tuple[list[Tensor], Tensor]:
    """(y0, t0, a, level), and a loss of the time and the states of y[0] - level (1 + t / 10) = 0."""
    f = Wobble() if f is None else f
    y0 = torch.tensor(values[:2], dtype=D, requires_grad=True)
    t0, level = number(values[2]), number(values[4])
    with torch.no_grad():
        f.a.copy_(number(values[3], grad=False))
    t, y = pfde.odeint_event(
        f,
        y0,
        t0,
        event_fn=lambda t, y: y[0] - level * (1 + t / 10),
        reverse_time=reverse,
        gradient=gradient,
        **FORMS[form],
    )
    return [y0, t0, f.a, level], t * 1.7 + y.square().sum() + y[1, 1]


VALUES = [1.0, -0.2, 0.15, 0.9, 0.4]


@pytest.mark.parametrize("gradient", ["state", "graph", "online", "symplectic"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_autograds(form: str, gradient: str) -> None:
    for reverse in (False, True):
        inputs, loss = reach(pfde.Backprop(), form, VALUES, reverse=reverse)
        expected = torch.autograd.grad(loss, inputs)
        inputs, value = reach(HOW[gradient], form, VALUES, reverse=reverse)
        assert float(value.detach()) == pytest.approx(float(loss.detach()), rel=1e-9)
        for a, b in zip(torch.autograd.grad(value, inputs), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12), f"reverse={reverse}: {a} against {b}"


@pytest.mark.parametrize("form", ["rk4", "dopri5 fixed", "cn"])
def test_gradients_against_differences_with_fixed_steps(form: str) -> None:
    """The discrete solution itself is differentiated: its steps do not change with the inputs."""
    for reverse in (False, True):
        inputs, loss = reach(None, form, VALUES, reverse=reverse)
        got = torch.cat([x.reshape(-1) for x in torch.autograd.grad(loss, inputs)])
        for i in range(5):
            with torch.no_grad():
                ends = []
                for sign in (1, -1):
                    values = list(VALUES)
                    values[i] += sign * 1e-5
                    ends.append(reach(None, form, values, reverse=reverse)[1])
            observed = float(ends[0] - ends[1]) / 2e-5
            assert float(got[i]) == pytest.approx(observed, abs=1e-6), f"input {i}, reverse={reverse}"


@pytest.mark.parametrize("form", ["dopri5", "dopri8"])
def test_gradients_against_differences_with_adaptive_steps(form: str) -> None:
    """Frozen steps are differentiated: to the tolerance, those of the solution."""
    inputs, loss = reach(None, form, VALUES)
    got = torch.cat([x.reshape(-1) for x in torch.autograd.grad(loss, inputs)])
    for i in range(5):
        with torch.no_grad():
            ends = []
            for sign in (1, -1):
                values = list(VALUES)
                values[i] += sign * 1e-3
                ends.append(reach(None, form, values)[1])
        assert float(got[i]) == pytest.approx(float(ends[0] - ends[1]) / 2e-3, abs=2e-5), f"input {i}"


@pytest.mark.parametrize("gradient", ["state", "symplectic", "backprop"])
def test_a_hand_written_oracle(gradient: str) -> None:
    """Euler's steps on autograd's graph, the cubic Hermite polynomial in the last, and a Newton step for the time."""
    h = 0.05

    def oracle(f: Wobble, y0: Tensor, t0: Tensor, level: Tensor) -> tuple[Tensor, Tensor]:
        t, y = t0, y0
        while True:
            slope = f(t, y)
            y1 = y + h * slope
            if float((y1[0] - level).detach()) < 0:
                break
            t, y = t + h, y1
        end = f(t + h, y1)

        def dense(x: Tensor) -> Tensor:
            cubic = x * x * (3 - 2 * x) * (y1 - y) + h * x * (1 - x) * ((1 - x) * slope - x * end)
            return y + cubic

        theta = torch.tensor(0.5, dtype=D)
        for last in (*[False] * 20, True):
            x = theta.detach().requires_grad_()
            (rate,) = torch.autograd.grad(dense(x)[0], x, retain_graph=True)
            gap = dense(theta.detach())[0] - level
            theta = theta - (gap if last else gap.detach()) / rate
        return t + theta * h, dense(theta)

    results = []
    for by_hand in (True, False):
        f, y0, t0, level = Wobble(), torch.tensor([1.0, -0.2], dtype=D, requires_grad=True), number(0.15), number(0.4)
        if by_hand:
            t, end = oracle(f, y0, t0, level)
        else:
            t, y = pfde.odeint_event(
                f,
                y0,
                t0,
                event_fn=lambda t, y, level=level: y[0] - level,
                method="euler",
                step_size=h,
                gradient=HOW[gradient],
            )
            end = y[1]
        inputs = (y0, t0, f.a, level)
        t_bars = torch.autograd.grad(t, inputs, retain_graph=True)
        results.append([t.detach(), end.detach(), *t_bars, *torch.autograd.grad(end[1], inputs)])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12), f"{a} against {b}"


@pytest.mark.parametrize("gradient", HOW)
@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5", "cn"])
def test_an_event_at_the_end_of_a_step(method: str, gradient: str) -> None:
    """y' = a, in steps of 1/4 of which the fourth ends at the event: t* = t0 + (1 - y0) / a."""
    a, y0, t0 = number(1.0), torch.zeros(1, dtype=D, requires_grad=True), number(0.0)
    t, y = pfde.odeint_event(
        lambda t, y: a.expand(1),
        y0,
        t0,
        event_fn=lambda t, y: y - 1,
        method=method,
        step_size=0.25,
        params=[a],
        gradient=HOW[gradient],
    )
    assert float(t.detach()) == pytest.approx(1.0, abs=1e-12)
    bars = torch.autograd.grad(t, (t0, y0, a), retain_graph=True)
    assert [float(bar) for bar in bars] == pytest.approx([1.0, -1.0, -1.0], abs=1e-12)
    bars = torch.autograd.grad(y[1].sum(), (t0, y0, a))
    assert [float(bar) for bar in bars] == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("form", ["dopri5", "rk4", "cn"])
def test_the_first_entry_that_changes_its_sign(form: str) -> None:
    """Of a vector-valued event_fn, in any shape; y = e^-t reaches 1/2 before 1/3, and never -1."""
    y0, levels = torch.ones(1, dtype=D, requires_grad=True), torch.tensor([1 / 3, -1.0, 0.5, 0.4], dtype=D)
    levels.requires_grad_()
    keywords = FORMS[form] | ({"step_size": 0.01} if "step_size" in FORMS[form] else {})
    for shape in ((4,), (2, 2)):
        t, y = pfde.odeint_event(
            lambda t, y: -y, y0, 0.0, event_fn=lambda t, y, shape=shape: (y - levels).view(shape), **keywords
        )
        assert float(t.detach()) == pytest.approx(math.log(2), abs=1e-5)
        assert float(y[1].detach()) == pytest.approx(0.5, abs=1e-9)
        y0_bar, levels_bar = torch.autograd.grad(t, (y0, levels))
        assert float(y0_bar) == pytest.approx(1.0, abs=1e-4)
        assert levels_bar.tolist() == pytest.approx([0.0, 0.0, -2.0, 0.0], abs=1e-4)


def test_two_entries_within_one_step() -> None:
    """The one that comes first wins, not the one that is listed first."""
    y0 = torch.zeros(1, dtype=D)
    t, _ = pfde.odeint_event(
        lambda t, y: torch.ones_like(y),
        y0,
        0.0,
        event_fn=lambda t, y: torch.cat([y - 0.8, y - 0.6, y - 0.7]),
        method="rk4",
        step_size=1.0,
    )
    assert float(t) == pytest.approx(0.6, abs=1e-12)


@pytest.mark.parametrize("form", ["dopri5", "rk4"])
def test_reverse_time(form: str) -> None:
    y0, t0 = torch.ones(1, dtype=D, requires_grad=True), number(0.2)
    keywords = FORMS[form] | ({"step_size": 0.01} if form == "rk4" else {})
    t, _ = pfde.odeint_event(lambda t, y: -y, y0, t0, event_fn=lambda t, y: y - 2, reverse_time=True, **keywords)
    assert float(t.detach()) == pytest.approx(0.2 - math.log(2), abs=1e-6)
    y0_bar, t0_bar = torch.autograd.grad(t, (y0, t0))
    assert float(y0_bar) == pytest.approx(1.0, abs=1e-5)
    assert float(t0_bar) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("form", ["dopri5", "rk4"])
def test_an_event_just_before_t_max(form: str) -> None:
    """Its time is not moved by where the search ends, nor is it on t_max's account."""
    found = []
    for t_max in (None, 1.0, 0.71):
        t, _ = pfde.odeint_event(
            lambda t, y: torch.ones_like(y),
            torch.zeros(1, dtype=D),
            0.0,
            event_fn=lambda t, y: y - 0.7,
            t_max=t_max,
            **FORMS[form],
        )
        found.append(float(t))
    assert found == pytest.approx([0.7] * 3, abs=1e-12)


@pytest.mark.parametrize("form", ["dopri5", "rk4", "esdirk4"])
def test_zero_at_the_start_is_no_event(form: str) -> None:
    """A ball that leaves the floor comes back to it; what touches zero from there without a change is none."""
    v, f = number(3.0), Fall()
    y0 = torch.stack([torch.zeros((), dtype=D), v])
    t, y = pfde.odeint_event(f, y0, 0.0, event_fn=lambda t, y: y[0], **FORMS[form])
    assert float(t.detach()) == pytest.approx(6 / 9.81, abs=1e-9)
    assert float(y[1, 1].detach()) == pytest.approx(-3.0, abs=1e-8)
    v_bar, g_bar = torch.autograd.grad(t, (v, f.g))
    assert float(v_bar) == pytest.approx(2 / 9.81, abs=1e-9)
    assert float(g_bar) == pytest.approx(-6 / 9.81**2, abs=1e-9)


@pytest.mark.parametrize("form", ["dopri5", "rk4", "esdirk4"])
@pytest.mark.parametrize("gradient", ["state", "symplectic", "backprop"])
def test_a_tuple_state(form: str, gradient: str) -> None:
    results = []
    for as_tuple in (False, True):
        g, h, v = number(9.81), number(2.0), number(0.7)
        if as_tuple:
            t, y = pfde.odeint_event(
                lambda t, y, g=g: (y[1].view(()), -g.expand(1)),
                (h, v.view(1)),
                0.0,
                event_fn=lambda t, y: y[0],
                params=[g],
                gradient=HOW[gradient],
                **FORMS[form],
            )
            assert isinstance(y, tuple)
            assert y[0].shape == (2,)
            assert y[1].shape == (2, 1)
            speed = y[1][1, 0]
        else:
            t, y = pfde.odeint_event(
                lambda t, y, g=g: torch.stack([y[1], -g]),
                torch.stack([h, v]),
                0.0,
                event_fn=lambda t, y: y[0],
                params=[g],
                gradient=HOW[gradient],
                **FORMS[form],
            )
            speed = y[1, 1]
        loss = t + 2 * speed
        results.append([loss.detach(), *torch.autograd.grad(loss, (g, h, v))])
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, rtol=1e-12)


@pytest.mark.parametrize("form", ["dopri5", "rk4", "cn"])
def test_a_complex_state(form: str) -> None:
    """y = e^(i w t) crosses the imaginary axis at t = pi / (2 w)."""
    results = []
    for gradient in ("state", "symplectic", "backprop"):
        w, y0 = number(1.3), torch.ones(1, dtype=torch.complex128, requires_grad=True)
        t, y = pfde.odeint_event(
            lambda t, y, w=w: 1j * w * y,
            y0,
            0.0,
            event_fn=lambda t, y: y.real,
            params=[w],
            gradient=HOW[gradient],
            **FORMS[form],
        )
        assert float(t.detach()) == pytest.approx(math.pi / 2.6, abs=2e-3)
        results.append(
            [*torch.autograd.grad(t, (w, y0), retain_graph=True), torch.autograd.grad(y[1].imag.sum(), y0)[0]]
        )
    assert float(results[0][0]) == pytest.approx(-math.pi / 2 / 1.69, abs=5e-3)
    assert complex(results[0][1]) == pytest.approx(-1j / 1.3, abs=5e-3)  # dt* = Re(conj(grad) dy0), dy0 = i dphi
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


def test_float32() -> None:
    y0 = torch.ones(2, requires_grad=True)
    for t0 in (0.0, torch.tensor(0.0), torch.tensor(0.0, dtype=D)):
        t, y = pfde.odeint_event(lambda t, y: -y, y0, t0, event_fn=lambda t, y: y[0] - 0.5, rtol=1e-4, atol=1e-5)
        assert t.dtype == (torch.float32 if isinstance(t0, Tensor) and t0.dtype == torch.float32 else D)
        assert y.dtype == torch.float32
        assert float(t.detach()) == pytest.approx(math.log(2), abs=1e-3)
        (bar,) = torch.autograd.grad(t, y0)
        assert bar.tolist() == pytest.approx([1.0, 0.0], abs=1e-3)


def test_without_gradients() -> None:
    y0 = torch.ones(1, dtype=D)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            t, y = pfde.odeint_event(lambda t, y: -y, y0, 0.0, event_fn=lambda t, y: y - 0.5)
        assert not t.requires_grad
        assert not y.requires_grad
    same, _ = pfde.odeint_event(lambda t, y: -y, y0, 0.0, event_fn=lambda t, y: y - 0.5)
    assert torch.equal(same, t)
    level = number(0.5)
    t, y = pfde.odeint_event(lambda t, y: -y, y0, 0.0, event_fn=lambda t, y: y - level)
    assert float(torch.autograd.grad(t, level)[0]) == pytest.approx(-2.0, abs=1e-6)


def test_bounces() -> None:
    """Events one after another: after n bounces with restitution r the time is t1 (1 + 2 (r + ... + r^(n-1)))."""
    f, r, h = Fall(), number(0.6), number(1.0)
    t, y = number(0.0, grad=False), torch.stack([h, torch.zeros((), dtype=D)])
    for _ in range(3):
        t, path = pfde.odeint_event(f, y, t, event_fn=lambda t, y: y[0], method="dopri5")
        y = torch.stack([path[1, 0].detach() * 0, -r * path[1, 1]])
    first = (2 * h / f.g).sqrt()
    exact = first * (1 + 2 * r + 2 * r * r)
    assert float(t.detach()) == pytest.approx(float(exact.detach()), abs=1e-9)
    for a, b in zip(torch.autograd.grad(t, (h, r, f.g)), torch.autograd.grad(exact, (h, r, f.g)), strict=True):
        assert float(a) == pytest.approx(float(b), abs=1e-8)


def test_a_step_that_needs_checkpoints() -> None:
    """Revolve becomes Online, where the number of steps is not known: with fixed steps too, as the event ends them."""
    for form in ("dopri5", "rk4"):
        inputs, loss = reach(pfde.Discrete(schedule=pfde.Revolve(2, leaf=2)), form, VALUES)
        got = torch.autograd.grad(loss, inputs)
        inputs, loss = reach(None, form, VALUES)
        for a, b in zip(got, torch.autograd.grad(loss, inputs), strict=True):
            assert torch.equal(a, b)
