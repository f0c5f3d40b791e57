"""Sums over many steps in float32: neither y nor a gradient drifts with N.

A plain sum of N terms drifts by up to N eps, and by a part of it where rounding goes one way, as that of one
exponential does. What y_{n+1}, lambda_n and the parameters' sums lose is carried, or summed in float64
(`schemes.sums_of_slopes`, `system.sums`); what is left is some eps, for each N alike.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pfde
from pfde.one_step.methods.sums_of_slopes import add_lost, advance, combine, no_carry, weighted_sum
from pfde.system.parameter_bar import ParameterBar
from pfde.system.sums import LongSum

EPS = torch.finfo(torch.float32).eps


class Decay(nn.Module):
    """y' = b - a y, its numbers exact in float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor([0.6875, 1.125, 0.40625], dtype=dtype))
        self.b = nn.Parameter(torch.tensor([0.3125, -0.1875, 0.90625], dtype=dtype))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.b - self.a * y


IMPLICIT = {"cn", "implicit_midpoint", "sdirk4"}


def gradients(dtype: torch.dtype, steps: int, method: str, alpha: float | None, **keywords: Any) -> list[Tensor]:
    """y(2) and the gradient of a sum of its entries to y0, a and b; no entry is in the f of another."""
    if method in IMPLICIT:
        keywords["options"] = {"fde_jacobian": "blocks"}
    f, y0 = Decay(dtype), torch.tensor([0.5, -0.25, 1.0], dtype=dtype, requires_grad=True)
    t = torch.tensor([0.0, 2.0], dtype=torch.float64)
    if alpha is None:
        y = pfde.odeint(f, y0, t, method=method, step_size=2 / steps, **keywords)
    else:
        y = pfde.fdeint(f, y0, t, alpha, method=method, step_size=2 / steps, **keywords)
    (y[-1] * torch.tensor([1.0, 0.5, -0.75], dtype=dtype)).sum().backward()
    return [x.double() for x in (y[-1].detach(), y0.grad, f.a.grad, f.b.grad)]  # type: ignore[union-attr]


@functools.cache
def exact(steps: int, method: str, alpha: float | None) -> list[Tensor]:
    """The same in float64."""
    return gradients(torch.float64, steps, method, alpha)


def worst(steps: int, method: str, alpha: float | None = None, **keywords: Any) -> float:
    """The largest relative distance of float32 from float64, in eps."""
    pairs = zip(gradients(torch.float32, steps, method, alpha, **keywords), exact(steps, method, alpha), strict=True)
    return max(float((x - y).norm() / y.norm()) for x, y in pairs) / EPS


# -- y and its gradient ------------------------------------------------------------------------------------------------

# eps by eps: f's own rounding enters as a part of T, not of N; a block of 16 parameter products loses a few eps.
ALLOWED = 8.0


@pytest.mark.parametrize(
    ("method", "gradient", "steps"),
    [
        ("euler", pfde.Discrete(), 3000),
        ("rk4", pfde.Discrete(), 1000),
        ("rk4", pfde.Discrete(store="stages"), 1000),
        ("rk4", pfde.Discrete(store="graph"), 1000),
        ("heun2", pfde.Symplectic(), 1000),
        ("heun2", pfde.Discrete(schedule=pfde.Revolve(20)), 500),
        ("cn", pfde.Discrete(), 500),
        ("implicit_midpoint", pfde.Discrete(), 200),
        ("sdirk4", pfde.Discrete(), 200),
    ],
)
def test_float32_does_not_drift(method: str, gradient: Any, steps: int) -> None:
    """Before: 14 eps (rk4), 400 eps (cn) at 2000 steps, and growing with them."""
    assert worst(steps, method, gradient=gradient) < ALLOWED


@pytest.mark.parametrize("method", ["rk4", "dopri5", "sdirk4"])
@pytest.mark.parametrize("schedule", [pfde.Revolve(3), pfde.Online(3), pfde.Revolve(2, on_disk=2)])
def test_a_replay_carries_the_same(method: str, schedule: Any) -> None:
    """The carry is part of a snapshot: every schedule's gradient is StoreAll's to the bit, in float32 too."""
    expected = gradients(torch.float32, 40, method, None)
    found = gradients(torch.float32, 40, method, None, gradient=pfde.Discrete(schedule=schedule))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("method", ["rk4", "dopri5", "sdirk4", "cn", "ark3"])
def test_every_store_takes_the_same_steps(method: str) -> None:
    """Values to the bit, and the oracle's too: the graph's steps carry the same."""
    t = torch.linspace(0.0, 2.0, 5)
    y0 = torch.tensor([0.5, -0.25, 1.0], requires_grad=True)

    def f() -> Any:
        return pfde.Split(Decay(torch.float32), Decay(torch.float32)) if method == "ark3" else Decay(torch.float32)

    def solve(gradient: Any) -> Tensor:
        return pfde.odeint(f(), y0, t, method=method, step_size=1 / 16, gradient=gradient).detach()

    expected = solve(pfde.Discrete())
    for store in ("stages", "graph"):
        assert torch.equal(solve(pfde.Discrete(store=store)), expected)
    torch.testing.assert_close(solve(pfde.Backprop()), expected, rtol=4 * EPS, atol=0.0)


