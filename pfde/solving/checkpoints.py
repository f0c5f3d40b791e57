"""The execution of a checkpoint schedule: a forward sweep that keeps snapshots, and the backward pass that uses them.

A snapshot is what the forward sweep needs to go on from a step: the modes and the recent rows of a bounded history,
y_n, and torch's random states where f draws numbers. A leaf is what the adjoint needs of a stretch of steps: their
states (the trajectory). With the exact history all rows are there anyway: a snapshot is an index, advancing is free,
and a schedule decides only which predictors and graphs are kept. What is computed again is compared with the first time
(`replay`).
"""

from __future__ import annotations

import sys
import warnings
from collections import deque
from pathlib import Path
from typing import Generic, TypeVar

from checkpoint_schedules import CheckpointAction, Copy, EndForward, EndReverse, Forward, Move, Reverse, StorageType
from torch import Tensor

from ..errors import PfdeError
from ..schedules import Schedule, Sizes, StoreAll
from ..schedules.snapshot_file import Snapshot
from ..schedules.storage import SnapshotStore
from ..system.base import Replayed
from ..system.peers import Peers
from .marks import Marks
from .replay import Replay
from .sweep import Adjoint, Record
from .sweep import Forward as ForwardPass

R = TypeVar("R", bound=Record)
T = TypeVar("T")


class CheckpointedSweep(Generic[R]):
    """A forward sweep under a schedule, and the backward pass that goes with it.

    Parameters
    ----------
    sweep : a new forward sweep
    system : f
    schedule : None for a solve without gradient
    peers : the ranks that share the state; what happens to a snapshot on one rank is known to all
    replay : what the sweep compares with, the same as its own; None for a solve without gradient
    directory : where an earlier pass put its snapshots, whatever the working directory is by now

    Attributes
    ----------
    trajectory, schedule : of the sweep
    snapshots : the store of this solve, with its peaks
    recomputed : evaluations of f in steps taken again
    """

    def __init__(
        self,
        sweep: ForwardPass[R],
        system: Replayed,
        schedule: Schedule | None,
        peers: Peers,
        replay: Replay | None,
        directory: Path | None = None,
    ) -> None:
        assert (schedule is None) == (replay is None)
        self.trajectory: R = sweep.trajectory
        self._sweep, self._system, self.schedule, self._peers, self._replay = sweep, system, schedule, peers, replay
        self._begin_draws = system.draws.now()
        self.snapshots: SnapshotStore | None = None
        self.recomputed, self._silent, self._reversing = 0, False, False
        self._until = sys.maxsize if schedule is None else 0
        self._action: Forward | None = None
        self._pending: dict[str, Tensor] = {}
        self._leaf_steps = 0  # the longest leaf so far
        self._keeps_all = self.trajectory.whole or isinstance(schedule, StoreAll)  # no step is taken twice
        if self.trajectory.whole:
            self.trajectory.open(0, 0)  # predictors that no history could give again are kept from the first step on
        if schedule is not None:
            self._plan(schedule, directory)

    def _plan(self, schedule: Schedule, directory: Path | None) -> None:
        """One plan for all ranks, whose parts of the state may differ: that of the largest. Collective."""
        trajectory, peers, sweep = self.trajectory, self._peers, self._sweep
        draws = 0 if trajectory.whole else sum(x.numel() for x in self._begin_draws)  # bytes; kept with each
        state, block, extra = sweep.snapshot_bytes()
        state, row, extra = map(peers.largest, (max(1, state + draws), max(1, trajectory.row_bytes + draws), extra))
        work = peers.largest(0 if trajectory.whole else sweep.workspace_bytes)
        self._sizes = Sizes(sweep.steps, state, row, block, extra, work, trajectory.graphs)
        self._stream = schedule.stream(self._sizes)
        if not isinstance(schedule, StoreAll):
            self.snapshots = peers.call(SnapshotStore, directory or schedule.directory)
        self._ahead: deque[CheckpointAction] = deque()

    @property
    def marks(self) -> Marks | None:
        """What the backward pass compares f with."""
        return None if self._replay is None else self._replay.marks

    def again(self) -> CheckpointedSweep[R]:
        """Do a spent run anew: the same steps without a TS, so without monitors and hooks. Collective."""
        self._system.silence()
        self._system.draws.restart(self._begin_draws)
        new = CheckpointedSweep(
            self._sweep.anew(), self._system, self.schedule, self._peers, self._replay, self.directory
        )
        new.advance(new.steps)
        return new

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
            if self._replay is not None and sweep.n in (self._until, sweep.steps):
                self._end()
        if self._replay is None:
            return
        if sweep.broken:
            self.release()
        elif self.ended:
            self._replay.end(sweep.n, sweep.y)
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
                f"{self.schedule!r} keeps {kept + sizes.sweep_bytes} bytes of snapshots, rows and what takes steps "
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
            self._system.draws.forget(n0)

    def _end(self) -> None:
        """Keep the leaf of the action where it is not to be reversed at once."""
        action, self._action = self._action, None
        if action is not None and self._stores_leaf(action):
            numbers: dict[str, int | float] = {"restart": int(action.write_ics), "last": self._sweep.n}
            leaf = {f"leaf {name}": rows for name, rows in self.trajectory.leaf().items()}
            if not self.trajectory.whole:
                draws = self._system.draws.leaf(action.n0, self._sweep.n)
                leaf |= {f"draws {i}": states for i, states in enumerate(draws)}
            self._put(action.n0, Snapshot(self._pending | leaf, numbers), action.storage)
            self._pending = {}

    @staticmethod
    def _stores_leaf(action: Forward) -> bool:
        return bool(action.write_adj_deps) and action.storage in (StorageType.RAM, StorageType.DISK)

    def _restart_data(self) -> dict[str, Tensor]:
        generators = [] if self.trajectory.whole else self._system.draws.now()  # see _open
        return self._sweep.snapshot() | {f"generator {i}": state for i, state in enumerate(generators)}

    def _put(self, n: int, snapshot: Snapshot, storage: StorageType) -> None:
        if not snapshot.tensors:  # an index into the exact history's rows: nothing to write anywhere
            storage = StorageType.RAM
        assert self.snapshots is not None
        self._peers.call(self.snapshots.put, n, snapshot, storage)

    # -- the backward pass ---------------------------------------------------------------------------------------

    def reverse(self, adjoint: Adjoint[T]) -> T:
        """The whole backward pass: execute the schedule from EndForward on. Releases the trajectory."""
        self._reversing = True
        self.trajectory.spend()  # at once: the rows are overwritten, and Ctrl-C may end that
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
        self._sweep.retake(self._until)
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
            self._system.draws.load(n, draws)
        if snapshot.numbers.get("restart"):
            if not self.trajectory.whole:
                generators = [x for name, x in snapshot.tensors.items() if name.startswith("generator ")]
                self._system.draws.restart(generators)
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
        assert self._replay is not None
        self._peers.agree(self._replay.function_error(self.steps))

    def _explain(self, error: PfdeError) -> None:
        """Raise ReplayError in place of an error that comes of f being another."""
        assert self._replay is not None
        mismatch = self._replay.marks.take_mismatch() if self._peers.alone else None
        if mismatch is not None:
            raise self._replay.another_function(mismatch, self.steps) from error

    def _check_replay(self) -> None:
        """Raise ReplayError, on every rank, where a state was another than in the forward pass. Collective."""
        assert self._replay is not None
        self._peers.agree(self._replay.state_error(self.steps))
