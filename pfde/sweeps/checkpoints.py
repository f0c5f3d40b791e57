"""The execution of a checkpoint schedule: a forward sweep that keeps snapshots, and the backward pass that uses them.

A snapshot is what the forward sweep needs to go on from a step: the modes and the recent rows of a bounded history,
y_n, and torch's random states where f draws numbers. A leaf is what the adjoint needs of a stretch of steps: their
states (`trajectory`). With the exact history all rows are there anyway: a snapshot is an index, advancing is free, and
a schedule decides only which predictors and graphs are kept.

Every state that is computed again is compared with the first one, by a fingerprint of its bits.
"""

from __future__ import annotations

import sys
import warnings
from array import array
from collections import deque
from pathlib import Path
from typing import TypeVar

import torch
from checkpoint_schedules import CheckpointAction, Copy, EndForward, EndReverse, Forward, Move, Reverse, StorageType
from torch import Tensor

from ..errors import PfdeError, ReplayError
from ..schedules import Schedule, Sizes, StoreAll
from ..schedules.snapshot_file import Snapshot
from ..schedules.storage import SnapshotStore
from ..system.base import System
from ..system.peers import Peers
from .base import Adjoint, Record
from .base import Forward as ForwardPass
from .marks import REMEDY, Marks

T = TypeVar("T")


class Fingerprints:
    """One number for each state seen in a forward pass: a weighted sum of its bits, as 32-bit integers.

    The weights tell components from each other: without them, an exchange or two changes of sign would be the same.

    every : all steps are kept, 8 bytes each; else the last one only
    mismatch : the first step that was seen again with another state
    """

    def __init__(self, *, every: bool) -> None:
        self.every = every
        self._values = array("q")
        self.mismatch: int | None = None
        self._weights: Tensor | None = None

    def _of(self, y: Tensor) -> int:
        bits = y.view(torch.int32)
        if self._weights is None:
            generator = torch.Generator().manual_seed(1)
            self._weights = torch.randint(1, 2**31, bits.shape, generator=generator).to(y.device)
        return int((bits * self._weights).sum())

    def witness(self, n: int, y: Tensor) -> None:
        """Keep the fingerprint of y_n if it is the first, else compare; where all steps are kept."""
        if self.every:
            self._see(n - 1, n, y)

    def end(self, n: int, y: Tensor) -> None:
        """The same for the last step, where it alone is kept."""
        if not self.every:
            self._see(0, n, y)

    def _see(self, at: int, n: int, y: Tensor) -> None:
        value = self._of(y)
        if at == len(self._values):
            self._values.append(value)
        elif self._values[at] != value and self.mismatch is None:
            self.mismatch = n


