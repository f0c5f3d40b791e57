"""Agreement on failure: under MPI every rank raises, or none, so that no error becomes a hang.

A rank that fails alone would leave the others waiting in the next collective operation. `Peers.agree` is called
between the last local operation that can fail and the next collective one; it costs one allreduce of an integer
on a communicator of several ranks and nothing on one.

NOTE 1. An error that a local variable names, raised from there, and its traceback keep each other alive, and all that
the solve holds with them. Under MPI that is a leak on every rank: PETSc destroys an object when all ranks have dropped
it. Hence `del error` on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from ..errors import PeerError

T = TypeVar("T")
CALL = "the function called"
N = TypeVar("N", int, float)


class Peers:
    """The ranks that share one solve. `comm` is an mpi4py communicator, or None for this rank alone."""

    def __init__(self, comm: Any | None = None) -> None:
        if comm is not None and not hasattr(comm, "allgather"):
            raise TypeError(f"comm must be an mpi4py communicator or None: got {type(comm).__name__}")
        self.comm = comm if comm is not None and comm.Get_size() > 1 else None

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.comm is None

    def agree(self, error: BaseException | None) -> None:
        """Raise `error` if this rank has one, PeerError if another rank has. Collective."""
        failed = error is not None if self.comm is None else self.comm.allreduce(int(error is not None))
        try:
            if failed:
                self._raise(error)
        finally:
            del error  # NOTE 1

    def _raise(self, error: BaseException | None) -> None:
        try:
            if self.comm is None:
                assert error is not None
                raise error
            reports = self.comm.allgather(None if error is None else f"{type(error).__name__}: {error}")
            if error is not None:
                raise error
        finally:
            del error
        rank = next(i for i, report in enumerate(reports) if report is not None)
        raise PeerError(f"rank {rank} of {len(reports)} raised {reports[rank]}")

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """`function(*args, **kwargs)`, raising on every rank when it raises on one. Collective."""
        if self.comm is None:
            return function(*args, **kwargs)
        result: T
        error: BaseException | None = None
        try:
            result = function(*args, **kwargs)
        except BaseException as caught:  # KeyboardInterrupt too: the other ranks must not wait for this one
            error = caught
        try:
            self.agree(error)
        finally:
            del error
        return result  # agree() has raised where there is none

    def sum(self, value: float) -> float:
        """The sum of a number over the ranks. Collective."""
        return value if self.comm is None else self.comm.allreduce(value)

    def largest(self, value: N) -> N:
        """The largest of a number over the ranks. Collective."""
        return value if self.comm is None else max(self.comm.allgather(value))

    def same(self, values: Mapping[str, Any]) -> None:
        """Raise ValueError on every rank when one of the named values differs between the ranks. Collective.

        The first collective operation of every function that takes a comm is one of these, with the name `CALL`: so
        ranks that call different ones learn of it, where they would wait for each other for ever.
        """
        if self.comm is None:
            return
        ranks = self.comm.allgather(dict(values))
        for name in values:
            found = [rank.get(name) for rank in ranks]
            if any(value != found[0] for value in found):
                raise ValueError(f"{name} must be the same on every rank of comm: got {found}")


@contextmanager
def raise_together(comm: Any) -> Iterator[None]:
    """Run the body so that an error on one rank raises on every rank of `comm`.

    The failing ranks raise their own error, the others `pfde.PeerError` with its text. Put it around the local
    part of a training step, before the collective that averages the gradients. The body itself must not wait for
    other ranks. Collective at its end.

    Parameters
    ----------
    comm : an mpi4py communicator
    """
    peers = Peers(comm)
    error: BaseException | None = None
    try:
        yield
    except BaseException as caught:
        error = caught
    try:
        peers.agree(error)
    finally:
        del error
