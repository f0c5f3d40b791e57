"""pfde.nn.ODEBlock: `odeint` as a layer, and what a torch module has to do besides; FDEBlock: test_fde_block.py.

The block adds nothing to the numbers: it is compared with odeint for equality to the bit.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import pfde
from pfde.nn import ODEBlock

DT = torch.float64
METHODS = {  # the arguments of a short solve, explicit and implicit, on fixed and on adaptive steps
    "rk4": {"method": "rk4", "step_size": 0.25},
    "dopri5": {"method": "dopri5", "rtol": 1e-4, "atol": 1e-6},
    "cn": {"method": "cn", "step_size": 0.25},
    "esdirk3": {"method": "esdirk3", "rtol": 1e-2, "atol": 1e-3},
}
every_method = pytest.mark.parametrize("keywords", METHODS.values(), ids=METHODS)


class Field(nn.Module):
    """A nonlinear right-hand side on (..., 3) that depends on t."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inner, self.outer = nn.Linear(3, 4, dtype=DT), nn.Linear(4, 3, dtype=DT)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(y) + t))


class Pendulum(nn.Module):
    """A right-hand side on a tuple, with parts of different shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor(2.0, dtype=DT))

    def forward(self, t: Tensor, y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        angle, momentum = y
        return momentum.sum(-1), -self.stiffness * angle.sin().unsqueeze(-1) * torch.ones_like(momentum)


def start(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, torch.Size(shape or (5, 3)).numel(), dtype=DT).reshape(shape or (5, 3))


def step(block: nn.Module) -> list[Tensor]:
    """The value, and the gradients of y0 and the parameters."""
    block.zero_grad()
    y0 = start().requires_grad_()
    y = block(y0)
    y.square().sum().backward()
    return [y.detach(), y0.grad, *(p.grad for p in block.parameters())]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


# -- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.5, 1.0), (1.0, 0.0), (0.5, 0.25, -0.5)], ids=str)
@every_method
def test_a_block_is_odeint(keywords: dict, times: tuple[float, ...]) -> None:
    """At the last time, at all of them, forwards and backwards; the gradients of y0 and of the parameters too."""
    f = Field()
    y0 = start().requires_grad_()
    expected = pfde.odeint(f, y0, torch.tensor(times, dtype=DT), **keywords)
    assert torch.equal(ODEBlock(f, t=times, return_all=True, **keywords)(y0), expected)
    for t in (times, list(times), torch.tensor(times)):  # those are exact in float32
        y = ODEBlock(f, t=t, **keywords)(y0)
        assert y.shape == y0.shape
        assert torch.equal(y, expected[-1])
    inputs = [y0, *f.parameters()]
    gradients = torch.autograd.grad(y.square().sum(), inputs)
    assert all(gradient.abs().max() > 0 for gradient in gradients)
    assert_same(list(gradients), list(torch.autograd.grad(expected[-1].square().sum(), inputs)))


def test_the_defaults_are_those_of_odeint() -> None:
    f, y0 = Field(), start()
    assert torch.equal(ODEBlock(f)(y0), pfde.odeint(f, y0, torch.tensor([0.0, 1.0], dtype=DT))[-1])
    assert torch.equal(ODEBlock(f, method=None)(y0), ODEBlock(f)(y0))


def test_a_decreasing_t_undoes_an_increasing_one() -> None:
    f, y0 = Field(), start()
    there, back = ODEBlock(f, t=(0.0, 1.0)), ODEBlock(f, t=(1.0, 0.0))
    # Each way keeps to 1e-7 and 1e-9; what f multiplies errors by in a unit of time is below 10.
    assert (back(there(y0)) - y0).abs().max() < 1e-5
    assert (there(y0) - y0).abs().max() > 1e-2


@pytest.mark.parametrize(
    "gradient", [pfde.Discrete(store="graph"), pfde.Symplectic(), pfde.Continuous(), pfde.Backprop()], ids=repr
)
def test_every_gradient_is_passed_on(gradient: object) -> None:
    """The discrete ones agree to rounding, the continuous one within its tolerances."""
    f = Field()
    found, expected = (step(ODEBlock(f, gradient=g)) for g in (gradient, pfde.Discrete()))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= (1e-5 if isinstance(gradient, pfde.Continuous) else 1e-12) * b.norm()


@every_method
def test_a_tuple_state(keywords: dict) -> None:
    f = Pendulum()
    y0 = (start(2).requires_grad_(), start(2, 3).requires_grad_())
    y = ODEBlock(f, **keywords)(y0)
    rows = ODEBlock(f, t=(0.0, 0.5, 1.0), return_all=True, **keywords)(y0)
    assert isinstance(y, tuple) and isinstance(rows, tuple)
    assert [part.shape for part in y] == [part.shape for part in y0]
    assert [part.shape for part in rows] == [(3, *part.shape) for part in y0]
    expected = pfde.odeint(f, y0, torch.tensor([0.0, 1.0], dtype=DT), **keywords)
    assert_same(list(y), [part[-1] for part in expected])
    y[1].square().sum().backward()  # their sum is zero by symmetry
    assert all(part.grad.abs().max() > 0 for part in y0)
    assert f.stiffness.grad.abs() > 1e-3


def test_params_and_options_are_passed_on() -> None:
    f = Field()
    block = ODEBlock(lambda t, y: f(t, y), params=f.parameters(), method="cn", options={"snes_rtol": 1e-3})
    assert len(list(block.parameters())) == 4  # of the lambda's; `params` may be an iterator and serves every call
    for _ in range(2):
        f.zero_grad()
        block(start()).sum().backward()
        assert all(p.grad is not None for p in f.parameters())
    with pytest.raises(pfde.StepLimitError):
        ODEBlock(f, options={"max_num_steps": 1})(start())


def test_split_methods() -> None:
    f = pfde.Split(Field(0), Field(1))
    found = step(ODEBlock(f, method="ark3", step_size=0.25))
    expected = step(ODEBlock(f, method="dopri5"))
    assert len(found) == 2 + 8
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()  # steps of a quarter with a method of order 3


# -- a torch module ----------------------------------------------------------------------------------------------------


@every_method
def test_training_reduces_a_loss(keywords: dict) -> None:
    """In nn.Sequential, between two layers, where every parameter gets its gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, dtype=DT), ODEBlock(Field(), **keywords), nn.Linear(3, 1, dtype=DT))
    assert len(list(model.parameters())) == 2 + 4 + 2
    x = start(8, 2)
    target = x.prod(-1, keepdim=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0], losses


