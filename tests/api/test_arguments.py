"""Orders that are no tensors, orders that leave (0, 1], and what `solve` chooses without a method."""

import numpy as np
import pytest
import torch
from torch import Tensor

import pfde
import pfde.testing

D = torch.float64


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


def start() -> Tensor:
    return torch.tensor([1.0, 2.0, 3.0], dtype=D)


@pytest.mark.parametrize(
    "alpha",
    [
        [0.5, 0.6, 0.7],
        (0.5, 0.6, 0.7),
        np.array([0.5, 0.6, 0.7]),
        [np.float64(0.5), torch.tensor(0.6, dtype=D), 0.7],
        [[0.5, 0.6, 0.7]],
    ],
    ids=["list", "tuple", "array", "mixed", "nested"],
)
def test_an_order_for_each_component_as_a_sequence(alpha: object) -> None:
    y0, t = start().expand(4, 3), torch.linspace(0, 1, 9, dtype=D)
    expected = pfde.fdeint(decay, y0, t, torch.tensor([0.5, 0.6, 0.7], dtype=D))
    assert torch.equal(pfde.fdeint(decay, y0, t, alpha), expected)
    assert torch.equal(pfde.solve(decay, y0, t, alpha, method="trapezoid").y, expected)
    block = pfde.nn.FDEBlock(decay, alpha=alpha, t=t, step_size=0.125, return_all=True)
    assert torch.equal(block(y0), expected)
    assert block.alpha.tolist()[-1] in (0.7, [0.5, 0.6, 0.7])


@pytest.mark.parametrize("alpha", [[0.5], np.float32(0.5), np.array(0.5), [1, 1, 1], np.array([1, 1, 1])], ids=repr)
def test_single_and_whole_orders(alpha: object) -> None:
    t = torch.linspace(0, 1, 9, dtype=D)
    value = 0.5 if np.asarray(alpha).flat[0] == 0.5 else 1.0
    assert (pfde.fdeint(decay, start(), t, alpha) - pfde.fdeint(decay, start(), t, value)).abs().max() < 1e-14


def test_tensors_in_a_sequence_keep_their_graphs() -> None:
    alpha = torch.tensor(0.6, dtype=D, requires_grad=True)
    whole = torch.tensor([0.5, 0.6, 0.7], dtype=D, requires_grad=True)
    t = torch.linspace(0, 1, 9, dtype=D)
    pfde.fdeint(decay, start(), t, [0.5, alpha, 0.7])[-1].sum().backward()
    pfde.fdeint(decay, start(), t, whole)[-1].sum().backward()
    assert alpha.grad == whole.grad[1] != 0


