"""Worker: an error on one rank raises on every rank (its own there, PeerError elsewhere), and the next solve works.

usage: faults.py METHOD
"""

import sys
from collections.abc import Callable

import abort_all  # noqa: F401
import torch
from faults_of_one import Faults
from mpi4py import MPI
from torch import Tensor, nn

import pfde
from pfde.caputo.schemes import METHODS

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
torch.set_num_threads(1)
method = sys.argv[1]
implicit = METHODS[method].implicit
culprit = size - 1
guilty = rank == culprit
# Few steps and equal entries: every collective operation costs four ranks on two cores dear.
T = torch.linspace(0, 1, 4, dtype=torch.float64)


class Identity(torch.autograd.Function):
    """The identity, whose `fuse`-th vector-Jacobian product raises."""

    fuse = products = 0

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, y_bar: Tensor) -> Tensor:
        Identity.products += 1
        if Identity.products == Identity.fuse:
            raise BOOM
        return y_bar * 1.0


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((3,), 0.5, dtype=torch.float64))
        self.calls, self.hook = 0, lambda _calls, value: value

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        self.calls += 1
        return self.hook(self.calls, torch.sin(self.a * Identity.apply(y)) + t)


BOOM = ValueError("boom")
CTRL_C = KeyboardInterrupt("ctrl-c")


def start() -> Tensor:
    return torch.ones(3, dtype=torch.float64).requires_grad_()


def solve(
    f: Callable | None = None, y0: Tensor | None = None, t: Tensor = T, alpha: object = 0.6, **keywords
) -> Tensor:
    keywords = {"method": method, "comm": comm} | keywords
    return pfde.fdeint(Field() if f is None else f, start() if y0 is None else y0, t, alpha, **keywords)


def healthy() -> list[Tensor]:
    Identity.fuse = Identity.products = 0
    f, y0 = Field(), start()
    y = solve(f, y0)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), (y0, f.a))]


fault = Faults(comm, healthy)

# -- an exception in f, at the first evaluation, midway and late, forward and backward --------------------------------

probe = Field()
y = solve(probe)
forward = probe.calls
y.sum().backward()
for error in (BOOM, CTRL_C):
    late = (2, forward, forward + 1, probe.calls) if error is BOOM else ()
    for k in (1, forward // 2, (forward + probe.calls) // 2, *late):
        f = Field()

        def hook(calls: int, value: Tensor, error: BaseException = error, k: int = k) -> Tensor:
            if guilty and calls == k:
                raise error
            return value

        f.hook = hook
        with fault(f"{error!r} at evaluation {k}", error):
            solve(f).sum().backward()

for k, where in (
    (1, "t=0, step 0 of 3"),
    (forward, "t=1, step 3 of 3" if implicit or method == "pece" else "step 2 of 3"),
):
    f = Field()
    f.hook = lambda calls, value, k=k: value * float("nan") if guilty and calls == k else value
    with fault("NaN", pfde.NonFiniteError, where):
        solve(f)

# -- an exception in a product: KSP's in the forward pass of implicit methods, the vjps of the backward pass ----------

Identity.products = 0
y = solve()
in_forward = Identity.products
y.sum().backward()
for fuse in {1, max(1, in_forward // 2), in_forward + 1, Identity.products}:
    Identity.products = 0
    Identity.fuse = fuse if guilty else 0
    with fault(f"product {fuse}", BOOM):
        solve().sum().backward()

# -- a bad argument on one rank ---------------------------------------------------------------------------------------

with fault("alpha", ValueError, "alpha must be in (0, 1]: got 2"):
    solve(alpha=2.0 if guilty else 0.6)
with fault("an integer state", TypeError, "y0 must be float32 or float64"):
    solve(y0=torch.tensor([1, 2, 3]) if guilty else None)
with fault("no entries", ValueError, "leave ranks without a part of the state out of comm"):
    solve(y0=torch.ones(0, dtype=torch.float64) if guilty else None)
with fault("times", ValueError, "t must be increasing"):
    solve(t=T.flip(0) if guilty else T)
with fault("method", ValueError, "method must be one of"):
    solve(method="rk4" if guilty else method)
with fault("closure", ValueError, "requires grad but is none of its parameters"):
    w = start()
    solve((lambda t, y: y * w) if guilty else None)
with fault("late closure", ValueError, "requires grad but is none of its parameters"):
    w = start()
    solve(lambda t, y: y * w if guilty and t > 0.5 else -y).sum().backward()
with fault("shape", ValueError, "func must return the shape of y"):
    solve(lambda t, y: -y[:2] if guilty and t > 0.5 else -y)

# -- arguments that differ between the ranks --------------------------------------------------------------------------


def differs(what: str, **keywords: object) -> None:
    with fault(what, ValueError, f"{what} must be the same on every rank of comm", everywhere=True):
        solve(**keywords)


differs("method", method=("gl" if method == "l1" else "l1") if guilty else method)
differs("t, with step_size", step_size=1 / 6 if guilty else 1 / 12)
differs("t, with step_size", t=T * 2 if guilty else T)
differs("gradient", gradient=pfde.Backprop() if guilty else pfde.Discrete())
differs("gradient", gradient=pfde.Discrete(store="graph") if guilty else None)
differs("options_prefix", options_prefix="a_" if guilty else "")
differs("the dtype of y0", f=lambda t, y: -y, y0=start().float() if guilty else None)
differs(
    "whether y0, alpha or a parameter requires a gradient",
    f=lambda t, y: -y,
    y0=start().detach() if guilty else start(),
)
if implicit:
    differs("options", options={"ksp_rtol": 1e-3 if guilty else 1e-4})
with (
    fault("grad mode", ValueError, "torch.is_grad_enabled() must be the same", everywhere=True),
    torch.set_grad_enabled(guilty),
):
    solve(f=lambda t, y: -y, y0=start().detach())

# -- the backward pass ------------------------------------------------------------------------------------------------

f = Field()
y = solve(f)
if guilty:
    with torch.no_grad():
        f.a.mul_(0.5)
with fault("theta changed in place", RuntimeError, "modified by an inplace operation"):
    y.sum().backward()

f = Field()
y = solve(f)
with fault("double backward", RuntimeError, "double backward", everywhere=True):
    torch.autograd.grad(y.sum(), f.a, create_graph=True)

with fault("random numbers", pfde.PfdeError, "func drew random numbers at some step"):
    solve(lambda t, y: -y + 0 * torch.rand(3, dtype=torch.float64) if guilty and t > 0.5 else -y)

# -- convergence is judged by all together ----------------------------------------------------------------------------

if implicit:
    with fault("stage", pfde.ConvergenceError, "did not converge at t=0.666667, step 2", everywhere=True):
        solve(lambda t, y: (y * y + 1) * (1e3 if guilty and t > 0.5 else 0.01))
    A = torch.tensor([[-1.0, 2.0, 0.0], [0.0, -3.0, 0.0], [0.0, 0.0, -1.0]], dtype=torch.float64)
    y0 = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    y = solve(lambda t, y: A @ y, y0, options={"adjoint_ksp_max_it": 1})
    with fault("adjoint", pfde.ConvergenceError, "adjoint system did not converge at t=1, step 3", everywhere=True):
        y[:, 0].sum().backward()

# -- one rank's part rests while the other's moves: whether f is evaluated again is decided together --------

if implicit:
    solve(lambda t, y: -y if guilty else y * 0)

survived = fault.counted()
if rank == 0:
    print(survived)
