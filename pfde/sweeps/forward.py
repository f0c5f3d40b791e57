"""The forward sweep: step n from the history of the steps before it.

    r_n = y_0 + c_n + sigma_n F_0,    (y_n, X_n) = Phi(t_n, r_n, w),    row n of the history = X_n

`ForwardSweep.advance` is the one place where steps are taken: the TS calls it step by step, the backward pass calls
it, without a TS, to compute again what it no longer has.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..history import Convolution
from ..history.bounded import BoundedConvolution
from ..schedules import Schedule
from ..schemes.base import Stage, with_slope
from ..system.base import System
from ..system.peers import Peers
from ..system.profile import event
from .checkpoints import CheckpointedSweep
from .marks import Marks
from .trajectory import Trajectory


class ForwardSweep:
    """A forward pass in progress over one trajectory, which it fills.

    Attributes
    ----------
    n : the last step taken
    y : y_n
    witness : sees (n, y_n) after every step
    marks : keeps what f gave
    """

    def __init__(self, trajectory: Trajectory, system: System) -> None:
        self.trajectory, self._system = trajectory, system
        self._discretisation = trajectory.discretisation
        self._scheme = self._discretisation.scheme
        self._graph = trajectory.keep == "graph"
        self._history: Convolution | None = self._discretisation.operator.forward(
            [trajectory.x_rows] if trajectory.whole else []
        )
        self._events = event("FDEForward"), event("FDEHistory")
        self.witness: Callable[[int, Tensor], None] | None = None
        self.marks: Marks | None = None
        self.n = 0
        self.y = trajectory.y0
        if self._scheme.uses_initial_slope and trajectory.slope is None:
            trajectory.record_slope(self._initial_slope(system))

    def _initial_slope(self, system: System) -> Stage:
        return with_slope(system, self._discretisation.at(0, keep=self._graph), Stage(self.y))

    broken = False  # it comes to its end, or raises

    @property
    def steps(self) -> int:
        """N."""
        return self._discretisation.grid.steps

    def advance(self, n1: int) -> Stage:
        """Take the steps n+1..n1 and return the last one's stage."""
        sweep_event, history_event = self._events
        history = self._history
        assert history is not None
        while self.n < n1:
            n = self.n + 1
            with sweep_event:
                with history_event:
                    c = history.read(n)
                stage = self._step(n, c)
                if stage.x is not None:
                    history.push(n, (stage.x,))
        return stage

    def _step(self, n: int, c: tuple[Tensor, ...]) -> Stage:
        trajectory, discretisation = self.trajectory, self._discretisation
        weights, y0, slope = discretisation.weights, trajectory.y0, trajectory.slope
        r = tuple(weights.add_start(channel, n, y0 + part, slope) for channel, part in enumerate(c))
        at = discretisation.at(n, keep=self._graph and trajectory.keeps(n))
        stage = self._scheme.step(self._system, at, r, y0, self.y)
        trajectory.record(n, stage)
        self.n, self.y = n, stage.y
        if self.marks is not None:
            if n == 1 and trajectory.slope is not None:
                self.marks.keep(0, [(trajectory.slope,)])
            self.marks.keep(n, [(x,) for x in stage.slopes])
        if self.witness is not None:
            self.witness(n, stage.y)
        return stage

    def close(self) -> None:
        """Give up the history: no more steps are taken."""
        self._history = None

    def snapshot_bytes(self) -> tuple[int, int, int]:
        """Bytes of a snapshot between two blocks of the history, steps of a block, bytes more of one inside a block.

        (0, 1, 0) where the history keeps all rows, and a snapshot is an index into them.
        """
        if not isinstance(self._history, BoundedConvolution):
            return 0, 1, 0
        least, most = self._history.state_bytes
        return least + self.y.numel() * self.y.element_size(), self._history.block, most - least

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the history, until the sweep is closed."""
        return 0 if self._history is None else self._history.workspace_bytes

    def snapshot(self) -> dict[str, Tensor]:
        """What `restore` needs to go on from here: views, valid until the next step."""
        if not isinstance(self._history, BoundedConvolution):
            return {}
        return self._history.state() | {"y": self.y}

    def restore(self, n: int, state: dict[str, Tensor]) -> None:
        """Go on behind step n, whose snapshot this was."""
        self.n = n
        if isinstance(self._history, BoundedConvolution):
            self._history.restore(n, state)
            self.y = state["y"].clone()


def take_again(run: CheckpointedSweep, system: System, schedule: Schedule, peers: Peers) -> CheckpointedSweep:
    """Do a spent run anew: the same steps without a TS, so without monitors and hooks."""
    system.silence()
    system.restore_generators(0, run.generators)
    spent = run.trajectory
    assert isinstance(spent, Trajectory)
    fresh = Trajectory(spent.discretisation, spent.y0, spent.keep)
    sweep = ForwardSweep(fresh, system)
    new = CheckpointedSweep(
        sweep, fresh, system, schedule, peers, run.fingerprints, marks=run.marks, directory=run.directory
    )
    new.advance(new.steps)
    return new
