"""A func that draws random numbers is one function, whoever differentiates it: values, gradients and what comes next.

The numbers of step n are those with which it is first evaluated; a rejected try of it, its stages, the estimate of the
first step, dense outputs and an event's step all draw the same. `Backprop` finds adaptive steps before it
differentiates them, and draws in both passes what `Discrete` draws in its one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pfde

T = torch.linspace(0.0, 1.0, 4, dtype=torch.float64)


class Noisy(nn.Module):
    """Dropout between two linear maps; strong enough that another mask is another solution."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.W1, self.W2 = (
            nn.Parameter(0.8 * torch.randn(shape, generator=generator, dtype=torch.float64))
            for shape in ((3, 6), (6, 3))
        )
        self.drop = nn.Dropout(0.3)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drop(torch.tanh(y @ self.W1)) @ self.W2


def outcome(solve: Any, gradient: Any, seed: int = 3) -> tuple[Tensor, list[Tensor], Tensor]:
    """y, the gradient of a sum over it, and a number drawn afterwards."""
    torch.manual_seed(seed)
    f, y0 = Noisy(), torch.tensor([[0.5, -0.3, 0.9]], dtype=torch.float64, requires_grad=True)
    y = solve(f, y0, gradient)
    after = torch.rand(())
    (y * torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64).view(y.shape)).sum().backward()
    return y.detach(), [y0.grad, f.W1.grad, f.W2.grad], after  # type: ignore[list-item]


def ode(method: str, **keywords: Any) -> Any:
    return lambda f, y0, gradient: pfde.odeint(f, y0, T, method=method, gradient=gradient, **keywords)


def event(f: Noisy, y0: Tensor, gradient: Any) -> Tensor:
    return pfde.odeint_event(
        f, y0, torch.tensor(0.0, dtype=torch.float64), event_fn=lambda t, y: t - 0.6, t_max=2.0, gradient=gradient
    )[1]


SOLVES: dict[str, Any] = {
    **{
        m: ode(m, rtol=1e-3, atol=1e-4) for m in ("bosh3", "fehlberg", "dopri5", "tsit5", "dopri8", "sdirk4", "esdirk4")
    },
    # a first step far too long: it is rejected, and tried again
    "dopri5 with rejected steps": ode("dopri5", rtol=1e-5, atol=1e-6, options={"first_step": 1.0}),
    "dopri5 with an event": event,
    "rk4": ode("rk4", step_size=1 / 6),
    "cn": ode("cn", step_size=1 / 6),
    "fdeint trapezoid": lambda f, y0, g: pfde.fdeint(f, y0, T, 0.6, step_size=1 / 6, gradient=g),
    "fdeint pece": lambda f, y0, g: pfde.fdeint(f, y0, T, 0.6, method="pece", step_size=1 / 6, gradient=g),
}


@pytest.mark.parametrize("name", SOLVES)
def test_backprop_draws_what_discrete_draws(name: str) -> None:
    y, bars, after = outcome(SOLVES[name], pfde.Discrete())
    y1, bars1, after1 = outcome(SOLVES[name], pfde.Backprop())
    torch.testing.assert_close(y1, y, rtol=1e-11, atol=1e-12)
    for a, b in zip(bars1, bars, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)  # implicit stages: to the solvers' tolerances
    assert torch.equal(after, after1)


@pytest.mark.parametrize("name", ["dopri5", "dopri5 with rejected steps", "dopri5 with an event", "sdirk4"])
@pytest.mark.parametrize(
    "gradient",
    [
        pfde.Discrete(store="stages"),
        pfde.Discrete(store="graph"),
        pfde.Discrete(schedule=pfde.Revolve(3)),
        pfde.Discrete(schedule=pfde.Online(3)),
        pfde.Symplectic(),
    ],
    ids=["stages", "graph", "revolve", "online", "symplectic"],
)
def test_every_way_of_keeping_draws_the_same(name: str, gradient: Any) -> None:
    y, bars, after = outcome(SOLVES[name], pfde.Discrete())
    y1, bars1, after1 = outcome(SOLVES[name], gradient)
    assert torch.equal(y, y1) and torch.equal(after, after1)
    for a, b in zip(bars1, bars, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_another_seed_is_another_solution() -> None:
    """Else the tests above would prove nothing."""
    y, *_ = outcome(SOLVES["dopri5"], pfde.Discrete())
    y1, *_ = outcome(SOLVES["dopri5"], pfde.Discrete(), seed=4)
    assert (y - y1).abs().max() > 0.05
