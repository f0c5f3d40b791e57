"""Worker: a state split over the ranks gives what one rank alone gives, for every method or the ones named.

usage: agreement.py even|uneven [METHOD,...]

Rank 0 prints "digest " and, as JSON, by method a digest of all bits of each rank.
"""

import hashlib
import json
import sys

import abort_all  # noqa: F401
import torch
from mpi4py import MPI
from torch import Tensor, nn

import pfde
from pfde.caputo.schemes import METHODS

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
torch.set_num_threads(1)

SIZE, TOLERANCE = 24, 1e-13
T = torch.linspace(0, 1, 5, dtype=torch.float64)
# Three kinds of component, so that GMRES needs few iterations: each costs four ranks on two cores milliseconds.
KIND = torch.arange(SIZE) % 3
A = torch.tensor([-1.0, 0.2, 0.6], dtype=torch.float64)[KIND]
START = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)[KIND]
ORDERS = torch.tensor([0.4, 0.9, 0.6], dtype=torch.float64)[KIND]
# uneven: rank 0 holds one entry, the last rank whatever is left
CUTS = [round(SIZE * r / size) for r in range(size + 1)] if sys.argv[1] == "even" else [0, *range(1, size), SIZE]
MINE = slice(CUTS[rank], CUTS[rank + 1])


class Field(nn.Module):
    """f = c tanh(a y) + t, entry by entry: a is split as y is, c is shared."""

    def __init__(self, part: slice) -> None:
        super().__init__()
        self.a = nn.Parameter(A[part].clone())
        self.c = nn.Parameter(torch.tensor(1.3, dtype=torch.float64))

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.c * torch.tanh(self.a * y) + t


def solve(part: slice, alpha: Tensor, method: str, **keywords: object) -> list[Tensor]:
    """y, y0_bar, a_bar (split); c_bar and alpha_bar (this rank's contributions)."""
    f = Field(part)
    y0 = START[part].clone().requires_grad_()
    y = pfde.fdeint(f, y0, T, alpha, method=method, **keywords)
    loss = (y.square().sum(0) * torch.arange(1.0, SIZE + 1, dtype=torch.float64)[part]).sum()
    return [y.detach(), *torch.autograd.grad(loss, (y0, f.a, f.c, alpha))]


def check(what: str, got: Tensor, expected: Tensor) -> None:
    error = float((got - expected).abs().max() / expected.abs().max())
    assert error <= TOLERANCE, f"rank {rank}: {what} is off by {error:.1e} (relative, of the largest entry)"


digests: dict[str, list[str] | None] = {}
for i, method in enumerate(METHODS):
    if sys.argv[2:] and method not in sys.argv[2].split(","):
        continue
    digest = hashlib.sha256()
    # Four ranks on two cores take their time, and one has little to show: there the methods have one order and several
    # in turn.
    for orders in ("one", "vector") if size == 2 else (("one", "vector")[i % 2],):
        if orders == "one":
            alpha = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
            local = alpha
        else:
            alpha = ORDERS.clone().requires_grad_()
            local = alpha.detach()[MINE].clone().requires_grad_()
        settings = [pfde.Discrete()]
        if orders == "one" and size < 4:
            others = [pfde.Discrete(store="graph"), pfde.Backprop()]
            settings += others[i % 2 :][:1] if METHODS[method].implicit else others  # implicit ones in turn
        for gradient in settings:
            y, y0_bar, a_bar, c_bar, alpha_bar = solve(slice(0, SIZE), alpha, method, gradient=gradient)
            parts = solve(MINE, local, method, comm=comm, gradient=gradient)
            if gradient == settings[0] and size < 4:
                again = solve(MINE, local, method, comm=comm, gradient=gradient)
                assert all(map(torch.equal, parts, again)), f"{method}: the same solve gives other bits"
            name = f"{method}, {orders} order, {gradient}: "
            check(name + "y", parts[0], y[:, MINE])
            check(name + "y0_bar", parts[1], y0_bar[MINE])
            check(name + "a_bar", parts[2], a_bar[MINE])
            check(name + "c_bar", comm.allreduce(parts[3]), c_bar)
            if orders == "one":
                check(name + "alpha_bar", comm.allreduce(parts[4]), alpha_bar)
            else:
                check(name + "alpha_bar", parts[4], alpha_bar[MINE])
            for part in parts:
                digest.update(part.numpy().tobytes())
    digests[method] = comm.gather(digest.hexdigest())
if rank == 0:
    print("digest", json.dumps(digests))
