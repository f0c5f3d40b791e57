"""What the execution of a checkpoint schedule needs to know of a forward sweep, its trajectory and the adjoint sweep.

Both wings have all three, under the same names: `Trajectory`, `ForwardSweep`, `AdjointSweep`.
"""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor

T = TypeVar("T", covariant=True)
R = TypeVar("R", bound="Record", covariant=True)


class Record(Protocol):
    """A trajectory: what a forward sweep leaves for the adjoint."""

    @property
    def whole(self) -> bool:
        """Whether the rows of all steps are kept in any case, so that a snapshot is an index into them."""

    @property
    def spent(self) -> bool:
        """Whether its buffers are overwritten, or given up."""

    @property
    def graphs(self) -> bool:
        """Whether a step of the leaf has a graph beside its row."""

    @property
    def row_bytes(self) -> int:
        """Bytes that a step of the leaf takes."""

    def open(self, first: int, last: int) -> None:
        """Keep from now on what the adjoint of the steps first+1..last needs, and nothing of others."""

    def leaf(self) -> dict[str, Tensor]:
        """The rows of the leaf, as `load` takes them."""

    def load(self, first: int, last: int, rows: dict[str, Tensor]) -> None:
        """Open this leaf, with rows kept elsewhere."""

    def spend(self) -> None:
        """The adjoint is about to overwrite it."""

    def release(self) -> None:
        """Give up all buffers."""


class Forward(Protocol[R]):
    """A forward pass in progress."""

    @property
    def trajectory(self) -> R:
        """What it fills."""

    @property
    def n(self) -> int:
        """The last step taken."""

    @property
    def y(self) -> Tensor:
        """y_n."""

    @property
    def broken(self) -> bool:
        """Whether it ended early, and has no backward pass."""

    @property
    def steps(self) -> int:
        """N; sys.maxsize as long as it is not known."""

    def advance(self, n1: int) -> Any:
        """Take the steps n+1..n1, or up to the last one."""

    def retake(self, n1: int) -> None:
        """Take the steps n+1..n1 once more."""

    def close(self) -> None:
        """No more steps are taken."""

    def snapshot_bytes(self) -> tuple[int, int, int]:
        """Bytes of a snapshot between two blocks, steps of a block, bytes more of one inside a block."""

    @property
    def workspace_bytes(self) -> int:
        """Bytes that the sweep itself holds, beside its trajectory, until it is closed."""

    def snapshot(self) -> dict[str, Tensor]:
        """What `restore` needs: views, valid until the next step."""

    def restore(self, n: int, state: dict[str, Tensor]) -> None:
        """Go on behind step n, whose snapshot this was."""

    def anew(self) -> Forward[R]:
        """A new sweep over the same steps, which fills a new trajectory, compared with what this one has seen."""


class Adjoint(Protocol[T]):
    """A backward pass in progress."""

    def reverse(self, n1: int, n0: int) -> None:
        """Reverse the steps n1, n1-1, ..., n0+1."""

    def finish(self) -> T:
        """The gradient, once all steps are reversed."""
