"""The forward sweep of a one-step method: fixed steps, steps found by error control, and recorded ones taken again.

`ForwardSweep.advance` is the one place where such steps are taken: the TS calls it, and the backward pass calls it,
without a TS, to compute again what it no longer has. A step that is found is tried with shrinking h until the error
estimate accepts it; its times are then recorded and frozen, so that what is computed again is the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..errors import ConvergenceError, StepLimitError
from ..solving.replay import Replay
from ..system.base import OneStepSystem
from ..system.profile import event
from .control import Controller
from .methods.base import Interval, Step
from .methods.sums_of_slopes import combine, no_carry
from .outputs import Outputs
from .trajectory import Trajectory


class Terminal(Protocol):
    """What may end a solve inside a step: an event."""

    def crossed(self, at: Interval, y: Tensor, y1: Tensor) -> bool:
        """Whether the solve ends within this step, from y to y1."""

    def locate(self, at: Interval, dense: Callable[[float, int], Tensor]) -> float:
        """At which time; dense(theta, k) is the dense output or, for k = 1, its derivative in theta."""


class ForwardSweep:
    """A forward pass in progress over one trajectory, which it fills.

    Parameters
    ----------
    trajectory : a new one
    system : f
    replay : sees every step, or compares it with the first time; None where none is to be taken again
    controller : of adaptive steps; None where all times are known
    outputs : filled on the first pass
    reuse : whether the slope at the end of a step may serve as the first of the next (not where f draws random numbers)
    terminal : sees every step of the first pass, and may end the solve with it, the last output inside
    stop_at_limit : whether too many or too small steps end the solve, with `limit`, instead of raising it

    Attributes
    ----------
    n : the last step taken
    y : y_n
    limit : what ended the solve early
    """

    def __init__(
        self,
        trajectory: Trajectory,
        system: OneStepSystem,
        replay: Replay | None,
        controller: Controller | None,
        outputs: Outputs,
        *,
        reuse: bool,
        terminal: Terminal | None = None,
        stop_at_limit: bool = False,
    ) -> None:
        self.trajectory, self._system, self._replay = trajectory, system, replay
        self._controller, self._outputs, self._reuse = controller, outputs, reuse
        self._terminal, self._stop_at_limit = terminal, stop_at_limit
        self._times, self._scheme = trajectory.times, trajectory.scheme
        self._graph = trajectory.keep == "graph"
        self._event = event("FDEForward")
        self._longest = 0.0 if controller is None else controller.limits.max_step
        self._slope: Tensor | None = None  # f(t_n, y_n), where it is known
        self._carry = no_carry(trajectory.y0)  # what y_n lacks of its sum
        self._h = 0.0
        self.limit: StepLimitError | None = None
        self.n = 0
        self.y = trajectory.y0

    @property
    def steps(self) -> int:
        """N; sys.maxsize as long as it is not known."""
        return self._times.steps

    @property
    def broken(self) -> bool:
        """Whether the solve ended early."""
        return self.limit is not None

    @property
    def t(self) -> float:
        """t_n."""
        return self._times.time(self.n)

    def advance(self, n1: int) -> None:
        """Take the steps n+1..n1, or up to the last one."""
        while self.n < min(n1, self.steps):
            with self._event:
                y = self.trajectory.begin(self.n + 1, self.y)
                if self.n < self._times.known:
                    at = self._times.interval(self.n + 1)
                    step = self._take(at, y)
                    if not self._outputs.complete:
                        self._system.require_finite(
                            at.n, at.t, at.t1, step.y, *(step.slopes[i] for i in self._scheme.silent)
                        )
                else:
                    found = self._find(y)
                    if found is None:
                        return
                    at, step = found
                self._accept(at, y, step)

    def retake(self, n1: int) -> None:
        """Take the steps n+1..n1 once more."""
        self.advance(n1)

    def _take(self, at: Interval, y: Tensor) -> Step:
        rows, out = self.trajectory.memory(at.n)
        keep = self._system if self._graph and self.trajectory.keeps(at.n) else None
        first, carry = self._slope, self._carry
        return self._scheme.step(self._system, at, y, first=first, keep=keep, rows=rows, out=out, carry=carry)

    def _find(self, y: Tensor) -> tuple[Interval, Step] | None:
        """The next step that the error estimate accepts. Raises StepLimitError."""
        control, t, nan = self._controller, self.t, False
        assert control is not None
        if self.n == 0:
            self._h = self._first_size(y)
        while True:
            if (error := control.check(t, self._h, abs(self._times.t1 - t), nan=nan)) is not None:
                error.t, error.y = t, y.clone()
                if self._stop_at_limit:
                    self.limit = error
                    self._times.end(self.n)
                    return None
                try:
                    raise error
                finally:
                    del error  # else it and its traceback would keep each other, and all the solve holds, alive
            control.tried += 1
            at = self._cut(t, min(self._h, control.limits.max_step))
            step, size = self._try(at, y)
            accepted = size <= 1.0
            self._h = abs(float(at.h)) * control.factor(size, accepted=accepted)
            if accepted and step is not None:
                self._times.append(float(at.t1))
                return at, step
            nan = not math.isfinite(size)
            control.rejected += 1

    def _cut(self, t: float, h: float) -> Interval:
        """The step from t of size h, or less: the last time is hit exactly, and not by a sliver of a step."""
        rest = self._times.t1 - t
        if h >= abs(rest) or 1.01 * h >= abs(rest) <= self._longest:
            t1 = self._times.t1
        elif 2.0 * h > abs(rest):
            t1 = t + 0.5 * rest
        else:
            t1 = t + self._times.direction * h
        return Interval(self.n + 1, t, t1 - t, t1)

    def _try(self, at: Interval, y: Tensor) -> tuple[Step | None, float]:
        """A step, and the size of its error estimate; infinite where a stage was not to be had."""
        control = self._controller
        assert control is not None
        try:
            step = self._take(at, y)
            step = self._complete(at, step, dense=False)
        except ConvergenceError:
            return None, math.inf
        size = control.norm(self._scheme.error(at, step), y, step.y)
        return step, size if not math.isnan(size) else math.inf

    def _first_size(self, y: Tensor) -> float:
        control, times = self._controller, self._times
        assert control is not None
        span = abs(times.t1 - times.t0)
        if control.limits.first_step is not None:
            return min(control.limits.first_step, span)
        t = times.t0
        f0 = self._slopes(1, t, y)
        if self._reuse and not self._scheme.implicit:
            self._slope = f0
        h = control.first(f0, y, span)
        f1 = self._slopes(1, t + times.direction * h, y + (times.direction * h) * f0)
        return control.second(h, f0, f1, y, span)

    def _slopes(self, n: int, t: float, y: Tensor) -> Tensor:
        first, *others = self._system.parts
        total = first.evaluate(n, t, y)
        for other in others:
            total = total + other.evaluate(n, t, y)
        return total

    def _accept(self, at: Interval, y: Tensor, step: Step) -> None:
        outputs, terminal = self._outputs, self._terminal
        ends = terminal is not None and terminal.crossed(at, y, step.y)
        dense = ends or outputs.within(at)
        if dense:
            step = self._complete(at, step, dense=True)
        self.trajectory.record(at.n, step, dense=dense)
        self._slope = self._scheme.reusable_slope(step) if self._reuse else None
        self.n, self.y, self._carry = at.n, step.y, step.carry
        if self._replay is not None:
            self._replay.keep(at.n, [self._scheme.marked(step)])
        if terminal is not None and ends:
            outputs.place(terminal.locate(at, lambda theta, k: self._dense(at, y, step, theta, k)))
            self._times.end(at.n)
        outputs.collect(self._scheme, at, y, step)
        if self.n == self.steps:
            self._terminal = None  # what is computed again has been seen
        if self._replay is not None:
            self._replay.see(at.n, step.y)

    def _complete(self, at: Interval, step: Step, *, dense: bool) -> Step:
        keep = self._system if self._graph else None
        return self._scheme.complete(self._system, at, step, dense=dense, keep=keep)

    def _dense(self, at: Interval, y: Tensor, step: Step, theta: float, derivative: int) -> Tensor:
        start = torch.zeros_like(y) if derivative else y
        return combine(start, at.h, self._scheme.dense_weights(theta, derivative), step.slopes)

    def close(self) -> None:
        """No more steps are taken."""
        self._slope = None

    def snapshot_bytes(self) -> tuple[int, int, int]:
        """Bytes of a snapshot, at every step the same."""
        return (1 + (self._carry is not None)) * self.y.numel() * self.y.element_size(), 1, 0

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the state."""
        return 0 if self._slope is None else self.y.numel() * self.y.element_size()

    def snapshot(self) -> dict[str, Tensor]:
        """What `restore` needs: a view, valid until the next step."""
        return {"y": self.y} if self._carry is None else {"y": self.y, "carry": self._carry}

    def restore(self, n: int, state: dict[str, Tensor]) -> None:
        """Go on behind step n, whose snapshot this was."""
        self.n, self.y, self._slope = n, state["y"].clone(), None
        if self._carry is not None:
            self._carry = state["carry"].clone()

    def anew(self) -> ForwardSweep:
        """A new sweep over the same steps, with a new trajectory."""
        spent = self.trajectory
        fresh = Trajectory(spent.scheme, spent.times, spent.y0, spent.keep)
        return ForwardSweep(fresh, self._system, self._replay, None, self._outputs, reuse=self._reuse)
