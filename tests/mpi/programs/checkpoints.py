"""Worker: checkpointed solves of a state split over the ranks.

usage: checkpoints.py agreement | faults | uneven

agreement : with the gradients of one rank to 1e-13, bitwise with those of store-all on as many ranks
faults : of one rank's disk, and what changes on one rank only, raise on every rank, and leave nothing behind
uneven : parts of different size, for which a budget in bytes would allow different plans
"""

import errno
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import abort_all  # noqa: F401
import torch
from faults_of_one import Faults
from mpi4py import MPI
from torch import Tensor, nn

import pfde
from pfde.schedules import storage

warnings.filterwarnings("ignore", message=".*snapshots, rows and what takes steps again")  # small solves, on purpose

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
torch.set_num_threads(1)
mode = sys.argv[1]
culprit = size - 1
guilty = rank == culprit

SIZE, STEPS, TOLERANCE = 8, {"agreement": 12, "faults": 20, "uneven": 120}[mode], 1e-13
T = torch.linspace(0, 1, STEPS + 1, dtype=torch.float64)
CUTS = [round(SIZE * r / size) for r in range(size + 1)] if mode != "uneven" else [0, *range(1, size), SIZE]
MINE, WHOLE = slice(CUTS[rank], CUTS[rank + 1]), slice(0, SIZE)
HISTORY = pfde.SumOfExponentials(1e-6)

folder = comm.bcast(tempfile.mkdtemp() if rank == 0 else None)
on_disk = pfde.Revolve(1, on_disk=2, directory=folder, leaf=3)


class Field(nn.Module):
    """f = c tanh(a y) + t, entry by entry: a is split as y is, c is shared."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.linspace(-1.0, 0.6, SIZE, dtype=torch.float64)[part].clone())
        self.c = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.c * torch.tanh(self.a * y) + t


class Pending:
    """A solve that awaits its backward pass."""

    def __init__(self, schedule: object, part: slice = MINE, method: str = "euler", **keywords: object) -> None:
        self.f = keywords.pop("f", None) or Field(part)
        self.y0 = torch.linspace(0.5, 2.0, SIZE, dtype=torch.float64)[part].clone().requires_grad_()
        self.alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
        keywords = {"history": HISTORY} | keywords
        gradient = pfde.Discrete(schedule=schedule)
        self.y = pfde.fdeint(self.f, self.y0, T, self.alpha, method=method, gradient=gradient, **keywords)
        self.loss = (self.y.square().sum(0) * torch.arange(1.0, SIZE + 1, dtype=torch.float64)[part]).sum()

    def backward(self) -> list[Tensor]:
        """y, y0_bar, a_bar (split); c_bar and alpha_bar (this rank's contributions)."""
        inputs = (self.y0, self.f.a, self.f.c, self.alpha)
        return [self.y.detach(), *torch.autograd.grad(self.loss, inputs, retain_graph=True)]


def solve(*arguments: object, **keywords: object) -> list[Tensor]:
    return Pending(*arguments, **keywords).backward()


def check(what: str, got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE, f"rank {rank}: {what} is off by {error:.1e} (relative, of the largest entry)"


def same(what: str, got: list[Tensor], expected: list[Tensor]) -> None:
    assert all(map(torch.equal, got, expected)), f"rank {rank}: {what} should be bitwise store-all's"


def nothing_left(what: str) -> None:
    comm.barrier()  # nobody looks before all have come so far,
    left = os.listdir(folder)
    comm.barrier()  # and nobody goes on to make files before all have looked
    assert left == [], f"rank {rank}: {what} left {left}"


def agree(schedules: list[object], methods: list[str]) -> None:
    for method in methods:
        whole = solve(None, WHOLE, method)
        reference = solve(None, method=method, comm=comm)
        for i, name in enumerate(("y", "y0_bar", "a_bar")):
            check(f"{method}, {name}", reference[i], whole[i][..., MINE])
        check(f"{method}, c_bar", comm.allreduce(reference[3]), whole[3])
        check(f"{method}, alpha_bar", comm.allreduce(reference[4]), whole[4])
        for schedule in schedules:
            same(f"{method}, {schedule}", solve(schedule, method=method, comm=comm), reference)
            nothing_left(f"{method}, {schedule}")


@contextmanager
def failing(module: object, name: str, after: int) -> Iterator[None]:
    """On the culprit, this function fails from its call number `after` on, as on a full disk."""
    original, calls = getattr(module, name), 0

    def function(*arguments: object, **keywords: object) -> object:
        nonlocal calls
        calls += 1
        if guilty and calls > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*arguments, **keywords)

    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)


if mode == "agreement":
    agree([pfde.Revolve(2, leaf=3), on_disk, pfde.Online(2, leaf=4)], ["euler"])
    agree([on_disk], ["trapezoid"])  # of implicit methods each solve takes a second
    agree([pfde.Online(2, leaf=4)], ["l1"])
elif mode == "uneven":
    agree([pfde.Revolve(2), pfde.Revolve(memory="5kB"), pfde.Revolve(memory="6kB")], ["euler"])
    try:  # enough for a small part, too little for the largest, whose plan is everybody's
        solve(pfde.Revolve(memory=1200), comm=comm)
    except ValueError as error:
        assert "memory must hold a snapshot" in str(error)
    else:
        raise AssertionError("no error for too little memory")
else:
    expected = solve(None, comm=comm)
    fault = Faults(comm, lambda: solve(on_disk, comm=comm), nothing_left)
    same("a schedule on disk", fault.expected, expected)
    full = "No space left on device; free space there"
    with (
        fault("a folder that cannot be made", pfde.SnapshotError, "could not be written to"),
        failing(storage.os, "mkdir", 0),
    ):
        solve(on_disk, comm=comm)
    for after in (0, 3):
        with (
            fault(f"a full disk after {after} calls", pfde.SnapshotError, full),
            failing(storage.os, "fsync", after),
        ):
            solve(on_disk, comm=comm)
    with fault("a full disk in the backward pass", pfde.SnapshotError, full):
        pending = Pending(pfde.Revolve(0, on_disk=2, directory=folder, leaf=2), comm=comm)
        with failing(storage.os, "write", 0):
            pending.backward()
    same("the second backward pass", pending.backward(), expected)
    for damage in ("truncate", "delete"):
        with fault(f"a file to {damage}", pfde.SnapshotError, "; was it touched, or is the disk failing?"):
            pending = Pending(on_disk, comm=comm)
            for path in Path(folder).glob(f"pfde-*-{os.getpid()}-*/*.snapshot") if guilty else ():
                path.unlink() if damage == "delete" else os.truncate(path, 100)
            pending.backward()
    for schedule in (on_disk, pfde.Revolve(2, leaf=3), pfde.Online(2, leaf=4)):
        with fault("another function", pfde.ReplayError, "computed again for the backward pass, is not what it was"):
            pending = Pending(schedule, comm=comm)
            if guilty:
                pending.f.a.data[-1] *= 1 + 1e-9
            pending.backward()
    with fault("random numbers late, on one rank", pfde.PfdeError, "func drew random numbers at some step"):
        f = Field(MINE)
        late = lambda t, y: f(t, y) + 0 * (torch.rand(()) if guilty and t > 0.5 else 0)  # noqa: E731
        late.a, late.c = f.a, f.c
        Pending(pfde.Revolve(2, leaf=3), comm=comm, f=late, params=list(f.parameters()))
comm.barrier()
if rank == 0:
    os.rmdir(folder)
    print("as one")
