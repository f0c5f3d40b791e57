"""Rounding is no other function: what states built again differ by does not raise, whatever f makes of it.

Each of these was found by test_properties.py or test_fault_kinds.py.
"""

import pytest
import torch
from torch import nn

import pfde
from pfde.solving.marks import Marks, shaken

pytestmark = pytest.mark.filterwarnings("ignore:Numba not available:RuntimeWarning")
both = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@both
@pytest.mark.parametrize("method", ["l1", "gl", "bdf2"])
def test_a_decay_far_below_its_start(method, dtype):
    """y_n = y_0 + X_n has the rounding of y_0, here 10^10 times y_n and more: f(y_n) differs by more than it is."""
    y0 = torch.ones(3, dtype=dtype, requires_grad=True)
    t = torch.linspace(0, 4, 60, dtype=torch.float64)
    y = pfde.fdeint(lambda t, y: -8 * y, y0, t, 1.0, method=method)
    (bar,) = torch.autograd.grad(y.sum(), y0)
    exact = y.detach().sum(0)  # linear: dy_n/dy_0 = y_n / y_0
    assert torch.allclose(bar, exact, rtol=1e3 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("gradient", [pfde.Discrete(), pfde.Discrete(schedule=pfde.Online(2, leaf=3))], ids=str)
def test_a_difference_quotient_of_a_smooth_state(gradient):
    """Rounding is rough, and second differences make 4 n^2 times as much of it; (1 + eps) y would not be."""
    n = 32
    torch.manual_seed(0)
    y0 = (1 + 0.01 * torch.randn(n)).requires_grad_()

    def heat(t, y):
        return n**2 * (torch.roll(y, 1) - 2 * y + torch.roll(y, -1))

    y = pfde.odeint(
        *(heat, y0, torch.linspace(0, 1, 30, dtype=torch.float64)),
        method="implicit_midpoint",
        gradient=gradient,
        options={"fde_jacobian": "dense"},
    )
    (bar,) = torch.autograd.grad(y[-1].sum(), y0)
    assert torch.allclose(bar, torch.ones(n), rtol=1e-4)  # the sum is kept


def test_a_value_whose_rounding_moving_the_state_does_not_show():
    """One number, float32: f moves by an ulp, or by none."""
    y0 = torch.linspace(0.2, 0.9, 40).requires_grad_()
    for start in y0.unbind():
        y = pfde.fdeint(
            *(lambda t, y: -0.8 * torch.cos(t) * y + t, start, torch.linspace(0.2, 1, 5, dtype=torch.float64), 1.0),
            method="l1",
        )
        assert torch.isfinite(torch.autograd.grad(y.sum(), y0, retain_graph=True)[0]).all()


def test_where_f_cannot_be_evaluated_alone_the_largest_mark_is_the_measure():
    marks = Marks(alone=False)
    marks.keep(0, [[torch.ones(3, dtype=torch.float64)]])
    marks.keep(1, [[torch.full((3,), 1e-14, dtype=torch.float64)]])
    never = lambda by: pytest.fail("evaluated")  # noqa: E731
    marks.compare(1, [[torch.full((3,), 1.1e-14, dtype=torch.float64)]], never, exact=(True,))  # the rounding of y_0
    assert marks.mismatch is None
    marks.compare(0, [[torch.full((3,), 1.001, dtype=torch.float64)]], never, exact=(True,))
    assert marks.mismatch == 0


def test_a_state_is_shaken_by_what_it_is_summed_from():
    y, start = torch.full((64,), 1e-9, dtype=torch.float64), torch.ones(64, dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(32)
    ratio = (shaken(y, 1e-8 * signs, start) - y) / 1e-8
    assert torch.allclose(ratio, signs)
    assert torch.equal(shaken(y, None, start), y)


@pytest.mark.parametrize("schedule", [pfde.Revolve(2, leaf=2), pfde.Online(2, leaf=2)], ids=str)
@pytest.mark.parametrize("method", ["gl", "l1", "pece"])
def test_graphs_made_anew_are_compared(method, schedule):
    factor = [1.0]
    y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
    gradient = pfde.Discrete(store="graph", schedule=schedule)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    y = pfde.fdeint(lambda t, y: -factor[0] * y, y0, t, 0.7, method=method, history=pfde.Exact(), gradient=gradient)
    factor[0] = 1.01
    with pytest.raises(pfde.ReplayError, match=r"step \d of 8"):
        y.sum().backward()


def test_a_second_backward_pass_makes_graphs_anew():
    factor = [1.0]
    y0 = torch.ones(3, dtype=torch.float64, requires_grad=True)
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    y = pfde.odeint(lambda t, y: -factor[0] * y, y0, t, method="rk4", gradient=pfde.Discrete(store="graph"))
    (first,) = torch.autograd.grad(y.sum(), y0, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(y.sum(), y0, retain_graph=True)[0])
    factor[0] = 1.01
    with pytest.raises(pfde.ReplayError, match=r"step \d of 8"):
        torch.autograd.grad(y.sum(), y0)


@pytest.mark.parametrize("method", ["rk4", "petsc:rk:4"])
def test_batch_norm_counts_a_batch_once(method):
    """torch's kernel writes the statistics without a new version of the tensors."""
    norm = nn.BatchNorm1d(3, dtype=torch.float64)
    y0 = torch.randn(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.tensor([0.0, 0.25, 0.5], dtype=torch.float64)
    y = pfde.odeint(Normed(norm), y0, t, method=method, step_size=0.25)
    left = {name: x.clone() for name, x in norm.state_dict().items()}
    y.square().sum().backward()
    for name, x in norm.state_dict().items():
        assert torch.equal(x, left[name]), name


class Normed(nn.Module):
    """f = norm(y) + t."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, t, y):
        return self.norm(y) + t


@pytest.mark.parametrize("steps", ["fixed", "adaptive"])
def test_an_empty_complex_state(steps):
    y0 = torch.zeros(0, 3, dtype=torch.complex128, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    y = pfde.odeint(lambda t, y: -y, y0, t, step_size=0.5 if steps == "fixed" else None)
    assert y.shape == (4, 0, 3) and y.dtype == y0.dtype
    assert torch.autograd.grad(y.real.sum(), y0)[0].shape == (0, 3)


def test_backprop_in_float32_with_moving_times_warns_of_nothing():
    """What a step's sum lost is counted off the graph."""
    t = torch.linspace(0, 1, 5, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(3, requires_grad=True)
    slopes = []
    for gradient in (pfde.Backprop(), pfde.Discrete()):
        y = pfde.odeint(lambda t, y: -y * t, y0, t, method="cn", gradient=gradient)
        slopes.append(torch.autograd.grad(y.sum(), t)[0])
    assert torch.allclose(*slopes, rtol=1e-5)
