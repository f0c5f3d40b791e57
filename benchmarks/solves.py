"""A case as a function of the number of steps: a forward and a backward pass, each timed."""

from __future__ import annotations

import time
from typing import Any

import torch
from cases import Case, Problem, solver

WARM_STEPS = (8, 72)  # the second is long enough for the blocked history


class Run:
    """One forward and backward pass of a case, with its CPU seconds."""

    def __init__(self, case: Case, problem: Problem) -> None:
        self._solve, self._problem, self._all = solver(case, problem), problem, case.outputs == "all"
        self._y_bar: torch.Tensor | None = None
        self.forward = self.backward = 0.0
        self.stats: Any = None

    def prepare(self, steps: int) -> None:
        """Make the cotangent of all outputs, which is the caller's and not the solver's."""
        self._y_bar = torch.ones(steps + 1, *self._problem.y0.shape) if self._all else None

    def __call__(self, steps: int) -> float:
        self._problem.clear()
        start = time.process_time()
        y, self.stats = self._solve(steps)
        middle = time.process_time()
        if self._y_bar is None:
            y.square().sum().backward()
        else:
            y.backward(self._y_bar)
        end = time.process_time()
        self.forward, self.backward = middle - start, end - middle
        return end - start


def warm(run: Run) -> None:
    """Short solves."""
    for steps in WARM_STEPS:
        run.prepare(steps)
        run(steps)