@every_method
def test_copies_pickles_and_state_dicts(keywords: dict) -> None:
    block = ODEBlock(Field(), **keywords)
    expected = step(block)
    assert_same(step(copy.deepcopy(block)), expected)
    assert_same(step(pickle.loads(pickle.dumps(block))), expected)
    assert list(block.state_dict()) == [f"func.{name}" for name in Field().state_dict()]
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    other = ODEBlock(Field(seed=1), **keywords)
    assert not torch.equal(step(other)[0], expected[0])
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(step(other), expected)


def test_a_copy_has_parameters_of_its_own() -> None:
    block = ODEBlock(Field())
    twin, before = copy.deepcopy(block), block(start())
    with torch.no_grad():
        twin.func.inner.weight.zero_()
    assert torch.equal(block(start()), before)
    assert not torch.equal(twin(start()), before)


def test_dtypes_and_modes() -> None:
    """As f is, so is the block: .float(), .eval(), no_grad()."""
    block = ODEBlock(Field(), method="rk4", step_size=0.25)
    exact = block(start())
    with torch.no_grad():
        y = block.eval()(start())
    assert not block.func.training
    assert not y.requires_grad and torch.equal(y, exact)
    y = block.float()(start().float())
    assert y.dtype == torch.float32
    assert (y - exact).abs().max() < 1e-5


def test_it_shows_what_it_is() -> None:
    assert "t=[0.0, 2.0], method='cn'" in repr(ODEBlock(Field(), t=(0.0, 2.0), method="cn"))
    assert ODEBlock(Field()).extra_repr() == "t=[0.0, 1.0], method='dopri5'"


# -- mistakes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"method": "rk5"}, ValueError, "method must be one of euler, .*: got 'rk5'"),
        ({"method": "pece"}, ValueError, "got 'pece'; 'pece' is a method of pfde.fdeint"),
        ({"method": 4}, ValueError, "method must be one of .*: got 4"),
        ({"t": (0.0, 1.0, 0.5)}, ValueError, r"t must be increasing or decreasing .*: got .*t\[2\]=0.5"),
        ({"t": (1.0, 0.0, 0.5)}, ValueError, "t must be increasing or decreasing"),
        ({"t": ()}, ValueError, "at least one time"),
        ({"t": (0.0, float("inf"))}, ValueError, "t must be finite"),
        ({"t": 1.0}, ValueError, r"t must be one-dimensional with at least one time.*: got shape \(\)"),
        ({"t": torch.tensor([0, 1])}, TypeError, "t must be floating point"),
        ({"alpha": 0.5}, TypeError, "unexpected keyword argument 'alpha'"),
    ],
)
def test_mistakes_at_construction(keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ODEBlock(Field(), **keywords)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"method": "rk4", "step_size": 0.3}, ValueError, "every t.* must be a whole number of steps"),
        ({"rtol": -1.0}, ValueError, "rtol must be finite and not negative: got -1"),
        ({"gradient": "adjoint"}, TypeError, r"gradient must be pfde.Discrete\(\)"),
        ({"method": "ark3"}, TypeError, r"give pfde.Split\(stiff, nonstiff\)"),
        ({"method": "rk4", "options": {"snes_rtol": 1e-3}}, ValueError, "snes_rtol"),
    ],
)
def test_mistakes_in_a_solve(keywords: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ODEBlock(Field(), **keywords)(start())
