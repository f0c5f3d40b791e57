"""What workers share: an error on the last rank only is an error on all of them, after which solves work as before."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from mpi4py import MPI
from torch import Tensor

import pfde


class Faults:
    """Blocks of code that must fail on every rank.

    healthy : a solve, whose results are to stay the same to the bit after every fault
    after : more that must hold after each, given its name

    done : how many there were
    """

    def __init__(
        self, comm: MPI.Comm, healthy: Callable[[], list[Tensor]], after: Callable[[str], None] = lambda name: None
    ) -> None:
        self._comm, self._healthy, self._after = comm, healthy, after
        self.expected = healthy()
        self.done = 0

    @contextmanager
    def __call__(
        self, name: str, own: type[BaseException] | BaseException, message: str = "", everywhere: bool = False
    ) -> Iterator[None]:
        """The body raises `own` on the last rank (or everywhere), PeerError naming it elsewhere; then a solve works."""
        rank, size = self._comm.Get_rank(), self._comm.Get_size()
        error: BaseException | None = None
        try:
            yield
        except BaseException as caught:
            error = caught
        got = f"{name}: rank {rank} got {error!r}"
        if everywhere or rank == size - 1:
            assert error is own if isinstance(own, BaseException) else isinstance(error, own), got
            assert message in str(error), got
        else:
            kind = type(own) if isinstance(own, BaseException) else own
            assert isinstance(error, pfde.PeerError), got
            assert f"rank {size - 1} of {size} raised {kind.__name__}" in str(error), got
        error = None
        self._after(name)
        assert all(map(torch.equal, self._healthy(), self.expected)), f"{name}: the next solve differs"
        self.done += 1

    def counted(self) -> str:
        """How many there were, on each rank alike."""
        assert all(count == self.done for count in self._comm.allgather(self.done))
        return f"{self.done} faults survived"
