"""The forward sweep: step n from the history of the steps before it.

    r_n = y_0 + c_n + sigma_n F_0,    (y_n, X_n) = Phi(t_n, r_n, w),    row n of the history = X_n

`ForwardSweep.advance` is the one place where steps are taken: the TS calls it step by step, the backward pass calls
it, without a TS, to compute again what it no longer has.
"""

from __future__ import annotations

from torch import Tensor

from ..solving.replay import Replay
from ..system.base import System
from ..system.profile import event
from .history import Convolution
from .history.bounded import BoundedConvolution
from .schemes.base import Stage, with_slope
from .trajectory import Trajectory


class ForwardSweep:
    """A forward pass in progress over one trajectory, which it fills.

    Parameters
    ----------
    trajectory : a new one
    system : f
    replay : sees every step, or compares it with the first time; None where none is to be taken again

    Attributes
    ----------
    n : the last step taken
    y : y_n
    """

    def __init__(self, trajectory: Trajectory, system: System, replay: Replay | None = None) -> None:
        self.trajectory, self._system, self._replay = trajectory, system, replay
        self._discretisation = trajectory.discretisation
        self._scheme = self._discretisation.scheme
        self._graph = trajectory.keep == "graph"
        self._history: Convolution | None = self._discretisation.operator.forward(
            [trajectory.x_rows] if trajectory.whole else []
        )
        self._events = event("FDEForward"), event("FDEHistory")
        self.n = 0
        self.y = trajectory.y0
        if self._scheme.uses_initial_slope and trajectory.slope is None:
            trajectory.record_slope(self._initial_slope(system))

    def _initial_slope(self, system: System) -> Stage:
        return with_slope(system, self._discretisation.at(0, keep=system if self._graph else None), Stage(self.y))

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
        at = discretisation.at(n, keep=self._system if self._graph and trajectory.keeps(n) else None)
        stage = self._scheme.step(self._system, at, r, y0, self.y)
        trajectory.record(n, stage)
        self.n, self.y = n, stage.y
        if self._replay is not None:
            if n == 1 and trajectory.slope is not None:
                self._replay.keep(0, [(trajectory.slope,)])
            self._replay.keep(n, [(x,) for x in stage.slopes])
            self._replay.see(n, stage.y)
        return stage

    def retake(self, n1: int) -> None:
        """Take the steps n+1..n1 once more: nothing to compute where all rows are there."""
        if self.trajectory.whole:
            self.n = n1
        else:
            self.advance(n1)

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

    def anew(self) -> ForwardSweep:
        """A new sweep over the same steps, with a new trajectory."""
        spent = self.trajectory
        fresh = Trajectory(spent.discretisation, spent.y0, spent.keep)
        return ForwardSweep(fresh, self._system, self._replay)
