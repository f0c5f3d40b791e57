"""Where a case's time goes: exclusive CPU time of the pieces of pfde, from timers put around its functions.

A piece's time excludes the pieces it calls, so the lines add up to the whole. The timers cost about
a microsecond a call; `timers` estimates them, and they are taken off the lines.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from cases import Case, Problem
from solves import Run, warm

# (line of the table, function); the first name of the path that is a module is imported, the others are attributes
PIECES: list[tuple[str, str]] = [
    ("autograd.grad", "torch.autograd.grad"),
    ("f: check, count", "pfde.system.torch_function.TorchFunction._checked"),
    ("f: evaluate/linearise", "pfde.system.torch_function.TorchFunction.evaluate"),
    ("f: evaluate/linearise", "pfde.system.torch_function.TorchFunction.linearise"),
    ("vjp: accumulate", "pfde.system.torch_function.TorchLinearisation._vjp"),
    ("weights", "pfde.caputo.schemes.product_integration.Euler.weights"),
    ("weights", "pfde.caputo.schemes.product_integration.PredictorCorrector.weights"),
    ("weights", "pfde.caputo.schemes.product_integration.Trapezoid.weights"),
    ("weights", "pfde.caputo.discretisation.StepWeights.__init__"),
    ("history: set up", "pfde.caputo.history.exact.Exact.convolution"),
    ("history: set up", "pfde.caputo.problem.CaputoProblem.prepare"),
    ("fingerprints", "pfde.solving.replay.Fingerprints._see"),
    ("snapshots", "pfde.solving.checkpoints.CheckpointedSweep._put"),
    ("snapshots", "pfde.solving.checkpoints.CheckpointedSweep._restore"),
    ("predictors rebuilt", "pfde.caputo.adjoint._Predictors.get"),
    ("step, forward", "pfde.caputo.schemes.base.ExplicitScheme.step"),
    ("step, forward", "pfde.caputo.schemes.product_integration.PredictorCorrector.step"),
    ("step, adjoint", "pfde.caputo.schemes.base.ExplicitScheme.step_adjoint"),
    ("step, adjoint", "pfde.caputo.schemes.product_integration.PredictorCorrector.step_adjoint"),
    ("sweep, forward", "pfde.caputo.forward.ForwardSweep._step"),
    ("record", "pfde.caputo.trajectory.Trajectory.record"),
    ("sweep, adjoint", "pfde.caputo.adjoint.AdjointSweep._step"),
    ("sweep, adjoint: ends", "pfde.caputo.adjoint.AdjointSweep.finish"),
    ("sweep, forward", "pfde.caputo.forward.ForwardSweep.advance"),
    ("sweep, adjoint", "pfde.caputo.adjoint.AdjointSweep.reverse"),
    ("TS context", "pfde.solving.driver.SweepTS.step"),
    ("TS (PETSc)", "pfde.solving.driver.Driver.run"),
    ("first look at f", "pfde.solving.initial_value.draws_numbers"),
]


class Clock:
    """Exclusive times by name."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self._stack: list[float] = []

    def wrap(self, function: Callable[..., Any], name: str | Callable[..., str]) -> Callable[..., Any]:
        """`function`, timed; `name` may depend on its arguments."""
        stack, times, calls, now = self._stack, self.times, self.calls, time.thread_time

        def timed(*args: Any, **kwargs: Any) -> Any:
            label = name if isinstance(name, str) else name(*args)
            stack.append(0.0)
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                spent = now() - start
                inner = stack.pop()
                if stack:
                    stack[-1] += spent
                times[label] = times.get(label, 0.0) + spent - inner
                calls[label] = calls.get(label, 0) + 1

        return timed


def patch(clock: Clock, path: str, name: str | Callable[..., str]) -> bool:
    """Put a timer around the function at `path`; whether there is one."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:-1]:
            owner = getattr(owner, part, None)
        if owner is None or parts[-1] not in vars(owner):
            return False
        setattr(owner, parts[-1], clock.wrap(getattr(owner, parts[-1]), name))
        return True
    return False


def profile(case: Case, repeats: int) -> dict[str, Any]:
    """Microseconds and calls per step of each piece, medians over the repeats."""
    clock = Clock()
    problem = Problem()

    def of_f(*_args: Any) -> str:
        return "f with graph" if torch.is_grad_enabled() else "f without graph"

    def of_read(history: Any, *_args: Any) -> str:
        return "history, adjoint" if getattr(history, "_reverse", False) else "history, forward"

    problem.f.forward = clock.wrap(problem.f.forward, of_f)  # type: ignore[method-assign]
    missing = [path for name, path in PIECES if not patch(clock, path, name)]
    for path in (
        "online_product.ExactConvolution.read",
        "bounded.BoundedConvolution.read",
        "bounded.BoundedConvolution.push",
    ):
        if not patch(clock, f"pfde.caputo.history.{path}", of_read):
            missing.append(path)

    run = Run(case, problem)
    warm(run)
    run.prepare(case.steps)
    run(case.steps)
    count = repeats or max(3, min(40, 4000 // case.steps))
    tables, totals, calls = [], [], {}
    for _ in range(count):
        clock.times.clear()
        clock.calls.clear()
        totals.append(clock.wrap(lambda: run(case.steps), "rest")())
        tables.append(dict(clock.times))
        calls = dict(clock.calls)

    empty = Clock()
    probe, plain = empty.wrap(lambda: None, "x"), lambda: None
    cost = (_time(probe) - _time(plain)) / 10_000
    pieces = {
        name: {
            "us": 1e6 * (statistics.median(t.get(name, 0.0) for t in tables) - cost * calls[name]) / case.steps,
            "calls": calls[name] / case.steps,
        }
        for name in calls
    }
    floors = []
    for _ in range(count):
        start = time.process_time()
        Problem.floor(_bare(problem), case.evaluations * case.steps)
        floors.append(time.process_time() - start)
    return {
        "pieces": pieces,
        "total_us": 1e6 * statistics.median(totals) / case.steps,
        "floor_us": 1e6 * statistics.median(floors) / case.steps,
        "timers_us": 1e6 * cost * sum(calls.values()) / case.steps,
        "missing": missing,
    }


def _bare(problem: Problem) -> Problem:
    """A problem whose f is not timed."""
    bare = Problem()
    bare.f.load_state_dict(problem.f.state_dict())
    return bare


def _time(function: Callable[[], Any]) -> float:
    start = time.thread_time()
    for _ in range(10_000):
        function()
    return time.thread_time() - start