class CheckpointedSweep:
    """A forward sweep under a schedule, and the backward pass that goes with it.

    Parameters
    ----------
    sweep : a new forward sweep
    trajectory : its record, a new one
    system : f
    schedule : None for a solve without gradient
    peers : the ranks that share the state; what happens to a snapshot on one rank is known to all
    fingerprints, marks : those of an earlier pass over the same steps, for this one to be compared with
    directory : where that put its snapshots, whatever the working directory is by now

    Attributes
    ----------
    trajectory, fingerprints, marks
    generators : torch's random states at the start, where f draws numbers
    snapshots : the store of this solve, with its peaks
    recomputed : evaluations of f in steps taken again
    """

    def __init__(
        self,
        sweep: ForwardPass,
        trajectory: Record,
        system: System,
        schedule: Schedule | None,
        peers: Peers,
        fingerprints: Fingerprints | None = None,
        marks: Marks | None = None,
        directory: Path | None = None,
    ) -> None:
        self.trajectory, self._system, self._peers = trajectory, system, peers
        self.generators = system.generators()
        self._sweep = sweep
        self.snapshots: SnapshotStore | None = None
        self.recomputed, self._silent, self._reversing = 0, False, False
        self.fingerprints = fingerprints or Fingerprints(every=not isinstance(schedule, StoreAll))
        self._until = sys.maxsize if schedule is None else 0
        self._action: Forward | None = None
        self._pending: dict[str, Tensor] = {}
        self._scheduled = schedule is not None
        self._leaf_steps = 0  # the longest leaf so far
        self._keeps_all = trajectory.whole or isinstance(schedule, StoreAll)  # no step is taken twice
        if trajectory.whole:
            trajectory.open(0, 0)  # predictors that no history could give again are kept from the first step on
        self.marks = marks
        if schedule is not None:
            if marks is None:  # kept graphs too: a leaf taken again, or a second backward pass, makes new ones
                self.marks = Marks(alone=peers.alone)
            self._sweep.marks = self.marks
            self._sweep.witness = self.fingerprints.witness  # no method of self: a cycle would outlive the solve
            # One plan for all ranks, whose parts of the state may differ: that of the largest.
            draws = 0 if trajectory.whole else sum(x.numel() for x in self.generators)  # bytes; kept with each
            state, block, extra = self._sweep.snapshot_bytes()
            state, row, extra = map(peers.largest, (max(1, state + draws), max(1, trajectory.row_bytes + draws), extra))
            work = peers.largest(0 if trajectory.whole else sweep.workspace_bytes)
            self._sizes = Sizes(sweep.steps, state, row, block, extra, work, trajectory.graphs)
            self._schedule, self._stream = schedule, schedule.stream(self._sizes)
            if not isinstance(schedule, StoreAll):
                self.snapshots = peers.call(SnapshotStore, directory or schedule.directory)
            self._ahead: deque[CheckpointAction] = deque()

    @property
    def n(self) -> int:
        """The last step taken."""
        return self._sweep.n

    @property
    def steps(self) -> int:
        """N; sys.maxsize as long as it is not known."""
        return self._sweep.steps

    @property
    def directory(self) -> Path | None:
        """Where the snapshots on disk go; None without a store."""
        return None if self.snapshots is None else self.snapshots.directory

    @property
    def ended(self) -> bool:
        """Whether the forward pass is over."""
        return self._sweep.n == self._sweep.steps

    # -- the forward pass ----------------------------------------------------------------------------------------

    def advance(self, n1: int) -> Tensor:
        """Take the steps n+1..n1 of the first forward pass, or up to the last one, and return the state there."""
        try:
            self._advance(n1)
            return self._sweep.y
        except BaseException:
            if self.snapshots is not None:
                self.snapshots.close()  # at once: who holds the error, holds the solve
            raise

    def _advance(self, n1: int) -> None:
        sweep = self._sweep
        while sweep.n < min(n1, sweep.steps):
            while sweep.n == self._until:
                self._prepare(self._next())
            sweep.advance(min(n1, self._until))
            if self._scheduled and sweep.n in (self._until, sweep.steps):
                self._end()
        if self._scheduled and sweep.broken:
            self.release()
        elif self._scheduled and self.ended:
            self.fingerprints.end(sweep.n, sweep.y)
            self._stream.finalize(sweep.n)
            action = self._next()
            assert isinstance(action, EndForward), f"{action} at the end of the forward pass"
            if self._keeps_all or (self.snapshots is not None and not self.snapshots.count):
                sweep.close()  # without a snapshot no step can be taken again
            elif self.snapshots is not None and not self.trajectory.whole:
                self._warn_of_more_than_all_rows(sweep.n)
            self._check_replay()

    def _warn_of_more_than_all_rows(self, steps: int) -> None:
        """Say so where the forward pass has kept more than the rows of all its steps would have been."""
        assert self.snapshots is not None
        known, sizes = self._sizes.steps, self._sizes._replace(steps=steps)
        leaf = self._leaf_steps * sizes.row_bytes
        kept = self.snapshots.memory_peak + leaf
        # Where the end was not known, no schedule could do without the first snapshot and one leaf.
        unavoidable = sizes.state_bytes + leaf if known == sys.maxsize else 0
        if sizes.all_rows_are_less_than(kept - unavoidable):
            warnings.warn(
                f"{self._schedule!r} keeps {kept + sizes.sweep_bytes} bytes of snapshots, rows and what takes steps "
                f"again; StoreAll() would keep {steps * sizes.row_bytes} for these {steps} steps: use StoreAll(), "
                "or fewer snapshots with longer leaves",
                stacklevel=2,
            )

    def _prepare(self, action: CheckpointAction) -> None:
        """An action of the forward pass: an advance, perhaps over no steps, or a snapshot given up for another."""
        if isinstance(action, Forward):
            self._begin(action)
            if self._until == self._sweep.n:
                self._end()
        else:
            self._load(action)

    def _begin(self, action: Forward) -> None:
        """Keep what the action asks for at its start, and open the leaf it asks for."""
        n0, n1 = self._sweep.n, min(action.n1, self._sweep.steps)
        assert action.n0 == n0, f"{action} at step {n0}"
        state = self._restart_data() if action.write_ics else {}
        if action.write_adj_deps:
            self._open(n0, n1)
        self._action, self._until = action, n1
        if action.write_ics and not self._stores_leaf(action):
            numbers: dict[str, int | float] = {"restart": 1}
            self._put(n0, Snapshot(state, numbers), action.storage)
        else:
            self._pending = {name: x.clone() for name, x in state.items()}

    def _open(self, n0: int, n1: int) -> None:
        """Keep from now on what the adjoint of the steps n0+1..n1 needs.

        Where all rows are there, no step is taken again, which could give its predictor or draw its random numbers:
        the former are built from the rows, of the latter all are kept.
        """
        self.trajectory.open(n0, n0 if self.trajectory.whole and self._reversing else n1)
        self._leaf_steps = max(self._leaf_steps, n1 - n0)
        if not self.trajectory.whole:
            self._system.forget(n0)

    def _end(self) -> None:
        """Keep the leaf of the action where it is not to be reversed at once."""
        action, self._action = self._action, None
        if action is not None and self._stores_leaf(action):
            numbers: dict[str, int | float] = {"restart": int(action.write_ics), "last": self._sweep.n}
            leaf = {f"leaf {name}": rows for name, rows in self.trajectory.leaf().items()}
            if not self.trajectory.whole:
                draws = self._system.leaf_generators(action.n0, self._sweep.n)
                leaf |= {f"draws {i}": states for i, states in enumerate(draws)}
            self._put(action.n0, Snapshot(self._pending | leaf, numbers), action.storage)
            self._pending = {}

    @staticmethod
    def _stores_leaf(action: Forward) -> bool:
        return bool(action.write_adj_deps) and action.storage in (StorageType.RAM, StorageType.DISK)

    def _restart_data(self) -> dict[str, Tensor]:
        generators = [] if self.trajectory.whole else self._system.generators()  # see _open
        return self._sweep.snapshot() | {f"generator {i}": state for i, state in enumerate(generators)}

    def _put(self, n: int, snapshot: Snapshot, storage: StorageType) -> None:
        if not snapshot.tensors:  # an index into the exact history's rows: nothing to write anywhere
            storage = StorageType.RAM
        assert self.snapshots is not None
        self._peers.call(self.snapshots.put, n, snapshot, storage)

    # -- the backward pass ---------------------------------------------------------------------------------------

    def reverse(self, adjoint: Adjoint[T]) -> T:
        """The whole backward pass: execute the schedule from EndForward on. Releases the trajectory."""
        self._reversing = self.trajectory.spent = True  # at once: the rows are overwritten, and Ctrl-C may end that
        adjoint.marks = self.marks
        try:
            while not isinstance(action := self._next(), EndReverse):
                if isinstance(action, Forward):
                    self._again(action)
                elif isinstance(action, Reverse):
                    self._prefetch()
                    adjoint.reverse(action.n1, action.n0)
                    self._check_marks()
                else:
                    self._load(action)
            bars = adjoint.finish()
            self._check_marks()
            return bars
        except PfdeError as error:
            self._explain(error)
            raise
        finally:
            self.release()

    def release(self) -> None:
        """Give up the trajectory and all snapshots."""
        self._sweep.close()
        self.trajectory.release()
        if self.snapshots is not None:
            self.snapshots.close()

    def _again(self, action: Forward) -> None:
        """Take steps once more."""
        if not self._silent:
            self._system.silence()
            self._silent = True
        self._begin(action)
        before = self._system.evaluations
        if self.trajectory.whole:  # nothing to compute: all rows are there
            self._sweep.n = self._until
        else:
            self._sweep.advance(self._until)
        self.recomputed += self._system.evaluations - before
        self._end()
        self._check_replay()

    def _load(self, action: CheckpointAction) -> None:
        """Copy or Move."""
        assert isinstance(action, Copy | Move), f"{action} in the backward pass"
        n, store = action.n, self.snapshots
        assert store is not None
        source = action.from_storage if store.holds(n, action.from_storage) else StorageType.RAM  # an index: see _put
        if action.to_storage == StorageType.WORK:
            snapshot = self._peers.call(store.get, n, source)
            self._restore(n, snapshot)
        elif action.to_storage in (StorageType.RAM, StorageType.DISK) and source == action.from_storage:
            snapshot = self._peers.call(store.get, n, source)
            self._put(n, snapshot, action.to_storage)
        if isinstance(action, Move):
            self._peers.call(store.discard, n, source)

    def _restore(self, n: int, snapshot: Snapshot) -> None:
        leaf = {name[5:]: rows for name, rows in snapshot.tensors.items() if name.startswith("leaf ")}
        if self.trajectory.whole:
            self._open(n, n)
        elif "last" in snapshot.numbers:
            self.trajectory.load(n, int(snapshot.numbers["last"]), leaf)
            draws = [states for name, states in snapshot.tensors.items() if name.startswith("draws ")]
            self._system.load_generators(n, draws)
        if snapshot.numbers.get("restart"):
            if not self.trajectory.whole:
                generators = [x for name, x in snapshot.tensors.items() if name.startswith("generator ")]
                self._system.restore_generators(n, generators)
            self._sweep.restore(n, snapshot.tensors)

    def _next(self) -> CheckpointAction:
        return self._ahead.popleft() if self._ahead else next(self._stream)

    def _prefetch(self) -> None:
        """While steps are reversed, the next snapshot may come from the disk."""
        if self.snapshots is None or not self.snapshots.on_disk:
            return
        while not self._ahead or not isinstance(self._ahead[-1], Copy | Move | EndReverse):
            self._ahead.append(next(self._stream))
        action = self._ahead[-1]
        if isinstance(action, Copy | Move) and action.from_storage == StorageType.DISK:
            self.snapshots.prefetch(action.n)

    # -- the replay ----------------------------------------------------------------------------------------------

    def _check_marks(self) -> None:
        """Raise ReplayError, on every rank, where f was another than in the forward pass. Collective."""
        if self.marks is None:
            return
        mismatch, self.marks.mismatch = self.marks.mismatch, None
        self._peers.agree(None if mismatch is None else self._another(mismatch))

    def _explain(self, error: PfdeError) -> None:
        """Raise ReplayError in place of an error that comes of f being another."""
        if self.marks is not None and self.marks.mismatch is not None and self._peers.alone:
            raise self._another(self.marks.mismatch) from error

    def _another(self, n: int) -> ReplayError:
        return ReplayError(
            f"func, evaluated again for the backward pass at step {n} of {self.steps}, is not what it was in the "
            f"forward pass: {REMEDY}"
        )

    def _check_replay(self) -> None:
        mismatch, self.fingerprints.mismatch = self.fingerprints.mismatch, None
        error = None
        if mismatch is not None:
            error = ReplayError(
                f"step {mismatch} of {self.steps}, computed again for the backward pass, is not what it was in "
                f"the forward pass: {REMEDY}"
            )
        self._peers.agree(error)