@pytest.mark.parametrize("t_requires_grad", [False, True])
def test_the_step_on_a_graph_has_the_value_of_the_step(t_requires_grad: bool) -> None:
    y0 = torch.tensor([0.5, -0.25, 1.0], requires_grad=True)
    t = torch.linspace(0.0, 2.0, 40, dtype=torch.float64, requires_grad=t_requires_grad)
    y = [
        pfde.odeint(Decay(torch.float32), y0, t, method="rk4", gradient=g).detach()
        for g in (pfde.Discrete(), pfde.Discrete(store="graph"), pfde.Backprop())
    ]
    assert torch.equal(y[0], y[1]) and torch.equal(y[0], y[2])


def test_a_snapshot_counts_the_carry() -> None:
    """Two states in float32, one in float64."""
    peaks = {}
    for dtype in (torch.float32, torch.float64):
        y0 = torch.ones(1000, dtype=dtype, requires_grad=True)
        sol = pfde.solve(lambda t, y: -y, y0, torch.linspace(0, 1, 65, dtype=torch.float64), method="rk4",
                         gradient=pfde.Discrete(schedule=pfde.Revolve(2, leaf=1)))  # fmt: skip
        sol.y[-1].sum().backward()
        peaks[dtype] = sol.stats.snapshot_bytes_peak
    assert peaks[torch.float32] >= 2 * 2 * 1000 * 4 and peaks[torch.float32] <= peaks[torch.float64] + 1000 * 8


# -- the sums themselves -----------------------------------------------------------------------------------------------


def test_increments_are_summed_before_they_meet_y() -> None:
    """Each of four quarters of half a unit in the last place would be lost by itself."""
    y, part = torch.tensor([1.0]), torch.tensor([EPS / 4])
    weights = [(i, 1.0) for i in range(4)]
    assert combine(y, 1.0, weights, [part] * 4) == 1.0 + EPS
    out = torch.empty(1)
    assert combine(y, 1.0, weights, [part] * 4, out).data_ptr() == out.data_ptr() and out == 1.0 + EPS


def test_a_weighted_sum_leaves_its_slopes_alone() -> None:
    slopes = [torch.tensor([float(i)], dtype=torch.float64) for i in range(1, 5)]
    before = [k.clone() for k in slopes]
    w, total = weighted_sum([(0, 1 / 6), (1, 1 / 3), (2, -2 / 3), (3, 1 / 6)], slopes)
    torch.testing.assert_close(w * total, torch.tensor([1 / 6 + 2 / 3 - 2 + 4 / 6], dtype=torch.float64))
    assert all(map(torch.equal, slopes, before)) and abs(w) == 2 / 3


def test_what_rounding_loses_is_carried() -> None:
    """1e4 increments of a tenth of a unit in the last place."""
    y = lam = torch.tensor([1.0])
    carry = bar_carry = no_carry(y)
    step = torch.tensor([0.1 * EPS])
    for _ in range(10_000):
        y, carry, *_ = advance(y, 1.0, [(0, 1.0)], [step], carry)
        lam, bar_carry = add_lost(lam, [step], bar_carry)
    exact = 1.0 + 1e4 * float(step.double())
    assert abs(float(y) - exact) <= EPS and abs(float(lam) - exact) <= EPS
    assert no_carry(y.double()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.bfloat16])
def test_parameter_sums_do_not_drift(dtype: torch.dtype) -> None:
    """6000 terms of one sign; a plain sum in float32 is 1e-4 off, in bfloat16 it stops at 256 terms."""
    term = torch.tensor([1 / 3, 0.7]).to(dtype)
    bar, plain = ParameterBar(3), torch.zeros(2, dtype=dtype)
    for i in range(6000):
        bar.add([term, None, term if i == 5999 else None])
        plain += term
    whole, none, one = bar.bars
    assert none is None and one is not None and torch.equal(one, term)
    assert whole is not None and whole.dtype == dtype
    exact = 6000 * term.to(torch.complex128)
    eps = torch.finfo(dtype).eps
    assert ((whole.to(torch.complex128) - exact).abs() <= 8 * max(eps, EPS) * exact.abs()).all()
    assert ((plain.to(torch.complex128) - exact).abs() > 8 * eps * exact.abs()).any()


def test_a_long_sum_does_not_drift_and_a_double_one_is_plain() -> None:
    x = torch.tensor([1 / 3, 0.7])
    single, double, plain = LongSum(x), LongSum(x.double()), torch.zeros(2, dtype=torch.float64)
    for _ in range(6000):
        single.term().add_(x)
        double.term().add_(x.double())
        plain.add_(x.double())
    assert torch.equal(double.total(), plain)
    torch.testing.assert_close(single.total(), plain, rtol=8 * EPS, atol=0.0)
