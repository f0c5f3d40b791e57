"""Worker: many solves with a shared state, good ones and failing ones, leave no memory behind.

usage: leaks.py METHOD
"""

import sys
from pathlib import Path

import abort_all  # noqa: F401
import torch
from mpi4py import MPI

import pfde

comm = MPI.COMM_WORLD
rank = comm.Get_rank()
torch.set_num_threads(1)
T = torch.linspace(0, 1, 4, dtype=torch.float64)
calls = 0


def resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def solve(fuse: int) -> None:
    global calls
    calls = 0
    y0 = torch.ones(20000, dtype=torch.float64, requires_grad=True)

    def func(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        global calls
        calls += 1
        if rank == 0 and calls == fuse:
            raise ValueError("boom")
        return torch.tanh(-y)

    try:
        pfde.fdeint(func, y0, T, 0.6, method=sys.argv[1], comm=comm).sum().backward()
    except (ValueError, pfde.PeerError):
        assert fuse


for fuse in (0, 4):
    for _ in range(5):
        solve(fuse)
    before = resident()
    for _ in range(10):  # each holds 1.5 MB or more
        solve(fuse)
    growth = resident() - before
    assert growth < 4, f"rank {rank}, fuse {fuse}: 10 solves left {growth:.1f} MB behind"
if rank == 0:
    print("no leak")
