"""Worker: pfde.raise_together around the local part of a data-parallel step, each rank with a solve of its own."""

import abort_all  # noqa: F401
import torch
from mpi4py import MPI
from torch import Tensor, nn

import pfde

comm = MPI.COMM_WORLD
rank, size = comm.Get_rank(), comm.Get_size()
torch.set_num_threads(1)
torch.manual_seed(0)


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return torch.tanh(self.linear(y))


block = pfde.nn.FDEBlock(Field(), alpha=0.7, learn_alpha=True, step_size=0.25)
batch = torch.randn(8, 2, dtype=torch.float64)


def step(fail: BaseException | None) -> Tensor:
    """The gradient averaged over the ranks; the culprit fails before the collective operation."""
    block.zero_grad()
    with pfde.raise_together(comm):
        (block(batch[rank::size]).square().sum() / len(batch)).backward()
        if fail is not None and rank == size - 1:
            raise fail
    flat = torch.cat([p.grad.reshape(-1) for p in block.parameters()])
    comm.Allreduce(MPI.IN_PLACE, flat.numpy())
    return flat


expected = step(None)
block.zero_grad()
(block(batch).square().sum() / len(batch)).backward()
whole = torch.cat([p.grad.reshape(-1) for p in block.parameters()])
assert torch.allclose(expected, whole, rtol=1e-13, atol=1e-15), (expected, whole)
for fail in (ValueError("boom"), KeyboardInterrupt("ctrl-c"), SystemExit(3)):
    try:
        step(fail)
    except BaseException as error:
        if rank == size - 1:
            assert error is fail, repr(error)
        else:
            assert isinstance(error, pfde.PeerError), repr(error)
            assert str(error) == f"rank {size - 1} of {size} raised {type(fail).__name__}: {fail}"
    else:
        raise AssertionError("no error")
    assert torch.equal(step(None), expected)
if rank == 0:
    print("together")
