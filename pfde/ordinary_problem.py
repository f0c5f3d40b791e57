"""One validated ordinary initial value problem: its forward pass in a TS, its backward pass, and what they cost.

The counterpart of `problem` for one-step methods: what the door `ordinary` hands to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .driver import SweepTS, bare_system, drive
from .errors import PfdeError
from .gradients import Backprop, Continuous, Discrete, Symplectic
from .initial_value import InitialValueProblem
from .problem import random_error
from .schedules import Online, Revolve, Schedule, StoreAll
from .schemes.one_step import OneStep
from .sweeps.checkpoints import CheckpointedSweep, Fingerprints
from .sweeps.control import Controller, Limits, Tolerance
from .sweeps.outputs import Outputs
from .sweeps.record import Keep, StepRecord
from .sweeps.steps import StepSweep, Watch
from .sweeps.steps_adjoint import StepAdjointSweep
from .sweeps.steps_backprop import backprop_steps
from .sweeps.times import StepTimes
from .system.base import System
from .system.mass import Mass
from .system.parameter_bar import ParameterBar
from .system.random import Draws, generator_states, has_drawn, set_generator_states
from .system.torch_function import TorchFunction
from .system.torch_system import GraphSystem, TorchSystem


class Split(torch.nn.Module):
    """A right-hand side in two parts, f = stiff + nonstiff, for the implicit-explicit methods ark2, ark3, ark4.

    Parameters
    ----------
    stiff, nonstiff : nn.Module or callable, (t, y) -> dy, each with its own parameters

    Called, it is their sum, so that any method takes it.
    """

    def __init__(self, stiff: Callable[[Tensor, Any], Any], nonstiff: Callable[[Tensor, Any], Any]) -> None:
        super().__init__()
        for name, part in (("stiff", stiff), ("nonstiff", nonstiff)):
            if not callable(part):
                raise TypeError(f"{name} must be callable as {name}(t, y): got {type(part).__name__}")
        self.stiff, self.nonstiff = stiff, nonstiff

    def forward(self, t: Tensor, y: Any) -> Any:
        """stiff(t, y) + nonstiff(t, y)."""
        first, second = self.stiff(t, y), self.nonstiff(t, y)
        if isinstance(first, tuple | list):
            return tuple(a + b for a, b in zip(first, second, strict=True))
        return first + second


@dataclass(frozen=True)
class Accuracy:
    """What adaptive steps aim at: rtol and atol, numbers or (d,) tensors, and the limits of the steps."""

    rtol: Tolerance
    atol: Tolerance
    limits: Limits


class Run(NamedTuple):
    """What a forward pass leaves for the backward pass."""

    sweep: CheckpointedSweep
    record: StepRecord
    system: TorchSystem
    outputs: Outputs


@dataclass(frozen=True, eq=False, kw_only=True)
class OrdinaryProblem(InitialValueProblem):
    """A validated solve of M y' = f(t, y), but for the values of y0, t and the parameters, which autograd owns.

    scheme : the method
    times : of the outputs
    pieces : the steps between two of them; None for adaptive steps
    gradient : how it is differentiated
    accuracy : of adaptive steps
    mass : M, None for the identity
    stop_at_limit : whether too many or too small steps end the solve, instead of being an error
    watch, open_end : see `StepSweep.watch`, `StepTimes`; for events
    found : what the forward pass tells beside y: "limit", the StepLimitError that ended it early, or None
    """

    scheme: OneStep
    times: tuple[float, ...]
    pieces: tuple[int, ...] | None
    gradient: Discrete | Symplectic | Continuous | Backprop
    accuracy: Accuracy
    mass: Mass | None = None
    stop_at_limit: bool = False
    watch: Watch | None = None
    open_end: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def schedule(self) -> Schedule:
        """The checkpoint schedule; one that has to know the number of steps becomes `Online` for adaptive ones."""
        if not isinstance(self.gradient, Discrete):
            return StoreAll()
        plan = self.gradient.plan
        if self._output_steps() is None and isinstance(plan, Revolve) and plan.snapshots is not None:
            return Online(plan.snapshots, on_disk=plan.on_disk, directory=plan.directory, leaf=plan.leaf)
        return plan

    def functions(self, y0: Tensor) -> list[TorchFunction]:
        """f; for a split method its stiff and its nonstiff part."""
        draws = Draws(y0.device) if self.draws else None
        parts = [self.func]
        if self.scheme.split:
            assert isinstance(self.func, Split)
            parts = [self.func.stiff, self.func.nonstiff]
        return [self.make_function(f, y0, None, draws) for f in parts]

    # -- the forward pass ----------------------------------------------------------------------------------------

    def forward(self, y0: Tensor, t: Tensor | None) -> tuple[Tensor, Run]:
        """The forward pass for autograd: the outputs, (T, d), and what the backward pass needs. Collective."""
        keep: Keep | None = None
        if isinstance(self.gradient, Discrete):
            keep = self.gradient.store
        elif isinstance(self.gradient, Symplectic):
            keep = "symplectic"
        return self.integrate(y0, keep, times=t is not None)

    def integrate(self, y0: Tensor, keep: Keep | None, *, times: bool = False) -> tuple[Tensor, Run]:
        """The forward pass in a TS. Collective.

        keep : for the backward pass; None keeps nothing
        times : whether the cotangents of the times will be wanted
        """
        y0 = y0.detach()
        functions, adaptive = self.functions(y0), self.pieces is None
        for f in functions:
            f.differentiates_time = times
            # NaN in a step that is tried rejects it; an explicit step is looked at as a whole
            f.trusted = adaptive or not self.scheme.implicit
        generators = generator_states(y0.device)
        step_times = StepTimes(self.times, self.pieces, open_end=self.open_end)
        outputs = Outputs(self.times, y0, self._output_steps(), open_end=self.open_end)
        controller = self._controller() if adaptive else None
        record = StepRecord(self.scheme, step_times, y0, keep)
        plan = self.schedule if keep is not None else None
        sweeps: list[StepSweep] = []

        def start(snes: Any, vec: Any) -> tuple[SweepTS, TorchSystem]:
            system = self._system(functions, snes, vec)
            sweep = StepSweep(record, cast(System, system), controller, outputs, reuse=not self.draws)
            sweep.watch, sweep.stop_at_limit = self.watch, self.stop_at_limit
            sweeps.append(sweep)
            run = CheckpointedSweep(sweep, record, cast(System, system), plan, self.peers)
            return SweepTS(run, step_times.time, self._title()), system

        h = step_times.interval(1).h if step_times.ended else (self.times[-1] - self.times[0]) / 100
        run, system = drive(
            start, functions[0], y0, self.times[0], float(h), options_prefix=self.prefix, adaptive=adaptive
        )
        drew = has_drawn(generators, y0.device)
        if keep is not None:
            how = self.gradient if isinstance(self.gradient, Discrete) else Discrete()
            self.peers.agree(random_error(how) if drew and not self.draws else None)
            self.stats.schedule = repr(plan)
        for f in functions:
            f.trusted = True
            if f.draws is not None:
                f.draws.keep_apart()
        stats = self.stats
        stats.steps = run.n
        stats.rejected = 0 if controller is None else controller.rejected
        stats.nfe_forward += system.evaluations
        self.count_snapshots(run.snapshots)
        self.count_iterations(system)
        self.found["limit"] = sweeps[0].limit
        y = outputs.y if outputs.reached == len(outputs.y) else outputs.y[: outputs.reached].clone()
        outputs.y = y0.new_empty(0)  # given away: it is to carry the graph, which holds this run
        return y, Run(run, record, system, outputs)

    def _output_steps(self) -> list[int] | None:
        """The step numbers of the outputs; None where they are found on the way."""
        if self.pieces is None or self.open_end:
            return None
        return list(accumulate(self.pieces, initial=0))

    def _controller(self) -> Controller:
        accuracy = self.accuracy
        return Controller(self.scheme, accuracy.rtol, accuracy.atol, accuracy.limits, self.peers)

    def _system(self, functions: Sequence[TorchFunction], snes: Any, vec: Any) -> TorchSystem:
        """The system of f's parts, with a SNES, None or not to be used, and a Vec of the state."""
        nonstiff = functions[1] if len(functions) > 1 else None
        return TorchSystem(functions[0], snes if self.scheme.implicit else None, vec, self.mass, nonstiff)

    def bare_system(self, y0: Tensor) -> TorchSystem:
        """f's parts with a solver of their own, outside any TS. Collective."""
        functions = self.functions(y0)
        make, implicit = partial(self._system, functions), self.scheme.implicit
        return bare_system(functions[0], make, implicit=implicit, options_prefix=self.prefix)

    def _title(self) -> str:
        scheme = self.scheme
        return f"ordinary equation, method {scheme.name} (order {scheme.order}; {scheme.stability})"

    def backprop(self, y0: Tensor, t: Tensor | None) -> Tensor:
        """The same steps on autograd's graph; the outputs, (T, d). Collective.

        Adaptive steps are found first, without a graph, and frozen; f draws the same random numbers again.
        """
        if self._output_steps() is None:
            begin = generator_states(y0.device)
            with torch.no_grad():
                _, run = self.integrate(y0.detach(), None)
            if self.draws:
                set_generator_states(y0.device, begin)
            times, outputs = run.record.times, run.outputs
        else:
            times = StepTimes(self.times, self.pieces, open_end=self.open_end)
            outputs = Outputs(self.times, y0.detach(), self._output_steps())
            outputs.reached = len(self.times)
            self.stats.steps = times.steps
        system = self.bare_system(y0)
        graph = cast(System, GraphSystem(system))
        anchors = None if t is None else t.double().cpu()
        y = backprop_steps(self.scheme, times, outputs, graph, y0, anchors)
        self.stats.nfe_forward += system.evaluations
        self.count_iterations(system)
        if (limit := self.found.get("limit")) is not None and y.requires_grad:
            why = str(limit)
            y.register_hook(lambda _: _refuse_early_end(why))  # not knowing this problem: a hook outlives its graph
        return y

    # -- the backward pass ---------------------------------------------------------------------------------------

    def backward(
        self, run: Run, y_bar: Tensor, needed: Sequence[bool]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The cotangents of (y0, t), as far as `needed`, and of the parameters. Collective."""
        self.refuse_early_end()
        run.system.silence()  # the TS is gone, and with it the callbacks of the SNES, which may solve stages again
        system, stats = run.system, self.stats
        before = system.evaluations
        sweep, record = run.sweep, run.record
        if sweep.trajectory.spent:
            sweep, record = self._again(run)
            stats.nfe_recompute += system.evaluations - before
            before = system.evaluations
        theta_bar: ParameterBar = system.parameter_cotangent()
        adjoint = StepAdjointSweep(record, cast(System, system), run.outputs, y_bar, theta_bar, times=bool(needed[1]))
        y0_bar = sweep.reverse(adjoint)
        stats.nfe_recompute += sweep.recomputed
        stats.nfe_backward += system.evaluations - before - sweep.recomputed
        self.count_snapshots(sweep.snapshots)
        self.count_iterations(system)
        t_bar = torch.tensor(adjoint.t_bar, dtype=torch.float64) if needed[1] else None
        return [y0_bar, t_bar], self.peers.call(theta_bar.finish, self.parameters)

    def refuse_early_end(self) -> None:
        """Raise PfdeError where the forward pass did not come to its end."""
        if (limit := self.found.get("limit")) is not None:
            _refuse_early_end(str(limit))

    def _again(self, run: Run) -> tuple[CheckpointedSweep, StepRecord]:
        """Do a spent run anew: the same steps without a TS, so without monitors and hooks."""
        system = cast(System, run.system)
        system.restore_generators(0, run.sweep.generators)
        spent = run.record
        record = StepRecord(self.scheme, spent.times, spent.y0, spent.keep)
        sweep = StepSweep(record, system, None, run.outputs, reuse=not self.draws)
        fingerprints: Fingerprints = run.sweep.fingerprints
        new = CheckpointedSweep(
            sweep,
            record,
            system,
            self.schedule,
            self.peers,
            fingerprints,
            marks=run.sweep.marks,
            directory=run.sweep.directory,
        )
        new.advance(new.steps)
        return new, record


def _refuse_early_end(why: str) -> None:
    raise PfdeError(f"the forward pass ended early, so it has no gradient: {why}; detach what it returned")
