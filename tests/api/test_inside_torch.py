"""Solves inside what torch offers around a model: autocast, half precision, torch.compile, sharding, Functions."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pfde

D = torch.float64
T = torch.tensor([0.0, 0.5, 1.0], dtype=D)
METHODS = ("dopri5", "rk4", "cn", "euler", "pece", "trapezoid")


def solve(func, y0, method, gradient=None, **keywords):
    if method in ("dopri5", "rk4", "cn"):
        step = {"rtol": 1e-3, "atol": 1e-4} if method == "dopri5" else {"step_size": 0.25}
        return pfde.odeint(func, y0, T, method=method, gradient=gradient, **step, **keywords)
    return pfde.fdeint(func, y0, T, 0.7, method=method, step_size=0.25, gradient=gradient, **keywords)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(3, 8), nn.Linear(8, 3)
        self.seen = []

    def forward(self, t, y):
        hidden = torch.tanh(self.inner(y))
        self.seen.append(hidden.dtype)
        return self.outer(hidden)


def start(dtype=torch.float32) -> torch.Tensor:
    return torch.linspace(-1, 1, 6, dtype=dtype).reshape(2, 3).requires_grad_()


# -- autocast ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*METHODS, "petsc:rk:4"])
def test_under_autocast_func_computes_in_the_lower_precision_and_the_solve_does_not(method) -> None:
    """The gradient is that of what was computed: Backprop's, and the backward pass need not be under autocast."""
    found = []
    by_petsc = method.startswith("petsc:")
    for how in (pfde.Backprop(), pfde.Discrete(), pfde.Discrete(store="graph")):
        f, y0 = Net(), start()
        with torch.autocast("cpu", torch.bfloat16):
            if by_petsc:
                y = pfde.odeint(f, y0, T, method=method, step_size=0.25)
            else:
                y = solve(f, y0, method, how)
        assert y.dtype == torch.float32 and set(f.seen) == {torch.bfloat16}
        found.append(torch.autograd.grad(y[-1].sum(), [y0, *f.parameters()]))
        assert set(f.seen) == {torch.bfloat16}  # in the backward pass too
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            # sums of bfloat16 products come in another order: half a percent is what one product has
            assert (a - b).norm() <= 0.02 * b.norm()


def test_autocast_leaves_no_converted_weights_without_a_graph_behind() -> None:
    """torch's cache of them would hand these to the next user of the module in the region."""
    f = Net()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            solve(f, start(), "rk4")
        f(T[0], start()).sum().backward()
    assert f.inner.weight.grad is not None and f.outer.weight.grad.abs().sum() > 0


def test_an_event_under_autocast() -> None:
    f = Net()
    with torch.autocast("cpu", torch.bfloat16):
        t, y = pfde.odeint_event(
            lambda t, y: 1.0 + 0.0 * f(t, y),
            start(),
            0.0,
            event_fn=lambda t, y: y.mean() - 0.5,
            params=[*f.parameters()],
        )
    assert y.dtype == torch.float32 and float(t.detach()) == pytest.approx(0.5, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["dopri5", "cn", "euler", "trapezoid"])
def test_a_state_of_half_precision_is_integrated_in_single(method, dtype) -> None:
    """As in Lightning's bf16-true: parameters, state and the default dtype are bfloat16."""
    before = torch.get_default_dtype()
    f, y0 = Net().to(dtype), start(dtype)
    torch.set_default_dtype(dtype)
    try:
        y = solve(f, y0, method)
        y[-1].float().sum().backward()
    finally:
        torch.set_default_dtype(before)
    exact = solve(Net(), start(), method)
    assert y.dtype == dtype and set(f.seen) == {dtype} and y0.grad.dtype == dtype
    assert (y.float() - exact).abs().max() < 0.03
    assert f.inner.weight.grad.dtype == dtype and bool(torch.isfinite(f.inner.weight.grad).all())


def test_another_dtype_without_autocast_is_still_refused() -> None:
    with pytest.raises(TypeError, match="func must return the dtype of y"):
        solve(lambda t, y: y.double(), start(), "rk4")


# -- torch.compile -----------------------------------------------------------------------------------------------------

