"""Worker: what the ranks do differently at an API, and in the backward pass, is an error on all of them.

usage: disagreement.py DIRECTORY
"""

import sys
from collections.abc import Callable
from pathlib import Path

import abort_all  # noqa: F401
import torch
from mpi4py import MPI
from torch import Tensor, nn

import pfde

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
guilty = rank == size - 1
torch.set_num_threads(1)
D = torch.float64
T = torch.linspace(0, 1, 4, dtype=D)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((3,), 0.5, dtype=D))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(self.a * y) + t


def start(needed: bool = True) -> Tensor:
    return torch.ones(3, dtype=D).requires_grad_(needed)


def plain(t: Tensor, y: Tensor) -> Tensor:
    return -y


APIS: dict[str, Callable[..., Tensor]] = {
    "fdeint": lambda f, y0, **k: pfde.fdeint(f, y0, T, 0.7, method="pece", comm=comm, **k),
    "fdeint, implicit": lambda f, y0, **k: pfde.fdeint(f, y0, T, 0.7, comm=comm, **k),
    "odeint": lambda f, y0, **k: pfde.odeint(f, y0, T, method="rk4", comm=comm, **k),
    "solve": lambda f, y0, **k: pfde.solve(f, y0, T, 0.7, comm=comm, **k).y,
    "solve, ordinary": lambda f, y0, **k: pfde.solve(f, y0, T, method="cn", comm=comm, **k).y,
    "petsc": lambda f, y0, **k: pfde.odeint(f, y0, T, method="petsc:rk:4", step_size=1 / 3, comm=comm, **k),
    "FDEBlock": lambda f, y0, **k: pfde.nn.FDEBlock(f, alpha=0.7, step_size=0.25, comm=comm, **k)(y0),
    "ODEBlock": lambda f, y0, **k: pfde.nn.ODEBlock(f, comm=comm, **k)(y0),
}


def raised(work: Callable[[], object]) -> BaseException | None:
    try:
        work()
    except Exception as error:
        return error
    return None


def everywhere(error: BaseException | None, words: str, what: str) -> None:
    assert isinstance(error, ValueError), f"{what}: rank {rank} got {error!r}"
    assert words in str(error), f"{what}: rank {rank} got {error!r}"


def on_one(error: BaseException | None, kind: type[BaseException], words: str, what: str) -> None:
    assert isinstance(error, kind if guilty else pfde.PeerError), f"{what}: rank {rank} got {error!r}"
    assert words in str(error), f"{what}: rank {rank} got {error!r}"


# -- another function on another rank ---------------------------------------------------------------------------------

names = list(APIS)
for i, one in enumerate(names):
    other = names[(i + 1) % len(names)] if one != "solve" else "odeint"
    mine = other if guilty else one
    error = raised(lambda mine=mine: APIS[mine](Field(), start()))
    differ = "method" if {one, other} == {"fdeint", "fdeint, implicit"} else "the function called"
    everywhere(error, f"{differ} must be the same on every rank of comm", f"{one}, {other}")
error = raised(lambda: APIS["petsc" if guilty else "odeint"](Field(), start()))
everywhere(error, "method must be the same", "odeint, petsc")

# -- a directory for each rank -----------------------------------------------------------------------------------------

folder = Path(sys.argv[1]) / str(rank)
folder.mkdir()
for api in ("odeint", "solve, ordinary", "fdeint"):
    bars = []
    for schedule in (pfde.Revolve(1, on_disk=1, directory=folder), None):
        f, y0 = Field(), start()
        y = APIS[api](f, y0, gradient=pfde.Discrete(schedule=schedule))
        bars.append(torch.autograd.grad(y.square().sum(), (y0, f.a)))
    assert all(map(torch.equal, *bars)), api
    assert not list(folder.iterdir())

# -- NaN in the backward pass of one rank ------------------------------------------------------------------------------


class Bad(torch.autograd.Function):
    """The identity, with derivative NaN on the last rank."""

    @staticmethod
    def forward(ctx: object, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: object, y_bar: Tensor) -> Tensor:
        return y_bar * float("nan") if guilty else y_bar * 1.0


def bad(t: Tensor, y: Tensor) -> Tensor:
    return -Bad.apply(y)


for api in ("fdeint", "odeint", "petsc"):
    f, y0 = Field(), start()
    y = APIS[api](f, y0)
    error = raised(lambda y=y: (y[-1] * (float("nan") if guilty else 1.0)).sum().backward())
    on_one(error, pfde.NonFiniteError, "the gradient of a state shared by ranks is NaN", api)
    assert y0.grad is None
    error = raised(lambda api=api: APIS[api](bad, start()).sum().backward())
    on_one(error, pfde.NonFiniteError, "the gradient of a state shared by ranks is NaN", f"{api}, product")

# -- gradients that are wanted on one rank -----------------------------------------------------------------------------

for api in ("fdeint", "fdeint, implicit", "odeint", "petsc"):
    for f in (plain, Field()):
        error = raised(lambda api=api, f=f: APIS[api](f, start(guilty)))
        everywhere(error, "or a parameter requires a gradient must be the same on every rank", api)

# -- options of PETSc's integrators ------------------------------------------------------------------------------------

error = raised(
    lambda: pfde.odeint(plain, start(), T, method="petsc:cn", options={"ksp_nonsense": 1} if guilty else {}, comm=comm)
)
everywhere(error, "options must be the same on every rank", "options")
error = raised(lambda: pfde.odeint(plain, start(), T * (1 + guilty), method="petsc:cn", comm=comm))
everywhere(error, "t, with step_size must be the same on every rank", "t")

# -- an exchange with the neighbours, as docs/coming_from.md has it ----------------------------------------------------


class Shift(torch.autograd.Function):
    """x of the rank `step` to the left, zero where there is none. Collective in both directions."""

    @staticmethod
    def forward(ctx: object, x: Tensor, step: int) -> Tensor:
        ctx.step = step
        there, here = (r if 0 <= r < size else MPI.PROC_NULL for r in (rank + step, rank - step))
        found = comm.sendrecv(x.detach().numpy(), dest=there, source=here)
        return torch.zeros_like(x) if found is None else torch.from_numpy(found)

    @staticmethod
    def backward(ctx: object, x_bar: Tensor) -> tuple[Tensor, None]:
        return Shift.apply(x_bar, -ctx.step), None


class Diffusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.fails_at = 0, 0

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        with pfde.raise_together(comm):  # what may fail on one rank, before the exchange
            self.calls += 1
            if self.calls == self.fails_at:
                raise ArithmeticError("boom")
            rate = 1 + y * y
        left, right = Shift.apply(y[-1:], 1), Shift.apply(y[:1], -1)
        whole = torch.cat([left, y, right])
        return rate * (whole[2:] - 2 * y + whole[:-2])


for api in ("fdeint", "fdeint, implicit", "odeint", "solve, ordinary"):
    f, y0 = Diffusion(), start()
    APIS[api](f, y0).sum().backward()
    total = f.calls
    for k in (1, total // 2, total):
        f = Diffusion()
        f.fails_at = k if guilty else 0
        error = raised(lambda api=api, f=f: APIS[api](f, start()).sum().backward())
        on_one(error, ArithmeticError, "boom", f"{api}, call {k} of {total}")

assert comm.allreduce(1) == size
if rank == 0:
    print("refused together")
