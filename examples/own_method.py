"""A tableau, a Caputo scheme, a history and a schedule of one's own, each defined here and not in pfde.

    python examples/own_method.py [--quick]

For each the gradient is compared with autograd through the same steps; nobody derives an adjoint. The script prints a
table and the observed order of the scheme, and ends in assertions.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch
from checkpoint_schedules import (
    CheckpointAction,
    EndForward,
    EndReverse,
    Forward,
    Move,
    Reverse,
    StorageType,
)
from torch import Tensor, nn

import pfde
from pfde.extend import Bounded, ImplicitScheme, Schedule, Sizes, Tableau, Weights

HEUN3 = Tableau(  # its order conditions are checked here, when it is made
    name="heun3",
    order=3,
    A=(
        (Fraction(0), Fraction(0), Fraction(0)),
        (Fraction(1, 3), Fraction(0), Fraction(0)),
        (Fraction(0), Fraction(2, 3), Fraction(0)),
    ),
    b=(Fraction(1, 4), Fraction(0), Fraction(3, 4)),
    c=(Fraction(0), Fraction(1, 3), Fraction(2, 3)),
    P=(
        (Fraction(1), Fraction(-3, 4)),
        (Fraction(0), Fraction(0)),
        (Fraction(0), Fraction(3, 4)),
    ),  # b_i(theta) = sum_k P[i][k] theta^(k+1)
    dense_order=2,
    stability="real interval [-2.51, 0]",
    source="Heun 1900; Hairer, Norsett, Wanner I, table II.1.1",
)


class BDF3(ImplicitScheme):
    """Convolution quadrature by the backward differentiation formula of order 3 (Lubich 1986, doi:10.1137/0517050).

    h^-alpha sum_j omega_{n-j} (y_j - y_0) = f(t_n, y_n), sum_k omega_k zeta^k = (11/6 - 3 zeta + 3/2 zeta^2 -
    zeta^3/3)^alpha. Of order 3 where y - y_0 vanishes fast enough at t_0: there is no start correction here.
    """

    name = "my_bdf3"
    form = "derivative"  # X = y - y_0
    uses_initial_slope = False
    window = 40  # from this lag on the kernel decays smoothly: a compressed history keeps the ones before
    order = "3 (y smooth, and flat at t_0)"
    stability = "A(86 deg)-stable at alpha = 1"
    cost = "1 nonlinear solve"

    def weights(self, alpha: Tensor, h: float | Tensor, steps: int) -> Weights:
        """omega by Miller's recurrence for a power of a polynomial; torch operations, so alpha's derivative is free."""
        a = [11 / 6, -3.0, 1.5, -1 / 3]
        omega = [a[0] ** alpha]
        for k in range(1, steps + 1):
            terms = (((alpha + 1) * i - k) * a[i] * omega[k - i] for i in range(1, min(k, 3) + 1))
            omega.append(sum(terms, torch.zeros_like(alpha)) / (k * a[0]))
        kernel = -torch.stack(omega) / omega[0]
        return Weights(kernel.unsqueeze(0), None, h**alpha / omega[0])


@dataclass(frozen=True)
class Prony(Bounded):
    """Recent lags exactly, older ones by `count` exponentials of fixed rates, fitted by least squares: O(1) memory.

    pfde.SumOfExponentials chooses its rates for a tolerance; this one says afterwards how far off it is.
    """

    count: int = 12

    def compress(self, steps: int, h: float, window: int, exponents: tuple[float, float]) -> Rates:
        """The linear map from a kernel to its exponentials' weights."""
        return Rates(self.count, steps, min(window, steps + 1))