def test_an_order_that_an_optimizer_moves_out() -> None:
    """The message says what to learn instead; that works."""
    alpha = torch.nn.Parameter(torch.tensor(0.99, dtype=D))
    optimizer = torch.optim.Adam([alpha], lr=0.1)
    t = torch.linspace(0, 1, 9)
    with pytest.raises(ValueError, match=r"got 1.0.*learn raw, and use alpha = torch.sigmoid\(raw\), as pfde.nn.FDEBl"):
        for _ in range(3):
            optimizer.zero_grad()
            pfde.fdeint(decay, start(), t, alpha)[-1].sum().backward()
            optimizer.step()
    with pytest.raises(ValueError) as caught:
        pfde.fdeint(decay, start(), t, 1.2)
    assert "sigmoid" not in str(caught.value)
    raw = torch.nn.Parameter(torch.logit(torch.tensor(0.99, dtype=D)))
    optimizer = torch.optim.Adam([raw], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        pfde.fdeint(decay, start(), t, torch.sigmoid(raw))[-1].sum().backward()
        optimizer.step()
    assert raw.grad != 0


# -- solve without a method --------------------------------------------------------------------------------------------


def test_solve_is_odeint_where_nothing_is_said() -> None:
    t = torch.tensor([0.0, 1.0], dtype=D)
    solution = pfde.solve(decay, start(), t)
    assert solution.stats.method == "dopri5"
    assert torch.equal(solution.y, pfde.odeint(decay, start(), t))
    assert (solution.y[-1] - start() * torch.exp(-t[-1])).abs().max() < 1e-6
    for alpha in (1, 1.0, np.float64(1.0)):
        assert torch.equal(pfde.solve(decay, start(), t, alpha, rtol=1e-4).y, pfde.odeint(decay, start(), t, rtol=1e-4))
    fixed = pfde.solve(decay, start(), t, step_size=0.25)
    assert torch.equal(fixed.y, pfde.odeint(decay, start(), t, step_size=0.25))


def test_solve_takes_steps_where_t_has_two_times() -> None:
    """Of D^alpha y = -y; the exact value at 1 is E_0.5(-1) = exp(1) erfc(1)."""
    t = torch.tensor([0.0, 1.0], dtype=D)
    solution = pfde.solve(decay, torch.ones(1, dtype=D), t, 0.5)
    assert solution.stats.method == "trapezoid" and solution.stats.steps == 100
    exact = torch.exp(t[1]) * torch.erfc(t[1])
    assert abs(float(solution.y[-1] - exact)) < 1e-3
    assert abs(float(pfde.fdeint(decay, torch.ones(1, dtype=D), t, 0.5)[-1] - exact)) > 0.02  # t is the grid there
    assert torch.equal(solution.y, pfde.fdeint(decay, torch.ones(1, dtype=D), t, 0.5, step_size=0.01))


@pytest.mark.parametrize(
    ("t", "steps"),
    [
        (torch.linspace(0, 1, 101, dtype=D), 100),
        (torch.linspace(0, 1, 8, dtype=D), 105),
        (torch.linspace(0, 1, 301, dtype=D), 300),
        (pfde.graded(0.0, 1.0, 30, 2.0), 120),
        (torch.tensor([0.0, 0.25, 0.25, 1.0], dtype=D), 100),
    ],
    ids=["uniform", "coarse", "fine", "graded", "repeated"],
)
def test_solve_divides_the_intervals_of_t(t: Tensor, steps: int) -> None:
    solution = pfde.solve(decay, torch.ones(1, dtype=D), t, 0.5)
    assert solution.stats.steps == steps and len(solution.y) == len(t)
    exact = torch.exp(t) * torch.erfc(t.sqrt())
    assert (solution.y.squeeze() - exact).abs().max() < 5e-3
    if steps == len(t) - 1:
        assert torch.equal(solution.y, pfde.fdeint(decay, torch.ones(1, dtype=D), t, 0.5))


def test_solve_with_a_history_or_a_tensor_of_orders_has_one() -> None:
    t = torch.tensor([0.0, 1.0], dtype=D)
    assert pfde.solve(decay, start(), t, history=pfde.Exact()).stats.method == "trapezoid"
    assert pfde.solve(decay, start(), t, torch.ones(3, dtype=D)).stats.method == "trapezoid"
    with pytest.raises(ValueError, match="rtol does not apply to method 'trapezoid'"):
        pfde.solve(decay, start(), t, 0.5, rtol=1e-3)
    with pytest.raises(ValueError, match=r"alpha must be the number 1 for method 'rk4'.*got array"):
        pfde.solve(decay, start(), t, np.array([0.5, 1.0, 1.0]), method="rk4")


@pytest.mark.parametrize("method", ["trapezoid", "rk4"])
def test_what_is_verified_moves(method: str) -> None:
    alpha = 0.5 if method == "trapezoid" else 1.0
    for times in ([0.0], [0.0, 0.5, 0.5]):
        with pytest.raises(ValueError, match="t must have two or more times, all different"):
            pfde.testing.verify(decay, start(), torch.tensor(times, dtype=D), alpha, method=method)
    with pytest.raises(ValueError, match="y0 must have entries to verify a gradient"):
        pfde.testing.verify(decay, start()[:0], torch.tensor([0.0, 1.0], dtype=D), alpha, method=method)
