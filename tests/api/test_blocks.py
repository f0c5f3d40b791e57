"""The parameters given to a block as `params=`, and the steps of a block without a step size."""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import pfde
from pfde.nn import FDEBlock, ODEBlock

D = torch.float64
MAKE = {
    "ode": lambda func, **k: ODEBlock(func, method="rk4", step_size=0.25, **k),
    "fde": lambda func, **k: FDEBlock(func, alpha=0.7, step_size=0.25, **k),
}
every_block = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


def linear(seed: int = 0) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Linear(3, 3, dtype=D)


def start() -> Tensor:
    return torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3)


class Rate(nn.Module):
    """y' = -rate y, the rate a parameter of its own or one that is lent."""

    def __init__(self, rate: Tensor | None = None) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(2.0, dtype=D))
        self.lent = [rate]

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return -self.rate * y if self.lent[0] is None else -self.rate * self.lent[0] * y


@every_block
def test_parameters_of_a_lambda_are_the_blocks(make) -> None:
    """Registered once each, in the order given; they train."""
    net = linear()
    block = make(lambda t, y: net(y), params=[net.bias, net.weight, net.bias])
    assert [name for name, p in block.named_parameters() if not name.startswith("raw")] == ["params.0", "params.1"]
    assert block.params[0] is net.bias and block.params[1] is net.weight
    assert {"params.0", "params.1"} <= set(block.state_dict())
    before = [p.detach().clone() for p in net.parameters()]
    optimizer = torch.optim.Adam(block.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = block(start()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert not any(map(torch.equal, before, net.parameters()))


@every_block
def test_what_func_has_is_not_registered_twice(make) -> None:
    f = Rate()
    block = make(f, params=f.parameters())
    assert [name for name, _ in block.named_parameters()] == ["func.rate"]
    assert [key for key in block.state_dict() if key != "fixed_alpha"] == ["func.rate"]
    block(start()).sum().backward()
    assert f.rate.grad != 0
    assert "params" not in dict(make(f).named_children())


@every_block
def test_tensors_that_are_no_parameters_stay_plain(make) -> None:
    """A leaf, and one on a graph, get their gradients, and the block has neither."""
    leaf = torch.tensor(0.5, dtype=D, requires_grad=True)
    below = torch.tensor(0.25, dtype=D, requires_grad=True)
    inner = below * 2
    block = make(lambda t, y: -leaf * inner * y, params=(leaf, inner))
    assert list(block.parameters()) == []
    block(start()).square().sum().backward()
    assert leaf.grad == below.grad / 2 != 0 or leaf.grad == pytest.approx(float(below.grad) / 2)


@every_block
def test_conversions_keep_the_objects(make) -> None:
    """.float() and .to() change parameters in place, so that func, which has them in a closure, sees them."""
    net = linear()
    block = make(lambda t, y: net(y), params=net.parameters())
    exact = block(start())
    block.float()
    assert net.weight.dtype == torch.float32 and block.params[0] is net.weight
    y = block(start().float())
    assert (y - exact).abs().max() < 1e-5
    y.sum().backward()
    block.to(D)
    block.zero_grad()
    block(start()).sum().backward()
    assert net.weight.grad.abs().max() > 0


@every_block
def test_copies_have_the_parameters_that_they_solve_with(make) -> None:
    """A func whose copy has the copied parameter: all that is trained is what the copy has."""
    rate = nn.Parameter(torch.tensor(0.5, dtype=D))
    block = make(Rate(rate), params=[rate])
    assert {name for name, _ in block.named_parameters()} == {"func.rate", "params.0"}
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert twin.params[0] is twin.func.lent[0] is not rate
        twin(start()).square().sum().backward()
        assert rate.grad is None and twin.params[0].grad != 0
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = nn.Parameter(torch.tensor(0.9, dtype=D))
    loaded = make(Rate(other), params=[other])
    loaded.load_state_dict(torch.load(file, weights_only=True))
    assert float(other.detach()) == 0.5
    assert torch.equal(loaded(start()), block(start()))


@every_block
def test_a_functional_call_replaces_them(make) -> None:
    """The solve differentiates what the block has at the time, not what it was made with."""
    holder: list[nn.Module] = []
    rate = nn.Parameter(torch.tensor(0.5, dtype=D))
    kept = pfde.Discrete(store="graph")  # a lambda has the old parameter again when the call is over
    block = make(lambda t, y: -holder[0].params[0] * y, params=[rate], gradient=kept)
    holder.append(block)
    new = torch.tensor(0.8, dtype=D, requires_grad=True)
    y = torch.func.functional_call(block, {"params.0": new}, (start(),))
    (bar,) = torch.autograd.grad(y.square().sum(), new)
    rate.data.fill_(0.8)
    (expected,) = torch.autograd.grad(block(start()).square().sum(), rate)
    assert torch.equal(bar, expected)
    assert rate.grad is None


@every_block
def test_what_params_may_be(make) -> None:
    for wrong in (torch.ones(1), linear(), 3):
        with pytest.raises(TypeError, match="params must be a sequence of tensors"):
            make(lambda t, y: -y, params=wrong)
    with pytest.raises(TypeError, match="params must be a sequence of tensors: got int in it"):
        make(lambda t, y: -y, params=[3])


# -- steps -------------------------------------------------------------------------------------------------------------


def test_a_block_without_a_step_size_is_accurate() -> None:
    """D^0.5 y = -y: y(1) = exp(1) erfc(1), which 100 steps meet to 3e-4."""
    y0, one = torch.ones(1, dtype=D), torch.ones(1, dtype=D)
    y = FDEBlock(lambda t, y: -y, alpha=0.5)(y0)
    assert (y - torch.exp(one) * torch.erfc(one)).abs() < 1e-3
    assert torch.equal(y, FDEBlock(lambda t, y: -y, alpha=0.5, step_size=0.01)(y0))


@pytest.mark.parametrize("method", ["euler", "pece", "beuler", "trapezoid", "gl", "l1", "bdf2"])
def test_every_method_takes_its_hundred_steps(method: str) -> None:
    f, y0 = Rate(), start()
    with torch.no_grad():
        y = FDEBlock(f, alpha=0.7, t=(0.0, 0.5, 2.0, 2.0), return_all=True, step_size=0.02, method=method)(y0)
        assert torch.equal(y[-1], FDEBlock(f, alpha=0.7, t=(0.0, 2.0), method=method)(y0))
        uniform = FDEBlock(f, alpha=0.7, t=(0.0, 1.0, 2.0), return_all=True, method=method)(y0)
    assert len(uniform) == 3
    assert (uniform[-1] - y[-1]).abs().max() < 1e-12


def test_a_block_of_repeated_times() -> None:
    y0 = start()
    assert torch.equal(FDEBlock(Rate(), alpha=0.7, t=(1.0, 1.0))(y0), y0)
    assert torch.equal(ODEBlock(Rate(), t=(1.0,))(y0), y0)
    assert FDEBlock(Rate(), alpha=0.7, t=(0.0, 1.0, 1.0), return_all=True)(y0[:0]).shape == (3, 0, 3)
    assert "t=[1.0, 1.0]" in repr(FDEBlock(Rate(), alpha=0.7, t=(1.0, 1.0)))


def test_solve_and_fdeint_are_one() -> None:
    """The block's default is what `solve` chooses."""
    y = pfde.solve(Rate(), start(), torch.tensor([0.0, 1.0], dtype=D), 0.7).y[-1]
    assert torch.equal(FDEBlock(Rate(), alpha=0.7)(start()), y)