COMPILED = """
import torch, pfde
from torch import nn
torch.set_num_threads(1)
D = torch.float64

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    def forward(self, t, y):
        return self.net(y)

def blocks():
    yield pfde.nn.ODEBlock(Net())
    yield pfde.nn.ODEBlock(Net(), method="cn", step_size=0.25)
    yield pfde.nn.FDEBlock(Net(), alpha=0.6, method="euler", step_size=0.25)
    yield pfde.nn.FDEBlock(Net(), alpha=0.6, step_size=0.25, learn_alpha=True)

for block in blocks():
    model = nn.Sequential(nn.Linear(3, 3), block, nn.Linear(3, 3)).double()
    x = torch.randn(4, 3, dtype=D, requires_grad=True)
    inputs = [x, *model.parameters()]
    exact = torch.autograd.grad(model(x).square().sum(), inputs)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    y = torch.compile(model, backend="eager")(x)
    found = torch.autograd.grad(y.square().sum(), inputs)
    assert all((a - b).norm() <= 1e-12 * b.norm() for a, b in zip(found, exact))
    frames = torch._dynamo.utils.counters["frames"]["total"]
    assert frames <= 8, frames  # of the model and the block; the solve itself has hundreds

func = torch.compile(Net().double(), backend="eager")
for method in ("rk4", "cn"):
    y0 = torch.randn(4, 3, dtype=D, requires_grad=True)
    bars = []
    for how in (pfde.Backprop(), pfde.Discrete()):
        y = pfde.odeint(func, y0, torch.tensor([0.0, 1.0], dtype=D), method=method, step_size=0.25, gradient=how)
        bars.append(torch.autograd.grad(y[-1].square().sum(), y0)[0])
    assert (bars[0] - bars[1]).norm() <= 1e-12 * bars[0].norm()
print("compiled")
"""

SHARDED = """
import torch, pfde
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
net = nn.Linear(3, 3).double()
fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
try:
    pfde.odeint(net, torch.ones(2, 3, dtype=torch.float64), torch.tensor([0.0, 1.0]))
except ValueError as error:
    assert "func is sharded" in str(error), error
    print("refused")
torch.distributed.destroy_process_group()
"""


def test_in_a_process_of_its_own() -> None:
    result = subprocess.run(
        [sys.executable, "-c", COMPILED + SHARDED],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.split() == ["compiled", "refused"]


# -- custom Functions --------------------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    """y^3, whose backward pass torch cannot differentiate: NumPy computes it."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return y**3

    @staticmethod
    def backward(ctx, bar):
        (y,) = ctx.saved_tensors
        return torch.from_numpy(3.0 * y.detach().numpy() ** 2 * bar.detach().numpy())


class CubeOnce(Cube):
    """The same, which says so; torch raises nothing where it is differentiated for J v."""

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, bar):
        (y,) = ctx.saved_tensors
        return 3.0 * y**2 * bar


@pytest.mark.parametrize("cube", [Cube, CubeOnce])
def test_a_backward_pass_that_is_not_differentiable_is_named_where_newton_fails(cube) -> None:
    y0 = torch.linspace(1.0, 2.0, 20, dtype=D)
    keywords = {"method": "beuler", "step_size": 0.5}
    with pytest.raises(pfde.ConvergenceError, match=r"not the transpose of its J\^T v.*'fde_jacobian': 'dense'"):
        pfde.odeint(lambda t, y: -50.0 * cube.apply(y), y0, T, options={"fde_jacobian": "matrix_free"}, **keywords)
    y = pfde.odeint(lambda t, y: -50.0 * cube.apply(y), y0, T, options={"fde_jacobian": "dense"}, **keywords)
    exact = pfde.odeint(lambda t, y: -50.0 * y**3, y0, T, **keywords)
    assert (y - exact).abs().max() < 1e-12


def test_a_stage_that_fails_for_another_reason_says_nothing_of_it() -> None:
    y0 = torch.linspace(1.0, 2.0, 20, dtype=D)
    with pytest.raises(pfde.ConvergenceError) as caught:
        pfde.odeint(lambda t, y: y**2 + 1.0, y0, torch.tensor([0.0, 10.0], dtype=D), method="beuler")
    assert "transpose" not in str(caught.value)
