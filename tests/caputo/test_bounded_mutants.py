"""Promise 7 for bounded histories and nonuniform grids: what is wrong in a recurrence or a block is noticed.

A mutant as in test_mutants. Some of them change the forward sweep, too, or the tangent one alone: the battery notices
when one of its two checks does, with an error of 1e-6 or more (or none at all, NaN, or an error raised on the way),
where rounding is 1e-13. The history's tolerance, 1e-3, does not enter: references are of the same compressed scheme.
"""

import math

import pytest
import torch

import pfde
from pfde import testing
from pfde.caputo.adjoint import AdjointSweep
from pfde.caputo.history.bounded import BlockWeights, BoundedConvolution
from pfde.caputo.history.dense import DenseConvolution
from pfde.caputo.history.exponentials import IntervalKernel, LagKernel
from pfde.caputo.operators import BoundedIntervals, BoundedLags, ExactIntervals
from pfde.caputo.trajectory import Trajectory
from support.models import Net
from support.mutants import EVERY, NOTICED, Mutant, mutate, sources

SOE, SHORT = pfde.SumOfExponentials(1e-3), pfde.ShortMemory(0.3)
ORDERS = torch.tensor([0.45, 0.8], dtype=torch.float64)
Y0 = torch.tensor([0.4, -0.9], dtype=torch.float64)


def uniform(steps):
    return torch.linspace(0.0, 1.0, steps + 1, dtype=torch.float64)


def graded(steps):
    return pfde.graded(0.0, 1.0, steps, 2.0)


# name: method, history, grid, order; three blocks each, the last one incomplete
CASES = {
    "lags": ("euler", SOE, uniform(70), 0.6),
    "lags, implicit": ("gl", SOE, uniform(70), 0.6),
    "two channels": ("pece", SOE, uniform(70), 0.6),
    "orders": ("euler", SOE, uniform(21), ORDERS),
    "window": ("euler", SHORT, uniform(70), 0.6),
    "window, orders": ("pece", SHORT, uniform(21), ORDERS),
    "grid": ("trapezoid", SOE, graded(70), 0.6),
    "grid, two channels": ("pece", SOE, graded(70), 0.6),
    "grid, orders": ("beuler", SOE, graded(21), ORDERS),
    "exact grid": ("euler", pfde.Exact(), graded(70), 0.6),
    "exact grid, orders": ("pece", pfde.Exact(), graded(40), ORDERS),
}
ONE_ORDER = ("lags", "lags, implicit", "two channels")
LAGS = ("lags", "orders")
ON_GRID = ("grid, two channels", "grid, orders")
EXACT = ("exact grid", "exact grid, orders")

