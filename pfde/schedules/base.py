"""Checkpoint schedules: which steps to take, keep, restore and reverse, as a stream of plain actions.

The actions are those of the library checkpoint_schedules (Maddison, Dolci, Ham, doi:10.21105/joss.06148): Forward,
Reverse, Copy, Move, EndForward, EndReverse. A schedule knows no numerics; the driver of a sweep executes it. What it
does need to know of a solve is its Sizes: the number of steps N, and what a snapshot and a row weigh. A snapshot is the
data from which the solve can be resumed at a step, a leaf is a run of M consecutive steps of which the data for the
adjoint are kept, one row a step, until they are reversed.

With blocks of M steps as the units, c snapshots (the one of step 0 among them) and r the smallest integer with
n <= beta(c, r) = C(c + r, r), reversing n blocks takes at least

    (r + 1) n - beta(c + 1, r - 1)                                                                                 (1)

advances over a block, the forward pass included (Griewank, Walther 2000, doi:10.1145/347837.347846, Proposition 1);
`forward_steps` is this number, against which the schedules are planned and tested.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from typing import NamedTuple, Protocol

from checkpoint_schedules import CheckpointAction, Copy, Forward, Move, Reverse


class Sizes(NamedTuple):
    """What a schedule plans with.

    steps : of the solve; sys.maxsize where it is not known
    state_bytes : of a snapshot at a multiple of `block` steps; elsewhere it has up to `extra_bytes` more
    row_bytes : of one step of a leaf
    sweep_bytes : of the forward sweep, which stays as long as steps may be taken again
    graphs : whether a step of a leaf also has a graph, of unknown size
    """

    steps: int
    state_bytes: int
    row_bytes: int
    block: int = 1
    extra_bytes: int = 0
    sweep_bytes: int = 0
    graphs: bool = False

    def snapshot_bytes(self, leaf: int) -> int:
        """The most that a snapshot at a multiple of `leaf` steps takes."""
        return self.state_bytes + (self.extra_bytes if leaf % self.block else 0)

    def all_rows_are_less_than(self, memory: int) -> bool:
        """Whether the rows of all steps are known to take less than these bytes of snapshots and rows, and a sweep.

        Then no step needs to be taken again: a snapshot of a compressed history weighs as much as tens of rows.
        """
        return not self.graphs and self.steps * self.row_bytes < memory + self.sweep_bytes


class Stream(Protocol):
    """The actions of one solve: forward phase, EndForward, backward phase, EndReverse. Consumed once."""

    def __next__(self) -> CheckpointAction:
        """The next action."""
        ...

    def finalize(self, n: int) -> None:
        """Told once, that the forward pass has ended after n steps; the next action is then EndForward."""
        ...


class Schedule(ABC):
    """A frozen description, hashable and comparable; every solve draws its own stream of actions from it.

    `directory` is where snapshots of the disk tier go; None is the system's folder for temporary files.
    """

    directory: str | os.PathLike[str] | None = None

    @abstractmethod
    def stream(self, sizes: Sizes) -> Stream:
        """A new stream for one solve; ValueError where the schedule does not suit its sizes."""

    def memory_bytes(self, sizes: Sizes) -> int | None:
        """The most that snapshots and rows will take in memory; None where the schedule does not say."""
        return None


def forward_steps(n: int, snapshots: int) -> int:
    """The fewest advances that reverse n steps with this many snapshots, formula (1); cost O(r).

    The adjoint data of one step are at hand at a time, and the forward pass is counted. ValueError without a snapshot
    (unless n is 1), since then no step but the last could be taken again.
    """
    if n < 1 or snapshots < min(1, n - 1):
        raise ValueError(
            f"n must be positive and snapshots too when n > 1: got n={n}, snapshots={snapshots}; allow one snapshot"
        )
    if snapshots >= n - 1:  # every start of a step but the last is kept; r = 1
        return 2 * n - 1
    if snapshots == 1:
        return n * (n + 1) // 2
    c, r, beta, above = snapshots, 1, snapshots + 1, 1  # beta(c, r) and beta(c + 1, r - 1)
    while beta < n:
        r += 1
        beta = beta * (c + r) // r
        above = above * (c + r) // (r - 1)
    return (r + 1) * n - above


def in_steps(action: CheckpointAction, leaf: int, steps: int, *, start: int = 0) -> CheckpointAction:
    """The action on blocks as one on steps: block b, counted from block `start`, begins at step min(b leaf, steps)."""

    def step(block: int) -> int:
        return min((start + block) * leaf, steps)

    if isinstance(action, Forward):
        return Forward(step(action.n0), step(action.n1), action.write_ics, action.write_adj_deps, action.storage)
    if isinstance(action, Reverse):
        return Reverse(step(action.n1), step(action.n0), action.clear_adj_deps)
    if isinstance(action, Copy | Move):
        return type(action)(step(action.n), action.from_storage, action.to_storage)
    return action


def check_count(name: str, value: object, least: int) -> None:
    """TypeError or ValueError unless value is an int of at least `least`; the message names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int of at least {least}: got {value!r}; give a whole number")
    if value < least:
        raise ValueError(f"{name} must be at least {least}: got {value}; give a larger number")


def check_tiers(
    snapshots: int | None, on_disk: int, directory: str | os.PathLike[str] | None, leaf: int | None
) -> None:
    """TypeError or ValueError unless these describe snapshots in memory (None: not counted) and on disk, and a leaf."""
    check_count("on_disk", on_disk, 0)
    check_directory(directory)
    if snapshots is not None:
        check_count("snapshots", snapshots, 0)
        if snapshots + on_disk == 0:
            raise ValueError("snapshots + on_disk must be at least 1: got 0; allow one, or use StoreAll()")
    if leaf is not None:
        check_count("leaf", leaf, 1)
    if directory is not None and on_disk == 0:
        raise ValueError(
            f"directory applies to snapshots on disk: got directory={os.fspath(directory)!r}, on_disk=0; "
            "give on_disk, or leave directory out"
        )


def check_directory(directory: object) -> None:
    """TypeError or ValueError unless this is None or a path that a file system can have."""
    remedy = "give a str or os.PathLike of an existing folder, or None for the system's folder for temporary files"
    path = directory
    if isinstance(directory, os.PathLike):
        path = os.fspath(directory)
    if path is None:
        return
    if not isinstance(path, str):
        raise TypeError(f"directory must be a path as text: got {directory!r}; {remedy}")
    try:
        encoded = os.fsencode(path)
    except UnicodeEncodeError as error:
        raise ValueError(
            f"directory must be a path that the file system can name: got {directory!r}; {remedy}"
        ) from error
    if b"\0" in encoded:
        raise ValueError(f"directory must not have a NUL character: got {directory!r}; {remedy}")
