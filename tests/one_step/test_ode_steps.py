"""Outputs, steps, memory and random numbers of `odeint`: what is kept, and that a replay is the same solve."""

import gc
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import pfde
from pfde.one_step.methods import METHODS as ODE_METHODS
from support.pendulum import (
    ADAPTIVE,
    Clock,
    D,
    close,
    pendulum,
    times,
)
from support.solution import solve_ode

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
        (pfde.Discrete(store="stages"), 0, "s"),
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


@pytest.mark.parametrize("method", [name for name, scheme in ODE_METHODS.items() if not scheme.implicit])
def test_no_stages_of_an_explicit_method_are_kept(method: str) -> None:
    """store="stages" is store="state": f is evaluated again either way."""
    assert ODE_METHODS[method].kept_stages == 0
    bars = []
    for store in ("state", "stages"):
        y0 = torch.tensor([1.0, 0.5], dtype=D, requires_grad=True)
        y = pfde.odeint(
            pendulum, y0, times(0.0, 0.3, 1.0), method=method, step_size=0.1, gradient=pfde.Discrete(store=store)
        )
        bars.append(torch.autograd.grad(y.square().sum(), y0)[0])
    assert torch.equal(*bars)
