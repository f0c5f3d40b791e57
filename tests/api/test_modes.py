"""Modes of torch: no_grad, inference_mode, autocast, and random numbers at some steps."""

import pytest
import torch
from torch import Tensor, nn

import pfde
from support.covering import pairs
from support.faults import FORMS, GRADIENTS, D, Field, T, assert_same, decay, solve, start, takes


@pytest.mark.parametrize(("form", "gradient"), pairs(FORMS, [None, "backprop", "continuous"], valid=takes))
def test_no_grad_and_inference_mode(form: str, gradient: str | None) -> None:
    f, how = Field(), None if gradient is None else GRADIENTS[gradient]
    expected = solve(f, start(), form).detach()
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            alpha = torch.tensor(0.6, dtype=D)
            y = solve(f, start(grad=False), form, alpha=alpha, t=T.clone(), gradient=how)
        assert not y.requires_grad
        assert torch.equal(y, expected)


def test_inference_mode_with_petscs_methods() -> None:
    with torch.no_grad():
        expected = pfde.odeint(decay, start(), T, method="petsc:rk:5dp", step_size=0.1)
    with torch.inference_mode():
        y = pfde.odeint(decay, start(grad=False), T.clone(), method="petsc:rk:5dp", step_size=0.1)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("method", ["pece", "trapezoid", "l1"])
def test_autocast_holds_in_the_backward_pass_too(method: str) -> None:
    """f in bfloat16: evaluated in float32 the backward pass would differentiate another function."""
    torch.manual_seed(0)
    net = nn.Linear(8, 8)
    y0 = torch.randn(4, 8)
    dtypes = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        out = net(y)
        dtypes.append(out.dtype)
        return 0.1 * torch.tanh(out.float())

    options = {} if method == "pece" else {"snes_rtol": 1e-2, "ksp_rtol": 1e-2}  # bfloat16 rounds to 4e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pfde.fdeint(func, y0, T, 0.6, method=method, params=list(net.parameters()), options=options).sum()
    forward = len(dtypes)
    loss.backward()
    assert len(dtypes) > forward
    assert set(dtypes) == {torch.bfloat16}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.5), nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.linear(y)))


@pytest.mark.parametrize("store", ["state", "stages"])
@pytest.mark.parametrize("method", ["euler", "pece"])
def test_random_numbers_at_some_steps_only_are_refused(method: str, store: str) -> None:
    """What f draws is kept step by step if it draws at t[0]; else it is seen once the forward pass has ended."""
    drop, gradient = Noisy(), pfde.Discrete(store=store)

    def f(t: Tensor, y: Tensor) -> Tensor:
        return drop(t, y) if t > 0.5 else -y

    keywords = {"method": method, "gradient": gradient, "params": list(drop.parameters())}
    with pytest.raises(pfde.PfdeError, match=r"func drew random numbers at some step, .*store='graph'.*Backprop"):
        pfde.fdeint(f, start(), T, 0.6, **keywords)
    with torch.no_grad():
        pfde.fdeint(f, start(), T, 0.6, **keywords)
    drop.eval()
    pfde.fdeint(f, start(), T, 0.6, **keywords).sum().backward()


@pytest.mark.parametrize("method", ["euler", "pece"])
def test_random_numbers_with_the_graph_kept(method: str) -> None:
    """Equal to autograd through the same steps with the same numbers; a second pass replays them."""
    f, y0, found = Noisy(), start(), []
    for gradient in (pfde.Backprop(), pfde.Discrete(store="graph")):
        torch.manual_seed(3)
        loss = pfde.fdeint(f, y0, T, 0.6, method=method, gradient=gradient).square().sum()
        found.append(torch.autograd.grad(loss, (y0, f.linear.weight), retain_graph=True))
    state = torch.get_rng_state()
    again = torch.autograd.grad(loss, (y0, f.linear.weight))
    assert torch.equal(torch.get_rng_state(), state)
    assert_same(list(again), list(found[1]))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14)