class Rates:
    """kappa_k = sum_q W_q exp(-s_q (k - window)), k >= window; W = P kappa, so that alpha's derivative is exact."""

    def __init__(self, count: int, steps: int, window: int) -> None:
        self.window, self.steps = window, steps
        self.nodes = torch.logspace(-math.log10(max(2, steps)) - 0.5, 0.3, count, dtype=torch.float64)
        k = torch.arange(window, steps + 1, dtype=torch.float64)
        self._values = torch.exp(-self.nodes * (k - window)[:, None])  # (K, Q)
        scale = k[:, None]  # relative errors, roughly: the kernel decays like a power of k
        # without singular values that would make the weights large, and cancel
        self._fit = torch.linalg.pinv(self._values * scale, rtol=1e-6) * k

    def weights(self, kernel: Tensor) -> Tensor:
        """W (C, Q, G)."""
        return self._fit @ kernel[:, self.window :]

    def lags(self, kernel: Tensor, weights: Tensor, count: int) -> Tensor:
        """The compressed kernel at the lags 0..count-1."""
        exact = kernel[:, : min(self.window, count)]
        k = torch.arange(self.window, max(count, self.window), dtype=torch.float64)
        return torch.cat([exact, torch.exp(-self.nodes * (k - self.window)[:, None]) @ weights], dim=1)[:, :count]

    def dense(self, kernel: Tensor) -> Tensor:
        """At all lags."""
        return self.lags(kernel, self.weights(kernel), kernel.shape[1])

    def start(self, sigma: Tensor) -> Tensor:
        """The start column stays."""
        return sigma

    def error(self, kernel: Tensor, weights: Tensor) -> float:
        """The largest relative error: `stats.history_error`."""
        exact, found = kernel[:, self.window :], self._values @ weights
        return float(((found - exact).abs() / exact.abs()).max()) if exact.numel() else 0.0


@dataclass(frozen=True)
class Halves(Schedule):
    """One snapshot: the second half of the states is kept, the first half is computed again."""

    def stream(self, sizes: Sizes) -> _Stream:
        """For N steps that are known."""
        return _Stream(_halves(sizes.steps))

    def memory_bytes(self, sizes: Sizes) -> int:
        """So that history=None knows what a compressed history would take."""
        return sizes.snapshot_bytes(1) + (sizes.steps - sizes.steps // 2) * sizes.row_bytes


class _Stream:
    def __init__(self, actions: Iterator[CheckpointAction]) -> None:
        self._actions = actions

    def __next__(self) -> CheckpointAction:
        return next(self._actions)

    def finalize(self, n: int) -> None:
        """The end was known."""


def _halves(steps: int) -> Iterator[CheckpointAction]:
    middle, work, ram = steps // 2, StorageType.WORK, StorageType.RAM
    if middle:
        yield Forward(0, middle, True, False, ram)  # a snapshot of step 0, no data for the adjoint
    yield Forward(middle, steps, False, True, work)
    yield EndForward()
    yield Reverse(steps, middle, True)
    if middle:
        yield Move(0, ram, work)
        yield Forward(0, middle, False, True, work)
        yield Reverse(middle, 0, True)
    yield EndReverse()


class Field(nn.Module):
    """A small network, and t."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """f(t, y)."""
        return self.net(y) + torch.sin(t)


def observed_order(steps: int, alpha: float = 0.6) -> float:
    """Of BDF3, for y = t^4 + 1."""

    def error(n: int) -> float:
        def f(t: Tensor, y: Tensor) -> Tensor:
            return math.gamma(5) / math.gamma(5 - alpha) * t ** (4 - alpha) + (t**4 + 1 - y)

        y = pfde.fdeint(f, torch.ones(1), torch.tensor([0.0, 1.0]), alpha, method=BDF3(), step_size=1 / n)
        return abs(float(y[-1, 0]) - 2.0)

    return math.log2(error(steps) / error(2 * steps))


def main() -> None:
    """Verify each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    steps = 24 if parser.parse_args().quick else 96
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    func, y0, t = Field(), torch.randn(2, 3), torch.linspace(0.0, 1.0, steps + 1)
    halves = pfde.Discrete(schedule=Halves())
    worst = {
        "the tableau heun3": pfde.testing.gradient_error(func, y0, t, 1, method=HEUN3),
        "the scheme my_bdf3": pfde.testing.gradient_error(func, y0, t, 0.6, method=BDF3()),
        "the history Prony(12)": pfde.testing.gradient_error(func, y0, t, 0.6, method="l1", history=Prony(12)),
        "the schedule Halves()": pfde.testing.gradient_error(func, y0, t, 1, method=HEUN3, gradient=halves),
        "history and schedule": pfde.testing.gradient_error(
            func, y0, torch.linspace(0.0, 1.0, 241), 0.6, method="l1", history=Prony(12), gradient=halves
        ),
    }
    for name, errors in worst.items():
        print(f"{name:28} against autograd {errors.worst:.1e}")
        assert errors.worst < 1e-12
    order = observed_order(steps)
    print(f"order of my_bdf3 for y = t^4 + 1: {order:.2f}")
    assert abs(order - 3) < 0.2
    solution = pfde.solve(func, y0, t, 0.6, method="l1", history=Prony(12))
    print(f"{solution.stats.history}: the kernel is off by {solution.stats.history_error:.1e} at most")


if __name__ == "__main__":
    main()