BLOCK = (LagKernel, "block")
MUTANTS = {
    # uniform blocks
    "decay of the modes dropped": Mutant(
        BlockWeights, "absorb", "z.addcmul_(z, self._decay)", "pass", (*LAGS, *ON_GRID)
    ),
    "modes grow instead of decaying": Mutant(*BLOCK, "-m * s, **scales", "m * s, **scales", (*ONE_ORDER, "orders")),
    "rows enter the modes one step late": Mutant(*BLOCK, "-(m - 1 - u) * s", "-(m - u) * s", LAGS),
    "modes leave one step late": Mutant(*BLOCK, "torch.exp(-u[:, None] * s)", "torch.exp(-(u[:, None] + 1) * s)", LAGS),
    "near weights one lag late": Mutant(*BLOCK, "self._near[", "self._near.roll(1, 2)[", (*LAGS, "window")),
    "near weights replaced by the first": Mutant(
        *BLOCK, "distance.clamp(min=0)", "distance.clamp(0, 1)", (*LAGS, "window", "window, orders")
    ),
    "exponentials dropped inside a block": Mutant(
        *BLOCK, "(distance > 0)[", "((distance > 0) & (distance <= self.lags))[", LAGS
    ),
    "weights of the modes dropped on their way out": Mutant(
        *BLOCK, "weights[..., 0].unsqueeze(2) if self._G == 1 else 1.0", "1.0", ONE_ORDER
    ),
    "weights of the modes dropped on their way in": Mutant(
        *BLOCK, "weights[..., 0].unsqueeze(3) if self._G == 1 else 1.0", "1.0", ("lags",)
    ),
    "weights of the modes dropped with several orders": Mutant(
        *BLOCK, 'scales["outward_scale"] = weights', 'scales["outward_scale"] = torch.ones_like(weights)', ("orders",)
    ),
    # the recurrence
    "orders exchanged in the modes": Mutant(
        BlockWeights, "_enter_grouped", "[o, r][:, self._group]", "[o, r].flip(1)[:, self._group]", ("orders",)
    ),
    "orders exchanged in the near weights": Mutant(
        BlockWeights, "_recent_grouped", ".index_select(", ".flip(1).index_select(", ("orders", "grid, orders")
    ),
    "a row left out of every push": Mutant(
        BlockWeights, "push", "self._lags + u - size,", "self._lags + u - size + 1,", ("lags", "grid, two channels")
    ),
    "recent weights one row early": Mutant(
        BlockWeights, "recent", "rows[u][hi - r : hi])", "rows[u][hi - r - 1 : hi - 1])", ("lags", "grid")
    ),
    "the band of a block not handed on": Mutant(
        BoundedConvolution, "_turn", "ring[:L].copy_(ring[b:])", "pass", (*LAGS, *ON_GRID, "window")
    ),
    "the youngest rows enter the modes": Mutant(
        BlockWeights, "absorb", "z.addmm_(matrix, x[:b])", "z.addmm_(matrix, x[-b:])", ("two channels", "grid")
    ),
    # nonuniform blocks
    "modes brought to the wrong time": Mutant(
        IntervalKernel, "_reverse_block", "after = t[min(end + 1, N)]", "after = t[end]", ON_GRID
    ),
    "reverse modes decay over one step more": Mutant(
        IntervalKernel, "_reverse_block", "(t[end - m + 1] - after) * s, ", "(t[end - m] - after) * s, ", ON_GRID
    ),
    "rows of the adjoint enter at the wrong time": Mutant(
        IntervalKernel, "_reverse_block", "- t[end - m + 1]) * s[:, None])", "- t[end - m]) * s[:, None])", ON_GRID
    ),
    "reverse modes not multiplied by the moments": Mutant(
        IntervalKernel, "_reverse_block", "(g[i] * out).T", "out.T", ON_GRID
    ),
    "forward modes not multiplied by the moments": Mutant(
        IntervalKernel, "_forward_block", "into * g[c, :, :-1]", "into", ON_GRID
    ),
    "forward decay over the steps of the next block": Mutant(
        IntervalKernel,
        "_forward_block",
        "(t[start] - t[start + m]) * s",
        "(t[min(start + 1, N - 1)] - t[min(start + m + 1, N)]) * s",
        ON_GRID,
    ),
    "distances from the other end of an interval": Mutant(
        IntervalKernel,
        "_forward_block",
        "t[reads][:, None] - t[(rows + 1).clamp(max=N)]",
        "t[reads][:, None] - t[rows]",
        ON_GRID,
    ),
    "nearest row as all others": Mutant(IntervalKernel, "_local", "lag == 1", "lag == 0", ON_GRID),
    # the exact history on a nonuniform grid
    "a row of an earlier block left out": Mutant(
        DenseConvolution, "_enter", "(lo + m, self._N + 1)", "(lo + m + 1, self._N + 1)", EXACT
    ),
    "the row before left out": Mutant(DenseConvolution, "read", "slice(at + 1, m)", "slice(at + 2, m)", EXACT),
    # the orders
    "derivative of the modes' weights dropped": Mutant(
        BoundedLags, "convolution", "self._tables(derivative).modes", "self._tables(0).modes", LAGS
    ),
    "derivative of the near weights dropped": Mutant(
        BoundedLags, "convolution", "self._tables(derivative).near", "self._tables(0).near", (*LAGS, "window")
    ),
    "derivative of the modes' weights dropped on a grid": Mutant(
        BoundedIntervals, "convolution", "self._modes(derivative)", "self._modes(0)", ON_GRID
    ),
    "derivative of the near weights dropped on a grid": Mutant(
        BoundedIntervals, "convolution", "self.step_weights(derivative)", "self.step_weights(0)", ON_GRID
    ),
    "derivative of the weights dropped on a grid": Mutant(
        ExactIntervals, "convolution", "self.orders.alpha, derivative)", "self.orders.alpha, 0)", EXACT
    ),
    "local weight of the first step": Mutant(
        AdjointSweep, "_add_alpha", "weights_dot.local(n)", "weights_dot.local(1)", ON_GRID
    ),
    # the leaf
    "f linearised at the state before": Mutant(
        Trajectory, "state", "[n - 1 - self._leaf[0]]", "[max(n - 2 - self._leaf[0], 0)]", ("lags, implicit", *ON_GRID)
    ),
}
SOURCES = sources(MUTANTS)


def errors(case):
    """Against autograd, then of the dot product, one when the other is known."""
    method, history, t, alpha = CASES[case]
    arguments = {"method": method, "history": history}
    try:
        yield testing.gradient_error(Net(), Y0, t, alpha, **arguments).worst
        yield testing.dot_product_error(Net(), Y0, t, alpha, **arguments)
    except pfde.PfdeError:  # no longer finite, or no convergence
        yield math.nan


@pytest.mark.parametrize("case", CASES)
def test_the_battery_accepts_the_histories_as_they_are(case):
    assert CASES[case][0] in EVERY and max(errors(case)) <= 1e-12


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_noticed(monkeypatch, name):
    mutant = MUTANTS[name]
    mutate(monkeypatch, mutant, SOURCES)
    for case in mutant.methods:
        assert any(not error <= NOTICED for error in errors(case)), case
